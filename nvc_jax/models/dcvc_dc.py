"""Intra codec of DCVC-DC (arXiv 2302.14402, released code), which BRHVC too begins with."""

from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from nvc_jax.nn.blocks import Conv3x3
from nvc_jax.nn.hyperprior import FactorizedPrior, latent_shapes, pad_to_multiple
from nvc_jax.nn.residual import (
    DepthBlock,
    LatentPrior,
    RateScale,
    ResDown,
    ResUp,
    UNet,
    leaky,
)
from nvc_jax.quality import QP_COUNT

GatedBlock = partial(DepthBlock, gated=True)


@dataclass(frozen=True)
class Config:
    """Widths (channels): of the first scales, of the latent, and of the last layers.

    `rgb`: pictures are R, G, B instead of Y, U, V.
    """

    widths: tuple[int, int] = (128, 192)
    y: int = 256
    tail: int = 16
    unet: tuple[int, int, int] = (32, 64, 128)
    unet_blocks: int = 4
    rgb: bool = True


SIZES = {"full": Config()}


class Encoder(nn.Module):
    cfg: Config
    dtype: Any

    @nn.compact
    def __call__(self, frame, q):
        c = self.cfg
        x = frame
        for i, width in enumerate((*c.widths, c.y)):
            x = ResDown(width, self.dtype, name=f"down{i}")(x)
            x = GatedBlock(width, dtype=self.dtype, name=f"block{i}")(x)
            if i == 0:
                x = x * q
        return Conv3x3(c.y, 2, self.dtype, name="latent")(x)


class Decoder(nn.Module):
    cfg: Config
    dtype: Any

    @nn.compact
    def __call__(self, y_hat, q):
        c = self.cfg
        x = y_hat
        widths = (c.y, c.y, *c.widths[::-1], c.tail)
        for i, (width, wider) in enumerate(pairwise(widths)):
            x = GatedBlock(width, dtype=self.dtype, name=f"block{i}")(x)
            x = ResUp(wider, self.dtype, name=f"up{i}")(x)
            if i == len(c.widths):
                x = x * q
        x = UNet(c.unet, c.unet_blocks, True, self.dtype, name="refine")(x)
        return Conv3x3(3, dtype=self.dtype, name="pixels")(x)


class HyperEncoder(nn.Module):
    features: int

    @nn.compact
    def __call__(self, y):
        x = GatedBlock(self.features, name="block")(y)
        x = leaky(Conv3x3(self.features, 2, name="conv0")(x))
        return Conv3x3(self.features, 2, name="conv1")(x)


class HyperDecoder(nn.Module):
    features: int

    @nn.compact
    def __call__(self, z):
        x = ResUp(self.features, name="up1")(ResUp(self.features, name="up0")(z))
        return GatedBlock(self.features, name="block")(x)


class Intra(nn.Module):
    """The codec. `dtype` is the compute type of everything but the entropy path (float32)."""

    cfg: Config
    dtype: Any = jnp.float32

    frames_per_unit = 1
    schedule = "all_intra"
    references = 0
    refers_to_pictures = False
    qp_rows = QP_COUNT

    @property
    def rgb(self) -> bool:
        return self.cfg.rgb

    def setup(self):
        c = self.cfg
        self.encoder = Encoder(c, self.dtype)
        self.q_encoder = RateScale(c.widths[0])
        self.hyper_encoder = HyperEncoder(c.y)
        self.z_prior = FactorizedPrior(1, c.y)
        self.hyper_decoder = HyperDecoder(c.y)
        self.fusion = [GatedBlock(2 * c.y), GatedBlock(3 * c.y)]
        self.prior = LatentPrior(c.y, (3 * c.y, 2 * c.y), "gaussian", gated=True)
        self.decoder = Decoder(c, self.dtype)
        self.q_decoder = RateScale(c.widths[0])

    def complete(self, refs, unit, height, width, exact=False):
        """References in the form that a program takes: there are never any."""
        return ()

    def __call__(self, frames, refs, qp, bottleneck):
        """Codes one picture: arguments and results as those of `nvc_jax.models.intra.Intra`.

        With `Config.rgb` pictures are R, G, B.
        """
        c = self.cfg
        del refs
        batch, _, height, width, _ = frames.shape
        qp = qp[:, 0]

        def analysis(m):
            y = m.encoder(frames[:, 0].astype(m.dtype), m.q_encoder(qp)).astype(jnp.float32)
            return y, m.hyper_encoder(pad_to_multiple(y, 4))

        h, w = height // 16, width // 16
        shapes = latent_shapes(batch, h, w, c.y, c.y)
        y, z = bottleneck.encoder_only(self, analysis, *shapes)
        row = jnp.zeros_like(qp)
        z_hat = bottleneck.factorized(z, self.z_prior, row)
        params = self.hyper_decoder(z_hat)
        for block in self.fusion:
            params = block(params)
        y_hat = self.prior(y, params[:, :h, :w], bottleneck)

        def render(m):
            return (m.decoder(y_hat.astype(m.dtype), m.q_decoder(qp)).astype(jnp.float32)[:, None],)

        (recon,) = bottleneck.decoder_only(
            self, render, jax.ShapeDtypeStruct(frames.shape, jnp.float32)
        )
        return recon, ()
