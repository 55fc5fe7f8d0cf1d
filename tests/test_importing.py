"""Checkpoints of published models. That the networks are the published ones: test_golden.py."""

import jax
import numpy as np
import pytest
import torch_writer
from flax import traverse_util

from nvc_jax import cli
from nvc_jax.errors import NvcError
from nvc_jax.importing import checkpoints, names

COUNTS = {
    "dcvc-rt-intra": 45_651_314,
    "dcvc-rt-inter": 20_691_456,
    "brhvc-intra": 30_998_187,
    "brhvc": 29_429_455,
}


@pytest.fixture(scope="module", params=COUNTS)
def kind(request):
    return request.param


def tensors_of(kind: str) -> dict[str, np.ndarray]:
    """A checkpoint of constants, one for each tensor, that take no memory."""
    sources = [
        names.source(kind, path, leaf.shape)
        for path, leaf in traverse_util.flatten_dict(checkpoints.shapes(kind), sep="/").items()
    ]
    published = {name: shape for source in sources for name, shape in source.shapes.items()}
    return {
        name: np.broadcast_to(np.float32(number), shape)
        for number, (name, shape) in enumerate(sorted(published.items()))
    }


def test_every_parameter_has_a_source_of_its_own(kind):
    leaves = traverse_util.flatten_dict(checkpoints.shapes(kind), sep="/")
    sources = [names.source(kind, path, leaf.shape) for path, leaf in leaves.items()]
    published = [name for source in sources for name in source.shapes]
    assert len(set(published)) == len(published)
    counts = [np.prod(shape) for source in sources for shape in source.shapes.values()]
    assert sum(map(int, counts)) == COUNTS[kind]
    assert sum(int(np.prod(leaf.shape)) for leaf in leaves.values()) == COUNTS[kind]


def test_parameters_have_our_shapes(kind):
    params = checkpoints.parameters(kind, tensors_of(kind))
    ours = jax.tree.map(lambda leaf: leaf.shape, checkpoints.shapes(kind))
    assert jax.tree.map(np.shape, params) == ours


@pytest.mark.parametrize(
    "change, complaint",
    [
        (lambda t, name: t.pop(name), ": 1 are missing: {}$"),
        (lambda t, name: t.update(stray=np.zeros(3)), ": 1 do not belong to it: stray$"),
        (
            lambda t, name: t.update({name: np.zeros((2, 5), np.float32)}),
            r": 1 have another shape: {} \(2x5, not .*\)$",
        ),
        (
            lambda t, name: t.update({name: np.full(t[name].shape, np.nan, np.float32)}),
            ": 1 have .* infinite or not numbers: {}$",
        ),
        (lambda t, name: t.clear(), "are missing: .* and .* more$"),
    ],
)
def test_what_is_wrong_with_a_checkpoint_is_named(kind, change, complaint):
    tensors = tensors_of(kind)
    name = sorted(tensors)[len(tensors) // 2]
    change(tensors, name)
    with pytest.raises(NvcError, match=complaint.format(name)) as error:
        checkpoints.parameters(kind, tensors)
    assert checkpoints.PUBLISHED[kind].file in str(error.value)


def test_all_that_is_wrong_is_named_at_once():
    tensors = tensors_of("brhvc-intra")
    first, second = sorted(tensors)[:2]
    tensors["stray"] = tensors.pop(first)
    tensors[second] = np.zeros((2, 5), np.float32)
    expected = rf"1 are missing: {first}; 1 do not belong to it: stray; 1 have .*: {second} \(2x5"
    with pytest.raises(NvcError, match=expected):
        checkpoints.parameters("brhvc-intra", tensors)


def test_the_intra_codec_is_looked_for_beside_the_checkpoint(tmp_path):
    path = torch_writer.write(tmp_path / "some.pth", {"w": np.zeros(3, np.float32)})
    with pytest.raises(NvcError, match=r"cvpr2023_image_psnr.pth.tar.*--intra"):
        checkpoints.load("brhvc", path)
    torch_writer.write(tmp_path / "cvpr2023_image_psnr.pth.tar", {"w": np.zeros(3, np.float32)})
    with pytest.raises(NvcError, match="not a checkpoint of brhvc-intra"):
        checkpoints.load("brhvc", path)
    with pytest.raises(NvcError, match="needs no other"):
        checkpoints.load("brhvc-intra", path, path)
    with pytest.raises(NvcError, match="nothing"):
        checkpoints.load("brhvc", tmp_path / "elsewhere" / "nothing.pth")


def test_the_command_explains_what_is_wrong(tmp_path, capsys):
    path = torch_writer.write(tmp_path / "some.pth", {"w": np.zeros(3, np.float32)})
    output = tmp_path / "out.safetensors"
    assert cli.main(["import", "brhvc-intra", str(path), str(output)]) == 2
    assert f"{path}: not a checkpoint of brhvc-intra" in capsys.readouterr().err
    assert not output.exists()
    for other, words in ((path, "named twice"), (tmp_path / "out.bin", "end in .safetensors")):
        assert cli.main(["import", "brhvc-intra", str(path), str(other)]) == 2
        assert words in capsys.readouterr().err
