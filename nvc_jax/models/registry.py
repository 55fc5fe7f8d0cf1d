"""All codecs by name, and what the rest of the project needs to know of each.

To add a codec: write `nvc_jax/models/<name>.py` with `Config`, `SIZES` and a Linen module whose
`__call__(frames, refs, qp, bottleneck)` follows `nvc_jax.models.ui2c.UI2C`, and add rows here, to
`MODULES` and `CODECS`.
"""

import dataclasses
import functools
from collections.abc import Iterable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from nvc_jax.entropy.bottleneck import Estimate, Step
from nvc_jax.errors import NvcError
from nvc_jax.models import brhvc, dcvc_dc, intra, light, ui2c, uni_lvc, with_intra
from nvc_jax.schedule import QP_OFFSETS, Unit


class Entry(NamedTuple):
    """A codec.

    Attributes:
      sizes: named configs. The type of a config says which module it is of, see `MODULES`.
      content: a name in `nvc_jax.quality.LAMBDA_RANGE`.
      qp_offsets, frame_weights: by frame number modulo their length, what is added to the qp, and
        the weight of the frame's distortion in training. Without offsets the schedule says them.
      intra_offset: what is added to the qp of frames without references instead, None for the same.
      layer_weights: the weights by layer, for codecs of B-frames.
      layer_qp: likewise what is added to the qp; the last one also for the layers above.
      summary: what it is, and where it was published.
    """

    sizes: dict[str, Any]
    content: str
    qp_offsets: tuple[int, ...] = ()
    frame_weights: tuple[float, ...] = (1.0,)
    intra_offset: int | None = None
    layer_weights: tuple[float, ...] = (1.0,)
    layer_qp: tuple[int, ...] = ()
    summary: str = ""

    def offsets(self, frames: Iterable[int], intra: bool) -> list[int]:
        """What is added to the qp of each of these frames; intra: they have no references."""
        if intra and self.intra_offset is not None:
            return [self.intra_offset for _ in frames]
        return [self.qp_offsets[frame % len(self.qp_offsets)] for frame in frames]


# Class of a config -> Linen module class with fields `cfg` and `dtype`; see also
# `with_intra.MODULES`.
MODULES = {
    light.Config: light.Light,
    uni_lvc.Config: uni_lvc.UniLVC,
    with_intra.Config: with_intra.WithIntra,
}
CODECS = {
    "intra": Entry(
        intra.SIZES,
        "image",
        summary="every picture on its own (DCVC-RT's intra codec, arXiv 2502.20762)",
    ),
    "dcvc_dc": Entry(
        dcvc_dc.SIZES,
        "image",
        summary="every picture on its own (DCVC-DC's intra codec, as BRHVC uses it)",
    ),
    "ui2c": Entry(
        ui2c.SIZES,
        "video",
        QP_OFFSETS,
        ui2c.FRAME_WEIGHTS,
        summary="one model for intra and inter, two frames at once (UI2C, arXiv 2510.14431)",
    ),
    "dcvc_rt": Entry(
        with_intra.DCVC_RT_SIZES,
        "video",
        QP_OFFSETS,
        ui2c.FRAME_WEIGHTS,
        summary="frames predicted from the one before, its intra codec, a refresh every 64 frames "
        "(DCVC-RT, arXiv 2502.20762)",
    ),
    "brhvc": Entry(
        with_intra.BRHVC_SIZES,
        "video",
        layer_weights=brhvc.LAYER_WEIGHTS,
        summary="hierarchical B-frames, and an intra codec (BRHVC, arXiv 2511.08938)",
    ),
    "light": Entry(
        light.SIZES | with_intra.LIGHT_SIZES,
        light.CONTENT,
        light.QP_OFFSETS,
        intra_offset=light.INTRA_OFFSET,
        summary="P-frames with explicit motion, for real time (after Tian et al., MM 2023, arXiv "
        "2309.11276)",
    ),
    "uni_lvc": Entry(
        uni_lvc.SIZES,
        "video",
        frame_weights=(uni_lvc.DISTORTION_WEIGHT,),
        layer_qp=uni_lvc.LAYER_QP,
        summary="all intra, low delay and random access with one set of weights (after Uni-LVC, "
        "arXiv 2603.05756)",
    ),
}


# Of no particular place in an order: what counts here is shapes.
UNIT = Unit((0,), (), 0, (0,), (), distances=(-1, 1))


def entry(name: str) -> Entry:
    """Raises NvcError for unknown codecs."""
    if name not in CODECS:
        raise NvcError(f"unknown codec '{name}'; there are: {', '.join(CODECS)}")
    return CODECS[name]


def build(name: str, size: str | dict | ConfigDict, dtype: Any = jnp.float32) -> nn.Module:
    """A codec's module. `size` is a named size, or a dict or ConfigDict of its config's fields.

    Raises:
      NvcError: unknown name, size or field.
    """
    codec = entry(name)
    if isinstance(size, str):
        if size not in codec.sizes:
            raise NvcError(f"'{name}' has no size '{size}'; there are: {', '.join(codec.sizes)}")
        cfg = codec.sizes[size]
    else:
        try:
            cfg = _config(codec, size if isinstance(size, dict) else size.to_dict())
        except TypeError as e:
            raise NvcError(f"bad size for '{name}': {e}") from None
    return (MODULES | with_intra.MODULES)[type(cfg)](cfg, jnp.dtype(dtype))


def _config(codec: Entry, size: dict) -> Any:
    """A config from plain data, of a class of the codec's sizes. Raises TypeError."""
    kinds = list(dict.fromkeys(type(cfg) for cfg in codec.sizes.values()))
    return _of_kind(kinds[0] if len(kinds) == 1 else _kind(kinds, size), size)


def _kind(kinds: Iterable[type], size: dict) -> type:
    """The class of configs that has these fields; files of older versions may lack some."""
    found = [k for k in kinds if set(size) <= {f.name for f in dataclasses.fields(k)}]
    if len(found) != 1:
        raise TypeError(f"{len(found)} codecs have the fields {', '.join(sorted(size))}")
    return found[0]


def _of_kind(kind: type, size: dict) -> Any:
    """A config from plain data. Configs inside of it are known by their fields."""

    def value(v):
        if isinstance(v, list):
            return tuple(v)
        return _of_kind(_kind(with_intra.MODULES, v), v) if isinstance(v, dict) else v

    return kind(**{k: value(v) for k, v in size.items()})


def size_as_dict(model: nn.Module) -> dict:
    """The config as plain data, for files: inverse of `build(name, dict)`."""
    return dataclasses.asdict(model.cfg)


def has_scale_head(model: nn.Module) -> bool:
    """Whether the codec can find its scales by integer arithmetic, see `nvc_jax.nn.integer`.

    With an intra codec beside it, only both of them together can.
    """
    if isinstance(model, with_intra.WithIntra):
        return all(getattr(c, "scale_head", 0) > 0 for c in (model.cfg.intra, model.cfg.inter))
    return getattr(model.cfg, "scale_head", 0) > 0


def modes(model: nn.Module) -> dict[str, str]:
    """Name -> coding order, of codecs that know several; {} of others."""
    return getattr(model, "modes", {})


def in_any_order(model: nn.Module) -> bool:
    """Whether the codec's pictures may have any references, or none."""
    return bool(modes(model))


def judges_references(model: nn.Module) -> bool:
    """Whether the encoder has a say in how much references count."""
    return hasattr(model, "reliability")


def searches_motion(model: nn.Module) -> bool:
    """Whether the encoder searches motion and sends it, see `nvc_jax.nn.motion`."""
    return getattr(model, "searches", False)


def networks(model: nn.Module, params: dict) -> dict[str, Any]:
    """The parameters by sub-network. An intra codec beside another one counts as one, "intra"."""
    if isinstance(model, with_intra.WithIntra):
        return {"intra": params["intra"], **params["inter"]}
    return params


@functools.cache
def network_names(model: nn.Module) -> tuple[str, ...]:
    """Of the sub-networks, in alphabetical order, without an intra codec beside another one."""
    return tuple(sorted(set(networks(model, param_shapes(model))) - {"intra"}))


def together(model: nn.Module, networks: dict[str, Any]) -> dict:
    """Inverse of `networks`."""
    if isinstance(model, with_intra.WithIntra):
        inter = {k: v for k, v in networks.items() if k != "intra"}
        return {"intra": networks["intra"], "inter": inter}
    return networks


def init(model: nn.Module, key: jax.Array) -> dict:
    """Parameters (float32) of all of the codec's networks, whichever references they serve."""
    frames = jnp.zeros((1, model.frames_per_unit, 64, 64, 3))
    qp = jnp.zeros((1, model.frames_per_unit), jnp.int32)

    def visit_everything(m):
        def code(refs):
            return m(frames, refs, qp, Estimate(exact=has_scale_head(m)))[1]

        first = code(())
        if m.references == 1:
            code(code(first))
        elif m.references == 2:
            code(m.complete(2 * first, UNIT, 64, 64))

    return nn.init(visit_everything, model)(key)["params"]


def param_shapes(model: nn.Module) -> dict:
    """Of the parameters that `init` gives."""
    return jax.eval_shape(lambda: init(model, jax.random.key(0)))


def random_params(model: nn.Module, seed: int) -> dict:
    """`init` as a program that compiles quickly.

    It has hundreds of draws that happen once. Threefry's programs for them take XLA minutes, and so
    does whatever XLA for CPUs could do about their speed.
    """
    options = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
    make = lambda: init(model, jax.random.key(seed, impl="unsafe_rbg"))  # noqa: E731
    return jax.jit(make, compiler_options=options)()


def steps(
    model: nn.Module, variables: dict, height: int, width: int, exact: bool
) -> dict[bool, tuple[Step, ...]]:
    """Coding steps of pictures of this padded size: of units (without, with) references.

    For codecs in which they are the same program, only the second is there.
    """
    found = {}

    def probe(variables, refs):
        bottleneck = Estimate(exact=exact)
        frames = jnp.zeros((1, model.frames_per_unit, height, width, 3))
        qp = jnp.zeros((1, model.frames_per_unit), jnp.int32)
        _, left = model.apply(variables, frames, refs, qp, bottleneck)
        found[bool(refs)] = tuple(bottleneck.steps)
        return left

    def visit(variables):
        refs = model.complete((), UNIT, height, width, exact)
        left = probe(variables, refs)
        if model.references and not refs:
            probe(variables, model.complete(left * model.references, UNIT, height, width, exact))

    jax.eval_shape(visit, variables)
    return found
