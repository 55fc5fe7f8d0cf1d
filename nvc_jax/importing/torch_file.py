"""Reads the tensors of a PyTorch checkpoint, without PyTorch and without running what it contains.

A checkpoint is a pickle, and a pickle is a program: loading one from a stranger can do anything.
Here its instructions are interpreted by a machine that knows only those that dictionaries of
tensors, numbers and text are made of, and only the handful of names that tensors need. No
instruction takes more memory or time than the file has bytes. Both layouts are read: the ZIP
archive of PyTorch 1.6 and later, and the plain sequence of pickles before.
"""

import io
import math
import pickletools
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from nvc_jax.errors import NvcError

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
MAX_DIMENSIONS = 8
BFLOAT16 = np.dtype("V2")  # NumPy has no such type; widened to float32
DTYPES = {
    "DoubleStorage": np.dtype("<f8"), "FloatStorage": np.dtype("<f4"),
    "HalfStorage": np.dtype("<f2"), "BFloat16Storage": BFLOAT16, "LongStorage": np.dtype("<i8"),
    "IntStorage": np.dtype("<i4"), "ShortStorage": np.dtype("<i2"), "CharStorage": np.dtype("i1"),
    "ByteStorage": np.dtype("u1"), "BoolStorage": np.dtype("?"),
}  # fmt: skip


class _Refused(Exception):
    """The pickle asks for something that no tensor needs."""


class _Storage:
    """Numbers that tensors are views of. `values` may come later than the tensors."""

    def __init__(self, dtype: np.dtype, count: int):
        self.dtype, self.count, self.values = dtype, count, None

    def fill(self, data: bytes) -> None:
        if len(data) != self.count * self.dtype.itemsize:
            raise ValueError(f"a storage has {len(data)} bytes instead of {self.count} numbers")
        values = np.frombuffer(data, self.dtype)
        if self.dtype == BFLOAT16:
            values = (values.view("<u2").astype(np.uint32) << 16).view(np.float32)
        self.values = values


class _Tensor:
    def __init__(self, storage: _Storage, offset: int, shape: tuple, strides: tuple, *_):
        if not isinstance(storage, _Storage) or max(len(shape), len(strides)) > MAX_DIMENSIONS:
            raise ValueError("a tensor has no storage, or too many dimensions")
        self.storage, self.offset = storage, int(offset)
        self.shape, self.strides = tuple(map(int, shape)), tuple(map(int, strides))

    def array(self) -> np.ndarray:
        values, shape, strides = self.storage.values, self.shape, self.strides
        count = math.prod(shape)
        last = self.offset + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
        if min((self.offset, *shape, *strides)) < 0 or count > len(values) or (
            count and last >= len(values)
        ):  # fmt: skip
            raise ValueError("a tensor lies outside of its storage")
        size = values.itemsize
        return np.lib.stride_tricks.as_strided(
            values[self.offset :], shape, [s * size for s in strides], writeable=False
        )


FUNCTIONS: dict[tuple[str, str], Callable] = {
    ("collections", "OrderedDict"): lambda: {},
    ("torch._utils", "_rebuild_tensor"): _Tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _Tensor,
    ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
    ("torch", "Size"): lambda items: items,
}
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
# Instructions that push what stands in them.
LITERALS = {
    "INT", "LONG", "LONG1", "BININT", "BININT1", "BININT2", "FLOAT", "BINFLOAT", "UNICODE",
    "BINUNICODE", "SHORT_BINUNICODE", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES",
}  # fmt: skip


class _Machine:
    """Interprets the pickle at a stream's position; leaves the stream behind it.

    Attributes:
      result: what the pickle holds.
      storages: by key, those that its tensors are views of, still empty.
    """

    def __init__(self, stream: io.BytesIO):
        self.storages: dict[str, _Storage] = {}
        self._stack: list = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}
        for opcode, argument, _ in pickletools.genops(stream):
            self._run(opcode.name, argument)
        self.result = self._stack.pop()

    def _run(self, name: str, argument: Any) -> None:
        stack, memo = self._stack, self._memo
        if name in ("PROTO", "FRAME", "STOP"):
            pass
        elif name in CONSTANTS:
            stack.append(CONSTANTS[name])
        elif name in LITERALS:
            stack.append(argument)
        elif name in ("EMPTY_LIST", "EMPTY_DICT"):
            stack.append([] if name == "EMPTY_LIST" else {})
        elif name == "MARK":
            self._marks.append(len(stack))
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            stack.append(tuple(self._popped(len(stack) - int(name[-1]))))
        elif name in ("TUPLE", "LIST"):
            items = self._popped(self._marks.pop())
            stack.append(tuple(items) if name == "TUPLE" else items)
        elif name == "DICT":
            items = self._popped(self._marks.pop())
            stack.append({})
            self._set(items)
        elif name in ("APPEND", "APPENDS"):
            items = self._popped(len(stack) - 1 if name == "APPEND" else self._marks.pop())
            if not isinstance(stack[-1], list):
                raise ValueError("it appends to what is no list")
            stack[-1].extend(items)
        elif name in ("SETITEM", "SETITEMS"):
            self._set(self._popped(len(stack) - 2 if name == "SETITEM" else self._marks.pop()))
        elif name in ("POP", "POP_MARK"):
            self._popped(len(stack) - 1 if name == "POP" else self._marks.pop())
        elif name == "GLOBAL":
            stack.append(_known(*argument.split(" ", 1)))
        elif name == "STACK_GLOBAL":
            stack.append(_known(*self._popped(len(stack) - 2)))
        elif name == "REDUCE":
            function, arguments = self._popped(len(stack) - 2)
            if not callable(function):
                raise _Refused("what is no function")
            stack.append(function(*arguments))
        elif name == "BUILD":  # attributes of an object, which we have no use for
            stack.pop()
        elif name == "BINPERSID":
            stack.append(self._storage(*stack.pop()))
        elif name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            memo[len(memo) if name == "MEMOIZE" else int(argument)] = stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(memo[int(argument)])
        else:
            raise _Refused(f"the instruction {name}")

    def _popped(self, start: int) -> list:
        items = self._stack[start:]
        del self._stack[start:]
        return items

    def _set(self, items: list) -> None:
        target = self._stack[-1]
        # Hashing any other key could take for ever.
        if not isinstance(target, dict) or not all(isinstance(k, str | int) for k in items[::2]):
            raise ValueError("it has keys that are neither text nor numbers")
        target.update(zip(items[::2], items[1::2], strict=True))

    def _storage(self, kind: str, dtype: np.dtype, key: str, _: str, count: int, *view) -> _Storage:
        if kind != "storage" or not isinstance(key, str) or any(view):
            raise ValueError("a reference to what is no plain storage")
        if key not in self.storages:
            self.storages[key] = _Storage(dtype, int(count))
        return self.storages[key]


def _known(module: str, name: str) -> Any:
    if module == "torch" and name in DTYPES:
        return DTYPES[name]
    if (module, name) not in FUNCTIONS:
        raise _Refused(f"{module}.{name}")
    return FUNCTIONS[module, name]


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
        # Whatever a damaged pickle makes of the machine.
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
        machine = _Machine(io.BytesIO(member("data.pkl")))
        for key, storage in machine.storages.items():
            storage.fill(member(f"data/{key}"))
    return machine.result


def _read_legacy(data: io.BytesIO) -> Any:
    data.seek(0)
    if _Machine(data).result != LEGACY_MAGIC:
        raise ValueError("it does not begin like one")
    for _ in range(2):  # protocol, system
        _Machine(data)
    machine = _Machine(data)
    for key in _Machine(data).result:
        storage = machine.storages[key]
        count = int.from_bytes(data.read(8), "little")
        if count != storage.count:
            raise ValueError(f"a storage has {count} numbers instead of {storage.count}")
        storage.fill(data.read(count * storage.dtype.itemsize))
    return machine.result


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
