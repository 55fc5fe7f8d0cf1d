"""Parity of `intra` size `full` with the published DCVC-RT intra model, value by value.

The golden vectors were recorded from the published model under weights that both sides generate
from the tensors' names. The whole codec runs once, with a bottleneck that keeps what arrives and
passes on the *recorded* latents and symbols, so that every sub-network is judged on the published
model's own intermediate values.
"""

import json
import re
import zlib
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from nvc_jax.models import registry
from nvc_jax.nn.hyperprior import factorized_logits

GOLDEN = Path(__file__).parents[1].parent / "shared/golden"

pytestmark = pytest.mark.skipif(
    not (GOLDEN / "dcvc_rt_intra.npz").exists(), reason=f"no golden vectors in {GOLDEN}"
)


def stand_in(name: str, shape: list[int], gain: float) -> np.ndarray:
    """The agreed weights of one tensor."""
    w = np.random.RandomState(zlib.crc32(name.encode())).randn(*shape)
    if name.split(".")[-1].startswith(("q_", "y_q_", "mv_y_q_")):
        w = np.exp(0.1 * w)
    elif "bit_estimator" in name:
        w = 0.3 * w
    elif len(shape) == 4:
        w = w * np.sqrt(gain / np.prod(shape[1:]))
    else:
        w = 0.05 * w
    return np.asarray(w, np.float32)


# Published module -> ours, first match wins; what follows the match are the layers of a block.
MODULES = [
    (r"enc\.enc_1", "encoder/patch"),
    (r"enc\.enc_2\.6", "encoder/latent/conv"),
    (r"enc\.enc_2\.(\d)", r"encoder/blocks/block\1"),
    (r"hyper_enc\.0", "hyper_encoder/block"),
    (r"hyper_enc\.1", "hyper_encoder/down0"),
    (r"hyper_enc\.2", "hyper_encoder/down1"),
    (r"hyper_dec\.([01])", r"hyper_decoder/up\1"),
    (r"hyper_dec\.2", "hyper_decoder/block"),
    (r"y_prior_fusion\.3", "prior_fusion/params/dense"),
    (r"y_prior_fusion\.(\d)", r"prior_fusion/blocks/block\1"),
    (r"y_spatial_prior_reduction", "spatial_prior_reduction/dense"),
    (r"y_spatial_prior_adaptor_1", "spatial_prior_adaptors_0"),
    (r"y_spatial_prior_adaptor_2", "spatial_prior_adaptors_1"),
    (r"y_spatial_prior_adaptor_3", "spatial_prior_adaptors_2"),
    (r"y_spatial_prior\.3", "spatial_prior/params/dense"),
    (r"y_spatial_prior\.(\d)", r"spatial_prior/blocks/block\1"),
    (r"dec\.dec_1\.0", "decoder/up"),
    # Ours start to count after the upsampling.
    *[(rf"dec\.dec_1\.{i + 1}(?=\.)", f"decoder/blocks/block{i}") for i in range(12)],
    (r"dec\.dec_2", "decoder/pixels"),
]
LAYERS = {
    "": "",
    ".up.conv.0": "/subpixel/dense",
    ".down": "/patch/dense",
    ".adaptor": "/adaptor/dense",
    ".dc.0": "/depth_in/dense",
    ".dc.2": "/depth",
    ".dc.3": "/depth_out/dense",
    ".ffn.0": "/point_in/dense",
    ".ffn.2": "/point_out/dense",
}
BIT_ESTIMATOR = [f"f{i}.h" for i in (1, 2, 3, 4)] + [f"f{i}.b" for i in (1, 2, 3, 4)]
BIT_ESTIMATOR += [f"f{i}.a" for i in (1, 2, 3)]


def our_path(name: str) -> str:
    """A published weight's or bias' place in our parameter tree."""
    module, _, kind = name.rpartition(".")
    match, ours = next((m, ours) for p, ours in MODULES if (m := re.match(p, module)))
    layer = module[match.end() :]
    nested = "/block" if layer.startswith(".conv.") else ""  # the block of an Up or Down
    place = match.expand(ours) + nested + LAYERS[layer.removeprefix(".conv")]
    return f"{place}/{'kernel' if kind == 'weight' else 'bias'}"


def our_layout(w: np.ndarray) -> np.ndarray:
    """A published kernel (output, input, row, column) in the layout of our layer."""
    outputs, inputs, rows, _ = w.shape
    if rows == 3:
        return w[:, 0].transpose(1, 2, 0) if inputs == 1 else w.transpose(2, 3, 1, 0)
    # 1x1, or 2x2 with stride 2: a matrix from (input, row, column) as `space_to_depth` orders them.
    return w.reshape(outputs, -1).T


def our_parameters(published: dict[str, np.ndarray]) -> dict:
    """The parameter tree of `intra` size `full`. Uses every published tensor exactly once."""
    left = dict(published)
    flat = {
        f"{table}/table": left.pop(table)[:, :, 0, 0] for table in ("q_scale_enc", "q_scale_dec")
    }
    chain = [left.pop(f"bit_estimator_z.{part}")[:, :, 0, 0] for part in BIT_ESTIMATOR]
    flat["z_prior/chain"] = np.stack(chain, axis=-1)
    for name, w in left.items():
        path = our_path(name)
        assert path not in flat, f"{name} and another tensor both map to {path}"
        flat[path] = our_layout(w) if w.ndim == 4 else w
    return traverse_util.unflatten_dict(flat, sep="/")


def nhwc(x: np.ndarray) -> jax.Array:
    return jnp.asarray(x.transpose(0, 2, 3, 1))


class Replay:
    """Bottleneck that keeps what the networks say and answers with the record."""

    def __init__(self, record):
        self.record, self.kept, self.step = record, {}, 0

    def encoder_only(self, module, fn, *shapes):
        self.kept["y"], self.kept["z"] = fn(module)
        return self.record["y"], self.record["z"]

    def decoder_only(self, module, fn, *shapes):
        return fn(module)

    def factorized(self, z, chain, qp):
        z_hat = jnp.clip(jnp.round(z), -128, 127)
        chain = chain[:, None, None]
        upper, lower = (factorized_logits(chain, z_hat + d) for d in (0.5, -0.5))
        self.kept["z_prob"] = jax.nn.sigmoid(upper) - jax.nn.sigmoid(lower)
        return z_hat

    exact = False

    def gaussian(self, residual, scale):
        s, self.step = self.step, self.step + 1
        self.kept[f"s{s}"] = scale
        self.kept[f"yq{s}"] = jnp.clip(jnp.round(residual), -128, 127)
        return self.record[f"yq{s}"]


@pytest.fixture(scope="module")
def recorded():
    with np.load(GOLDEN / "dcvc_rt_intra.npz") as file:
        return {k: int(file[k]) if k == "qp" else nhwc(file[k]) for k in file}


@pytest.fixture(scope="module")
def published():
    manifest = json.loads((GOLDEN / "dcvc_rt_intra.manifest.json").read_text())
    return {
        name: stand_in(name, shape, manifest["gain"]) for name, shape in manifest["tensors"].items()
    }


@pytest.fixture(scope="module")
def computed(recorded, published):
    """Our values under the names of the record."""
    model = registry.build("intra", "full")

    @jax.jit
    def run(params, record):
        replay = Replay(record)

        def tap(next_fun, args, kwargs, context):
            # Two values that only pass between sub-networks: seen where they enter.
            if context.module.name == "spatial_prior_reduction":
                replay.kept["params"] = args[0]
            if context.module.name == "decoder" and context.method_name == "__call__":
                replay.kept["y_hat"] = args[0]
            return next_fun(*args, **kwargs)

        frames = record["x"][:, None]
        qp = jnp.full((1, 1), recorded["qp"])
        with nn.intercept_methods(tap):
            recon, _ = model.apply({"params": params}, frames, (), qp, replay)
        return replay.kept | {"x_hat_unclamped": recon[:, 0]}

    arrays = {k: v for k, v in recorded.items() if k != "qp"}
    return run(our_parameters(published), arrays)


def test_every_tensor_has_its_place(published):
    params = our_parameters(published)
    model = registry.build("intra", "full")
    expected = jax.eval_shape(lambda key: registry.init(model, key), jax.random.key(0))
    shapes = lambda tree: {k: v.shape for k, v in traverse_util.flatten_dict(tree).items()}  # noqa: E731
    assert shapes(params) == shapes(expected)


FLOATS = ["y", "z", "z_prob", "params", "s0", "s1", "s2", "s3", "y_hat", "x_hat_unclamped"]
SYMBOLS = ["yq0", "yq1", "yq2", "yq3"]


@pytest.mark.parametrize("name", FLOATS)
def test_values_agree(name, computed, recorded):
    ours, theirs = np.asarray(computed[name]), np.asarray(recorded[name])
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() <= 1e-3 * np.abs(theirs).max()


@pytest.mark.parametrize("name", SYMBOLS)
def test_symbols_agree(name, computed, recorded):
    # A value on the edge between two integers may fall to either side.
    ours, theirs = np.asarray(computed[name]), np.asarray(recorded[name])
    assert ours.shape == theirs.shape
    assert np.mean(ours != theirs) <= 1e-3


def test_nothing_recorded_is_left_out(recorded):
    assert {*FLOATS, *SYMBOLS} == set(recorded) - {"x", "qp"}
