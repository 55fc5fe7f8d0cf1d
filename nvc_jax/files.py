"""Files that appear under their name only when they are complete, and what a folder holds."""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nvc_jax.errors import NvcError


@contextmanager
def writing(path: str | os.PathLike) -> Iterator[None]:
    """Turns the operating system's errors into ours, naming `path`."""
    try:
        yield
    except OSError as error:
        raise NvcError(f"{path}: cannot be written: {error.strerror or error}") from error


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """Yields a hidden name beside `path`, of the same extension, to write to.

    The finished file takes the place of `path` when the block ends. Any exception, even
    KeyboardInterrupt, removes it instead and leaves `path` as it was.

    Raises:
      NvcError: `path` cannot be a file, or its directory does not exist.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        raise NvcError(f"{path}: is not a file and cannot be replaced by one; give a file name")
    if not path.parent.is_dir():
        raise NvcError(f"{path}: the directory {path.parent} does not exist; create it first")
    hidden = path.parent / f".nvc-{secrets.token_hex(6)}{path.suffix}"
    try:
        yield hidden
        with writing(path):
            hidden.replace(path)
    finally:
        hidden.unlink(missing_ok=True)


def visible_files(folder: Path) -> Iterator[Path]:
    """Files below a folder, in no order, without hidden ones and those in hidden folders."""
    for path in folder.rglob("*"):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if path.is_file() and not hidden:
            yield path
