"""The P-frame codec of the size `full` of `light`: DCVC-HEM's topology, narrow.

Source: DCVC-HEM (arXiv 2207.05894) as Tian et al. made it small for real time (ACM MM 2023, arXiv
2309.11276): motion found by a SpyNet at half of the size and coded under a hyperprior, contexts at
three scales mined from the last frame's feature, priors from the hyper-latent, the context and the
last latent, and the dual spatial prior, which codes a latent in two steps. Tian et al. publish
arithmetic and parameters but not which channels they left; the widths are our own search and meet
both. Frames without references come from an intra codec, see `nvc_jax.models.with_intra`.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from nvc_jax.models.brhvc import (
    Decoder,
    Encoder,
    HyperDecoder,
    Pyramid,
    ScaleFusion,
    halving,
    hyper_encoder,
)
from nvc_jax.models.light import MOTION_WEIGHT, step_of_qp
from nvc_jax.nn.blocks import Conv3x3, Pointwise, QpTable
from nvc_jax.nn.compensation import compensate
from nvc_jax.nn.flow import SpyNet, note_motion
from nvc_jax.nn.hyperprior import FactorizedPrior, latent_shapes, leading_ones, pad_to_multiple
from nvc_jax.nn.integer import ScaleHead, no_memory
from nvc_jax.nn.motion import BLOCK
from nvc_jax.nn.motion_search import search
from nvc_jax.nn.residual import RateScale, ResBlock, ResDown, ResUp, Subpixel, leaky
from nvc_jax.nn.spatial_prior import code_in_steps, split_params
from nvc_jax.nn.warp import double, halve, warp
from nvc_jax.quality import QP_ROWS

STEPS = 2
MOTION = ("flow", "searched")


@dataclass(frozen=True)
class Config:
    """Widths (channels) of one size.

    Attributes:
      widths: of the contexts at full, half and quarter size.
      y, z: of the latent and of its hyper-latent.
      motion: "flow" for motion that a network finds and a network codes, "searched" (our addition)
        for motion of blocks, see `nvc_jax.nn.motion`.
      motion_width: of the motion codec and its latents.
      tail: of the decoder's last layer.
      fusion, spatial: of the layers of the two priors of the latent, before their last ones.
      motion_fusion, motion_spatial: of those of motion.
      unet, unet_blocks: see `nvc_jax.nn.residual.UNet`.
      flow, flow_kernel, flow_contrast: see `nvc_jax.nn.flow.SpyNet`.
      direct: whether the picture is coded as a correction of the reference after motion, which is
        our addition, for short trainings.
      scale_head: width of the integer networks behind the exact mode, 0 for none.
    """

    widths: tuple[int, int, int] = (12, 16, 32)
    y: int = 96
    z: int = 64
    motion: str = "flow"
    motion_width: int = 24
    tail: int = 8
    fusion: tuple[int, ...] = (320, 320)
    spatial: tuple[int, ...] = (320, 320)
    motion_fusion: tuple[int, ...] = (96, 96)
    motion_spatial: tuple[int, ...] = (96, 96)
    unet: tuple[int, int, int] = (8, 16, 32)
    unet_blocks: int = 2
    flow: tuple[int, ...] = (32, 60, 32, 16)
    flow_kernel: int = 7
    flow_contrast: float = 5.0
    direct: bool = False
    scale_head: int = 192

    # As `nvc_jax.models.brhvc.Config` calls them: networks work on pixels, latents are at 1/16.
    patch = 1
    halvings = 2

    def __post_init__(self):
        if self.motion not in MOTION:
            raise TypeError(f"motion {self.motion!r} is none of {', '.join(MOTION)}")


SIZES = {"full": Config(), "full_searched": Config(motion="searched", direct=True)}


class Ref(NamedTuple):
    """What is kept of a coded frame, and where to look in it. An intra frame leaves but itself.

    Attributes:
      frame: float32 [b, h, w, 3] in [0, 1].
      feature: [b, h, w, widths[0]].
      y, motion_y: decoded latents, [b, h/16, w/16, y or motion_width].
      memory, motion_memory: of their scale heads, [b, h/16, w/16, memory channels].
      field: int16 [b, h/8, w/8, 3], searched motion that the frame was coded with.
      motion: likewise, where blocks of the picture to be coded are in this one. None: to be found.
      bare: bool [], disregard all but the frame. Lets one compiled program serve references of both
        kinds. None: what is there is used.
    """

    frame: jax.Array
    feature: jax.Array | None = None
    y: jax.Array | None = None
    motion_y: jax.Array | None = None
    memory: jax.Array | None = None
    motion_memory: jax.Array | None = None
    field: jax.Array | None = None
    motion: jax.Array | None = None
    bare: jax.Array | None = None


class Moved(NamedTuple):
    """A reference's motion, as decoded.

    Attributes:
      flows: at full, half and quarter size, [b, h, w, 2] and so on, see `nvc_jax.nn.warp`.
      used: bool [b, h, w, 1] likewise, where the reference predicts anything; None for everywhere.
      picture: [b, h, w, 3], the reference after motion.
      y, memory, field: what later frames use, `Ref.motion_y`, `Ref.motion_memory`, `Ref.field`.
    """

    flows: list
    used: list | None
    picture: jax.Array
    y: jax.Array | None = None
    memory: jax.Array | None = None
    field: jax.Array | None = None


class MotionEncoder(nn.Module):
    """Flow [b, h, w, 2] -> latent [b, h/16, w/16, features]."""

    features: int

    @nn.compact
    def __call__(self, flow):
        x = flow
        for i in range(3):
            x = ResDown(self.features, name=f"down{i}")(x)
            x = ResBlock(name=f"res{i}")(x)
        return Conv3x3(self.features, 2, name="latent")(x)


class MotionDecoder(nn.Module):
    """Inverse of `MotionEncoder`."""

    features: int

    @nn.compact
    def __call__(self, y_hat):
        x = y_hat
        for i in range(3):
            x = ResBlock(name=f"res{i}")(x)
            x = ResUp(self.features, name=f"up{i}")(x)
        return Subpixel(2, name="flow")(ResBlock(name="res3")(x))


class Parameters(nn.Module):
    """3x3 convolutions of these widths, and `features` parameters, the first `ones` about 1."""

    widths: tuple[int, ...]
    features: int
    ones: int

    @nn.compact
    def __call__(self, x):
        for i, width in enumerate(self.widths):
            x = leaky(Conv3x3(width, name=f"conv{i}")(x))
        return Pointwise(self.features, bias_init=leading_ones(self.ones), name="params")(x)


class PFrame(nn.Module):
    """The P-frame codec. `dtype` is the compute type of everything but the entropy path."""

    cfg: Config
    dtype: Any = jnp.float32

    frames_per_unit = 1
    references = 1
    refers_to_pictures = True
    qp_rows = QP_ROWS
    rgb = False

    @property
    def searches(self) -> bool:
        return self.cfg.motion == "searched"

    def setup(self):
        c = self.cfg
        w1, w2, w3 = c.widths
        m = c.motion_width
        if not self.searches:
            self.flow = SpyNet(c.flow, c.flow_kernel, c.flow_contrast)
            self.motion_encoder = MotionEncoder(m)
            # Motion, like pictures, is needed the more precisely the higher the quality, but less
            # so.
            self.q_motion = RateScale(m, start=0.5)
            self.motion_hyper_encoder = hyper_encoder(m, (1, 1, 2, 1, 2))
            self.motion_hyper_decoder = HyperDecoder(2 * m)
            self.motion_z_prior = FactorizedPrior(QP_ROWS, m)
            self.motion_fusion = Parameters(c.motion_fusion, 3 * m, 2 * m)
            self.motion_spatial = Parameters(c.motion_spatial, 2 * m, m)
            self.motion_decoder = MotionDecoder(m)
            if c.scale_head:
                self.motion_scale_head = ScaleHead(m, c.scale_head, STEPS, references=1)

        self.feature_of_frame = Conv3x3(w1)
        self.feature_of_feature = Pointwise(w1)
        self.pyramid = Pyramid(c.widths)
        self.scale_fusion = ScaleFusion(c.widths)

        self.encoder = Encoder(c, self.dtype)
        self.q_encoder = QpTable(QP_ROWS, 2 * w2, self.dtype)
        self.q_latent = QpTable(QP_ROWS, c.y, ramp=True)
        self.hyper_encoder = hyper_encoder(c.z, (1, 2, 2))
        self.hyper_decoder = HyperDecoder(2 * c.y)
        self.z_prior = FactorizedPrior(QP_ROWS, c.z)
        self.temporal_prior = halving(w3, c.y)
        self.fusion = Parameters(c.fusion, 3 * c.y, 2 * c.y)
        self.spatial_prior = Parameters(c.spatial, 2 * c.y, c.y)
        if c.scale_head:
            self.scale_head = ScaleHead(c.y, c.scale_head, STEPS, references=1)
        self.decoder = Decoder(c, self.dtype)
        self.q_decoder = QpTable(QP_ROWS, w2, self.dtype)

    @staticmethod
    def start(frame):
        """What is kept of an intra frame [batch, height, width, 3]."""
        return Ref(frame)

    def complete(self, refs, unit, height, width, exact=False):
        """See `nvc_jax.models.ui2c.UI2C.complete`. There is always a reference."""
        c = self.cfg
        (ref,) = refs
        if unit.picture_only:
            ref = Ref(ref.frame)
        bare, small = ref.feature is None, (1, height // 16, width // 16)
        if bare:
            ref = ref._replace(
                feature=jnp.zeros((1, height, width, c.widths[0])), y=jnp.zeros((*small, c.y))
            )
        if exact and ref.memory is None:
            ref = ref._replace(memory=no_memory(c.y, height, width))
        if self.searches:
            if ref.field is None:
                blocks = 1, height // BLOCK, width // BLOCK
                ref = ref._replace(field=jnp.zeros((*blocks, 3), jnp.int16))
        else:
            if bare:
                ref = ref._replace(motion_y=jnp.zeros((*small, c.motion_width)))
            if exact and ref.motion_memory is None:
                ref = ref._replace(motion_memory=no_memory(c.motion_width, height, width))
        return (ref._replace(bare=jnp.bool_(bare)),)

    def motion(self, a, b):
        """Flow from picture a to b, [batch, height, width, 2] in pixels, before it is coded.

        Found at half of the size.
        """
        return 2 * double(self.flow(halve(a), halve(b)))

    def search(self, frame, ref, qp):
        """Where blocks of a picture are in a reference: see `nvc_jax.models.light.Light.search`."""
        weight = MOTION_WEIGHT * step_of_qp(qp) ** 2
        return search(frame[..., 0], ref.frame[..., 0], weight, ref.field)

    def _latent(self, y, z_hat, params, spatial_prior, head, memory, qp, bottleneck):
        """(decoded latent, what its scale head remembers) of either of the two latents."""
        step_size, scale, mean = split_params(params)

        def predict(step, y_hat):
            if step == 0:
                return mean, scale
            known = jnp.concatenate([y_hat, params], -1)
            return jnp.split(spatial_prior(known), 2, -1)[::-1]

        levels = left = None
        if bottleneck.exact:
            hidden = head.begin(z_hat, qp[:, None], [memory], y.shape[1:3])
            levels = partial(head.level, hidden)
        y_hat, symbols, level_map = code_in_steps(y / step_size, STEPS, predict, bottleneck, levels)
        if bottleneck.exact:
            left = head.remember(hidden, symbols, level_map)
        return y_hat * step_size, left

    def _coded_motion(self, frame, ref, qp, bottleneck) -> Moved:
        batch, height, width, _ = frame.shape
        h, w, m = height // 16, width // 16, self.cfg.motion_width
        gain = self.q_motion(qp)

        def analysis(module):
            y = module.motion_encoder(module.motion(frame, ref.frame)) * gain
            return y, module.motion_hyper_encoder(pad_to_multiple(y, 4))

        y, z = bottleneck.encoder_only(self, analysis, *latent_shapes(batch, h, w, m, m))
        z_hat = bottleneck.factorized(z, self.motion_z_prior, qp)
        hyper = self.motion_hyper_decoder(z_hat)[:, :h, :w]
        before = jnp.zeros_like(y) if ref.motion_y is None else ref.motion_y
        params = self.motion_fusion(jnp.concatenate([hyper, before], -1))
        head = self.motion_scale_head if bottleneck.exact else None
        y_hat, memory = self._latent(
            y, z_hat, params, self.motion_spatial, head, ref.motion_memory, qp, bottleneck
        )
        flows = [self.motion_decoder(y_hat / gain)]
        for _ in range(2):
            flows.append(halve(flows[-1]) / 2)
        return Moved(flows, None, warp(ref.frame, flows[0]), y_hat, memory)

    def _searched_motion(self, frame, ref, qp, bottleneck) -> Moved:
        if ref.motion is None:
            picture, reference = jax.lax.stop_gradient((frame, ref))
            ref = ref._replace(motion=self.search(picture, reference, qp))
        field = bottleneck.motion(ref.motion)
        flow = field[..., 1::-1].astype(jnp.float32) / 4
        # Blocks of features move as those of pictures do.
        sides = BLOCK, BLOCK // 2, BLOCK // 4
        flows = [_spread(flow * (side / BLOCK), side) for side in sides]
        used = [_spread(field[..., 2:] > 0, side) for side in sides]
        return Moved(flows, used, compensate(ref.frame, field), field=field)

    def _contexts(self, ref, moved: Moved):
        def of_frame(m):
            return m.feature_of_frame(ref.frame)

        def of_feature(m):
            return m.feature_of_feature(ref.feature)

        if ref.feature is None:
            x = of_frame(self)
        elif ref.bare is None:
            x = of_feature(self)
        else:
            x = nn.cond(ref.bare, of_frame, of_feature, self)
        contexts = [warp(f, flow) for f, flow in zip(self.pyramid(x), moved.flows, strict=True)]
        if moved.used:
            contexts = [jnp.where(u, x, 0) for u, x in zip(moved.used, contexts, strict=True)]
        return self.scale_fusion(*contexts)

    def __call__(self, frames, refs, qp, bottleneck):
        """Codes one frame.

        Args:
          frames: float32 [batch, 1, height, width, 3], Y, U, V in [0, 1], sides multiples of 16.
            When decoding only the shape counts.
          refs: one `Ref`.
          qp: int32 [batch, 1], 0..71.
          bottleneck: see `nvc_jax.entropy.bottleneck`.

        Returns:
          recon: float32 [batch, 1, height, width, 3], 0..1 and possibly a little beyond.
          new_refs: (Ref,) to be kept for the next unit.
        """
        c = self.cfg
        batch, _, height, width, _ = frames.shape
        (ref,) = refs
        frame, qp = frames[:, 0], qp[:, 0]
        h, w = height // 16, width // 16

        find = self._searched_motion if self.searches else self._coded_motion
        moved = find(frame, ref, qp, bottleneck)
        note_motion(self, frame, ref.frame, moved.picture)
        contexts = self._contexts(ref, moved)
        base = moved.picture if c.direct else 0.0
        gain = self.q_latent(qp)

        def analysis(m):
            y = m.encoder(frame - base, contexts, m.q_encoder(qp)).astype(jnp.float32) * gain
            return y, m.hyper_encoder(pad_to_multiple(y, 4))

        y, z = bottleneck.encoder_only(self, analysis, *latent_shapes(batch, h, w, c.y, c.z))
        z_hat = bottleneck.factorized(z, self.z_prior, qp)
        hyper = self.hyper_decoder(z_hat)[:, :h, :w]
        before = jnp.zeros_like(y) if ref.y is None else ref.y
        params = self.fusion(jnp.concatenate([self.temporal_prior(contexts[2]), hyper, before], -1))
        head = self.scale_head if bottleneck.exact else None
        y_hat, memory = self._latent(
            y, z_hat, params, self.spatial_prior, head, ref.memory, qp, bottleneck
        )

        def render(m):
            recon, feature = m.decoder(y_hat / gain, contexts, m.q_decoder(qp))
            return recon.astype(jnp.float32) + base, feature.astype(jnp.float32)

        shapes = [(batch, height, width, 3), (batch, height, width, c.widths[0])]
        shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
        recon, feature = bottleneck.decoder_only(self, render, *shapes)
        new = Ref(jnp.clip(recon, 0, 1), feature, y_hat, moved.y, memory, moved.memory, moved.field)
        return recon[:, None], (new,)


def _spread(x: jax.Array, side: int) -> jax.Array:
    """One value for all samples of a block: [b, h, w, c] -> [b, side h, side w, c]."""
    return x.repeat(side, 1).repeat(side, 2)
