"""Uni-LVC: one codec for single pictures, low delay and random access.

An intra codec that up to two references may talk into: wherever a picture's features pass an
*adaptation site*, they attend to those of the references, and what they find is added. Without
references, or with references that the encoder found unreliable, nothing is added and what is left
is the intra codec, bit for bit.

Source: the idea is that of Uni-LVC (arXiv 2603.05756), of which no layer sizes are public; the
layers are our own, so results of this codec say nothing about those of the paper. The backbone is
DCVC-RT's intra codec (arXiv 2502.20762) with learned step sizes, and an entropy model that knows
all scales before the first symbol (DCVC-UF's, arXiv 2606.04410): the host coder is asked once.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from nvc_jax.entropy.likelihood import lower_bound
from nvc_jax.nn.attention import neighbourhood_attention, polarity_attention
from nvc_jax.nn.blocks import (
    Blocks,
    Conv3x3,
    DepthConvBlock,
    Depthwise,
    Pointwise,
    QpTable,
    Up,
    depth_to_space,
    space_to_depth,
    wsilu,
)
from nvc_jax.nn.hyperprior import (
    FactorizedPrior,
    HyperDecoder,
    HyperEncoder,
    ParameterNet,
    leading_ones,
    pad_to_multiple,
)
from nvc_jax.nn.integer import ScaleHead, memory_channels
from nvc_jax.nn.spatial_prior import code_at_once
from nvc_jax.nn.warp import halve, warp_groups

QP_ROWS = 72  # 64 quality points and offsets of up to 8
STEPS = 4  # of the spatial prior
REACH = 64.0  # pixels that motion may span in an adaptation site
RELIABILITIES = 4  # levels, from "not at all" to "fully"
NEAR_PAST, FAR_PAST, FUTURE = range(3)  # what a reference is to the picture


@dataclass(frozen=True)
class Config:
    """Widths (channels) and depths (blocks) of one size.

    `encoder` and `decoder` count the blocks between the first (last) one and the latent, half of
    them on each side of the second adaptation site. `feature` is what is kept of a coded picture,
    `tokens` what attention works on, in `heads` for attention and `groups` for motion; `window` is
    the side of the neighbourhood that a position attends to. `temporal` is the width of what
    references tell the entropy model. `judge` is that of the reliability classifier. `near`,
    `linear` and `gate` False leave out one of the parts of a site, to see what it is worth.
    Otherwise as in `nvc_jax.models.intra.Config`.
    """

    width: int = 256
    y: int = 192
    z: int = 128
    prior: int = 576
    spatial_width: int = 384
    encoder: int = 4
    decoder: int = 6
    fusion: int = 3
    spatial: int = 2
    feature: int = 256
    tokens: int = 128
    heads: int = 4
    groups: int = 4
    window: int = 5
    temporal: int = 384
    judge: int = 64
    form: str = "rt"
    scale_head: int = 0
    near: bool = True
    linear: bool = True
    gate: bool = True


SIZES = {
    "large": Config(
        width=368, y=256, prior=768, spatial_width=512, encoder=6, decoder=12, spatial=3,
        temporal=512,
    ),
    "fast": Config(),
    "dev": Config(
        width=192, y=128, z=96, prior=384, spatial_width=256, encoder=3, decoder=4, feature=192,
        tokens=96, temporal=256,
    ),
    "nano": Config(
        width=112, y=128, z=32, prior=128, spatial_width=96, encoder=3, decoder=5, fusion=2,
        spatial=1, feature=112, tokens=48, temporal=128, judge=32, form="uf2", scale_head=128,
    ),
}  # fmt: skip


class Ref(NamedTuple):
    """What is kept of a coded picture.

    Attributes:
      feature: float32 [b, h/8, w/8, feature].
      qp: int32 [b], what it was coded with.
      memory: [b, h/16, w/16, memory_channels(y)], of the scale head, or None.
    """

    feature: jax.Array
    qp: jax.Array
    memory: jax.Array | None = None


class Slot(NamedTuple):
    """A reference as it is to one picture.

    Attributes:
      ref: what is referred to; anything finite if nothing is.
      role: int32 [b], NEAR_PAST, FAR_PAST or FUTURE.
      distance: float32 [b], in frames, positive.
      reliability: float32 [b], 0 to 1: how much it counts. 0 also where there is no reference.
    """

    ref: Ref
    role: jax.Array
    distance: jax.Array
    reliability: jax.Array


class Tokens(nn.Module):
    """A reference's feature -> what is attended to, [b, h/8, w/8, tokens]."""

    cfg: Config

    @nn.compact
    def __call__(self, slot):
        c = self.cfg
        x = slot.ref.feature
        for i in range(2):
            x = DepthConvBlock(c.tokens, c.form, name=f"block{i}")(x)
        roles = self.param("roles", nn.initializers.normal(0.1), (3, c.tokens))
        distance = jnp.log2(slot.distance)[:, None]
        return (
            x + (roles[slot.role] + Pointwise(c.tokens, name="distance")(distance))[:, None, None]
        )


class Alignment(nn.Module):
    """Moves tokens to where a query expects them: one flow for each group of channels.

    Attributes:
      groups: of channels.
      reach: how far, in positions.
    """

    groups: int
    reach: float

    @nn.compact
    def __call__(self, query, tokens):
        """query, tokens [b, h, w, c] -> [b, h, w, c]."""
        b, h, w, c = tokens.shape
        x = Pointwise(c, name="join")(jnp.concatenate([query, tokens], -1))
        x = wsilu(Depthwise(size=5, name="depth")(x))
        flow = Pointwise(2 * self.groups, kernel_init=nn.initializers.zeros, name="flow")(x)
        flow = self.reach * jnp.tanh(flow).reshape(b, h, w, self.groups, 2)
        grouped = tokens.reshape(b, h, w, self.groups, c // self.groups)
        return warp_groups(grouped, flow).reshape(b, h, w, c)


class Global(nn.Module):
    """Linear attention to the whole reference, at half of the resolution of the features."""

    cfg: Config

    @nn.compact
    def __call__(self, query, tokens):
        c = self.cfg
        x = Pointwise(c.tokens, name="query_patch")(space_to_depth(query, 2))
        t = Pointwise(c.tokens, name="token_patch")(space_to_depth(tokens, 2))
        q, gate = jnp.split(Pointwise(2 * c.tokens, name="query")(x), 2, -1)
        k, v = jnp.split(Pointwise(2 * c.tokens, name="key_value")(t), 2, -1)
        # Positions tell themselves apart by their surroundings, at any size of picture.
        k = k + Depthwise(name="place")(k)
        unit = jax.nn.softplus(self.param("temperature", nn.initializers.zeros, (c.tokens,)))
        heads = (c.heads, c.tokens // c.heads)
        power = 1 + 4 * jax.nn.sigmoid(self.param("power", nn.initializers.zeros, heads))
        b, h, w, _ = x.shape
        out = polarity_attention(
            *(a.reshape(b, h * w, *heads) for a in (q / unit, k / unit, v)), power
        ).reshape(b, h, w, -1)
        out = (out + Depthwise(size=5, name="near")(v)) * gate
        return depth_to_space(Pointwise(4 * c.tokens, name="subpixel")(out), 2)


class Site(nn.Module):
    """Adaptation site: features [b, h, w, c] of a picture, and what they find in its references.

    At first nothing is added, so an untrained site passes features on as they are.
    """

    cfg: Config

    @nn.compact
    def __call__(self, x, slots, tokens):
        c = self.cfg
        query = Pointwise(c.tokens, name="query")(x)
        find = _Lookup(c, name="lookup")
        found = sum(
            _if_reliable(find, slot, query.shape, query, t)
            for slot, t in zip(slots, tokens, strict=True)
        )
        zeros = nn.initializers.zeros
        return x + Pointwise(x.shape[-1], kernel_init=zeros, name="out")(found)


class _Lookup(nn.Module):
    """What a query finds in one reference: [b, h, w, tokens]."""

    cfg: Config

    @nn.compact
    def __call__(self, query, tokens):
        c = self.cfg
        b, h, w, _ = query.shape
        heads = (b, h, w, c.heads, c.tokens // c.heads)
        found = jnp.zeros_like(query)
        if c.near:
            moved = Alignment(c.groups, REACH / 8, name="align")(query, tokens)
            k, v = jnp.split(Pointwise(2 * c.tokens, name="key_value")(moved), 2, -1)
            bias = self.param("bias", nn.initializers.zeros, (c.heads, c.window, c.window))
            found += neighbourhood_attention(
                *(a.reshape(heads) for a in (query, k, v)), bias
            ).reshape(query.shape)
        if c.linear:
            found += Global(c, name="linear")(query, tokens)
        if c.gate:
            gate = Pointwise(c.heads, name="gate")(jnp.concatenate([query, found], -1))
            found = (found.reshape(heads) * jax.nn.sigmoid(gate)[..., None]).reshape(query.shape)
        return found


def _if_reliable(module, slot, shape, *args):
    """module(*args) [b, ...] of this shape, times the slot's reliability; not computed for 0."""

    def look(m):
        return m(*args) * slot.reliability.reshape(-1, *[1] * (len(shape) - 1))

    if module.is_initializing():
        return look(module)
    return nn.cond(jnp.any(slot.reliability > 0), look, lambda m: jnp.zeros(shape), module)


class TemporalPrior(nn.Module):
    """What references tell the entropy model: [b, h/16, w/16, temporal]."""

    cfg: Config

    @nn.compact
    def __call__(self, hyper, slots, tokens):
        c = self.cfg
        query = Pointwise(c.tokens, name="query")(hyper)
        look = _PriorLookup(c, name="lookup")
        shape = (*query.shape[:3], c.temporal)
        total = sum(
            _if_reliable(look, slot, shape, query, t) for slot, t in zip(slots, tokens, strict=True)
        )
        nothing = self.param("nothing", nn.initializers.normal(0.1), (c.temporal,))
        most = jnp.stack([slot.reliability for slot in slots]).max(0)
        return total + (1 - most)[:, None, None, None] * nothing


class _PriorLookup(nn.Module):
    cfg: Config

    @nn.compact
    def __call__(self, query, tokens):
        c = self.cfg
        x = Pointwise(c.tokens, name="patch")(space_to_depth(tokens, 2))
        x = Alignment(c.groups, REACH / 16, name="align")(query, x)
        return DepthConvBlock(c.temporal, c.form, name="block")(x)


class Encoder(nn.Module):
    cfg: Config
    dtype: Any

    def setup(self):
        c = self.cfg
        blocks = partial(Blocks, c.width, form=c.form, dtype=self.dtype)
        self.patch = DepthConvBlock(c.width, c.form, dtype=self.dtype)
        self.early, self.late = blocks(c.encoder // 2), blocks(c.encoder - c.encoder // 2)
        self.sites = [Site(c) for _ in range(2)]
        self.latent = Conv3x3(c.y, 2, self.dtype)

    def begin(self, frame, q):
        return self.patch(space_to_depth(frame, 8)) * q

    def __call__(self, frame, q, slots, tokens):
        x = self.sites[0](self.begin(frame, q), slots, tokens)
        x = self.sites[1](self.early(x), slots, tokens)
        return self.latent(self.late(x))


class Decoder(nn.Module):
    """Latent -> (features of the picture, what is kept for later pictures)."""

    cfg: Config
    dtype: Any

    @nn.compact
    def __call__(self, y_hat, slots, tokens):
        c = self.cfg
        blocks = partial(Blocks, c.width, form=c.form, dtype=self.dtype)
        x = Up(c.width, c.form, self.dtype, name="up")(y_hat)
        x = Site(c, name="site0")(x, slots, tokens)
        x = blocks(c.decoder // 2, name="early")(x)
        x = Site(c, name="site1")(x, slots, tokens)
        x = blocks(c.decoder - c.decoder // 2, name="late")(x)
        return x, Pointwise(c.feature, self.dtype, name="kept")(x)


class Judge(nn.Module):
    """Reliability classifier: logits of the levels, [b, levels]. Runs in the encoder alone.

    What a decoder would need to judge for itself, the picture, it does not have.
    """

    cfg: Config

    @nn.compact
    def __call__(self, features, slot, tokens, qp):
        c = self.cfg
        ours, theirs = halve(Pointwise(c.tokens, name="query")(features)), halve(tokens)
        x = jnp.concatenate([ours, theirs, jnp.abs(ours - theirs)], -1)
        for i in range(2):
            x = DepthConvBlock(c.judge, c.form, name=f"block{i}")(x)
        facts = jnp.stack([jnp.log2(slot.distance), qp / 63, slot.ref.qp / 63], -1)
        x = jnp.concatenate([x.mean((1, 2)), x.max((1, 2)), facts], -1)
        return Pointwise(RELIABILITIES, name="levels")(wsilu(Pointwise(c.judge, name="hidden")(x)))


class UniLVC(nn.Module):
    """The codec. `dtype` is the compute type of everything but the entropy path (float32)."""

    cfg: Config
    dtype: Any = jnp.float32

    frames_per_unit = 1
    schedule = "hierarchical"
    modes = {"ai": "all_intra", "ld": "low_delay_long", "ra": "hierarchical"}  # noqa: RUF012
    references = 2
    qp_rows = QP_ROWS
    rgb = False

    def setup(self):
        c = self.cfg
        self.tokens = Tokens(c)
        self.judge = Judge(c)
        self.encoder = Encoder(c, self.dtype)
        self.q_encoder = QpTable(QP_ROWS, c.width, self.dtype)
        self.q_latent = QpTable(QP_ROWS, c.y, ramp=True)
        self.hyper_encoder = HyperEncoder(c.z, c.form)
        self.z_prior = FactorizedPrior(QP_ROWS, c.z)
        self.hyper_decoder = HyperDecoder(c.y, c.form)
        self.temporal_prior = TemporalPrior(c)
        self.prior_fusion = ParameterNet(3 * c.y, c.prior, c.fusion, c.form, leading_ones(2 * c.y))
        self.spatial_prior_reduction = Pointwise(c.y)
        self.spatial_prior_adaptors = [
            DepthConvBlock(c.spatial_width, c.form, force_adaptor=True) for _ in range(STEPS - 1)
        ]
        self.spatial_prior = ParameterNet(c.y, c.spatial_width, c.spatial, c.form)
        if c.scale_head:
            self.scale_head = ScaleHead(c.y, c.scale_head, steps=1, references=2)
        self.decoder = Decoder(c, self.dtype)
        self.q_decoder = QpTable(QP_ROWS, c.width, self.dtype)
        self.pixels = DepthConvBlock(192, c.form, dtype=self.dtype)

    def complete(self, refs, unit, height, width, exact=False):
        """See `nvc_jax.models.ui2c.UI2C.complete`. Always two slots, of which some are empty."""
        slots = []
        for i in range(2):
            slot = self._empty(1, height, width, exact)
            # A reference that is named twice counts once.
            if i < len(refs) and unit.distances[i] not in unit.distances[:i]:
                distance = unit.distances[i]
                role = FUTURE if distance > 0 else FAR_PAST if i else NEAR_PAST
                highest = RELIABILITIES - 1
                level = unit.reliability[i] if unit.reliability else highest
                slot = Slot(
                    refs[i],
                    np.array([role], np.int32),
                    np.array([abs(distance)], np.float32),
                    np.array([level / highest], np.float32),
                )
            slots.append(slot)
        return tuple(slots)

    def _empty(self, batch, height, width, exact):
        c = self.cfg
        feature = jnp.zeros((batch, height // 8, width // 8, c.feature))
        numbers, ones = np.zeros(batch, np.int32), np.ones(batch, np.float32)
        memory = None
        if exact:
            shape = (batch, height // 16, width // 16, memory_channels(c.y))
            memory = jnp.zeros(shape, jnp.int8)
        return Slot(Ref(feature, numbers, memory), numbers, ones, 0 * ones)

    def reliability(self, frames, refs, qp):
        """Logits of how reliable the references are, [b, 2, levels]; for encoders.

        Arguments as those of `__call__`.
        """
        qp = qp[:, 0]
        frame = (frames[:, 0] - 0.5).astype(self.dtype)
        features = self.encoder.begin(frame, self.q_encoder(qp)).astype(jnp.float32)
        return jnp.stack([self.judge(features, slot, self.tokens(slot), qp) for slot in refs], 1)

    def __call__(self, frames, refs, qp, bottleneck):
        """Codes one picture.

        Args:
          frames: float32 [batch, 1, height, width, 3], Y, U, V in [0, 1], sides multiples of 16.
            When decoding only the shape counts.
          refs: two `Slot`s, or () for a picture on its own.
          qp: int32 [batch, 1], 0..71.
          bottleneck: see `nvc_jax.entropy.bottleneck`.

        Returns:
          recon: float32 [batch, 1, height, width, 3], 0..1 and possibly a little beyond.
          new_refs: (Ref,).
        """
        c = self.cfg
        batch, _, height, width, _ = frames.shape
        first_qp, h, w = qp[:, 0], height // 16, width // 16
        refs = refs or 2 * (self._empty(batch, height, width, bottleneck.exact),)
        gain = self.q_latent(first_qp)
        tokens = [self.tokens(slot) for slot in refs]
        if self.is_initializing():
            self.reliability(frames, refs, qp)

        def analysis(m):
            frame = (frames[:, 0] - 0.5).astype(m.dtype)
            y = m.encoder(frame, m.q_encoder(first_qp), refs, tokens).astype(jnp.float32) * gain
            return y, m.hyper_encoder(pad_to_multiple(y, 4))

        latent = jax.ShapeDtypeStruct((batch, h, w, c.y), jnp.float32)
        hyper_latent = jax.ShapeDtypeStruct((batch, -(-h // 4), -(-w // 4), c.z), jnp.float32)
        y, z = bottleneck.encoder_only(self, analysis, latent, hyper_latent)
        z_hat = bottleneck.factorized(z, self.z_prior, first_qp)
        hyper = self.hyper_decoder(z_hat)[:, :h, :w]
        temporal = self.temporal_prior(hyper, refs, tokens)
        params = self.prior_fusion(jnp.concatenate([hyper, temporal], -1))
        step_size, scale, mean = jnp.split(params, 3, -1)
        step_size = lower_bound(step_size, 0.5)
        reduced = self.spatial_prior_reduction(params)

        def predict(m, step, y_hat):
            if step == 0:
                return mean
            x = m.spatial_prior_adaptors[step - 1](jnp.concatenate([y_hat, reduced], -1))
            return m.spatial_prior(x)

        level = memory = None
        if bottleneck.exact:
            memories = [_believed(slot) for slot in refs]
            hidden = self.scale_head.begin(z_hat, qp, memories, (h, w))
            level = self.scale_head.level(hidden, 0, None)
        y_hat, symbols = code_at_once(self, y / step_size, STEPS, scale, predict, bottleneck, level)
        if bottleneck.exact:
            memory = self.scale_head.remember(hidden, symbols, level)
        y_hat = y_hat * step_size / gain

        x, kept = self.decoder(y_hat.astype(self.dtype), refs, tokens)

        def render(m):
            recon = depth_to_space(m.pixels(x * m.q_decoder(first_qp)), 8)
            return ((recon.astype(jnp.float32) + 0.5)[:, None],)

        (recon,) = bottleneck.decoder_only(
            self, render, jax.ShapeDtypeStruct(frames.shape, jnp.float32)
        )
        return recon, (Ref(kept.astype(jnp.float32), first_qp, memory),)


def _believed(slot):
    """The scale head's memory of a reference; blank if the reference does not count."""
    if slot.ref.memory is None:
        return None
    there = (slot.reliability > 0)[:, None, None, None]
    return jnp.where(there, slot.ref.memory, jnp.zeros_like(slot.ref.memory))
