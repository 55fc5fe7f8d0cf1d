"""The integer scale head: exact against plain integers in numpy, and trained as what it will be."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from hypothesis import given, settings
from hypothesis import strategies as st

from nvc_jax.nn import integer

Z, Y, WIDTH, STEPS = 6, 12, 20, 2
H, W = 7, 10
HEAD = integer.ScaleHead(Y, WIDTH, STEPS, references=2)


def everything(head, z, qp, memory, symbols):
    hidden = head.begin(z, qp, [memory, memory[:, ::-1]], (H, W))
    levels = [head.level(hidden, step, symbols) for step in range(STEPS)]
    return *levels, head.remember(hidden, symbols, levels[-1])


def inputs(seed: int, spread: float = 4.0):
    rng = np.random.default_rng(seed)
    z = np.round(rng.normal(0, spread, (1, 2, 3, Z)))
    symbols = np.round(rng.normal(0, spread, (1, H, W, Y)))
    memory = np.round(rng.uniform(-64, 64, (1, H, W, integer.memory_channels(Y))))
    qp = rng.integers(0, 73, (1, 2), np.int32)
    return jnp.float32(z), qp, jnp.float32(memory), jnp.float32(symbols)


def parameters(seed: int, spread: float):
    args = inputs(0)
    params = HEAD.init(jax.random.key(0), *args, method=everything)["params"]
    rng = np.random.default_rng(seed)
    louder = spread * 10 ** rng.uniform(-1, 0.5)
    return jax.tree.map(lambda p: p * louder + rng.normal(0, 0.1 * spread, p.shape), params)


def run(variables, z, qp, memory, symbols):
    if "integers" in variables:
        memory = memory.astype(jnp.int8)
    return jax.jit(lambda v, *a: HEAD.apply(v, *a, method=everything))(
        variables, z, qp, memory, symbols
    )


# --- what the integers mean, in numpy ----------------------------------------------------------


def dense(x, layer, out_bits=5):
    total = x @ layer["kernel"].astype(np.int64) + layer["bias"]
    return shifted(total, layer["exponent"].astype(np.int64) + 5 - out_bits)


def shifted(total, shift):
    return np.floor(total / 2.0**shift + 0.5).astype(np.int64)


def depthwise(x, layer):
    h, w = x.shape[1:3]
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    total = layer["bias"].astype(np.int64) + sum(
        padded[:, i : i + h, j : j + w] * layer["kernel"][i, j].astype(np.int64)
        for i in range(3)
        for j in range(3)
    )
    return shifted(total, layer["exponent"].astype(np.int64))


def narrow(x, low=-128, high=127):
    return np.clip(x, low, high)


def silu(x):
    return narrow(np.round(x / (1 + np.exp(-x / 32)))).astype(np.int64)


def code(symbols):
    s = np.clip(symbols, -127, 127).astype(np.int64)
    return narrow(np.round(np.sign(s) * 32 * np.log2(1 + abs(s))), -127).astype(np.int64)


def block(x, layers):
    y = silu(narrow(depthwise(x, layers["depthwise"])) if "depthwise" in layers else x)
    return narrow(x + narrow(dense(y, layers["dense"])))


def reference(n, z, qp, memory, symbols):
    z, memory, symbols = (np.asarray(a) for a in (z, memory, symbols))
    hats = np.maximum(0, 64 - 8 * abs(qp[..., None] - 8 * np.arange(10))).reshape(1, 1, 1, -1)
    hyper = block(silu(narrow(dense(code(z), n["hyper"]))), n["hyper_block"])
    hyper = dense(hyper, n["up"]).reshape(1, *z.shape[1:3], WIDTH, 4, 4)
    hyper = hyper.transpose(0, 1, 4, 2, 5, 3).reshape(1, 8, 12, WIDTH)[:, :H, :W]
    known = [memory.astype(np.int64), memory[:, ::-1].astype(np.int64)]
    known = sum(dense(x, n[f"digest_{i}"]) for i, x in enumerate(known))
    hidden = silu(narrow(hyper + known + dense(hats, n["quality"])))
    hidden = block(block(hidden, n["trunk_0"]), n["trunk_1"])
    later = np.concatenate([hidden, abs(code(symbols))], axis=-1)
    features = [hidden, silu(narrow(dense(later, n["later_0"])))]
    levels = [
        narrow(dense(block(x, n[f"blocks_{s}"]), n[f"levels_{s}"], 4) + 24, 0, 63)
        for s, x in enumerate(features)
    ]
    memory = [abs(code(symbols)), narrow(2 * levels[-1] - 64)]
    memory.append(silu(narrow(dense(np.concatenate([hidden, *memory], axis=-1), n["state"]))))
    return *levels, np.concatenate(memory, axis=-1)


@pytest.mark.parametrize("spread", [0.7, 1.0, 4.0])
@pytest.mark.parametrize("seed", range(3))
def test_integers_are_what_training_computed_and_what_numpy_computes(seed, spread):
    params, args = parameters(seed, spread), inputs(seed, 10.0**seed)
    frozen = integer.freeze(params)
    trained = run({"params": params}, *args)
    released = run({"integers": frozen}, *args)
    expected = reference(frozen, *args)
    for a, b, c in zip(trained, released, expected, strict=True):
        assert b.dtype == np.int8
        np.testing.assert_array_equal(b, c)
        np.testing.assert_array_equal(a, c)
    assert all(len(np.unique(levels)) > 5 for levels in expected[:STEPS])  # a test of something


def test_functions_of_all_activations():
    x = np.arange(-128, 128)
    np.testing.assert_array_equal(integer.exact_activation(jnp.int8(x)), silu(x))
    np.testing.assert_array_equal(integer.exact_activation(jnp.float32(x)), silu(x))
    np.testing.assert_array_equal(integer.exact_symbol_code(jnp.int8(x)), code(x))
    np.testing.assert_array_equal(integer.exact_symbol_code(jnp.float32(x)), code(x))


def test_frozen_layers_are_small_integers():
    frozen = traverse_util.flatten_dict(integer.freeze(parameters(0, 1.0)), sep="/")
    types = {"kernel": np.int8, "bias": np.int32, "exponent": np.int8, "table": np.int8}
    for name, array in frozen.items():
        assert array.dtype == types[name.split("/")[-1]], name
        if name.endswith("kernel"):
            # The largest weight of every channel uses all eight bits.
            largest = abs(array.astype(int)).reshape(-1, array.shape[-1]).max(0)
            assert (largest >= 64).all() and (largest <= 127).all()


@pytest.mark.parametrize("spread", [0.01, 1.0, 100.0])
def test_thawed_parameters_freeze_to_the_same_integers(spread):
    frozen = integer.freeze(parameters(1, spread))
    again = integer.freeze(integer.thaw(frozen))
    assert jax.tree.structure(frozen) == jax.tree.structure(again)
    jax.tree.map(np.testing.assert_array_equal, frozen, again)


@settings(max_examples=200)
@given(st.floats(0, 1e4, width=32))
def test_exponents_are_as_large_as_the_weights_allow(largest):
    k = int(integer.exponent(jnp.float32([[largest], [-largest]]))[0])
    assert k == 0 or round(largest * 2.0**k) <= 127
    assert k == integer.MAX_EXPONENT or round(largest * 2.0 ** (k + 1)) > 127


def test_gradients_reach_every_layer():
    args, params = inputs(3), parameters(3, 0.5)

    def distance(params):
        *levels, memory = run({"params": params}, *args)
        levels += run({"params": params}, *args[:2], memory, args[3])[:STEPS]
        return sum(jnp.square(level - 40).mean() for level in levels)

    gradients = jax.grad(distance)(params)
    for name, gradient in traverse_util.flatten_dict(gradients, sep="/").items():
        assert np.isfinite(gradient).all() and np.abs(gradient).max() > 0, name
    smaller = jax.tree.map(lambda p, g: p - 1e-3 * jnp.sign(g), params, gradients)
    assert distance(smaller) < distance(params)


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_the_programs_of_accelerators_hold_integer_products_only(platform):
    frozen = integer.freeze(parameters(0, 1.0))
    z, qp, memory, symbols = inputs(0)
    args = {"integers": frozen}, z, qp, memory.astype(jnp.int8), symbols
    program = jax.jit(lambda v, *a: HEAD.apply(v, *a, method=everything))
    text = program.trace(*args).lower(lowering_platforms=(platform,)).as_text()
    products = [line for line in text.splitlines() if "dot_general" in line]
    assert len(products) == 14
    assert all("xi8>" in line and line.rstrip().count("xi32>") for line in products), products
    assert "f16" not in text
