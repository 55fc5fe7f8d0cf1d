"""The two bottlenecks: what happens to a latent depends on who asks.

A codec's forward pass is written once and given a bottleneck. `Estimate` counts bits with gradients
(training, rate-distortion estimates). `Coded` is the real thing, and serves encoder, decoder and
verifier with *one* compiled program: an integer input says whether the symbols come from
the picture, from the stream, or from the caller. Encoder and decoder thus run the same machine code
on the way from symbols to pictures and cannot drift apart on one machine, whatever the compiler
does with floating-point sums.

Bottleneck interface, used by the models:
  encoder_only(module, fn, *shapes) -> arrays      fn(module), computed only if a picture is coded
  decoder_only(module, fn, *shapes) -> arrays      fn(module), computed only if pictures are wanted,
                                                   to be shown or to be referred to
  factorized(z, prior, row, coded) -> symbols      rounded hyper-latent; prior: `FactorizedPrior`;
                                                   coded: where not, symbols are 0 at no cost
  exact                                            whether scales come as levels or as floats
  float_scales                                     whether float scales are looked at all the same
  gaussian(residual, scale)  -> symbols            rounded y - mean; one call per step
  laplace(residual, scale)   -> symbols            the same for another distribution
  sparse(residual, scale)    -> symbols            likewise
  leveled(residual, level, scale, family) -> symbols  the same under scale levels; scale: to compare
  dead_zone(residual, scale, strength, family) -> residual  see `likelihood.dead_zone`
  motion(field) -> field                           motion that the encoder has found and sends
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from nvc_jax.entropy import calibration, likelihood
from nvc_jax.entropy.calibration import CALIBRATED, EXACT, Margin
from nvc_jax.entropy.coder import SKIP
from nvc_jax.nn.materialize import materialized
from nvc_jax.nn.motion import field_bits

# Where a coded unit's symbols come from: the values of `Coded`'s `source` input.
FROM_PICTURE, FROM_STREAM, FROM_CALLER = 0, 1, 2


class Step(NamedTuple):
    """One call of a bottleneck.

    Attributes:
      size: number of elements.
      family: of their distributions, see `likelihood.BITS`; None for a hyper-latent's, whose
        tables are fixed.
    """

    size: int
    family: str | None


# What a unit consists of, see `Estimate.bits`.
NO_BITS = {"z": 0.0, "y": 0.0, "y_float": 0.0, "side": 0.0, "motion": 0.0}


class Estimate:
    """Training and rate estimates: straight-through rounding, bits from the likelihoods.

    Attributes:
      bits: `NO_BITS`'s names -> float32 [batch], bits so far; "y_float": what "y" would be under
        float scales; "side": the calibrated mode's lists, not for `exact`; "motion": without
        gradients.
      steps: the calls so far, each a `Step`.
    """

    def __init__(
        self,
        noise_key: jax.Array | None = None,
        exact: bool = False,
        detached: bool = False,
        penalty: Callable[[jax.Array], jax.Array] | None = None,
        as_published: bool = False,
        rounded: bool = False,
    ):
        """
        Args:
          noise_key: additive uniform noise replaces rounding in the rate. It has gradients that
            are right on average, but overestimates low rates: scales are never seen to be small.
          exact: scales come from the integer scale head.
          detached: "y" counts the symbols, noise or not, and has no gradients with respect to them:
            the scale head learns from what it will code, the latent from "y_float".
          penalty: of a float scale, elementwise, see `nvc_jax.training.losses`; `self.penalty`
            adds it up, float32 [batch].
          as_published: see `likelihood.gaussian_bits`.
          rounded: rates are those of rounded symbols, from which their distributions learn; noise
            only gives latents and means their gradients, under distributions taken as they are.
            For latents that are nearly all 0, where noise would hide how little these cost. What a
            latent does to pictures has gradients outside of its dead zone.
        """
        self._key, self.exact, self._detached, self._penalty = noise_key, exact, detached, penalty
        self._as_published, self._rounded = as_published, rounded
        self.bits = dict(NO_BITS)
        self.steps, self.penalty = [], 0.0

    float_scales = True

    def encoder_only(self, module, fn, *shapes):
        return fn(module)

    decoder_only = encoder_only

    def _stand_in(self, value, family):
        self.steps.append(Step(value.size, family))
        if self._key is None:
            return likelihood.round_straight_through(value)
        self._key, key = jax.random.split(self._key)
        return value + jax.random.uniform(key, value.shape, minval=-0.5, maxval=0.5)

    dead_zone = staticmethod(likelihood.dead_zone)

    def motion(self, field):
        self.bits["motion"] += field_bits(field)
        return field

    def factorized(self, z, prior, row, coded=None):
        if coded is not None:
            z = jnp.where(coded, z, 0)
        stand_in = self._stand_in(z, None)

        def bits(value, chain):
            every = likelihood.factorized_bits(value, chain)
            return every if coded is None else jnp.where(coded, every, 0)

        self.bits["z"] += self._rate(bits, z, stand_in, prior(row))
        return likelihood.round_straight_through(z)

    def gaussian(self, residual, scale):
        return self._latent(residual, scale, scale)

    def laplace(self, residual, scale):
        return self._latent(residual, scale, scale, "laplace")

    def sparse(self, residual, scale):
        return self._latent(residual, scale, scale, "sparse")

    def leveled(self, residual, level, scale, family="gaussian"):
        return self._latent(residual, likelihood.scale_of_level(level), scale, family)

    def _rate(self, bits, value, stand_in, distribution):
        if not self._rounded:
            return bits(stand_in, distribution).sum((1, 2, 3))
        symbols, known = lax.stop_gradient((jnp.round(value), distribution))
        smooth = bits(stand_in, known)
        return (bits(symbols, distribution) + smooth - lax.stop_gradient(smooth)).sum((1, 2, 3))

    def _latent(self, residual, used, scale, family="gaussian"):
        stand_in = self._stand_in(residual, family)
        bits = partial(likelihood.BITS[family], as_published=self._as_published)
        if self._detached:
            self.bits["y"] += bits(lax.stop_gradient(jnp.round(residual)), used).sum((1, 2, 3))
        else:
            self.bits["y"] += self._rate(bits, residual, stand_in, used)
        self.bits["y_float"] += self._rate(bits, residual, stand_in, scale)
        if not self.exact:
            self.bits["side"] += likelihood.list_bits(scale, 2.0**-calibration.MARGIN_EXPONENT)
        if self._penalty is not None:
            self.penalty += self._penalty(scale).sum((1, 2, 3))
        if not self._rounded:
            return likelihood.round_straight_through(residual)
        # Rounding on average has a slope of 1, under noise of half a step. But a dead zone, which
        # leaves residuals of 0, is a flat piece: gradients that did not know would lift latents to
        # its edge everywhere.
        symbols = lax.stop_gradient(jnp.round(residual))
        return symbols + jnp.where(residual == 0, 0, residual - lax.stop_gradient(residual))


class Family(NamedTuple):
    """Tables of one kind of distribution, one for each level of its scale.

    Attributes:
      base: table of level 0.
      skip_below: levels below this are not coded.
    """

    base: int
    skip_below: int


class CodingSpec(NamedTuple):
    """Integer side of a released model: how float scales become table indices.

    Attributes:
      scale_boundaries: float32 [levels - 1], ascending; level = number of boundaries <= scale.
      families: "gaussian", "laplace" -> `Family`.
      priors: path of a `FactorizedPrior` in the model -> table of its (row 0, channel 0); the
        others follow row by row.
    """

    scale_boundaries: np.ndarray
    families: dict[str, Family]
    priors: dict[str, int]


class Coded:
    """Encoding, decoding and replaying: integer symbols under integer table indices.

    One image at a time (batch 1). After the forward pass `symbols` (int16) and `indices` (uint16)
    hold one flat array per step, in coding order, and `state` the coder's state; `scales` (float32;
    not if EXACT) and `flags` (bool; only if CALIBRATED) one per step with scales.
    """

    def __init__(
        self,
        spec: CodingSpec,
        mode: int,
        source: jax.Array,
        render: jax.Array,
        pull: Callable,
        state: jax.Array,
        given: jax.Array,
        margin: Margin | None = None,
        flags: jax.Array | None = None,
    ):
        """
        Args:
          spec: see `CodingSpec`.
          mode: FLOAT, CALIBRATED or EXACT.
          source: int32 [], one of FROM_PICTURE, FROM_STREAM, FROM_CALLER.
          render: bool [], whether pictures are wanted.
          pull: (state, index uint16 [n]) -> (symbols int16 [n], state); reaches the host coder.
          state: the coder's state, passed to and replaced by `pull`.
          given: int16 [total], all symbols in coding order for FROM_CALLER.
          margin: CALIBRATED only, see `nvc_jax.entropy.calibration`.
          flags: CALIBRATED only, bool [total], elements that take the nearest level; not used
            FROM_PICTURE, where the program finds them.
        """
        self._spec, self._source, self._render, self._pull = spec, source, render, pull
        self._mode, self._margin, self._given_flags = mode, margin, flags
        self.state, self._given, self._position = state, given, 0
        self.symbols, self.indices, self.flags, self.scales = [], [], [], []

    @property
    def exact(self):
        return self._mode == EXACT

    @property
    def float_scales(self):
        return not self.exact

    @staticmethod
    def _only_if(predicate, module, fn, shapes):
        zeros = tuple(jnp.zeros(s.shape, s.dtype) for s in shapes)
        return nn.cond(predicate, lambda m: tuple(fn(m)), lambda m: zeros, module)

    def encoder_only(self, module, fn, *shapes):
        return self._only_if(self._source == FROM_PICTURE, module, fn, shapes)

    def decoder_only(self, module, fn, *shapes):
        return self._only_if(self._render, module, fn, shapes)

    def dead_zone(self, residual, scale, strength, family):
        return lax.cond(
            self._source == FROM_PICTURE,
            lambda: likelihood.dead_zone(residual, scale, strength, family),
            lambda: residual,
        )

    @staticmethod
    def motion(field):
        return field  # which the host has coded, or decoded, before

    def _code(self, value, index):
        """value float32 [1, h, w, c] (used by the encoder), index int32 same shape -> symbols."""
        shape, n = value.shape, value.size
        # This pins what the three sources see, so that none is fused with its neighbours.
        value, index = materialized(value), materialized(index.astype(jnp.uint16))
        value, index = value.reshape(n), index.reshape(n)
        skipped = index == SKIP
        given = lax.dynamic_slice(self._given, (self._position,), (n,))

        def from_picture():
            symbol = jnp.clip(jnp.round(value), -32768, 32767).astype(jnp.int16)
            return jnp.where(skipped, jnp.int16(0), symbol), self.state

        symbols, self.state = lax.switch(
            self._source,
            [from_picture, lambda: self._pull(self.state, index), lambda: (given, self.state)],
        )
        symbols, self.state = lax.optimization_barrier((symbols, self.state))
        self._position += n
        self.symbols.append(symbols)
        self.indices.append(index)
        return symbols.astype(jnp.float32).reshape(shape)

    def factorized(self, z, prior, row, coded=None):
        channels = z.shape[-1]
        base = self._spec.priors["/".join(prior.path)]
        first = base + row[:, None, None, None] * channels
        index = jnp.broadcast_to(first + jnp.arange(channels), z.shape)
        return self._code(z, index if coded is None else jnp.where(coded, index, SKIP))

    def gaussian(self, residual, scale):
        return self._scaled(residual, scale, self._spec.families["gaussian"])

    def laplace(self, residual, scale):
        return self._scaled(residual, scale, self._spec.families["laplace"])

    def sparse(self, residual, scale):
        return self._scaled(residual, scale, self._spec.families["sparse"])

    def leveled(self, residual, level, scale, family="gaussian"):
        return self._leveled(residual, level.astype(jnp.int32), self._spec.families[family])

    def _scaled(self, residual, scale, family):
        scale = lax.optimization_barrier(scale)
        self.scales.append(scale.reshape(-1))
        boundaries = jnp.asarray(self._spec.scale_boundaries)
        level = jnp.sum(scale[..., None] >= boundaries, axis=-1, dtype=jnp.int32)
        if self._mode == CALIBRATED:
            level = self._calibrate(scale, level, family.skip_below)
        return self._leveled(residual, level, family)

    def _leveled(self, residual, level, family):
        index = jnp.where(level < family.skip_below, SKIP, family.base + level)
        return self._code(residual, index)

    def _calibrate(self, scale, floor, skip_below):
        nearest = calibration.nearest(scale, floor, self._margin)
        flags = self._given_flags[self._position : self._position + scale.size]
        flags = lax.cond(
            self._source == FROM_PICTURE,
            lambda: calibration.uncertain(scale, floor, self._margin, skip_below),
            lambda: flags.reshape(scale.shape),
        )
        self.flags.append(flags.reshape(-1))
        return jnp.where(flags, nearest, floor)
