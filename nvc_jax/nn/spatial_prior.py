"""Spatial priors: a latent is coded in steps, each of which knows what the ones before decoded to.

Sources: DCVC-RT (arXiv 2502.20762) for the order; DCVC-UF (arXiv 2606.04410) for steps that refine
nothing but means.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from nvc_jax.entropy.likelihood import lower_bound, round_straight_through, scale_of_level


def split_params(params: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Parameters of a latent [b, h, w, 3 c] -> its (step sizes, scales, means), [b, h, w, c] each.

    What is left of the latent behind its means is coded in multiples of the step sizes, which are
    at least 1/2.
    """
    step_size, scale, mean = jnp.split(params, 3, axis=-1)
    return lower_bound(step_size, 0.5), scale, mean


def step_groups(height: int, width: int, steps: int) -> Callable[[int], jax.Array]:
    """Which channel group is coded where, in each step of a two- or four-step spatial prior.

    The channels are cut into `steps` groups. At every position each step codes one group, so that
    after all steps everything is coded once and every step sees neighbours of all groups. With the
    phase p of a position (its parity for two steps; 2*(row%2) + column%2 for four), step s codes
    group p XOR c(s), c = 0, 1 or 0, 3, 2, 1: the tables of DCVC-RT in one line.

    Returns:
      A function step -> int32 [height, width] of group numbers.
    """
    rows, cols = jnp.arange(height)[:, None], jnp.arange(width)[None, :]
    if steps == 2:
        phase, code = (rows + cols) % 2, (0, 1)
    else:
        phase, code = 2 * (rows % 2) + cols % 2, (0, 3, 2, 1)
    return lambda step: phase ^ code[step]


def pack_step(x: jax.Array, group: jax.Array, steps: int) -> jax.Array:
    """Keeps the active group of every position: [b, h, w, c] -> [b, h, w, c/steps]."""
    parts = jnp.split(x, steps, axis=-1)
    out = parts[0]
    for g in range(1, steps):
        out = jnp.where((group == g)[..., None], parts[g], out)
    return out


def unpack_step(x: jax.Array, group: jax.Array, steps: int) -> jax.Array:
    """Puts a packed step back in place, zeros elsewhere: [b, h, w, c/steps] -> [b, h, w, c]."""
    return jnp.concatenate(
        [jnp.where((group == g)[..., None], x, 0) for g in range(steps)], axis=-1
    )


def code_in_steps(
    y,
    steps: int,
    predict: Callable,
    bottleneck,
    levels: Callable | None = None,
    family: str = "gaussian",
    dead_zone: jax.Array | None = None,
):
    """Codes a latent group by group, each step knowing what the ones before decoded to.

    Args:
      y: float32 [b, h, w, c]; ignored when decoding.
      predict: (step, y_hat so far) -> (mean, scale), both [b, h, w, c].
      bottleneck: see `nvc_jax.entropy.bottleneck`.
      levels: (step, symbols so far) -> scale levels [b, h, w, c], which replace the scales.
      family: of the distributions, see `nvc_jax.entropy.likelihood.BITS`.
      dead_zone: [b, 1, 1, c], strength of the encoder's dead zone, see
        `nvc_jax.entropy.likelihood.dead_zone`; None for none.

    Returns:
      (y_hat, symbols, levels), all [b, h, w, c]; levels are None if none were given.
    """
    group = step_groups(*y.shape[1:3], steps)
    y_hat = symbols = jnp.zeros_like(y)
    level_map = None
    for s in range(steps):
        mean, scale = (pack_step(p, group(s), steps) for p in predict(s, y_hat))
        residual = pack_step(y, group(s), steps) - mean
        level = None if levels is None else pack_step(levels(s, symbols), group(s), steps)
        if dead_zone is not None:
            used = scale if level is None else scale_of_level(level)
            strength = pack_step(jnp.broadcast_to(dead_zone, y.shape), group(s), steps)
            residual = bottleneck.dead_zone(residual, used, strength, family)
        if level is None:
            coded = getattr(bottleneck, family)(residual, scale)
        else:
            coded = bottleneck.leveled(residual, level, scale, family)
            placed = unpack_step(level, group(s), steps)
            level_map = placed if level_map is None else level_map + placed
        symbols = symbols + unpack_step(coded, group(s), steps)
        y_hat = y_hat + unpack_step(coded + mean, group(s), steps)
    return y_hat, symbols, level_map


def code_at_once(
    module,
    y,
    steps: int,
    scale,
    predict: Callable,
    bottleneck,
    level=None,
):
    """Codes a latent in one call of the coder: all scales are known before, only means are refined.

    The networks for the means run twice in an encoder, once to find the symbols and once from them
    as in a decoder, and there without waiting for the host in between (DCVC-UF, arXiv 2606.04410).

    Args:
      module: whose networks `predict` uses.
      y: float32 [b, h, w, c]; ignored when decoding.
      scale: [b, h, w, c].
      predict: (module, step, y_hat so far) -> means [b, h, w, c].
      bottleneck: see `nvc_jax.entropy.bottleneck`.
      level: [b, h, w, c], scale levels in the place of the scales, or None.

    Returns:
      (y_hat, symbols), both [b, h, w, c].
    """
    group = step_groups(*y.shape[1:3], steps)

    def walk(m, residual_of):
        residual = y_hat = jnp.zeros_like(y)
        for s in range(steps):
            mean = pack_step(predict(m, s, y_hat), group(s), steps)
            own = residual_of(s, mean)
            residual = residual + unpack_step(own, group(s), steps)
            y_hat = y_hat + unpack_step(round_straight_through(own) + mean, group(s), steps)
        return residual, y_hat

    def of_picture(s, mean):
        return pack_step(y, group(s), steps) - mean

    def of_symbols(s, mean):
        return pack_step(symbols, group(s), steps)

    shape = jax.ShapeDtypeStruct(y.shape, y.dtype)
    (residual,) = bottleneck.encoder_only(module, lambda m: walk(m, of_picture)[:1], shape)
    if level is None:
        symbols = bottleneck.gaussian(residual, scale)
    else:
        symbols = bottleneck.leveled(residual, level, scale)
    return walk(module, of_symbols)[1], symbols
