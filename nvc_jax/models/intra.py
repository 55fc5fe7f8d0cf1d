"""Intra: every picture on its own. DCVC-RT's intra codec (DMCI, arXiv 2502.20762) in all sizes.

The latent is coded in four steps, each predicting means *and* scales from what is decoded already,
and quantised with two spatial step-size maps (one on each side) that the entropy model predicts.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from nvc_jax.nn.blocks import (
    Blocks,
    Conv3x3,
    DepthConvBlock,
    Pointwise,
    QpTable,
    Up,
    depth_to_space,
    space_to_depth,
)
from nvc_jax.nn.hyperprior import (
    FactorizedPrior,
    HyperDecoder,
    HyperEncoder,
    ParameterNet,
    latent_shapes,
    pad_to_multiple,
)
from nvc_jax.nn.integer import ScaleHead
from nvc_jax.nn.spatial_prior import code_in_steps
from nvc_jax.quality import QP_COUNT

STEPS = 4


@dataclass(frozen=True)
class Config:
    """Widths (channels) and depths (blocks) of one size.

    `encoder` and `decoder` count the blocks between the first (last) one and the latent; `spatial`
    those of the spatial prior that its three later steps share, `spatial_width` their width.
    `offset` is subtracted from the input (0.5: signed networks; DCVC-RT feeds [0, 1]).
    `latent_gain`, `scale_head`: as in `nvc_jax.models.ui2c.Config`.
    """

    width: int = 368
    y: int = 256
    z: int = 128
    prior: int = 512
    spatial_width: int = 512
    encoder: int = 6
    decoder: int = 12
    fusion: int = 3
    spatial: int = 3
    offset: float = 0.0
    form: str = "rt"
    latent_gain: bool = False
    scale_head: int = 0


SIZES = {
    "full": Config(),
    "dev": Config(
        width=192, y=128, z=96, prior=256, spatial_width=256, encoder=3, decoder=6, fusion=2,
        spatial=2, form="uf2",
    ),
    "nano": Config(
        width=112, y=128, z=32, prior=112, spatial_width=96, encoder=3, decoder=5, fusion=2,
        spatial=1, offset=0.5, form="uf2", latent_gain=True, scale_head=128,
    ),
    # Beside P-frames of `light`, see `nvc_jax.models.hem`.
    "light": Config(
        width=256, y=192, prior=416, spatial_width=320, encoder=10, decoder=11, spatial=2,
        scale_head=256,
    ),
}  # fmt: skip


class Encoder(nn.Module):
    cfg: Config
    dtype: Any

    @nn.compact
    def __call__(self, frame, q):
        c = self.cfg
        x = space_to_depth(frame, 8)
        x = DepthConvBlock(c.width, c.form, dtype=self.dtype, name="patch")(x) * q
        x = Blocks(c.width, c.encoder, c.form, self.dtype, name="blocks")(x)
        return Conv3x3(c.y, 2, self.dtype, name="latent")(x)


class Decoder(nn.Module):
    cfg: Config
    dtype: Any

    @nn.compact
    def __call__(self, y_hat, q):
        c = self.cfg
        x = Up(c.width, c.form, self.dtype, name="up")(y_hat)
        x = Blocks(c.width, c.decoder, c.form, self.dtype, name="blocks")(x) * q
        x = DepthConvBlock(192, c.form, dtype=self.dtype, name="pixels")(x)
        return depth_to_space(x, 8)


def _neutral_start(channels: int):
    """Bias that starts both step-size maps and the scales at 1."""

    def init(key, shape, dtype=jnp.float32):
        del key
        bias = jnp.zeros(shape, dtype).at[:2].set(-jnp.log(2.0))
        return bias.at[2 : 2 + channels].set(1.0)

    return init


class Intra(nn.Module):
    """The codec. `dtype` is the compute type of everything but the entropy path (float32)."""

    cfg: Config
    dtype: Any = jnp.float32

    frames_per_unit = 1
    schedule = "all_intra"
    references = 0
    refers_to_pictures = False
    qp_rows = QP_COUNT
    rgb = False

    def setup(self):
        c = self.cfg
        self.encoder = Encoder(c, self.dtype)
        self.q_scale_enc = QpTable(QP_COUNT, c.width, self.dtype)
        if c.latent_gain:
            self.q_latent = QpTable(QP_COUNT, c.y, ramp=True)
        self.hyper_encoder = HyperEncoder(c.z, c.form)
        self.z_prior = FactorizedPrior(QP_COUNT, c.z)
        self.hyper_decoder = HyperDecoder(c.y, c.form)
        self.prior_fusion = ParameterNet(
            2 * c.y + 2, c.prior, c.fusion, c.form, _neutral_start(c.y)
        )
        self.spatial_prior_reduction = Pointwise(c.y)
        self.spatial_prior_adaptors = [
            DepthConvBlock(c.spatial_width, c.form, force_adaptor=True) for _ in range(STEPS - 1)
        ]
        self.spatial_prior = ParameterNet(2 * c.y, c.spatial_width, c.spatial, c.form)
        if c.scale_head:
            self.scale_head = ScaleHead(c.y, c.scale_head, STEPS, references=0)
        self.decoder = Decoder(c, self.dtype)
        self.q_scale_dec = QpTable(QP_COUNT, c.width, self.dtype)

    def complete(self, refs, unit, height, width, exact=False):
        """References in the form that a program takes: there are never any."""
        return ()

    def __call__(self, frames, refs, qp, bottleneck):
        """Codes one picture.

        Args:
          frames: float32 [batch, 1, height, width, 3], Y, U, V in [0, 1], sides multiples of 16.
            When decoding only the shape counts.
          refs: ignored.
          qp: int32 [batch, 1], 0..63.
          bottleneck: see `nvc_jax.entropy.bottleneck`.

        Returns:
          recon: float32 [batch, 1, height, width, 3], 0..1 and possibly a little beyond.
          new_refs: ().
        """
        c = self.cfg
        del refs
        batch, _, height, width, _ = frames.shape
        qp = qp[:, 0]
        gain = self.q_latent(qp) if c.latent_gain else 1.0

        def analysis(m):
            frame = (frames[:, 0] - c.offset).astype(m.dtype)
            y = m.encoder(frame, m.q_scale_enc(qp)).astype(jnp.float32) * gain
            return y, m.hyper_encoder(pad_to_multiple(y, 4))

        h, w = height // 16, width // 16
        shapes = latent_shapes(batch, h, w, c.y, c.z)
        y, z = bottleneck.encoder_only(self, analysis, *shapes)
        z_hat = bottleneck.factorized(z, self.z_prior, qp)
        params = self.prior_fusion(self.hyper_decoder(z_hat))[:, :h, :w]
        q_enc, q_dec = jnp.split(0.5 + 1.5 * jax.nn.sigmoid(params[..., :2]), 2, axis=-1)
        scale, mean = jnp.split(params[..., 2:], 2, axis=-1)
        reduced = self.spatial_prior_reduction(params)

        def predict(step, y_hat):
            if step == 0:
                return mean, scale
            x = self.spatial_prior_adaptors[step - 1](jnp.concatenate([y_hat, reduced], -1))
            return jnp.split(self.spatial_prior(x), 2, axis=-1)[::-1]

        levels = None
        if bottleneck.exact:
            hidden = self.scale_head.begin(z_hat, qp[:, None], [], (h, w))
            levels = partial(self.scale_head.level, hidden)
        y_hat, _, _ = code_in_steps(y * q_enc, STEPS, predict, bottleneck, levels)
        y_hat = y_hat * q_dec / gain

        def render(m):
            recon = m.decoder(y_hat.astype(m.dtype), m.q_scale_dec(qp))
            return ((recon.astype(jnp.float32) + c.offset)[:, None],)

        (recon,) = bottleneck.decoder_only(
            self, render, jax.ShapeDtypeStruct(frames.shape, jnp.float32)
        )
        return recon, ()
