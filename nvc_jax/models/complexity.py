"""Parameters and multiply-accumulates of the codecs, counted from what they really compute.

A count is taken from a traced program (shapes only, nothing is computed), so it cannot disagree
with the networks as a table kept by hand would. What is counted: matrix products, convolutions, the
depth-wise ones, and attention. What is not: activations, additions, quality tables, likelihoods and
the prior of z, which cost nothing beside them. Positions of zero padding count like any other, as
everywhere in the literature.

Counts are per pixel of the *padded* picture (sides multiples of 64, so that nothing is lost to
rounding). Published figures are often per pixel of the picture itself: at 1920x1080, coded as
1920x1088, they are 1088/1080 times ours.
"""

import functools
import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from nvc_jax.errors import NvcError
from nvc_jax.models.brhvc import Between
from nvc_jax.models.registry import UNIT, has_scale_head, judges_references, param_shapes
from nvc_jax.models.with_intra import WithIntra
from nvc_jax.nn.attention import neighbourhood_attention
from nvc_jax.nn.blocks import depthwise

# Hyper-latents are 64 times smaller; flows are found at 1/16 of the size and in multiples of 16, so
# that smaller pictures would pay for padding.
SIDE = 256


class SubNetwork(NamedTuple):
    """A row of `subnetworks`.

    Attributes:
      name: of the sub-network in the parameter tree.
      parameters: number of values.
      kmac_per_pixel: thousand multiply-accumulates of all its uses in one unit, per pixel of one
        picture (a unit of two pictures counts once, not per picture).
    """

    name: str
    parameters: int
    kmac_per_pixel: float


def macs(fn, *args: Any) -> int:
    """Multiply-accumulates of fn(*args), a forward pass: gradients are not recognised.

    Args:
      fn: function that JAX can trace.
      *args: pytrees of arrays or `jax.ShapeDtypeStruct`; only shapes and types count.

    Raises:
      NvcError: products in a `while` loop, whose number of rounds nobody knows beforehand.
    """
    return _macs(jax.make_jaxpr(fn)(*args))


def _macs(jaxpr) -> int:
    # A closed jaxpr holds the open one; in newer JAX they are one type.
    return sum(_equation_macs(eqn) for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns)


def _equation_macs(eqn) -> int:
    name, params = eqn.primitive.name, eqn.params
    out = math.prod(eqn.outvars[0].aval.shape) if eqn.outvars else 0
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        return out * math.prod(eqn.invars[0].aval.shape[d] for d in contracted)
    if name == "conv_general_dilated":
        kernel = eqn.invars[1].aval.shape
        output_channels = kernel[params["dimension_numbers"].rhs_spec[0]]
        return out * math.prod(kernel) // output_channels
    if name == "custom_vjp_call":
        # Told by the name they were traced under.
        traced = getattr(params["call_jaxpr"], "jaxpr", params["call_jaxpr"]).debug_info.func_name
        if traced == depthwise.__name__:
            return math.prod(eqn.invars[1].aval.shape[:2]) * out
        if traced == neighbourhood_attention.__name__:
            return 2 * math.prod(eqn.invars[3].aval.shape[1:]) * out
    if name == "cond":
        return max(_macs(branch) for branch in params["branches"])
    inner = sum(_macs(j) for j in _inner_programs(params))
    if name == "scan":
        return params["length"] * inner
    if name == "while" and inner:
        raise NvcError("cannot count the products of a while loop: it may run any number of times")
    return inner


def _inner_programs(params):
    """The programs among an equation's parameters: of a jit, a loop, a custom derivative, ..."""
    for value in jax.tree.leaves(list(params.values())):
        if hasattr(getattr(value, "jaxpr", value), "eqns"):
            yield value


class _Everything:
    """A bottleneck that passes on what it is given and runs the whole codec."""

    def __init__(self, exact: bool = False):
        self.exact, self.float_scales = exact, not exact

    def encoder_only(self, module, fn, *shapes):
        return fn(module)

    def decoder_only(self, module, fn, *shapes):
        return fn(module)

    def motion(self, field):
        return field

    def dead_zone(self, residual, scale, strength, family):
        return residual

    def factorized(self, z, prior, row, coded=None):
        return z

    def gaussian(self, residual, scale):
        return residual

    laplace = sparse = gaussian

    def leveled(self, residual, level, scale, family="gaussian"):
        return residual


class _Encode(_Everything):
    """What an encoder runs: everything but what only pictures need."""

    def decoder_only(self, module, fn, *shapes):
        return tuple(jnp.zeros(s.shape, s.dtype) for s in shapes)


class _Decode(_Everything):
    """What a decoder runs: everything but what only coding a picture needs."""

    def encoder_only(self, module, fn, *shapes):
        return tuple(jnp.zeros(s.shape, s.dtype) for s in shapes)


class _Units(NamedTuple):
    """Abstract arguments of a codec's units.

    Attributes:
      kinds: references of units of all kinds, from those without to those that only refer to
        predicted frames.
    """

    params: dict
    frames: jax.ShapeDtypeStruct
    qp: jax.ShapeDtypeStruct
    kinds: list


@functools.cache
def _units(model: nn.Module) -> _Units:
    n = model.frames_per_unit
    params = param_shapes(model)
    frames = jax.ShapeDtypeStruct((1, n, SIDE, SIDE, 3), jnp.float32)
    qp = jax.ShapeDtypeStruct((1, n), jnp.int32)
    bottleneck = _Everything(has_scale_head(model))

    def left_by(refs):
        left = jax.eval_shape(_forward(model, bottleneck), params, frames, refs, qp)[1]
        if model.references < 2:
            return left
        if isinstance(model, WithIntra):
            return Between(*left, *left, 0, 0.5)
        return model.complete(2 * left, UNIT, SIDE, SIDE, bottleneck.exact)

    kinds = [(), left_by(())]
    if isinstance(model, WithIntra):  # the second refers to intra frames, the third no more
        kinds.append(left_by(kinds[-1]))
    return _Units(params, frames, qp, kinds)


def _forward(model, bottleneck):
    return lambda params, frames, refs, qp: model.apply(
        {"params": params}, frames, refs, qp, bottleneck
    )


def _judgement(model):
    """What an encoder computes before it codes a unit that has references; None for nothing."""
    if not judges_references(model):
        return None
    return lambda params, frames, refs, qp: model.apply(
        {"params": params}, frames, refs, qp, method="reliability"
    )


class _Alone(nn.Module):
    """A sub-network outside of its codec; its parameters lie under "network"."""

    network: nn.Module
    method: str

    def __call__(self, *args):
        return getattr(self.network, self.method)(*args)


def _split(args: tuple):
    """Shapes of the arrays in args, and what puts arrays back beside the other arguments."""
    leaves, tree = jax.tree.flatten(args)
    is_array = [hasattr(leaf, "shape") for leaf in leaves]
    shapes = [
        jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
        for leaf, array in zip(leaves, is_array, strict=True)
        if array
    ]

    def merge(arrays):
        rest = iter(arrays)
        return tree.unflatten(
            next(rest) if array else leaf for leaf, array in zip(leaves, is_array, strict=True)
        )

    return shapes, merge


def _macs_by_subnetwork(model: nn.Module, units: _Units, refs: tuple) -> dict[str, int]:
    """Multiply-accumulates of each sub-network that a unit with these references calls."""
    calls = []

    def record(next_fun, args, kwargs, context):
        name, path = context.method_name, context.module.path
        public = name == "__call__" or not name.startswith("_")
        # Flax also intercepts the branches of a cond, which are no methods.
        public &= name != "setup" and hasattr(type(context.module), name)
        if public and len(path) == _depth(model):
            network = context.module.clone(parent=None, name="network")
            calls.append(("/".join(path), network, name, *_split(args)))
        return next_fun(*args, **kwargs)

    with nn.intercept_methods(record):
        bottleneck = _Everything(has_scale_head(model))
        args = units.params, units.frames, refs, units.qp
        jax.eval_shape(_forward(model, bottleneck), *args)
        if refs and _judgement(model):
            jax.eval_shape(_judgement(model), *args)

    totals, params = {}, _by_subnetwork(model, units.params)
    for name, network, method, shapes, merge in calls:
        alone = _Alone(network, method)
        variables = {"params": {"network": params[name]}}
        count = macs(lambda v, a, m=alone, f=merge: m.apply(v, *f(a)), variables, shapes)
        totals[name] = totals.get(name, 0) + count
    return totals


def _depth(model: nn.Module) -> int:
    """How deep in the parameter tree the sub-networks lie."""
    return 2 if isinstance(model, WithIntra) else 1


def _by_subnetwork(model: nn.Module, params: dict) -> dict:
    if _depth(model) == 1:
        return params
    return {f"{part}/{name}": p for part, tree in params.items() for name, p in tree.items()}


def subnetworks(model: nn.Module) -> list[SubNetwork]:
    """Every sub-network of a codec, in the order of its parameter tree.

    A sub-network that only some units use (the adaptor of a first frame) has the count of those.
    """
    units = _units(model)
    count = {}
    for refs in units.kinds:
        count |= _macs_by_subnetwork(model, units, refs)
    return [
        SubNetwork(
            name,
            sum(math.prod(p.shape) for p in jax.tree.leaves(tree)),
            count.get(name, 0) / (1000 * SIDE * SIDE),
        )
        for name, tree in _by_subnetwork(model, units.params).items()
    ]


def training_flop(model: nn.Module, exact: bool, pixels: int) -> int:
    """Floating-point operations of a training step that codes so many pixels, of all its frames.

    Two for every multiply-accumulate, and twice as many again for the gradients: what the step
    needs, whatever is computed a second time to save memory, and as if every network learned.
    """
    units = _units(model)
    args = units.params, units.frames, units.kinds[-1], units.qp
    count = macs(_forward(model, _Everything(exact)), *args)
    return round(6 * count / (model.frames_per_unit * SIDE * SIDE) * pixels)


def motion_training_flop(model: nn.Module, pixels: int) -> int:
    """Likewise of a step in which flows learn alone, see `motion_only` of training stages.

    A flow for every frame that would be coded; of B-frames three, to both references, and between
    these.
    """
    picture = jax.ShapeDtypeStruct((1, SIDE, SIDE, 3), jnp.float32)

    def flow(params, a, b):
        return model.apply({"params": params}, a, b, method="motion")

    count = (1 if model.references == 1 else 3) * macs(flow, param_shapes(model), picture, picture)
    return round(6 * count / (SIDE * SIDE) * pixels)


def coding_cost(model: nn.Module, alone: bool = False) -> dict[str, float]:
    """Thousand multiply-accumulates per pixel and frame, on each side.

    Encoding goes without what turns features into pictures, unless others refer to these, decoding
    without analysis transform and hyper-encoder, as in `nvc_jax.unit_program`. Units refer to an
    earlier one, and are referred to, if the codec does that and they are not `alone`.
    """
    units, exact = _units(model), has_scale_head(model)

    def cost(forward):
        args = units.params, units.frames, units.kinds[0 if alone else -1], units.qp
        return macs(forward, *args) / (1000 * model.frames_per_unit * SIDE * SIDE)

    judgement = None if alone else _judgement(model)
    encoder = _Everything if model.refers_to_pictures and not alone else _Encode
    return {
        "encode_kmac_per_pixel": cost(_forward(model, encoder(exact)))
        + (cost(judgement) if judgement else 0),
        "decode_kmac_per_pixel": cost(_forward(model, _Decode(exact))),
    }
