"""Reads the tensors of a PyTorch checkpoint, without PyTorch and without running what it contains.

A checkpoint is a pickle, and a pickle is a program: loading one from a stranger can do anything.
Here its instructions are looked through before any of them runs, and the unpickler knows the names
that tensors are made of and refuses all others. Both layouts are read: the ZIP archive of PyTorch
1.6 and later, and the plain sequence of pickles before.
"""

import io
import pickle
import pickletools
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np

from nvc_jax.errors import NvcError

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
# What dictionaries of tensors, numbers and text are made of. None of these allocates more memory
# than the pickle itself has.
OPCODES = {
    "PROTO", "FRAME", "MARK", "STOP", "POP", "POP_MARK", "NONE", "NEWTRUE", "NEWFALSE", "INT",
    "LONG", "LONG1", "BININT", "BININT1", "BININT2", "FLOAT", "BINFLOAT", "UNICODE", "BINUNICODE",
    "SHORT_BINUNICODE", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "EMPTY_TUPLE",
    "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "EMPTY_LIST", "LIST", "APPEND", "APPENDS", "EMPTY_DICT",
    "DICT", "SETITEM", "SETITEMS", "GLOBAL", "STACK_GLOBAL", "REDUCE", "BUILD", "BINPERSID", "PUT",
    "BINPUT", "LONG_BINPUT", "MEMOIZE", "GET", "BINGET", "LONG_BINGET",
}  # fmt: skip
BFLOAT16 = np.dtype("V2")  # NumPy has no such type; widened to float32
DTYPES = {
    "DoubleStorage": np.float64, "FloatStorage": np.float32, "HalfStorage": np.float16,
    "BFloat16Storage": BFLOAT16, "LongStorage": np.int64, "IntStorage": np.int32,
    "ShortStorage": np.int16, "CharStorage": np.int8, "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}  # fmt: skip


class _Refused(Exception):
    """The pickle asks for something that no tensor needs."""


class _Storage:
    """Numbers that tensors are views of. `values` may come later than the tensors."""

    def __init__(self, dtype: np.dtype, count: int):
        self.dtype, self.count, self.values = np.dtype(dtype), count, None

    def fill(self, data: bytes) -> None:
        if len(data) != self.count * self.dtype.itemsize:
            raise ValueError(f"a storage has {len(data)} bytes instead of {self.count} numbers")
        values = np.frombuffer(data, self.dtype.newbyteorder("<"))
        if self.dtype == BFLOAT16:
            values = (values.view("<u2").astype(np.uint32) << 16).view(np.float32)
        self.values = values


class _Tensor:
    def __init__(self, storage: _Storage, offset: int, shape: tuple, strides: tuple):
        self.storage, self.offset, self.shape, self.strides = storage, offset, shape, strides

    def array(self) -> np.ndarray:
        values, shape, strides = self.storage.values, self.shape, self.strides
        last = self.offset + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
        empty = 0 in shape
        if min((self.offset, *shape, *strides)) < 0 or (last >= len(values) and not empty):
            raise ValueError("a tensor lies outside of its storage")
        size = values.itemsize
        view = np.lib.stride_tricks.as_strided(
            values[self.offset :], shape, [s * size for s in strides]
        )
        return np.array(view, values.dtype.newbyteorder("="))


def _rebuild_tensor(storage, offset, shape, strides, *_) -> _Tensor:
    if not isinstance(storage, _Storage):
        raise ValueError("a tensor has no storage")
    return _Tensor(storage, int(offset), tuple(map(int, shape)), tuple(map(int, strides)))


ALLOWED = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch._utils", "_rebuild_tensor"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
    ("torch", "Size"): tuple,
} | {("torch", name): dtype for name, dtype in DTYPES.items()}


class _Unpickler(pickle.Unpickler):
    """Of the pickle at a stream's position; leaves the stream behind it."""

    def __init__(self, stream: io.BytesIO):
        start = stream.tell()
        for opcode, argument, _ in pickletools.genops(stream):
            if opcode.name not in OPCODES:
                raise _Refused(f"the instruction {opcode.name}")
            if opcode.name.endswith("PUT") and int(argument) > stream.tell():
                raise ValueError("it numbers its objects too high")
        super().__init__(io.BytesIO(stream.getbuffer()[start : stream.tell()]), encoding="utf-8")
        self.storages: dict[str, _Storage] = {}

    def find_class(self, module: str, name: str) -> Any:
        try:
            return ALLOWED[module, name]
        except KeyError:
            raise _Refused(f"{module}.{name}") from None

    def persistent_load(self, pid: Any) -> _Storage:
        kind, dtype, key, _, count, *view = pid
        if kind != "storage" or any(view):
            raise ValueError(f"a reference to a {kind} that is not a plain storage")
        if key not in self.storages:
            self.storages[key] = _Storage(dtype, int(count))
        return self.storages[key]


def read(path: str | Path) -> dict[str, np.ndarray]:
    """The tensors of a checkpoint by name, in float32 if they were in bfloat16.

    A checkpoint that holds its weights in an entry "state_dict", "net" or "model", or names that
    all begin with "module." (of a model that was trained on several devices), is unwrapped.

    Raises:
      NvcError: the file cannot be read, is no checkpoint, is damaged, or contains anything else
        than tensors, numbers and text.
    """
    path = Path(path)
    try:
        data = io.BytesIO(path.read_bytes())
        found = _read_zip(data) if zipfile.is_zipfile(data) else _read_legacy(data)
        tensors = _tensors(found)
    except _Refused as e:
        raise NvcError(
            f"{path}: refused, because it asks to run {e}. Weights need nothing of the kind; only "
            "use checkpoints from their authors, and save them as a plain `state_dict`"
        ) from None
    except OSError as e:
        raise NvcError(f"{path}: cannot be read ({e.strerror or e})") from None
    except Exception as e:
        # Whatever a damaged pickle makes of the unpickler.
        raise NvcError(f"{path}: not a PyTorch checkpoint, or a damaged one ({e})") from None
    if not tensors:
        raise NvcError(f"{path}: there are no tensors in it")
    return tensors


def _read_zip(data: io.BytesIO) -> Any:
    with zipfile.ZipFile(data) as archive:
        entries = {info.filename: info for info in archive.infolist()}
        pickles = [name for name in entries if name.rpartition("/")[2] == "data.pkl"]
        if len(pickles) != 1:
            raise ValueError("no single data.pkl in the archive")
        folder = pickles[0].removesuffix("data.pkl")

        def member(name: str) -> bytes:
            info = entries[folder + name]
            # Stored as they are, so that a small file cannot unfold to a large one.
            if info.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"{info.filename} is compressed")
            return archive.read(info)

        if folder + "byteorder" in entries and member("byteorder") != b"little":
            raise ValueError("its numbers are stored with the highest byte first")
        unpickler = _Unpickler(io.BytesIO(member("data.pkl")))
        found = unpickler.load()
        for key, storage in unpickler.storages.items():
            storage.fill(member(f"data/{key}"))
    return found


def _read_legacy(data: io.BytesIO) -> Any:
    data.seek(0)
    if _Unpickler(data).load() != LEGACY_MAGIC:
        raise ValueError("it does not begin like one")
    for _ in range(2):  # protocol, system
        _Unpickler(data).load()
    unpickler = _Unpickler(data)
    found = unpickler.load()
    for key in _Unpickler(data).load():
        storage = unpickler.storages[key]
        count = int.from_bytes(data.read(8), "little")
        if count != storage.count:
            raise ValueError(f"a storage has {count} numbers instead of {storage.count}")
        storage.fill(data.read(count * storage.dtype.itemsize))
    return found


def _tensors(found: Any) -> dict[str, np.ndarray]:
    for wrapper in ("state_dict", "net", "model"):
        if isinstance(found, dict) and isinstance(found.get(wrapper), dict):
            found = found[wrapper]
    if not isinstance(found, dict):
        raise ValueError("it holds no dictionary of tensors")
    tensors = {str(k): v.array() for k, v in found.items() if isinstance(v, _Tensor)}
    if tensors and all(k.startswith("module.") for k in tensors):
        tensors = {k.removeprefix("module."): v for k, v in tensors.items()}
    return tensors
