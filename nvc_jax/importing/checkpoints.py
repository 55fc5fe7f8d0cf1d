"""Turns published PyTorch checkpoints into released models of this program.

Every tensor must be there, of the right shape, and none may be left over; the integer tables are
frozen from the imported weights. Nothing is trained or changed: see tests/test_golden.py for the
proof that the networks compute what the published ones do.
"""

import functools
from pathlib import Path
from typing import NamedTuple

import flax.linen as nn
import numpy as np
from flax import traverse_util

from nvc_jax.errors import NvcError
from nvc_jax.importing import names, torch_file
from nvc_jax.models import registry, released


class Published(NamedTuple):
    """A published model.

    Attributes:
      file: the checkpoint's official name.
      intra: kind of the intra codec that it needs; None for an intra codec.
      codec: of ours, in size "full": the codec alone, or with its intra codec.
      levels, scale_range: of its tables.
      skip_scale: symbols of smaller scales are not coded, as its authors do.
    """

    file: str
    intra: str | None
    codec: str
    levels: int
    scale_range: tuple[float, float]
    skip_scale: float


PUBLISHED = {
    "dcvc-rt-intra": Published("cvpr2025_image.pth.tar", None, "intra", 128, (0.11, 16.0), 0.12),
    "dcvc-rt-inter": Published(
        "cvpr2025_video.pth.tar", "dcvc-rt-intra", "dcvc_rt", 128, (0.11, 16.0), 0.12
    ),
    "brhvc-intra": Published(
        "cvpr2023_image_psnr.pth.tar", None, "dcvc_dc", 256, (0.11, 64.0), 0.0
    ),
    # Their Laplace distributions begin at 0.01.
    "brhvc": Published("brhvc_model_weights.pth", "brhvc-intra", "brhvc", 256, (0.01, 64.0), 0.0),
}


@functools.cache
def shapes(kind: str) -> dict:
    """Our parameter tree for a kind of checkpoint; its leaves have a shape."""
    published = PUBLISHED[kind]
    module = registry.build(published.codec, "full")
    tree = registry.param_shapes(module)
    return tree["inter"] if published.intra else tree


def parameters(kind: str, tensors: dict[str, np.ndarray]) -> dict:
    """Our parameter tree from a checkpoint's tensors.

    Args:
      kind: a key of `PUBLISHED`.
      tensors: by published name.

    Raises:
      NvcError: tensors are missing, superfluous, of another shape or not finite; names them.
    """
    sources = {
        path: names.source(kind, path, leaf.shape)
        for path, leaf in traverse_util.flatten_dict(shapes(kind), sep="/").items()
    }
    expected = {k: shape for source in sources.values() for k, shape in source.shapes.items()}
    there = {name: tensors[name] for name in expected if name in tensors}
    wrong = {name: t.shape for name, t in there.items() if t.shape != tuple(expected[name])}
    faults = {
        "are missing": [name for name in expected if name not in there],
        "do not belong to it": [name for name in tensors if name not in expected],
        "have another shape": [
            f"{name} ({_size(shape)}, not {_size(expected[name])})" for name, shape in wrong.items()
        ],
        "have values that are infinite or not numbers": [
            name for name, t in there.items() if not np.isfinite(t).all()
        ],
    }
    found = [f"{len(names)} {what}: {_listed(names)}" for what, names in faults.items() if names]
    if found:
        raise NvcError(
            f"not a checkpoint of {kind} ({PUBLISHED[kind].file}), which has {len(expected)} "
            f"tensors: {'; '.join(found)}"
        )
    flat = {
        path: np.asarray(source.build(*(tensors[name] for name in source.shapes)), np.float32)
        for path, source in sources.items()
    }
    return traverse_util.unflatten_dict(flat, sep="/")


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return ", ".join(names[:8]) + more


def _size(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "a single number"


def load(kind: str, checkpoint: Path, intra: Path | None = None) -> tuple[nn.Module, dict]:
    """A published model: our module and its parameters.

    Args:
      checkpoint: the PyTorch file.
      intra: that of the intra codec, for models that need one; by default the official file in the
        same folder.

    Raises:
      NvcError: a file cannot be read or is something else.
    """
    published = PUBLISHED[kind]
    module = registry.build(published.codec, "full")
    if published.intra is None:
        if intra is not None:
            raise NvcError(f"{kind} is an intra codec and needs no other (--intra {intra})")
        return module, _read(kind, checkpoint)
    tensors = torch_file.read(checkpoint)
    if intra is None:
        intra = checkpoint.parent / PUBLISHED[published.intra].file
        if not intra.is_file():
            raise NvcError(
                f"{kind} predicts frames from others; its first frames come from the intra codec "
                f"{published.intra} ({intra.name}), which is not in {checkpoint.parent}. Say where "
                "it is with --intra"
            )
    found = _read(published.intra, intra)
    return module, {"intra": found, "inter": _parameters(kind, checkpoint, tensors)}


def _read(kind: str, path: Path) -> dict:
    return _parameters(kind, path, torch_file.read(path))


def _parameters(kind: str, path: Path, tensors: dict[str, np.ndarray]) -> dict:
    try:
        return parameters(kind, tensors)
    except NvcError as e:
        raise NvcError(f"{path}: {e}") from None


def to_released(kind: str, checkpoint: Path, output: Path, intra: Path | None = None) -> None:
    """Writes a published model as a released model of ours, under the name of `output`.

    Raises:
      NvcError: as `load`, or the file cannot be written.
    """
    module, params = load(kind, checkpoint, intra)
    published = PUBLISHED[kind]
    tensors, metadata = released.freeze(
        output.stem,
        published.codec,
        module,
        params,
        levels=published.levels,
        scale_range=published.scale_range,
        skip_scale=published.skip_scale,
        weights_dtype=np.float32,
    )
    released.save(output, tensors, metadata)
