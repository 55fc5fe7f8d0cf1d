"""Model files: what is saved comes back, and whatever happens to a file is noticed."""

import json
import math
import struct

import jax
import numpy as np
import pytest
import safetensors.numpy
from conftest import SIZES, random_parameters
from flax import traverse_util

from nvc_jax import unit_program
from nvc_jax.entropy import likelihood, tables
from nvc_jax.entropy.calibration import CALIBRATED, EXACT
from nvc_jax.errors import NvcError
from nvc_jax.models import light, registry, released
from nvc_jax.nn import integer

NAMES = tuple(SIZES)


@pytest.fixture(scope="module", params=NAMES)
def frozen(request):
    """(codec's name, module, parameters, tensors, metadata)."""
    name = request.param
    module = registry.build(name, SIZES[name])
    params = random_parameters(module)
    return name, module, params, *released.freeze("some-model", name, module, params)


@pytest.fixture
def saved(frozen, tmp_path):
    path = tmp_path / "model.safetensors"
    released.save(path, *frozen[3:])
    return path


def test_what_is_saved_comes_back(frozen, saved):
    name, module, params, _, _ = frozen
    model = released.load(saved)
    assert (model.name, model.codec) == ("some-model", name)
    assert model.module == module
    floats = {name: tree for name, tree in params.items() if name != "scale_head"}
    ours = model.variables["params"]
    assert jax.tree.structure(ours) == jax.tree.structure(floats)
    for mine, original in zip(jax.tree.leaves(ours), jax.tree.leaves(floats), strict=True):
        assert mine.dtype == np.float32
        np.testing.assert_array_equal(mine, original.astype(np.float16).astype(np.float32))
    integers = model.variables["integers"]["scale_head"]
    jax.tree.map(np.testing.assert_array_equal, integers, integer.freeze(params["scale_head"]))
    tables.validate(model.tables)
    base = model.spec.priors["z_prior"]
    rows, channels = module.qp_rows, module.cfg.z
    if isinstance(module, light.Light):  # rows of their own for intra frames, and the base layer
        rows, channels = 2 * rows, channels + light.BASE_CHANNELS
    assert base + rows * channels == len(model.tables.size)
    assert len(model.fingerprint) == released.FINGERPRINT_BYTES
    assert released.load(str(saved)).fingerprint == model.fingerprint


def test_views_in_another_order_are_saved_in_order(frozen, tmp_path):
    """As an import makes them of transposed kernels."""
    path = tmp_path / "model.safetensors"
    tensors, metadata = frozen[3:]
    turned = {k: np.asfortranarray(v) for k, v in tensors.items()}
    released.save(path, turned, metadata)
    released.save(tmp_path / "same.safetensors", tensors, metadata)
    assert (
        released.load(path).fingerprint == released.load(tmp_path / "same.safetensors").fingerprint
    )


def test_only_scales_that_code_something_are_coded(saved):
    spec = released.load(saved).spec
    assert spec.scale_boundaries.dtype == np.float32
    assert (np.diff(spec.scale_boundaries) > 0).all()
    # Level k ends at boundary k: the last one left out ends below the limit, the next one above.
    # Of a Gaussian that is 0.15; others have as many zeros there.
    zeros = math.erf(0.5 / (0.15 * math.sqrt(2)))
    limits = {"gaussian": 0.15, "sparse": -0.5 / math.log(1 - zeros) / likelihood.SPARSE}
    ((family, (_, first)),) = spec.families.items()
    assert spec.scale_boundaries[first - 1] <= limits[family] < spec.scale_boundaries[first]


def test_tables_belong_to_the_weights_as_stored(frozen):
    """Frozen from the rounded weights, which are what the encoder estimates with."""
    name, module, params, tensors, _ = frozen
    rounded = jax.tree.map(lambda p: p.astype(np.float16).astype(np.float32), params)
    rounded["scale_head"] = params["scale_head"]  # rounded to integers, see test_integer.py
    again, _ = released.freeze("some-model", name, module, rounded)
    for key, value in tensors.items():
        np.testing.assert_array_equal(again[key], value)


def test_models_of_the_first_format_have_no_integer_scales(frozen, tmp_path):
    tensors = {k: v for k, v in frozen[3].items() if not k.startswith("integers/")}
    size = json.loads(frozen[4]["size"]) | {"scale_head": 0}
    metadata = frozen[4] | {"format": "nvc-model-1", "size": json.dumps(size)}
    families, priors = json.loads(metadata.pop("families")), json.loads(metadata.pop("priors"))
    assert priors == {"z_prior": 64}
    if "gaussian" not in families:
        pytest.skip("the codec is younger than that format")
    metadata["skip_below"] = str(families["gaussian"][1])
    del metadata["known_answer"]
    path = tmp_path / "old.safetensors"
    released.save(path, tensors, metadata)
    model = released.load(path)
    assert not model.exact and unit_program.default_mode(model) == CALIBRATED
    assert model.spec.families == {"gaussian": tuple(families["gaussian"])}
    with pytest.raises(NvcError, match="no integer scales"):
        unit_program.prepare(model, 32, 32, EXACT)


def test_a_processor_that_computes_something_else_is_refused(saved, monkeypatch):
    model = released.load(saved)
    released.check_integers(model)
    monkeypatch.setattr(released.jax, "default_backend", lambda: "abacus")
    with pytest.raises(NvcError, match="abacus fails the known-answer test"):
        released.check_integers(model._replace(known_answer="0123456789abcdef"))
    head = model.variables["integers"]["scale_head"]
    head["levels_0"]["bias"] = head["levels_0"]["bias"].at[0].add(1000)
    with pytest.raises(NvcError, match="known-answer"):
        unit_program.prepare(model, 32, 32, EXACT)


def test_the_fingerprint_depends_on_every_weight_and_table(frozen, tmp_path):
    _, _, _, tensors, metadata = frozen
    rng = np.random.default_rng(0)

    def fingerprint(tensors, metadata):
        released.save(tmp_path / "a.safetensors", tensors, metadata)
        with safetensors.safe_open(tmp_path / "a.safetensors", "numpy") as f:
            return f.metadata()["fingerprint"]

    seen = {fingerprint(tensors, metadata)}
    assert fingerprint(dict(reversed(tensors.items())), metadata) in seen
    for key, value in tensors.items():
        changed = value.copy()
        place = rng.integers(value.size)
        changed.view(f"u{value.itemsize}").flat[place] ^= 1
        seen.add(fingerprint({**tensors, key: changed}, metadata))
    for key, value in metadata.items():
        seen.add(fingerprint(tensors, {**metadata, key: value + " "}))
    assert len(seen) == 1 + len(tensors) + len(metadata)


@pytest.mark.parametrize("seed", range(20))
def test_damaged_files_are_refused(saved, seed):
    rng = np.random.default_rng(seed)
    data = bytearray(saved.read_bytes())
    header_bytes = 8 + struct.unpack("<Q", data[:8])[0]
    if seed % 4 == 0:
        del data[rng.integers(len(data)) :]
    else:  # in the header, or anywhere
        data[rng.integers(header_bytes if seed % 4 == 1 else len(data))] ^= 1 << rng.integers(8)
    saved.write_bytes(data)
    with pytest.raises(NvcError, match=r"model\.safetensors"):
        released.load(saved)


@pytest.mark.parametrize(
    "content",
    [b"", b"text, not weights", bytes(1000), b"\xff" * 1000, b"\x08" + bytes(7) + b"{}" * 4],
)
def test_other_files_are_refused(tmp_path, content):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(NvcError, match=r"model\.safetensors: cannot be read as a model"):
        released.load(path)


def test_weights_of_other_programs_are_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    safetensors.numpy.save_file({"weight": np.zeros(3, np.float32)}, path)
    with pytest.raises(NvcError, match="not a released model"):
        released.load(path)
    for other in (
        "",
        "pt",
        "nvc-model",
        "nvc-model-",
        "nvc-model-x",
        "nvc-model-\u0661",
        "model-1",
    ):
        safetensors.numpy.save_file({"w": np.zeros(3)}, path, {"format": other})
        with pytest.raises(NvcError, match="not a released model"):
            released.load(path)
    header = {"w": {"dtype": "BF16", "shape": [2], "data_offsets": [0, 4]}}
    header = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    with pytest.raises(NvcError, match="not a released model"):
        released.load(path)


@pytest.mark.parametrize(
    "version, remedy",
    [("0", "use an older"), ("4", "update"), ("10", "update"), ("9" * 5000, "update")],
)
def test_models_of_other_versions_say_which_program_they_need(frozen, tmp_path, version, remedy):
    path = tmp_path / "model.safetensors"
    tensors, metadata = frozen[3:]
    released.save(path, tensors, {**metadata, "format": f"nvc-model-{version}"})
    complaint = f"version {version[:9]} of the format, this program reads versions 1 to 3; {remedy}"
    with pytest.raises(NvcError, match=complaint) as error:
        released.load(path)
    assert len(str(error.value)) < 500


def test_unknown_names_and_missing_files(tmp_path):
    for wrong in ("no-such-model", tmp_path / "missing.safetensors", tmp_path, "", __file__):
        with pytest.raises(NvcError, match=r"give a \.safetensors file or one of") as error:
            released.load(wrong)
        for name in released.shipped():
            assert name in str(error.value)


def test_shipped_models_are_found_by_name_and_by_file(saved, monkeypatch):
    monkeypatch.setattr(released, "SHIPPED", saved.parent)
    assert released.shipped() == {"model": saved}
    assert released.load("model").fingerprint == released.load(saved).fingerprint


@pytest.mark.parametrize("name", released.shipped())
def test_every_shipped_model_loads_and_is_called_like_its_file(name):
    model = released.load(name)
    assert model.name == name
    tables.validate(model.tables)


def test_saving_replaces_a_file_only_when_complete(frozen, tmp_path):
    for target, reason in (
        (tmp_path / "missing" / "a.safetensors", "does not exist"),
        (tmp_path, "not a file"),
    ):
        with pytest.raises(NvcError, match=reason):
            released.save(target, *frozen[3:])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e6])
def test_weights_that_float16_cannot_hold_are_not_released(frozen, value):
    name, module, params, _, _ = frozen
    flat = traverse_util.flatten_dict(params)
    key = next(iter(flat))
    flat[key] = np.full_like(flat[key], value)
    with pytest.raises(NvcError, match="cannot be released"):
        released.freeze("some-model", name, module, traverse_util.unflatten_dict(flat))
