"""UI2C: one network for intra and inter, two frames coded at once.

Source: arXiv 2510.14431. The paper gives the scheme and three totals (46.7 M parameters, 157/233
kMAC per pixel); the layer widths are our own search under DCVC-RT's topology and meet all three
within 1 %.

There is no intra model: the first pair refers to a blank (mid-grey) frame through the first-frame
adaptor. A pair is one latent and one stream; the second frame is a backward reference of the first
for free. Each frame of a pair has its own quality index, and every quality table holds two halves,
one looked up by each frame's index. `Config.frames` 1 is the same network without pairs, to compare
with; under the size "dcvc_rt" it is the P-frame codec that UI2C grew from.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from nvc_jax.nn.blocks import (
    Blocks,
    Conv3x3,
    DepthConvBlock,
    Down,
    Pointwise,
    QpTable,
    depth_to_space,
    space_to_depth,
)
from nvc_jax.nn.hyperprior import (
    FactorizedPrior,
    HyperDecoder,
    HyperEncoder,
    ParameterNet,
    latent_shapes,
    leading_ones,
    pad_to_multiple,
)
from nvc_jax.nn.integer import ScaleHead, no_memory
from nvc_jax.nn.spatial_prior import code_in_steps, split_params
from nvc_jax.quality import QP_ROWS

# Weights on the distortion by frame number modulo 8, in training; better-coded frames count more.
FRAME_WEIGHTS = (0.52, 1.33, 0.52, 0.83, 0.52, 0.83, 0.52, 0.83)


@dataclass(frozen=True)
class Config:
    """Widths (channels) and depths (blocks) of one size.

    `prior` is the width of the blocks of the prior fusion and the spatial prior, `temporal` that of
    the temporal prior. `subpixel` is the kernel of the decoder's first layer (3 or 1). Block forms:
    see `nvc_jax.nn.blocks.DepthConvBlock`. `latent_gain` adds a quality table that scales the
    latent before quantisation and back after it, from a start that spans the whole range of rates:
    our addition, without which short trainings do not get the qualities apart. `scale_head` is the
    width of the integer network behind the exact mode (`nvc_jax.nn.integer`), 0 for none. `frames`
    are coded at once: 2, or 1. `offset` is subtracted from pictures (0.5: signed networks).
    """

    width: int = 384
    y: int = 128
    z: int = 128
    recon: int = 448
    prior: int = 384
    temporal: int = 256
    extractor: tuple[int, int] = (2, 5)
    encoder: int = 3
    decoder: int = 3
    recon_blocks: int = 4
    fusion: int = 5
    spatial: int = 4
    subpixel: int = 3
    form: str = "rt"
    latent_gain: bool = False
    scale_head: int = 0
    frames: int = 2
    offset: float = 0.5


SIZES = {
    "base": Config(),
    "plain": Config(extractor=(2, 4), fusion=3, spatial=2),
    "dcvc_rt": Config(
        width=256, recon=320, extractor=(2, 4), fusion=3, spatial=2, frames=1, offset=0.0
    ),
    "dev": Config(
        width=192, y=96, z=96, recon=192, prior=288, temporal=192, extractor=(2, 2),
        encoder=2, decoder=2, recon_blocks=2, fusion=2, spatial=2,
    ),
    "nano": Config(
        width=144, y=160, z=48, recon=112, prior=160, temporal=128, extractor=(2, 2),
        encoder=2, decoder=2, recon_blocks=2, fusion=2, spatial=1, subpixel=1, form="uf2",
        latent_gain=True, scale_head=160,
    ),
}  # fmt: skip


class Ref(NamedTuple):
    """What a slot of the decoded picture buffer holds. Where there is a feature, it counts.

    Attributes:
      frame: float32 [batch, height, width, 3] in [0, 1], or None.
      feature: float32 [batch, height/8, width/8, width], or None.
      bare: bool [], disregard the feature and start from the frame, mid-grey if there is none.
        Lets one compiled program serve both kinds of unit. None: what is there is used.
      memory: [batch, height/16, width/16, memory_channels(y)], what the scale head remembers of
        the unit, or None.
    """

    frame: jax.Array | None = None
    feature: jax.Array | None = None
    bare: jax.Array | None = None
    memory: jax.Array | None = None


class FrameTables(nn.Module):
    """A learned table for each frame of a unit: qp [b, frames] -> [b, 1, 1, channels]."""

    channels: int
    dtype: Any = jnp.float32
    ramp: bool = False

    @nn.compact
    def __call__(self, qp):
        each = self.channels // qp.shape[1]
        tables = [
            QpTable(QP_ROWS, each, self.dtype, self.ramp, name=f"frame{i}")(qp[:, i])
            for i in range(qp.shape[1])
        ]
        return jnp.concatenate(tables, axis=-1)


class Encoder(nn.Module):
    cfg: Config
    dtype: Any

    @nn.compact
    def __call__(self, frames, ctx, q):
        c = self.cfg
        x = jnp.concatenate([frames[:, i] for i in range(c.frames)], axis=-1)
        x = Pointwise(c.width, self.dtype, name="patch")(space_to_depth(x, 8))
        x = jnp.concatenate([x, ctx], axis=-1)
        x = Blocks(c.width, c.encoder, c.form, self.dtype, name="blocks")(x)
        return Conv3x3(c.y, 2, self.dtype, name="latent")(x * q)


class Decoder(nn.Module):
    cfg: Config
    dtype: Any

    @nn.compact
    def __call__(self, y_hat, ctx, q):
        c = self.cfg
        up = Conv3x3 if c.subpixel == 3 else Pointwise
        x = depth_to_space(up(4 * c.width, dtype=self.dtype, name="subpixel")(y_hat), 2)
        x = jnp.concatenate([x, ctx], axis=-1)
        x = Blocks(c.width, c.decoder, c.form, self.dtype, name="blocks")(x)
        return Pointwise(c.width, self.dtype, name="feature")(x) * q


class ReconHead(nn.Module):
    cfg: Config
    dtype: Any

    @nn.compact
    def __call__(self, feature, q):
        x = Blocks(self.cfg.recon, self.cfg.recon_blocks, self.cfg.form, self.dtype, name="blocks")(
            feature
        )
        return depth_to_space(Pointwise(192, self.dtype, name="pixels")(x * q), 8)


class UI2C(nn.Module):
    """The codec. `dtype` is the compute type of everything but the entropy path (float32).

    The entropy path is what lies between a unit's decoded symbols and its scales. References come
    out of the decoder in `dtype` arithmetic, so across units only float32 models keep it entirely.
    """

    cfg: Config
    dtype: Any = jnp.float32

    references = 1
    refers_to_pictures = False
    qp_rows = QP_ROWS
    rgb = False  # whether pictures are R, G, B and not Y, U, V

    @property
    def frames_per_unit(self) -> int:
        return self.cfg.frames

    @property
    def schedule(self) -> str:
        return "two_frame" if self.cfg.frames == 2 else "low_delay"

    def setup(self):
        c = self.cfg
        # Float32 from here ...
        self.feature_adaptor_i = DepthConvBlock(c.width, c.form)
        self.feature_adaptor_p = Pointwise(c.width)
        self.extractor_1 = Blocks(c.width, c.extractor[0], c.form)
        self.q_feature = FrameTables(c.width, ramp=c.latent_gain)
        if c.latent_gain:
            self.q_latent = FrameTables(c.y, ramp=True)
        self.temporal_prior_encoder = Down(c.temporal, c.form)
        self.hyper_decoder = HyperDecoder(c.y, c.form)
        self.prior_fusion = ParameterNet(3 * c.y, c.prior, c.fusion, c.form, leading_ones(2 * c.y))
        self.spatial_prior = ParameterNet(2 * c.y, c.prior, c.spatial, c.form, leading_ones(c.y))
        self.z_prior = FactorizedPrior(QP_ROWS, c.z)
        # ... to here: everything between decoded data and the scales.
        if c.scale_head:
            self.scale_head = ScaleHead(c.y, c.scale_head, steps=2, references=1)
        self.extractor_2 = Blocks(c.width, c.extractor[1], c.form, self.dtype)
        self.encoder = Encoder(c, self.dtype)
        self.hyper_encoder = HyperEncoder(c.z, c.form)
        self.decoder = Decoder(c, self.dtype)
        self.q_encoder = FrameTables(c.width, self.dtype)
        self.q_decoder = FrameTables(c.width, self.dtype)
        self.recon_head = [ReconHead(c, self.dtype) for _ in range(c.frames)]
        self.q_recon = [QpTable(QP_ROWS, c.recon, self.dtype) for _ in range(c.frames)]

    @staticmethod
    def start(frame):
        """What the first unit behind an intra frame [batch, height, width, 3] refers to."""
        return Ref(frame=frame)

    def complete(self, refs, unit, height, width, exact=False):
        """References in the one form that a compiled program of this size takes.

        Args:
          refs: what the units that are referred to left; () for a blank reference.
          unit: of the schedule, for what else a codec may want to know.
          height, width: of the padded pictures.
          exact: whether the scale head is used.
        """
        ref = refs[0] if refs else Ref()
        bare = ref.feature is None or unit.picture_only
        if ref.feature is None:
            ref = ref._replace(feature=jnp.zeros((1, height // 8, width // 8, self.cfg.width)))
        if exact and ref.memory is None:
            ref = ref._replace(memory=no_memory(self.cfg.y, height, width))
        return (ref._replace(bare=jnp.bool_(bare)),)

    def _reference(self, ref, shape):
        """Reference feature [batch, height/8, width/8, width]."""

        def from_frame(m):
            # Mid-grey: the paper's "blank frame".
            frame = jnp.full(shape, 0.5) if ref.frame is None else ref.frame
            return m.feature_adaptor_i(space_to_depth(frame - m.cfg.offset, 8))

        def from_feature(m):
            return m.feature_adaptor_p(ref.feature)

        if ref.feature is None:
            return from_frame(self)
        if ref.bare is None:
            return from_feature(self)
        return nn.cond(ref.bare, from_frame, from_feature, self)

    def __call__(self, frames, refs, qp, bottleneck):
        """Codes one unit of n frames: a pair, or a single one (`Config.frames`).

        Args:
          frames: float32 [batch, n, height, width, 3], Y, U, V in [0, 1], sides multiples of 16.
            When decoding only the shape counts.
          refs: () for a blank reference, or one `Ref`.
          qp: int32 [batch, n], 0..71.
          bottleneck: see `nvc_jax.entropy.bottleneck`.

        Returns:
          recon: float32 [batch, n, height, width, 3], 0..1 and possibly a little beyond.
          new_refs: (Ref,) to be kept for the next unit.
        """
        c = self.cfg
        batch, _, height, width, _ = frames.shape
        ref = refs[0] if refs else Ref()
        reference = self._reference(ref, (batch, height, width, 3))
        early = self.extractor_1(reference)
        ctx = self.extractor_2(early.astype(self.dtype))

        gain = self.q_latent(qp) if c.latent_gain else 1.0

        def analysis(m):
            y = m.encoder((frames - c.offset).astype(m.dtype), ctx, m.q_encoder(qp))
            y = y.astype(jnp.float32) * gain
            return y, m.hyper_encoder(pad_to_multiple(y, 4))

        h, w = height // 16, width // 16
        shapes = latent_shapes(batch, h, w, c.y, c.z)
        y, z = bottleneck.encoder_only(self, analysis, *shapes)

        # Of a pair, only the second frame's index changes with the frame number's class.
        z_hat = bottleneck.factorized(z, self.z_prior, qp[:, -1])
        hyper = self.hyper_decoder(z_hat)[:, :h, :w]
        temporal = self.temporal_prior_encoder(early * self.q_feature(qp))
        params = self.prior_fusion(jnp.concatenate([hyper, temporal], axis=-1))
        step_size, scale, mean = split_params(params)

        def predict(step, y_hat):
            if step == 0:
                return mean, scale
            prior_input = jnp.concatenate([y_hat, params], axis=-1)
            return jnp.split(self.spatial_prior(prior_input), 2, axis=-1)[::-1]

        levels = memory = None
        if bottleneck.exact:
            hidden = self.scale_head.begin(z_hat, qp, [ref.memory], (h, w))
            levels = partial(self.scale_head.level, hidden)
        y_hat, symbols, level_map = code_in_steps(y / step_size, 2, predict, bottleneck, levels)
        if bottleneck.exact:
            memory = self.scale_head.remember(hidden, symbols, level_map)
        y_hat = y_hat * step_size / gain

        feature = self.decoder(y_hat.astype(self.dtype), ctx, self.q_decoder(qp))

        def render(m):
            recons = [
                head(feature, q(qp[:, i]))
                for i, (head, q) in enumerate(zip(m.recon_head, m.q_recon, strict=True))
            ]
            return (jnp.stack(recons, axis=1).astype(jnp.float32) + c.offset,)

        (recon,) = bottleneck.decoder_only(
            self, render, jax.ShapeDtypeStruct(frames.shape, jnp.float32)
        )
        return recon, (Ref(feature=feature.astype(jnp.float32), memory=memory),)
