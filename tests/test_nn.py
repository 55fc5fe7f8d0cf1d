"""Blocks against plain formulations, shapes and parameter formulas, masks, number formats."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

from nvc_jax.entropy.bottleneck import Estimate
from nvc_jax.models import registry
from nvc_jax.nn.blocks import (
    Blocks,
    Conv3x3,
    DepthConvBlock,
    Depthwise,
    Down,
    QpTable,
    Up,
    convolution,
    depth_to_space,
    depthwise,
    quality_ramp,
    space_to_depth,
    wsilu,
)
from nvc_jax.nn.hyperprior import (
    HyperDecoder,
    HyperEncoder,
    pad_to_multiple,
)
from nvc_jax.nn.spatial_prior import (
    pack_step,
    step_groups,
    unpack_step,
)


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def output_shape(module, *shape):
    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    return jax.eval_shape(module.init_with_output, jax.random.key(0), x)[0].shape


def parameters(module, *shape):
    """Number of values of a module for an input of this shape."""
    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    return sum(
        math.prod(p.shape)
        for p in jax.tree.leaves(jax.eval_shape(module.init, jax.random.key(0), x))
    )


# --- depth-wise convolution ---------------------------------------------------------------------


@jax.jit
def plain_depthwise(x, kernel):
    pad = len(kernel) // 2
    return lax.conv_general_dilated(
        x,
        kernel[:, :, None],
        (1, 1),
        ((pad, pad), (pad, pad)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[-1],
        precision=lax.Precision.HIGHEST,
    )


# Few distinct shapes, since each is compiled: a map of one pixel, heights that the gradient folds
# into one, two, four and eight bands.
SHAPES = st.sampled_from(
    [(1, 1, 1, 3), (2, 2, 5, 1), (2, 7, 1, 2), (3, 12, 4, 2), (1, 8, 6, 5), (1, 16, 9, 3)]
)


@functools.partial(jax.jit, static_argnums=0)
def value_and_pullback(fn, x, kernel, g):
    value, pull = jax.vjp(fn, x, kernel)
    return value, *pull(g)


@settings(max_examples=30)
@given(SHAPES, st.sampled_from([3, 5]), st.integers(0, 2**32 - 1))
def test_depthwise_and_its_gradient_are_those_of_a_grouped_convolution(shape, size, seed):
    kernel = normal(seed + 1, size, size, shape[-1])
    args = normal(seed, *shape), kernel, normal(seed + 2, *shape)
    ours, plain = (value_and_pullback(fn, *args) for fn in (depthwise, plain_depthwise))
    for a, b in zip(ours, plain, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-4)


# --- resampling ---------------------------------------------------------------------------------


@settings(max_examples=25)
@given(
    st.integers(1, 2), st.integers(1, 4), st.integers(1, 4), st.integers(1, 3),
    st.sampled_from([1, 2, 8]),
)  # fmt: skip
def test_space_to_depth_is_undone_by_depth_to_space(batch, rows, cols, channels, block):
    x = normal(0, batch, rows * block, cols * block, channels)
    small = space_to_depth(x, block)
    assert small.shape == (batch, rows, cols, channels * block * block)
    np.testing.assert_array_equal(depth_to_space(small, block), x)


def test_space_to_depth_orders_channels_before_rows_before_columns():
    x = normal(0, 1, 16, 24, 3)
    small = space_to_depth(x, 8)
    for c, a, b in itertools.product(range(3), range(8), range(8)):
        np.testing.assert_array_equal(small[..., 64 * c + 8 * a + b], x[:, a::8, b::8, c])


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("height, width", [(1, 1), (4, 6), (5, 7)])
def test_conv3x3_pads_one_zero_on_every_side(stride, height, width):
    conv = Conv3x3(4, stride)
    x = normal(0, 2, height, width, 3)
    variables = conv.init(jax.random.key(0), x)
    kernel = np.asarray(variables["params"]["conv"]["kernel"])
    out = conv.apply(variables, x)
    assert out.shape == (2, -(-height // stride), -(-width // stride), 4)
    # The middle of output (i, j) is input (stride i, stride j), whatever the stride.
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    for i, j in itertools.product(range(out.shape[1]), range(out.shape[2])):
        patch = padded[:, stride * i : stride * i + 3, stride * j : stride * j + 3]
        expected = np.einsum("bijc,ijco->bo", patch, kernel)
        np.testing.assert_allclose(out[:, i, j], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", ["rt", "uf", "uf2"])
def test_resampling_blocks_change_the_size_by_two(form):
    assert output_shape(Down(12, form), 2, 6, 10, 8) == (2, 3, 5, 12)
    assert output_shape(Up(12, form), 2, 6, 10, 8) == (2, 12, 20, 12)


# --- blocks -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "form, formula",
    [
        ("rt", lambda o: 8 * o * o + 17 * o),
        ("uf", lambda o: 7 * o * o + 17 * o),
        ("uf2", lambda o: 3.5 * o * o + 9.5 * o),
    ],
)
@pytest.mark.parametrize("o", [8, 32])
def test_parameters_of_a_block(form, formula, o):
    assert parameters(DepthConvBlock(o, form), 1, 4, 4, o) == formula(o)
    # Another number of input channels costs a matrix and a bias, and so does forcing it.
    assert parameters(DepthConvBlock(o, form), 1, 4, 4, 6) == formula(o) + 6 * o + o
    forced = DepthConvBlock(o, form, force_adaptor=True)
    assert parameters(forced, 1, 4, 4, o) == formula(o) + o * o + o
    assert parameters(Blocks(o, 3, form), 1, 4, 4, 6) == 3 * formula(o) + 6 * o + o
    assert parameters(Down(o, form), 1, 4, 4, 6) == formula(o) + 4 * 6 * o + o
    assert parameters(Up(o, form), 1, 4, 4, 6) == formula(o) + 6 * 4 * o + 4 * o


def randomised(variables):
    """Biases too, which start at zero."""
    leaves, tree = jax.tree.flatten(variables)
    return jax.tree.unflatten(tree, [0.3 * normal(i, *leaf.shape) for i, leaf in enumerate(leaves)])


def activate(x):
    return x / (1 + np.exp(-4 * x))


@pytest.mark.parametrize("form, folds", [("rt", 2), ("uf", 4), ("uf2", 4)])
@pytest.mark.parametrize("shortcut", [False, True])
def test_a_block_is_what_its_table_says(form, folds, shortcut):
    block = DepthConvBlock(8, form, shortcut)
    inputs = normal(0, 1, 5, 3, 6)
    variables = randomised(jax.eval_shape(block.init, jax.random.key(0), inputs))
    p = variables["params"]

    def dense(x, name):
        return x @ p[name]["dense"]["kernel"] + p[name]["dense"]["bias"]

    x = dense(inputs, "adaptor")
    a = plain_depthwise(activate(dense(x, "depth_in")), p["depth"]["kernel"])
    u = x + dense(a + p["depth"]["bias"], "depth_out")
    # Contiguous parts are added: channel k of the result is the sum of k, k + n, ...
    b = activate(dense(u, "point_in"))
    n = b.shape[-1] // folds
    b = sum(b[..., i * n : (i + 1) * n] for i in range(folds))
    expected = u + dense(b, "point_out") + (x if shortcut else 0)
    ours = jax.jit(block.apply)(variables, inputs)
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-5)


def test_wsilu():
    x = np.linspace(-5, 5, 101, dtype=np.float32)
    np.testing.assert_allclose(wsilu(x), activate(x), rtol=1e-5, atol=1e-7)


def test_quality_tables_start_at_one_or_on_the_ramp():
    qp = jnp.array([0, 63])
    ones = QpTable(64, 5).init_with_output(jax.random.key(0), qp)[0]
    np.testing.assert_array_equal(ones, np.ones((2, 1, 1, 5)))
    ramp = QpTable(64, 5, ramp=True).init_with_output(jax.random.key(0), qp)[0]
    assert ramp.shape == (2, 1, 1, 5)
    # Squared, the whole range of Lagrangian weights; 2 in the middle.
    assert (ramp[1] / ramp[0]) ** 2 == pytest.approx(768, rel=1e-4)
    assert quality_ramp(31.5) == pytest.approx(2)


# --- hyperprior and spatial prior ---------------------------------------------------------------


def test_hyperprior_scales_by_four():
    assert output_shape(HyperEncoder(8), 1, 8, 12, 16) == (1, 2, 3, 8)
    assert output_shape(HyperDecoder(16), 1, 2, 3, 8) == (1, 8, 12, 16)


@pytest.mark.parametrize("height, width", [(1, 1), (4, 8), (5, 7)])
def test_padding_repeats_the_last_row_and_column(height, width):
    x = normal(0, 1, height, width, 2)
    padded = pad_to_multiple(x, 4)
    rows, cols = padded.shape[1:3]
    assert rows % 4 == 0 and cols % 4 == 0 and rows - height < 4 and cols - width < 4
    i, j = np.minimum(np.arange(rows), height - 1), np.minimum(np.arange(cols), width - 1)
    np.testing.assert_array_equal(padded, x[:, i][:, :, j])


# Rows are steps, columns channel groups: at which positions of a 2x2 cell (A B / D E) each group is
# coded. Published tables of DCVC-RT.
TWO_STEPS = ["AE BD", "BD AE"]
FOUR_STEPS = ["A B D E", "E D B A", "D E A B", "B A E D"]


@pytest.mark.parametrize("steps, table", [(2, TWO_STEPS), (4, FOUR_STEPS)])
@pytest.mark.parametrize("height, width", [(1, 1), (2, 2), (5, 3), (4, 7)])
def test_masks_are_the_published_ones_and_partition_the_latent(steps, table, height, width):
    group = step_groups(height, width, steps)
    for step, row in enumerate(table):
        ours = np.asarray(group(step))
        assert ours.shape == (height, width)
        for g, positions in enumerate(row.split()):
            for i, j in itertools.product(range(height), range(width)):
                assert (ours[i, j] == g) == ("ABDE"[2 * (i % 2) + j % 2] in positions)

    x = np.ones((1, height, width, 8))
    covered = [unpack_step(pack_step(x, group(s), steps), group(s), steps) for s in range(steps)]
    np.testing.assert_array_equal(sum(covered), x)


@settings(max_examples=20)
@given(
    st.sampled_from([(1, 1), (3, 4), (5, 5)]), st.sampled_from([2, 4]), st.integers(0, 2**32 - 1)
)
def test_packed_steps_put_together_give_the_latent_back(size, steps, seed):
    x = normal(seed, 2, *size, 8)
    group = step_groups(*size, steps)
    packed = [pack_step(x, group(s), steps) for s in range(steps)]
    assert all(p.shape == (2, *size, 8 // steps) for p in packed)
    again = sum(unpack_step(p, group(s), steps) for s, p in enumerate(packed))
    np.testing.assert_array_equal(again, x)


# --- number formats -----------------------------------------------------------------------------


@pytest.mark.parametrize("module", [DepthConvBlock, Conv3x3, Down, Up])
def test_bfloat16_layers_keep_float32_parameters(module):
    layer = module(8, dtype=jnp.bfloat16)
    out, variables = layer.init_with_output(jax.random.key(0), jnp.ones((1, 4, 4, 6)))
    assert out.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype(jnp.float32)}


def test_bfloat16_depthwise_keeps_its_bias_short_too():
    layer = Depthwise(jnp.bfloat16)
    out, variables = layer.init_with_output(jax.random.key(0), jnp.ones((1, 4, 4, 6)))
    assert out.dtype == jnp.bfloat16
    assert variables["params"]["bias"].dtype == jnp.float32


SMALL = {
    "intra": dict(encoder=1, decoder=1, fusion=1, spatial=1, form="uf2", latent_gain=True),
    "ui2c": dict(
        extractor=(1, 1), encoder=1, decoder=1, recon_blocks=1, fusion=1, spatial=1,
        form="uf2", latent_gain=True,
    ),
}  # fmt: skip


class Listening(Estimate):
    """Decodes given symbols and keeps the scales: what the entropy coder depends on."""

    def __init__(self, symbol):
        super().__init__()
        self.symbol, self.scales = symbol, []

    def encoder_only(self, module, fn, *shapes):
        return tuple(jnp.zeros(s.shape, s.dtype) for s in shapes)

    def factorized(self, z, chain, qp):
        return jnp.full(z.shape, self.symbol)

    def gaussian(self, residual, scale):
        self.scales.append(scale)
        return jnp.full(residual.shape, self.symbol)


def trace(model, fn):
    """Equations of fn(params, frames, refs, qp) for a unit that refers to another."""
    n = model.frames_per_unit
    params = jax.eval_shape(lambda key: registry.init(model, key), jax.random.key(0))
    frames = jax.ShapeDtypeStruct((1, n, 64, 64, 3), jnp.float32)
    qp = jax.ShapeDtypeStruct((1, n), jnp.int32)
    forward = lambda p, f, qp: model.apply({"params": p}, f, (), qp, Estimate())  # noqa: E731
    _, refs = jax.eval_shape(forward, params, frames, qp)
    return jax.make_jaxpr(fn)(params, frames, refs, qp).jaxpr


def needed(jaxpr, outputs):
    """The equations that these outputs depend on."""
    wanted, equations = {id(v) for v in outputs}, []
    for eqn in reversed(jaxpr.eqns):
        if any(id(v) in wanted for v in eqn.outvars):
            wanted.update(id(v) for v in eqn.invars)
            equations.append(eqn)
    return equations


def formats(equations):
    dtypes = {v.aval.dtype for eqn in equations for v in eqn.outvars}
    return {d.name for d in dtypes if jnp.issubdtype(d, jnp.floating)}


@pytest.mark.parametrize("codec, steps", [("intra", 4), ("ui2c", 2)])
def test_from_decoded_symbols_to_scales_everything_is_float32(codec, steps):
    model = registry.build(codec, SMALL[codec], jnp.bfloat16)

    def decode(params, frames, refs, qp):
        bottleneck = Listening(jnp.float32(1))
        recon, refs = model.apply({"params": params}, frames, refs, qp, bottleneck)
        return bottleneck.scales, recon

    jaxpr = trace(model, decode)
    *scales, recon = jaxpr.outvars
    assert len(scales) == steps
    entropy = needed(jaxpr, scales)
    assert formats(entropy) == {"float32"}
    assert any(eqn.primitive.name == "dot_general" for eqn in entropy)
    assert formats(needed(jaxpr, [recon])) == {"float32", "bfloat16"}


def products(jaxpr):
    """All matrix products and convolutions, at any depth."""
    for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        if eqn.primitive.name in ("dot_general", "conv_general_dilated"):
            yield eqn
        for value in jax.tree.leaves(list(eqn.params.values())):
            if hasattr(getattr(value, "jaxpr", value), "eqns"):
                yield from products(value)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("codec", ["intra", "ui2c"])
def test_float32_products_ask_for_the_highest_precision(codec, dtype):
    """In the forward pass and in the gradient."""
    model = registry.build(codec, SMALL[codec], dtype)

    def loss(params, frames, refs, qp):
        bottleneck = Estimate()
        recon, _ = model.apply({"params": params}, frames, refs, qp, bottleneck)
        return recon.sum() + bottleneck.bits["y"].sum()

    found = list(products(trace(model, jax.grad(loss))))
    float32 = [eqn for eqn in found if eqn.outvars[0].aval.dtype == jnp.float32]
    assert float32 and (len(float32) < len(found)) == (dtype == jnp.bfloat16)
    for eqn in float32:
        assert {*np.ravel(eqn.params["precision"])} == {lax.Precision.HIGHEST}, eqn


@pytest.mark.parametrize(
    "shape, kernel, stride",
    [((2, 6, 8, 3), 3, 1), ((2, 6, 8, 3), 3, 2), ((1, 5, 7, 2), 7, 1), ((1, 2, 2, 1), 3, 2)],
)
@pytest.mark.parametrize("looped", [False, True])
def test_convolutions_have_the_gradients_of_xla(shape, kernel, stride, looped):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=shape), jnp.float32)
    weights = jnp.asarray(rng.normal(size=(kernel, kernel, shape[-1], 5)), jnp.float32)

    def plain(x, weights):
        pad = (kernel // 2, kernel // 2)
        return jax.lax.conv_general_dilated(
            x, weights, (stride, stride), (pad, pad), dimension_numbers=("NHWC", "HWIO", "NHWC"),
            precision="highest",
        )  # fmt: skip

    def gradients(convolve):
        def step(_, x):
            return None, jax.grad(lambda x, w: (convolve(x, w) ** 3).sum(), (0, 1))(x, weights)

        if looped:
            return jax.jit(lambda x: jax.lax.scan(step, None, x[None])[1])(x)
        return jax.jit(lambda x: step(None, x)[1])(x)

    ours = gradients(lambda x, w: convolution(x, w, stride, jax.lax.Precision.HIGHEST))
    for mine, other in zip(ours, gradients(plain), strict=True):
        np.testing.assert_allclose(mine.reshape(other.shape), other, rtol=1e-4, atol=1e-4)
