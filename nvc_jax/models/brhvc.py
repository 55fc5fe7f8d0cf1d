"""BRHVC: hierarchical B-frames with two references whose motion and contexts are joined.

Source: arXiv 2511.08938 and its released code. *Bi-directional Motion Converge* codes the motion
towards both references in one latent, from flows at three scales; *Bi-directional Contextual
Fusion* weights the contexts of both references pixel by pixel. Frames without references come from
an intra codec, see `nvc_jax.models.with_intra`.
"""

from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from nvc_jax.nn.blocks import Conv3x3, Pointwise, depth_to_space, space_to_depth
from nvc_jax.nn.flow import SpyNet, note_motion
from nvc_jax.nn.hyperprior import FactorizedPrior, latent_shapes, pad_to_multiple
from nvc_jax.nn.residual import (
    DepthBlock,
    DepthConv,
    LatentPrior,
    RateScale,
    ResBlock,
    ResDown,
    ResUp,
    Subpixel,
    UNet,
    leaky,
)
from nvc_jax.nn.warp import double, halve, warp, warp_groups
from nvc_jax.quality import QP_COUNT

LAYERS = 5  # of the hierarchy, each with its own feature adaptor
# Weights on the distortion of a layer in training, which are not published: about one quality step
# of classical codecs a layer, 2^(0.35 (layer - 2)), with a mean of 1 over a group of 32.
LAYER_WEIGHTS = (0.79, 1.00, 1.28, 1.63, 2.07)


@dataclass(frozen=True)
class Config:
    """Widths (channels) of one size.

    `widths` are those of the contexts at full, half and quarter size, `motion` of everything that
    concerns motion, `tail` of the decoder's last layer, `guess` of the first layers that read the
    guessed flows. `groups` and `offsets`: see `OffsetDiversity`. `patch` 2 is our addition for
    small models: all networks work on patches of 2x2 pixels, motion included, at a quarter of the
    cost; "full size" below is then half of the picture's. `flow_halvings`: how often pictures are
    made half as large before motion is looked for in them; the cost of that falls to a quarter each
    time. `flow_contrast`: see `nvc_jax.nn.flow.SpyNet`. `family`: of the latents' distributions.
    `direct` (our addition, for short trainings) makes decoded motion a correction of the guessed
    one, and the picture a correction of a weighted mean of both references after motion, as in the
    direct mode of classical codecs.
    `converge` and `weigh` False leave out what the paper is named after, to see what it is worth:
    motion is found and decoded at one scale, contexts are joined without predicted weights.
    """

    widths: tuple[int, int, int] = (48, 64, 96)
    y: int = 128
    motion: int = 64
    guess: int = 48
    tail: int = 32
    groups: int = 16
    offsets: int = 2
    unet: tuple[int, int, int] = (32, 64, 128)
    unet_blocks: int = 4
    flow: tuple[int, ...] = (32, 64, 32, 16)
    flow_kernel: int = 7
    patch: int = 1
    flow_halvings: int = 0
    flow_contrast: float = 0.0
    family: str = "laplace"
    direct: bool = False
    converge: bool = True
    weigh: bool = True

    @property
    def halvings(self) -> int:
        """Between the third scale of the contexts and the latent at 1/16."""
        return {1: 2, 2: 1}[self.patch]


SIZES = {
    "full": Config(),
    "small": Config(
        widths=(16, 24, 48), y=96, motion=24, guess=24, tail=16, groups=8, unet=(16, 32, 64),
        unet_blocks=2, flow=(16, 24, 16), patch=2, flow_halvings=1, flow_contrast=5.0,
        family="gaussian", direct=True,
    ),
    "nano": Config(
        widths=(8, 16, 32), y=64, motion=16, guess=8, tail=8, groups=2, unet=(8, 16, 32),
        unet_blocks=1, flow=(16, 16, 12), flow_kernel=5, patch=2, flow_contrast=5.0,
        family="gaussian", direct=True,
    ),
}  # fmt: skip


class Ref(NamedTuple):
    """What is kept of a coded frame. An intra frame leaves nothing but itself.

    Attributes:
      frame: float32 [b, h, w, 3] in [0, 1].
      feature: [b, h/patch, w/patch, widths[0]].
      motion_feature: [b, h/4/patch, w/4/patch, 2 motion].
      y, motion_y: decoded latents, [b, h/16, w/16, y or motion].
      bare: bool [], disregard all but the frame. Lets one compiled program serve all combinations
        of intra and B-frames. None: what is there is used.
    """

    frame: jax.Array
    feature: jax.Array | None = None
    motion_feature: jax.Array | None = None
    y: jax.Array | None = None
    motion_y: jax.Array | None = None
    bare: jax.Array | None = None


class Between(NamedTuple):
    """What a B-frame refers to.

    Attributes:
      past, future: two `Ref`, usually of an earlier and a later frame.
      layer: int32 [], of the hierarchy: 0 for a frame between neighbours, one more for every
        doubling of the distance, see `nvc_jax.schedule`.
      ratio: float32 [], the frame's distance from the first reference in time, as a share of the
        distance of both: 1/2 in the middle, beyond 0..1 for references on the same side.
    """

    past: Ref
    future: Ref
    layer: Any
    ratio: Any


class Motion(NamedTuple):
    """Decoded motion from a B-frame towards the past reference and the future one.

    Attributes:
      flows: for each, flows at full, half and quarter size, [b, h/patch, w/patch, 2] and so on.
      guesses: for each, [b, h/patch, w/patch, 2], what its decoder knew without being told.
      moved: both references after motion, [b, h, w, 3]; None without `Config.direct`.
      mean: [b, h, w, 3], their weighted mean, from which the picture is predicted; or 0.
      y, feature: what later frames use, `Ref.motion_y` and `Ref.motion_feature`.
    """

    flows: tuple
    guesses: list
    moved: list | None
    mean: Any
    y: jax.Array
    feature: jax.Array


class ReferenceTypes(nn.Module):
    """A network for each combination of intra and B-frames among the two references.

    Only B-frames bring a state; which of them do decides which network runs (LTA in the released
    code).
    """

    features: int

    def setup(self):
        self.ii, self.ib, self.bi, self.bb = (DepthBlock(self.features) for _ in range(4))

    def __call__(self, x, states, bare):
        """x [b, h, w, c]; states: of both references, [b, h, w, c] or None; bare: as `Ref.bare`."""

        def network(f, b):
            kept = [s for s, used in zip(states, (f, b), strict=True) if used]
            name = "ib"[f] + "ib"[b]
            return lambda m: getattr(m, name)(jnp.concatenate([x, *kept], -1))

        if bare[0] is None:
            return network(*(s is not None for s in states))(self)
        networks = [network(f, b) for f in (False, True) for b in (False, True)]
        if self.is_initializing():  # all of them get parameters
            return [net(self) for net in networks][-1]
        number = 2 * ~bare[0] + ~bare[1]
        return nn.switch(number.astype(jnp.int32), networks, self)


class FlowConverge(nn.Module):
    """Flows at full, half and quarter size of one direction -> [b, h/4, w/4, features].

    Flows at fewer sizes will do.
    """

    features: int

    @nn.compact
    def __call__(self, flows):
        h = None
        for i, (flow, stride) in enumerate(zip_longest(flows, (2, 2, 1))):
            x = jnp.concatenate([x for x in (h, flow) if x is not None], -1)
            x = leaky(Conv3x3(self.features, stride, name=f"conv{i}")(x))
            h = Pointwise(self.features, name=f"mix{i}")(x)
        return h


class Convolutions(nn.Module):
    """3x3 convolutions of these widths and strides, leaky ReLU in between."""

    widths: tuple[int, ...]
    strides: tuple[int, ...]
    slope: float = 0.01

    @nn.compact
    def __call__(self, x):
        for i, (features, stride) in enumerate(zip(self.widths, self.strides, strict=True)):
            x = Conv3x3(features, stride, name=f"conv{i}")(leaky(x, self.slope) if i else x)
        return x


def hyper_encoder(features, strides):
    return Convolutions((features,) * len(strides), strides)


def halving(*widths):
    """Each convolution halves both sides."""
    return Convolutions(widths, (2,) * len(widths), slope=0.1)


class MotionEncoder(nn.Module):
    cfg: Config

    @nn.compact
    def __call__(self, flows_f, flows_b, guess, states, bare, q):
        m = self.cfg.motion
        converge = FlowConverge(m, name="converge")
        x = jnp.concatenate([converge(flows_f), converge(flows_b), guess], -1)
        shrink = [DepthBlock(m, 2, name=f"state{i}") for i in range(self.cfg.halvings)]
        for i in range(self.cfg.halvings):
            x = ResDown(m, name=f"down{i}")(x)
            states = [s if s is None else shrink[i](s) for s in states]
        x = ReferenceTypes(m, name="types")(x * q, states, bare)
        return DepthBlock(m, name="out")(x)


class MotionDecoder(nn.Module):
    """Motion latent -> (flows of both directions at three scales, feature for later frames).

    With `Config.direct` those at full size have a third channel: the weight of the reference.
    """

    cfg: Config

    @nn.compact
    def __call__(self, y_hat, guess, q):
        m = self.cfg.motion
        x = y_hat
        for i in range(self.cfg.halvings):
            x = ResUp(2 * m if i + 1 == self.cfg.halvings else m, name=f"up{i}")(x)
        feature = DepthBlock(2 * m, name="fuse")(jnp.concatenate([x, guess], -1))
        ups = [(ResUp(m, name=f"double{i}"), DepthBlock(m, name=f"block{i}")) for i in range(2)]
        outputs = (2 + self.cfg.direct, 2, 2)[: 3 if self.cfg.converge else 1]
        heads = [Conv3x3(n, name=f"flow{i}") for i, n in enumerate(outputs)]  # full, half, quarter

        def flows(half):
            quarter = half * q
            middle = ups[0][1](ups[0][0](quarter))
            full = ups[1][1](ups[1][0](middle))
            if self.cfg.converge:
                return heads[0](full), heads[1](middle), heads[2](quarter)
            flow = heads[0](full)
            return flow, halve(flow[..., :2]) / 2, halve(halve(flow[..., :2])) / 4

        forward, backward = (flows(half) for half in jnp.split(feature, 2, -1))
        return forward, backward, feature


class HyperDecoder(nn.Module):
    features: int

    @nn.compact
    def __call__(self, x):
        for i in range(2):
            x = leaky(Conv3x3(self.features, name=f"conv{i}")(x))
            x = leaky(Subpixel(self.features, 1, name=f"up{i}")(x))
        return Conv3x3(self.features, name="conv2")(x)


class Pyramid(nn.Module):
    """Feature [b, h, w, widths[0]] -> features at full, half and quarter size."""

    widths: tuple[int, int, int]

    @nn.compact
    def __call__(self, x):
        out = []
        for i, width in enumerate(self.widths):
            x = Conv3x3(width, 2 if i else 1, name=f"conv{i}")(x)
            x = ResBlock(name=f"res{i}")(x)
            out.append(x)
        return out


class OffsetDiversity(nn.Module):
    """Aligns a feature by several flows of its own for each group of channels, weighted by masks.

    The offsets are corrections of one decoded flow. As in the released code, group k of the moved
    features is weighted by mask k, and the final grouped convolution mixes neighbouring groups.
    """

    groups: int
    offsets: int
    hidden: int
    reach = 40.0  # pixels that an offset may differ from the flow

    @nn.compact
    def __call__(self, x, flow, hints):
        """x [b, h, w, c]; flow [b, h, w, 2]; hints: what tells how reliable the flow is."""
        b, h, w, c = x.shape
        n = self.groups * self.offsets
        o = jnp.concatenate([warp(x, flow), *hints], -1)
        o = leaky(Conv3x3(self.hidden, 2, name="offset0")(o), 0.1)
        o = leaky(Conv3x3(self.hidden, name="offset1")(o), 0.1)
        o = double(Conv3x3(3 * n, name="offset2")(o))
        mask = jax.nn.sigmoid(o[..., 2 * n :])[..., None]
        flows = self.reach * jnp.tanh(o[..., : 2 * n]).reshape(b, h, w, n, 2) + flow[..., None, :]
        moved = warp_groups(x.reshape(b, h, w, self.groups, c // self.groups), flows) * mask
        moved = moved.reshape(b, h, w, self.groups, -1)
        kernel = self.param(
            "fusion_kernel",
            nn.initializers.lecun_normal(in_axis=1, out_axis=2, batch_axis=0),
            (self.groups, moved.shape[-1], c // self.groups),
        )
        bias = self.param("fusion_bias", nn.initializers.zeros, (c,))
        mixed = jnp.einsum("bhwgi,gio->bhwgo", moved, kernel, precision=jax.lax.Precision.HIGHEST)
        return mixed.reshape(b, h, w, c) + bias


class ScaleFusion(nn.Module):
    """Lets aligned features of three scales correct each other, from coarse to fine."""

    widths: tuple[int, int, int]

    @nn.compact
    def __call__(self, c1, c2, c3):
        w1, w2, w3 = self.widths
        up = ResBlock(name="up3_res")(Subpixel(w2, name="up3")(c3))
        c3 = c3 + ResBlock(name="out3_res")(Conv3x3(w3, name="out3")(c3))
        joined = jnp.concatenate([up, c2], -1)
        up = ResBlock(name="up2_res")(Subpixel(w1, name="up2")(joined))
        c2 = c2 + ResBlock(name="out2_res")(Conv3x3(w2, name="out2")(joined))
        joined = jnp.concatenate([up, c1], -1)
        return c1 + ResBlock(name="out1_res")(Conv3x3(w1, name="out1")(joined)), c2, c3


def _weighted(maps, context_f, context_b):
    """Bi-directional Contextual Fusion: two contexts under predicted weights, and an offset."""
    scale_b, scale_f, offset = jnp.split(maps, 3, -1)
    return (1 + scale_b) * context_b + (1 + scale_f) * context_f + offset


class PlainFusion(nn.Module):
    """Contexts of both references -> one, in the place of both of the following."""

    widths: tuple[int, int, int]
    dtype: Any

    @nn.compact
    def __call__(self, seen, warped_f, warped_b, contexts_f, contexts_b):
        pairs = zip(self.widths, contexts_f, contexts_b, strict=True)
        return tuple(
            DepthBlock(w, dtype=self.dtype, name=f"fuse{i}")(jnp.concatenate([f, b], -1))
            for i, (w, f, b) in enumerate(pairs, 1)
        )


class EncoderFusion(nn.Module):
    """Contexts of both references -> one, seen from the frame that is coded; fine to coarse."""

    widths: tuple[int, int, int]
    dtype: Any

    @nn.compact
    def __call__(self, frame, warped_f, warped_b, contexts_f, contexts_b):
        w1, w2, w3 = self.widths
        block, mix = partial(DepthBlock, dtype=self.dtype), partial(DepthConv, dtype=self.dtype)
        guide = block(w1, name="guide")(jnp.concatenate([frame, warped_b, warped_f], -1))
        maps = block(3 * w1, name="maps1")(mix(w1, name="guide1")(guide))
        out1 = block(w1, name="fuse1")(_weighted(maps, contexts_f[0], contexts_b[0]))
        x = jnp.concatenate([mix(w1, name="guide2")(guide), out1], -1)
        maps = block(3 * w2, 2, name="maps2")(x)
        out2 = block(w2, name="fuse2")(_weighted(maps, contexts_f[1], contexts_b[1]))
        x = jnp.concatenate([mix(w2, 2, name="guide3")(guide), out2], -1)
        maps = block(3 * w3, 2, name="maps3")(x)
        out3 = block(w3, name="fuse3")(_weighted(maps, contexts_f[2], contexts_b[2]))
        return out1, out2, out3


class DecoderFusion(nn.Module):
    """The same seen from the decoded latent; coarse to fine."""

    widths: tuple[int, int, int]
    halvings: int
    dtype: Any

    @nn.compact
    def __call__(self, y_hat, warped_f, warped_b, contexts_f, contexts_b):
        w1, w2, w3 = self.widths
        block, mix = partial(DepthBlock, dtype=self.dtype), partial(DepthConv, dtype=self.dtype)
        up = partial(Subpixel, dtype=self.dtype)
        pixels0, pixels1 = mix(w3, 2, name="pixels0"), mix(w3, 2, name="pixels1")
        seen_f, seen_b = (pixels1(leaky(pixels0(p))) for p in (warped_f, warped_b))
        z = y_hat
        for i in range(self.halvings):
            z = up(w3, name=f"latent{i}")(leaky(z) if i else z)
        guide = block(w3, name="guide")(jnp.concatenate([z, seen_b, seen_f], -1))
        maps = block(3 * w3, name="maps3")(mix(w3, name="guide3")(guide))
        out3 = block(w3, name="fuse3")(_weighted(maps, contexts_f[2], contexts_b[2]))
        x = jnp.concatenate([mix(w3, name="guide2")(guide), out3], -1)
        maps = up(3 * w2, name="maps2")(x)
        out2 = block(w2, name="fuse2")(_weighted(maps, contexts_f[1], contexts_b[1]))
        x = jnp.concatenate([up(w2, name="guide1")(guide), out2], -1)
        maps = up(3 * w1, name="maps1")(x)
        out1 = block(w1, name="fuse1")(_weighted(maps, contexts_f[0], contexts_b[0]))
        return out1, out2, out3


class Encoder(nn.Module):
    cfg: Config
    dtype: Any

    @nn.compact
    def __call__(self, frame, contexts, q):
        _, w2, w3 = self.cfg.widths
        conv = partial(Conv3x3, dtype=self.dtype)
        res = partial(ResBlock, slope=0.1, bottleneck=True, end=True, dtype=self.dtype)
        c1, c2, c3 = contexts
        x = conv(w2, 2, name="conv0")(jnp.concatenate([frame, c1], -1))
        x = res(name="res0")(jnp.concatenate([x, c2], -1)) * q
        x = conv(w3, 2, name="conv1")(x)
        x = res(name="res1")(jnp.concatenate([x, c3], -1))
        if self.cfg.halvings == 2:
            x = conv(w3, 2, name="conv2")(x)
        return conv(self.cfg.y, 2, name="latent")(x)


class Decoder(nn.Module):
    """Latent -> (picture, feature for later frames)."""

    cfg: Config
    dtype: Any

    @nn.compact
    def __call__(self, y_hat, contexts, q):
        w1, w2, w3 = self.cfg.widths
        up = partial(Subpixel, dtype=self.dtype)
        res = partial(ResBlock, slope=0.1, bottleneck=True, end=True, dtype=self.dtype)
        c1, c2, c3 = contexts
        x = y_hat
        for i in range(self.cfg.halvings):
            x = up(w3, name=f"up{i}")(x)
        x = res(name="res0")(jnp.concatenate([x, c3], -1))
        x = up(w2, name="up2")(x) * q
        x = res(name="res1")(jnp.concatenate([x, c2], -1))
        x = up(self.cfg.tail, name="up3")(x)
        x = Conv3x3(w1, dtype=self.dtype, name="join")(jnp.concatenate([x, c1], -1))
        for i in range(2):
            x = UNet(self.cfg.unet, self.cfg.unet_blocks, dtype=self.dtype, name=f"unet{i}")(x)
        pixels = Conv3x3(3 * self.cfg.patch**2, dtype=self.dtype, name="pixels")(x)
        return depth_to_space(pixels, self.cfg.patch), x


class LayerAdaptor(nn.Module):
    """A 1x1 convolution for each layer of the hierarchy. `__call__(x, layer)`, layer int []."""

    features: int

    @nn.compact
    def __call__(self, x, layer):
        layer = jnp.clip(layer, 0, LAYERS - 1)
        shape = (LAYERS, x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.xavier_normal(batch_axis=0), shape)
        bias = self.param("bias", nn.initializers.zeros, (LAYERS, self.features))
        return jnp.dot(x, kernel[layer], precision=jax.lax.Precision.HIGHEST) + bias[layer]


class BFrame(nn.Module):
    """The B-frame codec. `dtype` is the compute type of everything but the entropy path."""

    cfg: Config
    dtype: Any = jnp.float32

    frames_per_unit = 1
    references = 2
    refers_to_pictures = True
    qp_rows = QP_COUNT

    def setup(self):
        c = self.cfg
        w1, w2, w3 = c.widths
        self.flow = SpyNet(c.flow, c.flow_kernel, c.flow_contrast)
        self.guess_feature = halving(c.guess, c.motion)
        self.motion_encoder = MotionEncoder(c)
        self.motion_hyper_encoder = hyper_encoder(c.motion, (1, 1, 2, 1, 2))
        self.motion_hyper_decoder = HyperDecoder(c.motion)
        self.motion_z_prior = FactorizedPrior(1, c.motion)
        self.motion_guess = halving(c.guess, c.motion, *[c.motion] * c.halvings)
        self.motion_types = ReferenceTypes(2 * c.motion)
        self.motion_fusion = [DepthBlock(3 * c.motion) for _ in range(2)]
        self.motion_prior = LatentPrior(c.motion, (3 * c.motion, 3 * c.motion), c.family)
        self.motion_decoder = MotionDecoder(c)
        # Motion, like pictures, is needed the more precisely the higher the quality, but less so.
        self.q_motion_encoder = RateScale(c.motion, start=0.5)
        self.q_motion_decoder = RateScale(c.motion, start=-0.5)

        self.feature_of_frame = Conv3x3(w1)
        self.feature_of_feature = Pointwise(w1)
        self.layer_adaptor = LayerAdaptor(w1)
        self.pyramid = Pyramid(c.widths)
        self.align = OffsetDiversity(c.groups, c.offsets, w2)
        self.scale_fusion = ScaleFusion(c.widths)
        self.prior_context = DepthBlock(w3)

        self.encoder_fusion = (EncoderFusion if c.weigh else PlainFusion)(c.widths, self.dtype)
        self.encoder = Encoder(c, self.dtype)
        self.q_encoder = RateScale(2 * w2, start=1.0)
        self.hyper_encoder = hyper_encoder(c.y, (1, 2, 2))
        self.hyper_decoder = HyperDecoder(c.y)
        self.z_prior = FactorizedPrior(1, c.y)
        self.temporal_prior = halving(*[w3] * (c.halvings - 1), c.y)
        self.types = ReferenceTypes(3 * c.y)
        self.fusion = [DepthBlock(3 * c.y) for _ in range(2)]
        self.prior = LatentPrior(c.y, (3 * c.y, 3 * c.y), c.family)
        if c.weigh:
            self.decoder_fusion = DecoderFusion(c.widths, c.halvings, self.dtype)
        else:
            self.decoder_fusion = PlainFusion(c.widths, self.dtype)
        self.decoder = Decoder(c, self.dtype)
        self.q_decoder = RateScale(w2, start=-1.0)

    def _motion_between(self, a, b, times=0):
        """Flow from picture a to b [b, h, w, 3], both made smaller by 2^times."""
        for _ in range(times + self.cfg.patch - 1 + self.cfg.flow_halvings):
            a, b = halve(a), halve(b)
        h, w = a.shape[1:3]
        flow = self.flow(pad_to_multiple(a, 16), pad_to_multiple(b, 16))[:, :h, :w]
        for _ in range(self.cfg.flow_halvings):
            flow = 2 * double(flow)
        return flow

    def _contexts(self, ref, flows, guesses, layer):
        frame = space_to_depth(ref.frame, self.cfg.patch)

        def of_frame(m):
            return m.feature_of_frame(frame)

        def of_feature(m):
            return m.feature_of_feature(ref.feature)

        if ref.bare is None:
            x = of_frame(self) if ref.feature is None else of_feature(self)
        elif self.is_initializing():
            x = of_frame(self) + of_feature(self)
        else:
            x = nn.cond(ref.bare, of_frame, of_feature, self)
        f1, f2, f3 = self.pyramid(self.layer_adaptor(x, layer))
        warped = warp(frame, flows[0])
        c1 = self.align(f1, flows[0], [warped, flows[0], frame, *guesses])
        c2, c3 = warp(f2, flows[1]), warp(f3, flows[2])
        return self.scale_fusion(c1, c2, c3), warped

    def _corrected(self, flows, guess):
        """(guessed flow plus its decoded corrections at three scales, weight of the reference)."""
        full, half, quarter = flows
        full, weight = full[..., :2], full[..., 2:]
        scales = [guess, halve(guess) / 2, halve(halve(guess)) / 4]
        return [g + c for g, c in zip(scales, (full, half, quarter), strict=True)], weight

    def motion(self, a, b):
        """Flow from picture a to b, [batch, height, width, 2] in pixels, before it is coded."""
        return self._full_size(self.cfg.patch * self._motion_between(a, b))

    def _full_size(self, x):
        """What networks on patches give, for pixels."""
        return x if self.cfg.patch == 1 else double(x)

    @staticmethod
    def start(frame):
        """What is kept of an intra frame [batch, height, width, 3]."""
        return Ref(frame)

    def complete(self, refs, unit, height, width, exact=False):
        """See `nvc_jax.models.ui2c.UI2C.complete`."""
        c = self.cfg
        shapes = dict(
            feature=(height // c.patch, width // c.patch, c.widths[0]),
            motion_feature=(height // 4 // c.patch, width // 4 // c.patch, 2 * c.motion),
            y=(height // 16, width // 16, c.y),
            motion_y=(height // 16, width // 16, c.motion),
        )

        def completed(ref):
            bare = ref.feature is None
            if bare:
                ref = ref._replace(**{k: jnp.zeros((1, *shape)) for k, shape in shapes.items()})
            return ref._replace(bare=jnp.bool_(bare))

        past, future = (completed(ref) for ref in refs)
        return Between(past, future, np.int32(unit.layer), np.float32(unit.ratio))

    def _coded_motion(self, frame, refs, qp, bottleneck) -> Motion:
        c = self.cfg
        f, b, _, ratio = refs
        bare = f.bare, b.bare
        batch, height, width, _ = frame.shape
        h, w = height // 16, width // 16
        guess_f = ratio * self._motion_between(b.frame, f.frame)
        guess_b = (1 - ratio) * self._motion_between(f.frame, b.frame)
        guesses = [guess_f, guess_b]
        guess = self.guess_feature(jnp.concatenate(guesses, -1))
        q = self.q_motion_decoder(qp)

        def analysis(m):
            sizes = range(3 if c.converge else 1)
            flows_f, flows_b = (
                [m._motion_between(frame, ref.frame, times) for times in sizes] for ref in (f, b)
            )
            states = [ref.motion_feature for ref in (f, b)]
            y = m.motion_encoder(flows_f, flows_b, guess, states, bare, m.q_motion_encoder(qp))
            return y, m.motion_hyper_encoder(pad_to_multiple(y, 4))

        shapes = latent_shapes(batch, h, w, c.motion, c.motion)
        y, z = bottleneck.encoder_only(self, analysis, *shapes)
        # Hyper-priors do not depend on the quality.
        z_hat = bottleneck.factorized(z, self.motion_z_prior, jnp.zeros_like(qp))
        params = self.motion_hyper_decoder(z_hat)[:, :h, :w]
        params = self.motion_types(params, [f.motion_y, b.motion_y], bare)
        temporal = self.motion_guess(jnp.concatenate([guess_b, guess_f], -1))
        params = jnp.concatenate([params, temporal], -1)
        for block in self.motion_fusion:
            params = block(params)
        y_hat = self.motion_prior(y, params, bottleneck)
        *flows, feature = self.motion_decoder(y_hat, guess, q)

        if not c.direct:
            return Motion(tuple(flows), guesses, None, 0.0, y_hat, feature)
        flows, logits = zip(*map(self._corrected, flows, guesses), strict=True)
        share = jax.nn.sigmoid(self._full_size(logits[0] - logits[1]))
        moved = [
            warp(ref.frame, self._full_size(c.patch * own[0]))
            for ref, own in zip((f, b), flows, strict=True)
        ]
        mean = share * moved[0] + (1 - share) * moved[1]
        return Motion(flows, guesses, moved, mean, y_hat, feature)

    def __call__(self, frames, refs, qp, bottleneck):
        """Codes one frame between two others.

        Args:
          frames: float32 [batch, 1, height, width, 3] in [0, 1] and the intra codec's colours,
            sides multiples of 16. When decoding only the shape counts.
          refs: `Between`.
          qp: int32 [batch, 1], 0..63.
          bottleneck: see `nvc_jax.entropy.bottleneck`.

        Returns:
          recon: float32 [batch, 1, height, width, 3], 0..1 and possibly a little beyond.
          new_refs: (Ref,).
        """
        c = self.cfg
        batch, _, height, width, _ = frames.shape
        f, b, layer, _ = refs
        qp = qp[:, 0]
        h, w = height // 16, width // 16

        frame = space_to_depth(frames[:, 0], c.patch)
        motion = self._coded_motion(frames[:, 0], refs, qp, bottleneck)
        contexts_f, warped_f = self._contexts(f, motion.flows[0], motion.guesses, layer)
        contexts_b, warped_b = self._contexts(b, motion.flows[1], motion.guesses, layer)
        moved = motion.moved or [depth_to_space(x, c.patch) for x in (warped_f, warped_b)]
        for ref, picture in zip((f, b), moved, strict=True):
            note_motion(self, frames[:, 0], ref.frame, picture)

        def analysis(m):
            fused = m.encoder_fusion(frame, warped_f, warped_b, contexts_f, contexts_b)
            rest = space_to_depth(frames[:, 0] - motion.mean, c.patch)
            y = m.encoder(rest, fused, m.q_encoder(qp)).astype(jnp.float32)
            return y, m.hyper_encoder(pad_to_multiple(y, 4))

        y, z = bottleneck.encoder_only(self, analysis, *latent_shapes(batch, h, w, c.y, c.y))
        z_hat = bottleneck.factorized(z, self.z_prior, jnp.zeros_like(qp))
        hyper = self.hyper_decoder(z_hat)[:, :h, :w]
        prior_context = self.prior_context(jnp.concatenate([contexts_f[2], contexts_b[2]], -1))
        params = jnp.concatenate([self.temporal_prior(prior_context), hyper], -1)
        params = self.types(params, [f.y, b.y], (f.bare, b.bare))
        for block in self.fusion:
            params = block(params)
        y_hat = self.prior(y, params, bottleneck)

        def render(m):
            fused = m.decoder_fusion(y_hat, warped_f, warped_b, contexts_f, contexts_b)
            recon, feature = m.decoder(y_hat, fused, m.q_decoder(qp))
            return recon.astype(jnp.float32) + motion.mean, feature.astype(jnp.float32)

        size = height // c.patch, width // c.patch
        shapes = [(batch, height, width, 3), (batch, *size, c.widths[0])]
        shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
        recon, feature = bottleneck.decoder_only(self, render, *shapes)
        ref = Ref(jnp.clip(recon, 0, 1), feature, motion.feature, y_hat, motion.y)
        return recon[:, None], (ref,)
