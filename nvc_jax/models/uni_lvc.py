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
    precision_of,
    space_to_depth,
    wsilu,
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
from nvc_jax.nn.matching import motion_between
from nvc_jax.nn.spatial_prior import code_at_once, split_params
from nvc_jax.nn.warp import warp, warp_groups
from nvc_jax.quality import MAX_QP, QP_ROWS

STEPS = 4  # of the spatial prior
REACH = 64.0  # pixels that motion may span in an adaptation site
# Of the distortion of every frame, beside the lambda of its row of the tables. Of a row there is
# but one lambda, whatever order a picture is coded in: rows mean the same to all, and what listens
# to references need not first learn another quality.
DISTORTION_WEIGHT = 1.5
RELIABILITIES = 4  # levels, from "not at all" to "fully"; a stream has two bits for them
# By layer of the hierarchy in random access, from frames between neighbours up to anchors.
LAYER_QP = (0, 0, 2, 4, 6, 8)
# Of a search for motion, level after level: one value for so many pixels squared, and how many such
# values away it looks.
SEARCH = ((4, 8), (2, 2), (1, 2))
JUDGED_BY = SEARCH[:2]  # the classifier's
NEAR_PAST, FAR_PAST, FUTURE = range(3)  # what a reference is to the picture
# Sub-networks, for stages of training: what listens to references, and the intra codec, to which
# only the reliability classifier ("judge") and the integer scale head are missing.
LISTENING = (
    "tokens", "sites_0", "sites_1", "sites_2", "sites_3", "news_encoder", "news_decoder",
    "temporal_prior", "takeover",
)  # fmt: skip
BACKBONE = (
    "patch", "encoder_early", "encoder_late", "latent", "q_encoder", "q_latent", "hyper_encoder",
    "z_prior", "hyper_decoder", "prior_fusion", "spatial_prior_reduction",
    "spatial_prior_adaptors_0", "spatial_prior_adaptors_1", "spatial_prior_adaptors_2",
    "spatial_prior", "up", "decoder_early", "decoder_late", "q_decoder", "pixels",
)  # fmt: skip


@dataclass(frozen=True)
class Config:
    """Widths (channels) and depths (blocks) of one size.

    `encoder` and `decoder` count the blocks between the first (last) one and the latent, half of
    them on each side of the second adaptation site. `tokens` is what attention works on, in `heads`
    for attention and `groups` for motion; `window` is the side of the neighbourhood that a position
    attends to. `temporal` is the width of what looks for news for the entropy model, `judge` that
    of the reliability classifier. `near`, `linear` and `gate` False leave out one of the parts of a
    site, `takeover` False the last step of the decoder, to see what it is worth.
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
    takeover: bool = True


SIZES = {
    "large": Config(
        width=368, y=256, prior=768, spatial_width=512, encoder=6, decoder=12, spatial=3,
        temporal=512,
    ),
    "fast": Config(),
    "dev": Config(
        width=192, y=128, z=96, prior=384, spatial_width=256, encoder=3, decoder=4, tokens=96,
        temporal=256,
    ),
    "nano": Config(
        width=112, y=128, z=32, prior=128, spatial_width=96, encoder=3, decoder=5, fusion=2,
        spatial=1, tokens=48, temporal=128, judge=32, form="uf2", scale_head=128,
    ),
}  # fmt: skip


class Ref(NamedTuple):
    """What is kept of a coded picture.

    Attributes:
      frame: float32 [b, h, w, 3], as it was decoded.
      y: float32 [b, h/16, w/16, y], its latent, likewise, without the gain of its qp.
      qp: int32 [b], what it was coded with.
      memory: [b, h/16, w/16, memory_channels(y)], of the scale head, or None.
    """

    frame: jax.Array
    y: jax.Array
    qp: jax.Array
    memory: jax.Array | None = None


class Slot(NamedTuple):
    """A reference as it is to one picture.

    Attributes:
      ref: what is referred to; anything finite if nothing is.
      role: int32 [b], NEAR_PAST, FAR_PAST or FUTURE.
      distance: float32 [b], in frames, positive.
      reliability: float32 [b], 0 to 1: how much it counts. 0 also where there is no reference.
      looked_at: bool [b], False for a reference that surely does not count: if it is one for all of
        a batch, nothing is computed for it. In training also those that count 0 are looked at, or
        nothing could teach that they should count.
    """

    ref: Ref
    role: jax.Array
    distance: jax.Array
    reliability: jax.Array
    looked_at: jax.Array


def role(number: int, distance: int) -> int:
    """What the reference of this number is, so many frames behind the picture (before: below 0)."""
    return FUTURE if distance > 0 else FAR_PAST if number else NEAR_PAST


class Tokens(nn.Module):
    """A reference's picture -> what is attended to, [b, h/8, w/8, tokens]."""

    cfg: Config

    @nn.compact
    def __call__(self, picture, slot):
        c = self.cfg
        x = space_to_depth(picture - 0.5, 8)
        for i in range(2):
            x = DepthConvBlock(c.tokens, c.form, name=f"block{i}")(x)
        roles = self.param("roles", nn.initializers.normal(0.1), (3, c.tokens))
        distance = jnp.log2(slot.distance)[:, None]
        return (
            x + (roles[slot.role] + Pointwise(c.tokens, name="distance")(distance))[:, None, None]
        )


class Alignment(nn.Module):
    """Where a query expects what it looks for: one flow for each group of channels.

    Attributes:
      groups: of channels.
      reach: how far, in positions.
    """

    groups: int
    reach: float
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, query, tokens):
        """query, tokens [b, h, w, c] -> float32 [b, h, w, groups, 2], in positions."""
        b, h, w, c = tokens.shape
        x = Pointwise(c, self.dtype, name="join")(jnp.concatenate([query, tokens], -1))
        x = wsilu(Depthwise(self.dtype, size=5, name="depth")(x))
        flow = Pointwise(2 * self.groups, kernel_init=nn.initializers.zeros, name="flow")(x)
        return self.reach * jnp.tanh(flow).reshape(b, h, w, self.groups, 2)


def _moved(x, flow):
    """x [b, h, w, c] by the flows of its groups."""
    return warp_groups(x.reshape(*flow.shape[:4], -1), flow).reshape(x.shape)


class Global(nn.Module):
    """Linear attention to the whole reference, at half of the resolution of the features."""

    cfg: Config
    dtype: Any

    @nn.compact
    def __call__(self, query, tokens):
        c = self.cfg
        dense = partial(Pointwise, dtype=self.dtype)
        x = dense(c.tokens, name="query_patch")(space_to_depth(query, 2))
        t = dense(c.tokens, name="token_patch")(space_to_depth(tokens, 2))
        q, gate = jnp.split(dense(2 * c.tokens, name="query")(x), 2, -1)
        k, v = jnp.split(dense(2 * c.tokens, name="key_value")(t), 2, -1)
        # Positions tell themselves apart by their surroundings, at any size of picture.
        k = k + Depthwise(self.dtype, name="place")(k)
        unit = jax.nn.softplus(self.param("temperature", nn.initializers.zeros, (c.tokens,)))
        heads = (c.heads, c.tokens // c.heads)
        power = 1 + 4 * jax.nn.sigmoid(self.param("power", nn.initializers.zeros, heads))
        b, h, w, _ = x.shape
        # In float32: sums over whole pictures. At unit size: what is raised to powers stays finite.
        parts = (a.astype(jnp.float32).reshape(b, h * w, *heads) for a in (q / unit, k / unit, v))
        q, k, values = parts
        out = polarity_attention(_normal(q), _normal(k), values, power)
        out = out.reshape(b, h, w, -1).astype(v.dtype)
        out = (out + Depthwise(self.dtype, size=5, name="near")(v)) * gate
        return depth_to_space(dense(4 * c.tokens, name="subpixel")(out), 2)


def _normal(x):
    return x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-6)


class ReferenceLookup(nn.Module):
    """What a query finds in one reference: [b, h, w, tokens]."""

    cfg: Config
    dtype: Any

    @nn.compact
    def __call__(self, query, tokens):
        c = self.cfg
        b, h, w, _ = query.shape
        heads = (b, h, w, c.heads, c.tokens // c.heads)
        tokens = tokens.astype(self.dtype)
        found = jnp.zeros_like(query)
        if c.near:
            flow = Alignment(c.groups, REACH / 8, self.dtype, name="align")(query, tokens)
            moved = _moved(tokens, flow)
            k, v = jnp.split(Pointwise(2 * c.tokens, self.dtype, name="key_value")(moved), 2, -1)
            bias = self.param("bias", _looking_ahead, (c.heads, c.window, c.window))
            parts = (a.reshape(heads) for a in (query, k, v))
            found += neighbourhood_attention(*parts, bias).reshape(query.shape)
        if c.linear:
            found += Global(c, self.dtype, name="linear")(query, tokens)
        if c.gate:
            both = jnp.concatenate([query, found], -1)
            gate = jax.nn.sigmoid(Pointwise(c.heads, self.dtype, name="gate")(both))
            found = (found.reshape(heads) * gate[..., None]).reshape(query.shape)
        return found


def _looking_ahead(key, shape, dtype=jnp.float32):
    """Windows that first look at what is in their middle, from where flows learn: not at a mean."""
    del key
    _, height, width = shape
    return jnp.zeros(shape, dtype).at[:, height // 2, width // 2].set(4.0)


class Site(nn.Module):
    """Adaptation site: features [b, h, w, c] of a picture, and what they find in its references.

    At first nothing is added, so an untrained site passes features on as they are.
    """

    cfg: Config
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, slots, tokens):
        c = self.cfg
        query = Pointwise(c.tokens, self.dtype, name="query")(x)
        lookup = ReferenceLookup(c, self.dtype, name="lookup")
        found = sum(
            _if_looked_at(lookup, slot, query, query, t) * _share(slot).astype(query.dtype)
            for slot, t in zip(slots, tokens, strict=True)
        )
        return x + _at_first_nothing(x.shape[-1], self.dtype, name="out")(found)


def _at_first_nothing(width, dtype=jnp.float32, **options):
    """A dense layer without a bias: of nothing found nothing is added."""
    zeros, precision = nn.initializers.zeros, precision_of(dtype)
    return nn.Dense(
        width, use_bias=False, dtype=dtype, precision=precision, kernel_init=zeros, **options
    )


def _facts(qp, slot):
    """How far away a reference is, and how well both are coded: [b, 3]."""
    return jnp.stack([jnp.log2(slot.distance), qp / MAX_QP, slot.ref.qp / MAX_QP], -1)


def _share(slot):
    return slot.reliability[:, None, None, None]


def _if_looked_at(module, slot, like, *args):
    """module(*args), of these shapes; zeros, for nothing, if the reference does not count."""
    if module.is_initializing():
        return module(*args)

    def nothing(m):
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)

    if isinstance(slot.looked_at, np.ndarray) and not slot.looked_at.any():  # known beforehand
        return nothing(module)
    return nn.cond(jnp.any(slot.looked_at), lambda m: m(*args), nothing, module)


def _average(found, slots):
    """Weighted means of what was found in references, and the weights' sums.

    Each is found with a weight in -1..1. Where weights add up to more than 1, the sum is taken for
    1; where to less, what is missing is left to what the picture says of itself.

    Args:
      found: (weighted values, weights, absolute weights), of each reference.
    """
    values, weights, sizes = (
        sum(part * _share(slot) for part, slot in zip(parts, slots, strict=True))
        for parts in zip(*found, strict=True)
    )
    total = jnp.maximum(sizes, 1)
    return values / total, weights / total


class NewsEncoder(nn.Module):
    """Adds to the hyper-latent where references agree with the picture and where they do not.

    Decoders cannot know that before they have the latent, and would trust references everywhere
    alike. At first nothing is added.
    """

    cfg: Config

    @nn.compact
    def __call__(self, y, slots, gain):
        """y: latent [b, h/16, w/16, y] -> [b, h/64, w/64, z], sides rounded up."""
        c = self.cfg
        b, h, w, _ = y.shape
        like = latent_shapes(b, h, w, c.y, c.z)[1]
        lookup = NewsLookup(c, name="lookup")
        return sum(
            _if_looked_at(lookup, slot, like, y, slot.ref.y * gain) * _share(slot) for slot in slots
        )


class NewsLookup(nn.Module):
    """Of one reference; see `NewsEncoder`."""

    cfg: Config

    @nn.compact
    def __call__(self, y, latent):
        c = self.cfg
        apart = jax.nn.soft_sign(pad_to_multiple(y - latent, 4))
        x = jnp.concatenate([apart, jnp.abs(apart)], -1)
        x = HyperEncoder(c.z, c.form, name="encoder")(x)
        return _at_first_nothing(c.z, name="out")(x)


class NewsDecoder(nn.Module):
    """Hyper-latent [b, h/64, w/64, z] -> what it says of references, [b, h/16, w/16, tokens]."""

    cfg: Config

    @nn.compact
    def __call__(self, z):
        x = HyperDecoder(self.cfg.tokens, self.cfg.form, name="decoder")(z)
        return _at_first_nothing(self.cfg.tokens, name="out")(x)


class TemporalPrior(nn.Module):
    """What references tell the entropy model; at first, nothing.

    Returns:
      change: of the latent's parameters, [b, h/16, w/16, 3 y].
      latent, weight: [b, h/16, w/16, y], what is expected by the references, times how much it is
        to count beside what the picture's own symbols say, and that, -1..1.
    """

    cfg: Config

    @nn.compact
    def __call__(self, params, own, news, slots, tokens):
        """params: by the picture alone, own: the latent that they expect."""
        c = self.cfg
        query = Pointwise(c.tokens, name="query")(params) + news
        lookup = PriorLookup(c, name="lookup")
        found = [
            _if_looked_at(lookup, slot, (params, (own, own, own)), query, own, t, slot.ref.y)
            for slot, t in zip(slots, tokens, strict=True)
        ]
        changes, latents = zip(*found, strict=True)
        change = sum(x * _share(slot) for x, slot in zip(changes, slots, strict=True))
        return change, *_average(latents, slots)


class PriorLookup(nn.Module):
    """What one reference tells the entropy model; see `TemporalPrior` and `_average`."""

    cfg: Config

    @nn.compact
    def __call__(self, query, own, tokens, latent):
        c = self.cfg
        x = Pointwise(c.tokens, name="patch")(space_to_depth(tokens, 2))
        flow = Alignment(c.groups, REACH / 16, name="align")(query, x)
        x, latent = _moved(x, flow), _moved(latent, flow)
        apart = jax.nn.soft_sign(latent - own)
        x = jnp.concatenate([query, x, apart, jnp.abs(apart)], -1)
        x = DepthConvBlock(c.temporal, c.form, name="block")(x)
        change, weight = jnp.split(_at_first_nothing(4 * c.y, name="out")(x), [3 * c.y], -1)
        weight = jnp.tanh(weight)
        return change, (weight * latent, weight, jnp.abs(weight))


class Takeover(nn.Module):
    """Last step of the decoder: what was seen before is taken over from the references.

    The draft, which is what the stream alone says, is looked for in every reference, as it is and
    moved by motion that decoders find for themselves (`nvc_jax.nn.matching`). What agrees with the
    draft and was coded better than it replaces it, pixel by pixel, as far as a network says.
    """

    cfg: Config
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, draft, features, qp, slots):
        """draft [b, h, w, 3], features [b, h/8, w/8, width] -> [b, h, w, 3]."""
        c = self.cfg
        lookup = TakeoverLookup(c, self.dtype, name="lookup")
        like = (draft, draft, draft)
        found = [_if_looked_at(lookup, slot, like, draft, features, qp, slot) for slot in slots]
        values, weights = _average(found, slots)
        return draft * (1 - weights) + values


class TakeoverLookup(nn.Module):
    """What is taken over from one reference; see `_average`."""

    cfg: Config
    dtype: Any

    @nn.compact
    def __call__(self, draft, features, qp, slot):
        c = self.cfg
        sharpness = self.param("sharpness", nn.initializers.constant(9.0), (len(SEARCH),))
        inertia = self.param("inertia", nn.initializers.constant(0.5), (len(SEARCH),))
        still = slot.ref.frame
        flow = motion_between(draft[..., :1], still[..., :1], SEARCH, sharpness, inertia)
        seen = (still, warp(still, flow))
        apart = [jnp.abs(space_to_depth(x - draft, 8)) for x in seen]
        facts = Pointwise(c.tokens, self.dtype, name="facts")(_facts(qp, slot))[:, None, None]
        x = jnp.concatenate([features.astype(jnp.float32), *apart], -1)
        x = wsilu(Pointwise(c.tokens, self.dtype, name="join")(x) + facts)
        x = DepthConvBlock(c.tokens, c.form, dtype=self.dtype, name="block")(x)
        # For each of both, luma and chroma.
        x = _at_first_nothing(4 * 64, self.dtype, name="out")(x)
        weights = jnp.tanh(depth_to_space(x, 8).astype(jnp.float32))
        weights = [w[..., [0, 1, 1]] for w in jnp.split(weights, 2, -1)]
        values = sum(w * x for w, x in zip(weights, seen, strict=True))
        return values, sum(weights), sum(map(jnp.abs, weights))


class Judge(nn.Module):
    """Reliability classifier: logits of the levels, [b, levels]. Runs in the encoder alone.

    What a decoder would need to judge for itself, the picture, it does not have. Block by block it
    sees how far the reference is from the picture, as it is and moved by the motion that is found
    between them, beside how much there is to code in the block at all.
    """

    cfg: Config

    @nn.compact
    def __call__(self, picture, qp, slot):
        """picture [b, h, w, 3] -> [b, levels]."""
        c = self.cfg
        ours, theirs = picture[..., :1], slot.ref.frame[..., :1]
        levels = len(JUDGED_BY)
        flow = motion_between(ours, theirs, JUDGED_BY, jnp.full(levels, 7.0), jnp.zeros(levels))
        blocks = [space_to_depth(x, 8) for x in (ours, theirs, warp(theirs, flow))]
        energies = [jnp.square(x - blocks[0]).mean(-1) for x in blocks[1:]]
        x = jnp.log(jnp.stack([*energies, blocks[0].var(-1)], -1) + 1e-5) / 4 + 2
        x = wsilu(Pointwise(c.judge, name="join")(x))
        x = DepthConvBlock(c.judge, c.form, name="block")(x)
        x = jnp.concatenate([x.mean((1, 2)), x.max((1, 2)), _facts(qp, slot)], -1)
        x = wsilu(Pointwise(c.judge, name="hidden")(x))
        # Untrained, it trusts everything.
        levels = partial(Pointwise, RELIABILITIES, kernel_init=nn.initializers.zeros)
        return levels(bias_init=_trusting, name="levels")(x)


def _trusting(key, shape, dtype=jnp.float32):
    del key
    return jnp.zeros(shape, dtype).at[-1].set(2.0)


class UniLVC(nn.Module):
    """The codec. `dtype` is the compute type of everything but the entropy path (float32)."""

    cfg: Config
    dtype: Any = jnp.float32

    frames_per_unit = 1
    schedule = "hierarchical"
    modes = {"ai": "all_intra", "ld": "low_delay_long", "ra": "hierarchical"}  # noqa: RUF012
    references = 2
    refers_to_pictures = True
    qp_rows = QP_ROWS
    rgb = False

    def setup(self):
        c = self.cfg
        self.tokens = Tokens(c)
        self.judge = Judge(c)
        blocks = partial(Blocks, c.width, form=c.form, dtype=self.dtype)
        self.sites = [
            Site(c, self.dtype) for _ in range(4)
        ]  # two in the encoder, two in the decoder
        self.patch = DepthConvBlock(c.width, c.form, dtype=self.dtype)
        self.encoder_early = blocks(c.encoder // 2)
        self.encoder_late = blocks(c.encoder - c.encoder // 2)
        self.latent = Conv3x3(c.y, 2, self.dtype)
        self.q_encoder = QpTable(QP_ROWS, c.width, self.dtype)
        self.q_latent = QpTable(QP_ROWS, c.y, ramp=True)
        self.hyper_encoder = HyperEncoder(c.z, c.form)
        self.z_prior = FactorizedPrior(QP_ROWS, c.z)
        self.hyper_decoder = HyperDecoder(c.y, c.form)
        self.news_encoder = NewsEncoder(c)
        self.news_decoder = NewsDecoder(c)
        self.temporal_prior = TemporalPrior(c)
        self.prior_fusion = ParameterNet(3 * c.y, c.prior, c.fusion, c.form, leading_ones(2 * c.y))
        self.spatial_prior_reduction = Pointwise(c.y)
        self.spatial_prior_adaptors = [
            DepthConvBlock(c.spatial_width, c.form, force_adaptor=True) for _ in range(STEPS - 1)
        ]
        self.spatial_prior = ParameterNet(c.y, c.spatial_width, c.spatial, c.form)
        if c.scale_head:
            self.scale_head = ScaleHead(c.y, c.scale_head, steps=1, references=2)
        self.up = Up(c.width, c.form, self.dtype)
        self.decoder_early = blocks(c.decoder // 2)
        self.decoder_late = blocks(c.decoder - c.decoder // 2)
        if c.takeover:
            self.takeover = Takeover(c, self.dtype)
        self.q_decoder = QpTable(QP_ROWS, c.width, self.dtype)
        self.pixels = DepthConvBlock(192, c.form, dtype=self.dtype)

    def complete(self, refs, unit, height, width, exact=False):
        """See `nvc_jax.models.ui2c.UI2C.complete`. Always two slots, of which some are empty."""
        slots = []
        for i in range(2):
            slot = self._empty(1, height, width)
            if exact:
                memory = no_memory(self.cfg.y, height, width)
                slot = slot._replace(ref=slot.ref._replace(memory=memory))
            # A reference that is named twice counts once.
            if i < len(refs) and unit.distances[i] not in unit.distances[:i]:
                highest = RELIABILITIES - 1
                level = unit.reliability[i] if unit.reliability else highest
                slot = Slot(
                    refs[i],
                    np.array([role(i, unit.distances[i])], np.int32),
                    np.array([abs(unit.distances[i])], np.float32),
                    np.array([level / highest], np.float32),
                    np.array([level > 0]),
                )
            slots.append(slot)
        return tuple(slots)

    def _empty(self, batch, height, width):
        picture = jnp.zeros((batch, height, width, 3))
        latent = jnp.zeros((batch, height // 16, width // 16, self.cfg.y))
        numbers, ones = np.zeros(batch, np.int32), np.ones(batch, np.float32)
        return Slot(Ref(picture, latent, numbers), numbers, ones, 0 * ones, ones == 0)

    def reliability(self, frames, refs, qp):
        """Logits of how reliable the references are, [b, 2, levels]; for encoders.

        Arguments as those of `__call__`.
        """
        return jnp.stack([self.judge(frames[:, 0], qp[:, 0], slot) for slot in refs], 1)

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
        refs = refs or 2 * (self._empty(batch, height, width),)
        gain = self.q_latent(first_qp)
        like = jax.ShapeDtypeStruct((batch, 2 * h, 2 * w, c.tokens), jnp.float32)
        tokens = [_if_looked_at(self.tokens, slot, like, slot.ref.frame, slot) for slot in refs]
        if self.is_initializing():
            self.reliability(frames, refs, qp)

        def analysis(m):
            x = space_to_depth((frames[:, 0] - 0.5).astype(m.dtype), 8)
            x = m.sites[0](m.patch(x) * m.q_encoder(first_qp), refs, tokens)
            x = m.sites[1](m.encoder_early(x), refs, tokens)
            y = m.latent(m.encoder_late(x)).astype(jnp.float32) * gain
            z = m.hyper_encoder(pad_to_multiple(y, 4))
            return y, z + m.news_encoder(y, refs, gain)

        shapes = latent_shapes(batch, h, w, c.y, c.z)
        y, z = bottleneck.encoder_only(self, analysis, *shapes)
        z_hat = bottleneck.factorized(z, self.z_prior, first_qp)
        hyper = self.hyper_decoder(z_hat)[:, :h, :w]
        params = self.prior_fusion(hyper)
        step_size, _, mean = split_params(params)
        own = mean * step_size / gain
        news = self.news_decoder(z_hat)[:, :h, :w]
        change, latent, weight = self.temporal_prior(params, own, news, refs, tokens)
        params = params + change
        step_size, scale, mean = split_params(params)
        latent = latent * gain / step_size
        reduced = self.spatial_prior_reduction(params)

        def predict(m, step, y_hat):
            own = mean
            if step > 0:
                x = m.spatial_prior_adaptors[step - 1](jnp.concatenate([y_hat, reduced], -1))
                own = m.spatial_prior(x)
            return own * (1 - weight) + latent

        level = memory = None
        if bottleneck.exact:
            memories = [_believed(slot) for slot in refs]
            hidden = self.scale_head.begin(z_hat, qp, memories, (h, w))
            level = self.scale_head.level(hidden, 0, None)
        y_hat, symbols = code_at_once(self, y / step_size, STEPS, scale, predict, bottleneck, level)
        if bottleneck.exact:
            memory = self.scale_head.remember(hidden, symbols, level)
        y_hat = y_hat * step_size / gain

        def render(m):
            x = m.sites[2](m.up(y_hat.astype(m.dtype)), refs, tokens)
            x = m.decoder_late(m.sites[3](m.decoder_early(x), refs, tokens))
            x = x * m.q_decoder(first_qp)
            recon = depth_to_space(m.pixels(x), 8).astype(jnp.float32) + 0.5
            return (m.takeover(recon, x, first_qp, refs) if c.takeover else recon,)

        shape = jax.ShapeDtypeStruct((batch, height, width, 3), jnp.float32)
        (recon,) = bottleneck.decoder_only(self, render, shape)
        return recon[:, None], (Ref(recon, y_hat, first_qp, memory),)


def _believed(slot):
    """The scale head's memory of a reference; blank if the reference does not count."""
    if slot.ref.memory is None:
        return None
    there = (slot.reliability > 0)[:, None, None, None]
    return jnp.where(there, slot.ref.memory, jnp.zeros_like(slot.ref.memory))
