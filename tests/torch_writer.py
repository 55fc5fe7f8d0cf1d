"""Writes checkpoints as PyTorch does, without PyTorch."""

import io
import pickle
import sys
import types
import zipfile
from collections import OrderedDict
from pathlib import Path
from unittest import mock

import numpy as np

STORAGES = {
    np.dtype("f4"): "FloatStorage", np.dtype("f8"): "DoubleStorage", np.dtype("f2"): "HalfStorage",
    np.dtype("i8"): "LongStorage", np.dtype("V2"): "BFloat16Storage",
}  # fmt: skip


def _torch() -> dict[str, types.ModuleType]:
    """Modules that a pickle can name as if they were PyTorch's."""
    torch, utils = types.ModuleType("torch"), types.ModuleType("torch._utils")
    for name in STORAGES.values():
        setattr(torch, name, type(name, (), {"__module__": "torch"}))

    def _rebuild_tensor_v2():
        pass

    _rebuild_tensor_v2.__module__, _rebuild_tensor_v2.__qualname__ = (
        "torch._utils",
        "_rebuild_tensor_v2",
    )
    utils._rebuild_tensor_v2 = _rebuild_tensor_v2
    return {"torch": torch, "torch._utils": utils}


class _Storage:
    def __init__(self, key, dtype, count):
        self.key, self.dtype, self.count = key, dtype, count


class _Pickler(pickle.Pickler):
    def persistent_id(self, obj):
        if not isinstance(obj, _Storage):
            return None
        kind = getattr(sys.modules["torch"], STORAGES[obj.dtype])
        return "storage", kind, obj.key, "cpu", obj.count


class _Tensor:
    def __init__(self, storage, shape, strides, offset=0):
        self.arguments = (storage, offset, shape, strides, False, OrderedDict())

    def __reduce__(self):
        return sys.modules["torch._utils"]._rebuild_tensor_v2, self.arguments


def write(path: Path, tensors: dict[str, np.ndarray], wrap=lambda state: state) -> Path:
    """Writes C-contiguous arrays by name. `wrap`: what the state dictionary is saved inside of."""
    state, data = OrderedDict(), {}
    for number, (name, array) in enumerate(tensors.items()):
        storage = _Storage(str(number), array.dtype, array.size)
        strides = tuple(s // array.itemsize for s in array.strides)
        state[name] = _Tensor(storage, array.shape, strides)
        data[str(number)] = array.tobytes()
    return write_pickle(path, wrap(state), data)


def write_pickle(path: Path, content, data: dict[str, bytes]) -> Path:
    pickled = io.BytesIO()
    with mock.patch.dict(sys.modules, _torch()):
        _Pickler(pickled, protocol=2).dump(content)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", pickled.getvalue())
        archive.writestr("archive/byteorder", "little")
        for key, values in data.items():
            archive.writestr(f"archive/data/{key}", values)
    return path
