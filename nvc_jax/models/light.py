"""Light: P-frames from one reference with searched motion, for real time on small machines.

After the real-time system of Tian et al. (ACM MM 2023, arXiv 2309.11276): explicit motion, low
delay, one frame at a time, entropy coding that decodes on any machine. Ours differs in where the
work is done: motion is found by block search at the encoder and coded as integers (see
`nvc_jax.nn.motion`), and the pixel path is a hybrid codec from the first step of training on, with
learned parts beside it:

    u = compensated picture, v = picture, both as blocks of 8x8 luma and 2 of 4x4 chroma samples
    y = (T(v - u)) / step + E(v, u)           T: cosine transforms; E: where nothing is predicted
    x = u + T'((y^ + D(y^, u, f)) * step)     E and D: networks that start at zero; D where
                                              something is coded
    f = what D saw of the frame               for the next one, moved with the blocks

A linear path beside a learned one trains faster and has no ceiling at high rates (AuxT, arXiv
2501.13751). There is no intra codec: blocks that nothing predicts are coded in any frame, and the
first frame consists of them. They are predicted from a base layer, the means of 32x32 samples:
cosine transforms of 8x8 alone say the brightness of every block of a smooth picture anew.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from nvc_jax.nn.blocks import (
    Blocks,
    Pointwise,
    QpTable,
    depth_to_space,
    space_to_depth,
)
from nvc_jax.nn.compensation import BLANK, compensate, compensate_cells, compensate_features
from nvc_jax.nn.hyperprior import (
    FactorizedPrior,
    HyperDecoder,
    HyperEncoder,
    ParameterNet,
    latent_shapes,
    pad_to_multiple,
)
from nvc_jax.nn.integer import ScaleHead, no_memory
from nvc_jax.nn.motion_search import search
from nvc_jax.nn.spatial_prior import code_in_steps
from nvc_jax.nn.warp import halve
from nvc_jax.quality import QP_ROWS, lambda_of_qp

CELL = 8  # luma samples of a side of a cell of the latent
COEFFICIENTS = CELL**2 + 2 * (CELL // 2) ** 2  # of a cell
STEPS = 2
MARKS = 6  # of motion, for the scale head
FAMILY = "sparse"  # of the latent, see `nvc_jax.entropy.likelihood`
# Squared quantiser step times lambda at which rate and distortion are in balance. At high rates a
# step S costs S^2 / 12 of squared error and saves log2(S) bits; `d_yuv` weighs luma by 10/12 of 3.
BALANCE = 3.46
BASE = 4  # cells of a side of a block of the base layer
BASE_CHANNELS = 3
BASE_STEP = 0.5  # in nominal steps: a mean need not be exact, cells have what it leaves
CHROMA_STEP = 0.75  # in nominal steps: errors of U and V are smaller, but weigh as much, relatively
# What a bit of motion is worth, as squared differences over a squared quantiser step.
MOTION_WEIGHT = 0.115
# Of the encoder's dead zone, from the same balance: a squared step is worth 8.7 bits.
DEAD_ZONE = 0.0577
# Within which scales lie, as logarithms: what tables there are, and a little beyond.
LOG_SCALES = (-2.2, 3.5)
CONTENT = "wide"  # the range of lambda
# Of layers that give means and scales: at first means are near 0, as they are without a network.
SMALL = nn.initializers.normal(0.01)
# What all later frames are copied from is coded better; these are all alike.
INTRA_OFFSET = 18
QP_OFFSETS = (0,)


@dataclass(frozen=True)
class Config:
    """Widths (channels) and depths (blocks) of one size.

    Attributes:
      width: of the features, contexts and decoder.
      z: hyper-latent.
      encoder, context, decoder, fusion, spatial: blocks of each network.
      alone: blocks that go on from the decoder's where nothing predicts.
      scale_head: width of the integer network behind the exact mode, 0 for none.
      form: of the blocks, see `nvc_jax.nn.blocks.DepthConvBlock`.
    """

    width: int = 96
    z: int = 16
    encoder: int = 4
    context: int = 2
    decoder: int = 2
    fusion: int = 2
    spatial: int = 2
    alone: int = 2
    scale_head: int = 96
    form: str = "uf2"

    y = COEFFICIENTS  # channels of the latent


SIZES = {"nano": Config()}


class Ref(NamedTuple):
    """What a slot of the decoded picture buffer holds, and where to look in it.

    Attributes:
      frame: float32 [batch, height, width, 3] in [0, 1].
      feature: float32 [batch, height/8, width/8, width], or None.
      memory: of the scale head, [batch, height/8, width/8, memory channels], or None.
      field: int16 [batch, height/8, width/8, 3], the motion that the frame was coded with, or None.
      motion: likewise, where blocks of the picture to be coded are in this one. None: to be found.
    """

    frame: jax.Array
    feature: jax.Array | None = None
    memory: jax.Array | None = None
    field: jax.Array | None = None
    motion: jax.Array | None = None


def arcsinh(x: jax.Array) -> jax.Array:
    """As `jnp.arcsinh`, in half the time on CPUs; loses precision near 0, about 1e-7."""
    sign = jnp.where(x < 0, -1.0, 1.0)  # not 0 at 0, nor is its gradient
    x = sign * x
    return sign * jnp.log(x + jnp.sqrt(x * x + 1))


def cosine_transform(size: int) -> np.ndarray:
    """float32 [size, size]: rows are the orthonormal basis (DCT-II)."""
    frequency, place = np.arange(size)[:, None], np.arange(size)
    basis = np.cos(np.pi * frequency * (2 * place + 1) / (2 * size)) * np.sqrt(2 / size)
    basis[0] /= np.sqrt(2)
    return basis.astype(np.float32)


def _coefficients() -> tuple[np.ndarray, np.ndarray]:
    """(order of a cell's coefficients, which of them in this order are of luma).

    Those whose frequencies add up to an even number come first. They are one half of what the
    spatial prior codes in a step, so that every step has low and high frequencies of every cell,
    and the second one knows how much there is.
    """
    sizes = CELL, CELL // 2, CELL // 2
    frequencies = [np.add.outer(np.arange(n), np.arange(n)).ravel() for n in sizes]
    order = np.argsort(np.concatenate(frequencies) % 2, kind="stable")
    return order, order < CELL**2


ORDER, IS_LUMA = _coefficients()
# Quantiser steps of coefficients, in nominal ones.
RELATIVE_STEPS = np.where(IS_LUMA, 1, CHROMA_STEP).astype(np.float32)


def _transform_init(key, shape, dtype=jnp.float32):
    """Samples of a cell -> coefficients: [96, 96], 8x8 of luma, 4x4 of U and of V."""
    del key, shape
    kernel = np.zeros((COEFFICIENTS, COEFFICIENTS), np.float32)
    start = 0
    for size in (CELL, CELL // 2, CELL // 2):
        basis = cosine_transform(size)
        end = start + size**2
        kernel[start:end, start:end] = np.kron(basis, basis).T
        start = end
    return jnp.asarray(kernel[:, ORDER], dtype)


def cells_of(luma: jax.Array, chroma: jax.Array) -> jax.Array:
    """[b, h, w, 1] and [b, h/2, w/2, 2] -> [b, h/8, w/8, 96]."""
    return jnp.concatenate([space_to_depth(luma, CELL), space_to_depth(chroma, CELL // 2)], -1)


def planes_of(cells: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Inverse of `cells_of`."""
    luma, chroma = jnp.split(cells, [CELL**2], -1)
    return depth_to_space(luma, CELL), depth_to_space(chroma, CELL // 2)


def split_planes(frame: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A picture [b, h, w, 3] -> luma [b, h, w, 1], and chroma of half the size [b, h/2, w/2, 2]."""
    return frame[..., :1], halve(frame[..., 1:])


def join_planes(luma: jax.Array, chroma: jax.Array) -> jax.Array:
    """Inverse of `split_planes`: chroma samples are repeated."""
    return jnp.concatenate([luma, chroma.repeat(2, 1).repeat(2, 2)], -1)


def block_means(cells: jax.Array, share: jax.Array) -> jax.Array:
    """Means of the base layer's blocks.

    Args:
      cells: float32 [b, h, w, 96] as `cells_of` gives.
      share: [b, h, w, 1], 1 for cells that count, 0 for others.

    Returns:
      float32 [b, ceil(h/4), ceil(w/4), 3] of Y, U, V; 0 for blocks in which nothing counts.
    """
    luma, u, v = jnp.split(cells, [CELL**2, CELL**2 + (CELL // 2) ** 2], -1)
    means = jnp.stack([luma.mean(-1), u.mean(-1), v.mean(-1)], -1)
    return _pooled(means * share) / jnp.maximum(_pooled(share), 1)


def _pooled(x: jax.Array) -> jax.Array:
    """Sums over the base layer's blocks, [b, h, w, c] -> [b, ceil(h/4), ceil(w/4), c]."""
    b, h, w, c = x.shape
    x = jnp.pad(x, ((0, 0), (0, -h % BASE), (0, -w % BASE), (0, 0)))
    return x.reshape(b, -(-h // BASE), BASE, -(-w // BASE), BASE, c).sum((2, 4))


def base_cells(means: jax.Array, known: jax.Array, h: int, w: int) -> jax.Array:
    """The picture that a base layer stands for, bilinear between its blocks.

    Args:
      means: float32 [b, ceil(h/4), ceil(w/4), 3].
      known: [b, ceil(h/4), ceil(w/4), 1], 1 for blocks that have a mean, 0 for others, which do not
        count.

    Returns:
      float32 [b, h, w, 96], as `cells_of` gives; h, w: cells.
    """

    def spread(x, side):
        rows, columns = (
            _interpolation(blocks, side * BASE)[: side * cells]
            for blocks, cells in zip(x.shape[1:3], (h, w), strict=True)
        )
        x = jnp.einsum("ri,bijc->brjc", rows, x, precision=lax.Precision.HIGHEST)
        return jnp.einsum("cj,brjk->brck", columns, x, precision=lax.Precision.HIGHEST)

    def picture(x, side):
        return spread(x * known, side) / jnp.maximum(spread(known, side), 1e-3)

    return cells_of(picture(means[..., :1], CELL), picture(means[..., 1:], CELL // 2))


def _interpolation(blocks: int, size: int) -> np.ndarray:
    """float32 [blocks * size, blocks]: weights of blocks' middles for every sample."""
    place = np.clip((np.arange(blocks * size) + 0.5) / size - 0.5, 0, blocks - 1)
    return np.maximum(0, 1 - np.abs(place[:, None] - np.arange(blocks))).astype(np.float32)


def motion_marks(field: jax.Array) -> jax.Array:
    """What motion says about where prediction fails: small integers, for the scale head.

    Args:
      field: int16 [b, h, w, 3], see `nvc_jax.nn.motion`.

    Returns:
      float32 [b, h, w, 6]: whether a cell is predicted, how far it moves, and by how much that
      differs from each of its four neighbours.
    """
    field = field.astype(jnp.int32)
    vectors = field[..., :2]
    padded = jnp.pad(vectors, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
    _, h, w, _ = field.shape
    far = [jnp.abs(vectors).sum(-1)]
    for row, column in ((0, 1), (2, 1), (1, 0), (1, 2)):
        far.append(jnp.abs(vectors - padded[:, row : row + h, column : column + w]).sum(-1))
    return jnp.stack([field[..., 2], *far], -1).astype(jnp.float32)


def step_of_qp(qp: jax.Array) -> jax.Array:
    """The quantiser step that balances rate and distortion, for samples in [0, 1]."""
    return jnp.sqrt(BALANCE / lambda_of_qp(qp, CONTENT))


class Light(nn.Module):
    """The codec. `dtype` is the compute type of everything but the entropy path (float32)."""

    cfg: Config
    dtype: Any = jnp.float32

    references = 1
    refers_to_pictures = False  # but to frames in its references, which are always there
    frames_per_unit = 1
    searches = True
    qp_rows = QP_ROWS
    rgb = False
    schedule = "low_delay"

    def setup(self):
        c = self.cfg
        self.transform = Pointwise(COEFFICIENTS, kernel_init=_transform_init)
        self.inverse = Pointwise(COEFFICIENTS, kernel_init=lambda *a: _transform_init(*a).T)
        self.q_step = QpTable(QP_ROWS, COEFFICIENTS)  # times `RELATIVE_STEPS`
        self.q_dead_zone = QpTable(QP_ROWS, COEFFICIENTS)
        self.q_context = QpTable(QP_ROWS, c.width)
        # Float32 from here ...
        self.context_in = Pointwise(c.width)
        self.context = Blocks(c.width, c.context, c.form)
        self.hyper_decoder = HyperDecoder(COEFFICIENTS, c.form)
        params = partial(ParameterNet, 2 * COEFFICIENTS, c.width, form=c.form, kernel_init=SMALL)
        self.prior_fusion = params(c.fusion)
        self.spatial_prior = params(c.spatial)
        # Of the hyper-latent and the base layer; frames without references have rows of their own.
        steepness = (1.3,) * c.z + (0.0,) * BASE_CHANNELS
        self.z_prior = FactorizedPrior(2 * QP_ROWS, c.z + BASE_CHANNELS, steepness)
        # ... to here: everything between decoded data and the scales.
        if c.scale_head:
            self.scale_head = ScaleHead(
                COEFFICIENTS, c.scale_head, STEPS, references=1, marks=MARKS
            )
        self.encoder = Blocks(c.width, c.encoder, c.form, self.dtype)
        self.encoder_out = Pointwise(COEFFICIENTS, self.dtype, nn.initializers.zeros)
        self.hyper_encoder = HyperEncoder(c.z, c.form)
        self.decoder = Blocks(c.width, c.decoder, c.form, self.dtype)
        self.decoder_alone = Blocks(c.width, c.alone, c.form, self.dtype)
        self.decoder_out = Pointwise(COEFFICIENTS, self.dtype, nn.initializers.zeros)

    @staticmethod
    def start(frame):
        """A reference that is but a picture [batch, height, width, 3]."""
        return Ref(frame=frame)

    def complete(self, refs, unit, height, width, exact=False):
        """References in the one form that a compiled program of this size takes.

        See `nvc_jax.models.ui2c.UI2C.complete`. `unit.motion` is where the reference's blocks are.
        """
        del unit
        shape = (1, height // CELL, width // CELL)
        ref = refs[0] if refs else Ref(jnp.full((1, height, width, 3), BLANK, jnp.float32))
        if not refs:
            ref = ref._replace(motion=jnp.zeros((*shape, 3), jnp.int16))
        if ref.feature is None:
            ref = ref._replace(feature=jnp.zeros((*shape, self.cfg.width)))
        if ref.field is None:
            ref = ref._replace(field=jnp.zeros((*shape, 3), jnp.int16))
        if exact and ref.memory is None:
            ref = ref._replace(memory=no_memory(COEFFICIENTS, height, width, CELL))
        return (ref,)

    def search(self, frame, ref, qp):
        """Where blocks of a picture are in a reference.

        Args:
          frame: float32 [b, h, w, 3].
          ref: `Ref`; its `motion` does not count.
          qp: int32 [b].

        Returns:
          int16 [b, h/8, w/8, 3], see `nvc_jax.nn.motion`.
        """
        weight = MOTION_WEIGHT * step_of_qp(qp) ** 2
        field = search(frame[..., 0], ref.frame[..., 0], weight, ref.field)
        # In training, some samples have references and others do not.
        blank = jnp.all(ref.frame == BLANK, (1, 2, 3))
        return jnp.where(blank[:, None, None, None], jnp.zeros_like(field), field)

    def __call__(self, frames, refs, qp, bottleneck):
        """Codes one frame.

        Args:
          frames: float32 [batch, 1, height, width, 3], Y, U, V in [0, 1], sides multiples of 16.
            When decoding only the shape counts.
          refs: () for none, or one `Ref`.
          qp: int32 [batch, 1], 0..71.
          bottleneck: see `nvc_jax.entropy.bottleneck`.

        Returns:
          recon: float32 [batch, 1, height, width, 3], 0..1 and possibly a little beyond.
          new_refs: (Ref,) to be kept for the next unit.
        """
        c = self.cfg
        batch, _, height, width, _ = frames.shape
        h, w = height // CELL, width // CELL
        qp = qp[:, 0]
        ref = refs[0] if refs else Ref(jnp.full((batch, height, width, 3), BLANK))
        if ref.motion is None:
            frame, reference = lax.stop_gradient((frames[:, 0], ref))
            ref = ref._replace(motion=self.search(frame, reference, qp))
        field = bottleneck.motion(ref.motion)

        none = 1 - field[..., 2:].astype(jnp.float32)
        known = jnp.minimum(_pooled(none), 1)  # blocks of the base layer
        step = step_of_qp(qp)[:, None, None, None]
        compensated = cells_of(*(compensate(plane, field) for plane in split_planes(ref.frame)))

        gain = 1 / (step * RELATIVE_STEPS * self.q_step(qp))
        moved = jnp.zeros((batch, h, w, c.width))
        if ref.feature is not None:
            moved = compensate_features(ref.feature, field)

        def texture(u):
            return arcsinh(self.transform(u - BLANK) * gain)

        def where_some(module, fn, size, *args, always=False):
            """fn(module, *args) [b, h, w, size] where cells are predicted from nothing, or zeros.

            Most frames have no such cells.
            """
            if always or module.is_initializing():
                return fn(module, *args)
            zeros = jnp.zeros((batch, h, w, size))
            return nn.cond(jnp.any(none > 0), fn, lambda *_: zeros, module, *args)

        def predicted(m, base):
            def from_means(m, base):
                return none * base_cells(base * (step * BASE_STEP), known, h, w)

            return compensated + where_some(m, from_means, c.y, base)

        def learned_analysis(m, y, texture):  # see configs/light_nano.py
            features = m.encoder(jnp.concatenate([arcsinh(y), texture], -1).astype(m.dtype))
            return none * m.encoder_out(features).astype(jnp.float32)

        def analysis(m):
            cells = cells_of(*split_planes(frames[:, 0]))
            base = block_means(cells - BLANK, none) / (step * BASE_STEP)
            base = jnp.round(lax.stop_gradient(base))
            u = predicted(m, base)
            y = m.transform(cells - u) * gain
            y += where_some(m, learned_analysis, c.y, y, texture(u))
            z = m.hyper_encoder(pad_to_multiple(arcsinh(y), 4))
            return y, jnp.concatenate([z, base], -1)

        shapes = latent_shapes(batch, h, w, c.y, c.z + BASE_CHANNELS)
        y, z = bottleneck.encoder_only(self, analysis, *shapes)
        intra = jnp.all(none > 0, (1, 2, 3))
        coded = jnp.concatenate(
            [jnp.ones((*known.shape[:3], c.z)), known.repeat(BASE_CHANNELS, -1)], -1
        )
        z_hat = bottleneck.factorized(z, self.z_prior, qp + QP_ROWS * intra, coded > 0)
        hyper, base = jnp.split(z_hat, [c.z], -1)
        u = predicted(self, base)
        context = self.context_in(jnp.concatenate([texture(u), moved, none], -1))
        context = self.context(context * self.q_context(qp))

        def first(m, hyper):
            hyper = m.hyper_decoder(hyper)[:, :h, :w]
            return m.prior_fusion(jnp.concatenate([hyper, context], -1))

        def second(m, y_hat):
            return params + m.spatial_prior(jnp.concatenate([arcsinh(y_hat), params], -1))

        def split(params):
            log_scale, mean = jnp.split(params, 2, -1)
            # What motion predicts has residuals without means: see configs/light_nano.py.
            return mean * none, jnp.exp(jnp.clip(log_scale, *LOG_SCALES))

        # Scales of the exact mode come from elsewhere.
        params = where_some(self, first, c.y * 2, hyper, always=bottleneck.float_scales)

        def predict(step, y_hat):
            if step == 0:
                return split(params)
            return split(where_some(self, second, c.y * 2, y_hat, always=bottleneck.float_scales))

        levels = memory = None
        if bottleneck.exact:
            remembered = None if ref.memory is None else compensate_cells(ref.memory, field)
            hidden = self.scale_head.begin(
                z_hat, qp[:, None], [remembered], (h, w), motion_marks(field)
            )
            levels = partial(self.scale_head.level, hidden)
        y_hat, symbols, level_map = code_in_steps(
            y, STEPS, predict, bottleneck, levels, FAMILY, DEAD_ZONE * self.q_dead_zone(qp)
        )
        if bottleneck.exact:
            memory = self.scale_head.remember(hidden, symbols, level_map)

        decoded = jnp.concatenate([arcsinh(y_hat), context], -1).astype(self.dtype)
        feature = self.decoder(decoded)

        def go_on(m, feature):
            return m.decoder_alone(feature).astype(jnp.float32)

        alone = where_some(self, go_on, c.width, feature)
        feature = jnp.where(none > 0, alone.astype(self.dtype), feature)
        y_hat += self.decoder_out(feature).astype(jnp.float32)
        # Cells without symbols near them are copies, or what networks make of them would add up.
        changed = jnp.maximum(jnp.any(symbols != 0, -1, keepdims=True), none)
        changed = nn.max_pool(changed, (3, 3), padding="SAME")
        recon = join_planes(*planes_of(u + self.inverse(changed * y_hat / gain)))
        new = Ref(jnp.clip(recon, 0, 1), feature.astype(jnp.float32), memory, field)
        return recon[:, None], (new,)
