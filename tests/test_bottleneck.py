"""The two bottlenecks on latents made up here: what is counted, coded, skipped and given back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nvc_jax.entropy import coder, likelihood
from nvc_jax.entropy.bottleneck import (
    FROM_CALLER,
    FROM_PICTURE,
    FROM_STREAM,
    Coded,
    CodingSpec,
    Estimate,
    Family,
)
from nvc_jax.entropy.calibration import FLOAT
from nvc_jax.entropy.freeze import concatenate, factorized_tables, gaussian_tables

EDGES = np.geomspace(0.11, 32, 16)
QP_ROWS, CHANNELS = 3, 4
SPEC = CodingSpec(EDGES[1:].astype(np.float32), {"gaussian": Family(0, 1)}, {"some/z_prior": 16})
CHAINS = np.random.default_rng(5).normal(0.5, 0.3, (QP_ROWS, CHANNELS, 11)).astype(np.float32)
TABLES = coder.prepare(
    concatenate(
        gaussian_tables(EDGES * 1.2), factorized_tables(CHAINS.reshape(-1, 11).astype(np.float64))
    )
)


class Prior:
    """In place of a `FactorizedPrior`."""

    path = ("some", "z_prior")

    def __call__(self, row):
        return jnp.asarray(CHAINS)[row]


Z_SHAPE, Y_SHAPE = (1, 2, 3, CHANNELS), (1, 4, 6, 5)
SIZES = [24, 120]


def latents(seed: int):
    rng = np.random.default_rng(seed)
    z = np.float32(rng.normal(0, 3, Z_SHAPE))
    mean, scale = np.float32(rng.normal(0, 1, Y_SHAPE)), np.float32(rng.uniform(-0.1, 2, Y_SHAPE))
    y = np.float32(mean + scale * rng.normal(0, 1, Y_SHAPE))
    y.flat[:4] = 1e9, -1e9, 40000.5, -40  # far outside, whatever the table
    scale.flat[:4] = 1.0
    return z, y, mean, scale


def code_both(bottleneck, z, y, mean, scale, qp):
    z_hat = bottleneck.factorized(z, Prior(), qp)
    return z_hat, bottleneck.gaussian(y - mean, scale) + mean


@jax.jit
def run(source, latent, qp, payload, state, given):
    def pull(state, index):
        result = jax.ShapeDtypeStruct(index.shape, jnp.int16), jax.typeof(state)
        return jax.pure_callback(
            lambda *a: coder.decode_step(*map(np.asarray, a), TABLES), result, payload, state, index
        )

    bottleneck = Coded(SPEC, FLOAT, source, jnp.bool_(True), pull, state, given)
    hats = code_both(bottleneck, *latent, qp)
    return hats, bottleneck.symbols, bottleneck.indices, bottleneck.state


def coded(source, latent, qp=1, payload=b"", given=None):
    buffer = np.zeros(2048, np.uint8)
    buffer[: len(payload)] = np.frombuffer(payload, np.uint8)
    given = np.zeros(sum(SIZES), np.int16) if given is None else given
    state = coder.begin_decode(buffer, len(payload))
    return jax.device_get(
        run(np.int32(source), latent, np.array([qp], np.int32), buffer, state, given)
    )


@pytest.mark.parametrize("seed", range(3))
def test_three_sources_give_the_same_latents(seed):
    z, y, mean, scale = latents(seed)
    hats, symbols, indices, _ = coded(FROM_PICTURE, (z, y, mean, scale))
    assert [s.dtype for s in symbols] == [np.int16] * 2 and [len(s) for s in symbols] == SIZES
    assert [i.dtype for i in indices] == [np.uint16] * 2
    payload = coder.encode(list(zip(symbols, indices, strict=True)), TABLES)
    nothing = np.full_like(z, np.nan), np.full_like(y, np.nan), mean, scale
    for source, extra in (
        (FROM_STREAM, {"payload": payload}),
        (FROM_CALLER, {"given": np.concatenate(symbols)}),
    ):
        again, same_symbols, same_indices, state = coded(source, nothing, **extra)
        for a, b in zip(
            [*hats, *symbols, *indices], [*again, *same_symbols, *same_indices], strict=True
        ):
            np.testing.assert_array_equal(a, b)
        if source == FROM_STREAM:
            coder.finish_decode(np.frombuffer(payload, np.uint8), state)


def test_symbols_are_rounded_residuals_within_16_bits():
    z, y, mean, scale = latents(0)
    (z_hat, y_hat), (z_symbols, y_symbols), (_, y_index), _ = coded(
        FROM_PICTURE, (z, y, mean, scale)
    )
    np.testing.assert_array_equal(z_symbols, np.round(z).ravel())
    np.testing.assert_array_equal(z_hat, np.round(z))
    skipped = y_index == coder.SKIP
    expected = np.clip(np.round(y - mean), -32768, 32767).ravel()
    np.testing.assert_array_equal(y_symbols, np.where(skipped, 0, expected))
    assert list(y_symbols[:2]) == [32767, -32768]
    np.testing.assert_array_equal(y_hat, y_symbols.reshape(Y_SHAPE) + mean)


def test_index_counts_the_boundaries_at_or_below_the_scale():
    z, y, mean, scale = latents(0)
    boundaries = SPEC.scale_boundaries
    special = np.concatenate([boundaries, np.nextafter(boundaries, 0), [-1, 0, np.inf, np.nan]])
    scale.flat[: len(special)] = special
    index = coded(FROM_PICTURE, (z, y, mean, scale))[2][1]
    expected = (scale.reshape(-1, 1) >= boundaries).sum(1)
    np.testing.assert_array_equal(index, np.where(expected < 1, coder.SKIP, expected))
    assert (index == coder.SKIP).any() and (index != coder.SKIP).any()


@pytest.mark.parametrize("qp", range(QP_ROWS))
def test_hyper_latents_use_the_tables_of_their_quality(qp):
    index = coded(FROM_PICTURE, latents(0), qp)[2][0]
    expected = 16 + qp * CHANNELS + np.arange(CHANNELS)
    np.testing.assert_array_equal(index.reshape(Z_SHAPE), np.broadcast_to(expected, Z_SHAPE))


def batch_latents():
    return [np.concatenate(pair) for pair in zip(latents(0), latents(1), strict=True)]


def test_estimate_rounds_and_adds_up_the_bits_of_each_image():
    z, y, mean, scale = batch_latents()
    bottleneck = Estimate()
    qp = np.array([0, 2])
    z_hat, y_hat = code_both(bottleneck, z, y, mean, scale, qp)
    np.testing.assert_array_equal(z_hat, np.round(z))
    np.testing.assert_allclose(y_hat, np.round(y - mean) + mean, rtol=1e-6)
    families = [None, "gaussian"]
    assert bottleneck.steps == [(2 * n, f) for n, f in zip(SIZES, families, strict=True)]
    expected = likelihood.factorized_bits(np.round(z), CHAINS[qp]).sum((1, 2, 3))
    np.testing.assert_allclose(bottleneck.bits["z"], expected, rtol=1e-5)
    expected = likelihood.gaussian_bits(np.round(y - mean), scale).sum((1, 2, 3))
    np.testing.assert_allclose(bottleneck.bits["y"], expected, rtol=1e-5)


def test_noise_only_stands_in_for_rounding_in_the_rate():
    z, y, mean, scale = batch_latents()
    bits = {}
    for seed in (0, 0, 1):
        bottleneck = Estimate(jax.random.key(seed))
        z_hat, y_hat = code_both(bottleneck, z, y, mean, scale, np.array([0, 2]))
        np.testing.assert_array_equal(z_hat, np.round(z))
        np.testing.assert_allclose(y_hat, np.round(y - mean) + mean, rtol=1e-6)
        total = bottleneck.bits["z"] + bottleneck.bits["y"]
        np.testing.assert_array_equal(bits.setdefault(seed, total), total)
    assert (bits[0] != bits[1]).all()


def test_noise_is_uniform_and_new_for_every_call():
    bottleneck = Estimate(jax.random.key(0))
    first, second = (np.ravel(bottleneck._stand_in(jnp.zeros(10000), None)) for _ in range(2))
    for noise in (first, second):
        assert -0.5 <= noise.min() < -0.49 and 0.49 < noise.max() <= 0.5
        assert abs(noise.mean()) < 0.01
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.05


def test_gradients_of_the_rate_reach_latents_and_parameters():
    z, y, mean, scale = latents(0)
    y, scale = mean + 0.7 * abs(scale), abs(scale) + 0.2

    def rate(z, y, mean, scale, chain):
        bottleneck = Estimate(jax.random.key(0))
        bottleneck.factorized(z, lambda _: chain, None)
        bottleneck.gaussian(y - mean, scale)
        return (bottleneck.bits["z"] + bottleneck.bits["y"]).sum()

    for gradient in jax.grad(rate, range(5))(z, y, mean, scale, CHAINS[:1]):
        assert np.isfinite(gradient).all() and np.mean(gradient != 0) > 0.9
