"""Checkpoints of PyTorch; the two files in tests/data were written by PyTorch 2.13."""

import io
import os
import pickle
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch_writer
from hypothesis import given
from hypothesis import strategies as st

from nvc_jax.errors import NvcError
from nvc_jax.importing import torch_file

DATA = Path(__file__).parent / "data"


@pytest.mark.parametrize("name", ["torch_zip.pth.tar", "torch_legacy.pth"])
def test_files_of_pytorch(name):
    """Wrapped in "state_dict" or with "module." before every name, views and all types."""
    tensors = torch_file.read(DATA / name)
    expected = dict(
        weight=np.arange(24, dtype=np.float32).reshape(2, 3, 4),
        transposed=np.arange(6, dtype=np.float32).reshape(2, 3).T,
        half=np.array([0.5, -2], np.float16),
        bfloat=np.array([1.5, -3], np.float32),
        count=np.array(7),
        flag=np.array([True, False]),
        slice=np.array([2.0, 5.0, 8.0]),
        parameter=np.ones(3, np.float32),
        empty=np.zeros((0, 4), np.float32),
    )
    assert set(tensors) == set(expected)
    for key, array in expected.items():
        assert tensors[key].dtype == array.dtype, key
        np.testing.assert_array_equal(tensors[key], array, err_msg=key)


class Malicious:
    """What an attacker would put into a checkpoint."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


ATTACKS = {
    "os.system": Malicious(os.system, "touch {}"),
    "eval": Malicious(eval, "open('{}', 'w')"),
    "getattr": Malicious(getattr, "", "join"),
    "builtins.__import__": Malicious(__import__, "os"),
}


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("layout", ["zip", "legacy"])
def test_pickles_that_want_to_run_something_are_refused(attack, layout, tmp_path):
    trace = tmp_path / "trace"
    malicious = ATTACKS[attack]
    function, arguments = malicious.call
    malicious = Malicious(function, *(str(a).format(trace) for a in arguments))
    path = tmp_path / "model.pth"
    if layout == "zip":
        torch_writer.write_pickle(path, {"weight": malicious}, {})
    else:
        path.write_bytes(b"".join(pickle.dumps(x) for x in (malicious, 1001, {}, {}, [])))
    with pytest.raises(NvcError, match="refused, because it asks to run"):
        torch_file.read(path)
    assert not trace.exists()


def zipped(**members) -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        for name, content in members.items():
            archive.writestr(f"archive/{name.replace('_', '.', 1)}", content)
    return data.getvalue()


@pytest.mark.parametrize(
    "content, complaint",
    [
        (b"", "not a PyTorch checkpoint"),
        (b"text, not weights", "not a PyTorch checkpoint"),
        (pickle.dumps([1, 2]), "not a PyTorch checkpoint"),
        (zipped(readme="nothing here"), "no single data.pkl"),
        (zipped(data_pkl=pickle.dumps({"epoch": 3})), "no tensors"),
        (zipped(data_pkl=pickle.dumps([1])), "no dictionary"),
        (zipped(data_pkl=pickle.dumps({}), byteorder="big"), "highest byte first"),
    ],
)
def test_other_files_are_refused(content, complaint, tmp_path):
    path = tmp_path / "model.pth"
    path.write_bytes(content)
    with pytest.raises(NvcError, match=complaint) as error:
        torch_file.read(path)
    assert str(path) in str(error.value)


def test_missing_files_and_folders(tmp_path):
    for path in (tmp_path / "none.pth", tmp_path):
        with pytest.raises(NvcError, match="cannot be read"):
            torch_file.read(path)


@pytest.mark.parametrize(
    "offset, shape, strides",
    [
        (0, (25,), (1,)),
        (20, (5,), (1,)),
        (0, (2,), (24,)),
        (-1, (2,), (1,)),
        (0, (10**5, 10**5), (0, 0)),  # small in the file, large in memory
    ],
)
def test_tensors_outside_of_their_storage_are_refused(offset, shape, strides, tmp_path):
    storage = torch_writer._Storage("0", np.dtype("f4"), 24)
    tensor = torch_writer._Tensor(storage, shape, strides, offset)
    path = torch_writer.write_pickle(tmp_path / "a.pth", {"w": tensor}, {"0": bytes(96)})
    with pytest.raises(NvcError, match="outside of its storage"):
        torch_file.read(path)


def test_storages_that_are_too_short_are_refused(tmp_path):
    storage = torch_writer._Storage("0", np.dtype("f4"), 24)
    tensor = torch_writer._Tensor(storage, (24,), (1,))
    path = torch_writer.write_pickle(tmp_path / "a.pth", {"w": tensor}, {"0": bytes(95)})
    with pytest.raises(NvcError, match="95 bytes"):
        torch_file.read(path)


def test_compressed_members_are_refused(tmp_path):
    """They could unfold to any size."""
    path = tmp_path / "bomb.pth"
    torch_writer.write(path, {"w": np.zeros(100, np.float32)})
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    with pytest.raises(NvcError, match="compressed"):
        torch_file.read(path)


@given(st.data())
def test_damaged_files_never_end_in_a_traceback(data):
    name = data.draw(st.sampled_from(["torch_zip.pth.tar", "torch_legacy.pth"]))
    content = bytearray((DATA / name).read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
        try:
            torch_file.read(path)
        except NvcError as e:
            assert str(path) in str(e)


@pytest.mark.parametrize(
    "instructions, complaint",
    [
        (b"\x80\x05\x96" + (1 << 40).to_bytes(8, "little") + b".", "BYTEARRAY8|damaged"),
        (b"\x80\x02X\xff\xff\xff\x7fabc.", "damaged"),
        # A type of numbers in the place of a function, called on lists.
        (b"\x80\x02ctorch\nDoubleStorage\n(]K\x00atR.", "no function"),
        # Tuples inside of tuples as a key, and shared ones whose hash would take for ever.
        (b"\x80\x02})" + 10**6 * b"\x85" + b"K\x00s.", "neither text nor numbers"),
        (b"\x80\x02})" + 60 * b"q\x00h\x00\x86" + b"K\x00s.", "neither text nor numbers"),
    ],
)
def test_pickles_cannot_ask_for_more_memory_than_they_have(instructions, complaint, tmp_path):
    path = tmp_path / "model.pth"
    path.write_bytes(zipped(data_pkl=instructions))
    with pytest.raises(NvcError, match=complaint):
        torch_file.read(path)


def test_arrays_come_back(tmp_path):
    rng = np.random.default_rng(0)
    tensors = {
        f"layer{i}.weight": rng.normal(size=shape).astype(dtype)
        for i, (shape, dtype) in enumerate(
            [((3, 4, 1, 1), "f4"), ((), "f4"), ((5,), "f8"), ((2, 2), "f2")]
        )
    }
    found = torch_file.read(torch_writer.write(tmp_path / "a.pth", tensors))
    assert list(found) == list(tensors)
    for name, array in tensors.items():
        np.testing.assert_array_equal(found[name], array)
