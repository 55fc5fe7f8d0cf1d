"""Released models: one `.safetensors` file with everything a codec needs, and nothing else.

Contents: the weights (float16 by default; they are float32 when computing), the frozen integer
probability tables, the boundaries of the scale index, and as metadata the codec's name and sizes.
The fingerprint is a hash of all of it; streams carry it, and only a model with the same one decodes
them. The tables are data: nobody recomputes them from floats when decoding.
"""

import dataclasses
import hashlib
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from flax import traverse_util

import nvc_jax
from nvc_jax.entropy import likelihood
from nvc_jax.entropy.bottleneck import CodingSpec, Family
from nvc_jax.entropy.freeze import TABLES, concatenate, factorized_tables
from nvc_jax.entropy.tables import CdfTables
from nvc_jax.errors import NvcError
from nvc_jax.files import replacing, writing
from nvc_jax.models import registry, with_intra
from nvc_jax.nn import integer

FORMAT = "nvc-model-3"
OLDEST_VERSION = 1  # that is still read
FINGERPRINT_BYTES = 16
SHIPPED = Path(nvc_jax.__file__).parent / "weights"


class Released(NamedTuple):
    """A model ready for coding.

    Attributes:
      name: of the model, e.g. "ui2c-nano"; goes into streams for error messages.
      codec: name in the registry.
      module: the Linen module.
      variables: {"params": float32 pytree, "integers": scale heads, if the model has any, in the
        places of their float parameters}.
      tables: integer CDFs of the scale levels of each family of distributions, then of each
        hyper-latent's (row, channel), see `CodingSpec`.
      spec: how scales become table indices.
      fingerprint: 16 bytes.
      known_answer: of the scale heads, see `check_integers`; empty without any.
    """

    name: str
    codec: str
    module: nn.Module
    variables: dict[str, Any]
    tables: CdfTables
    spec: CodingSpec
    fingerprint: bytes
    known_answer: str

    @property
    def exact(self) -> bool:
        """Whether scale levels can be computed with integers, the same on every machine."""
        return "integers" in self.variables


def freeze(
    name: str,
    codec: str,
    module: nn.Module,
    params: Any,
    *,
    levels: int = likelihood.LEVELS,
    scale_range: tuple[float, float] = (likelihood.SCALE_MIN, likelihood.SCALE_MAX),
    middle: bool = True,
    skip_scale: float = likelihood.SKIP_SCALE,
    weights_dtype: Any = np.float16,
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Turns trained parameters into a released model's tensors and metadata.

    Args:
      levels, scale_range: the log-spaced scales of the tables, for every family of distributions.
        A model with a scale head has been trained with the defaults.
      middle: table scales lie in the middle of their interval (which costs a quarter of the rate
        loss of its lower end) and not at its lower end.
      skip_scale: Gaussian levels that end below this are not coded, those of other families below
        the scale that has as many zeros.

    Returns:
      (tensors, metadata) for `save`.

    Raises:
      NvcError: a weight is not finite in `weights_dtype`, there cannot be such tables, or this
        machine fails to compute a scale head's known answer.
    """
    if not (2 <= levels <= 256 and 0 < scale_range[0] < scale_range[1] < 1e3):
        raise NvcError(
            f"{levels} scale tables from {scale_range[0]} to {scale_range[1]}: give 2 to 256 of "
            "them, and scales that grow from above 0 to below 1000"
        )
    heads = {}
    if registry.has_scale_head(module):
        learnt = likelihood.LEVELS, likelihood.SCALE_MIN, likelihood.SCALE_MAX, True
        if (levels, *scale_range, middle) != learnt:
            raise NvcError(
                f"the model's scale head has learnt {learnt[0]} tables, for the middle of levels "
                f"from {learnt[1]} to {learnt[2]}; others would need another head"
            )
        heads, params = _split_heads(params)
        heads = {path: integer.freeze(head) for path, head in heads.items()}
    with np.errstate(over="ignore"):
        params = jax.tree.map(lambda p: np.asarray(p, weights_dtype), params)
    if not all(np.isfinite(p).all() for p in jax.tree.leaves(params)):
        raise NvcError(
            f"the model has weights that are infinite or not numbers as {np.dtype(weights_dtype)}; "
            "it cannot be released"
        )
    step = np.log(scale_range[1] / scale_range[0]) / (levels - 1)
    edges = scale_range[0] * np.exp(step * np.arange(levels))
    flat = traverse_util.flatten_dict(params, sep="/")
    families = _families(module, params)
    scales = edges * np.exp(step / 2 if middle else 0)
    parts = [TABLES[family](scales) for family in families]
    priors = {}
    for path, chain in sorted(flat.items()):
        prior, _, leaf = path.rpartition("/")
        if leaf == "chain":
            priors[prior] = sum(len(p.size) for p in parts)
            parts.append(factorized_tables(chain.reshape(-1, chain.shape[-1]).astype(np.float64)))
    tables = concatenate(*parts)
    tensors = {f"params/{k}": v for k, v in flat.items()}
    for path, head in heads.items():
        flat = traverse_util.flatten_dict(head, sep="/")
        tensors |= {f"integers/{path}/{k}": v for k, v in flat.items()}
    frequencies = np.diff(tables.cdf.astype(np.int64), axis=1)
    coded = np.arange(frequencies.shape[1]) < tables.size[:, None]
    tensors["tables/frequency"] = frequencies[coded].astype(np.uint16)
    tensors["tables/size"] = tables.size.astype(np.uint16)
    tensors["tables/offset"] = tables.offset.astype(np.int16)
    tensors["scale_boundaries"] = edges[1:].astype(np.float32)
    metadata = {
        "format": FORMAT,
        "name": name,
        "codec": codec,
        "size": json.dumps(registry.size_as_dict(module), sort_keys=True),
        # The compute type is part of the model: encoder and decoder must not differ in it.
        "dtype": jnp.dtype(module.dtype).name,
        "families": json.dumps(
            {
                family: (number * levels, skip_below(family, edges[1:], skip_scale))
                for number, family in enumerate(families)
            }
        ),
        "priors": json.dumps(priors),
    }
    metadata["known_answer"] = ""
    if heads:
        frames = module.frames_per_unit
        metadata["known_answer"] = _integer_answer("integers", heads, frames)
        # The same integers from floats: another way of computing them, on the same machine.
        floats = {path: integer.thaw(head) for path, head in heads.items()}
        if _integer_answer("params", floats, frames) != metadata["known_answer"]:
            raise NvcError("integer and float arithmetic disagree here; release on another machine")
    return tensors, metadata


def save(path: str | Path, tensors: dict[str, np.ndarray], metadata: dict[str, str]) -> None:
    """Writes a released model, fingerprint included.

    Raises:
      NvcError: the file cannot be written.
    """
    # safetensors writes the bytes of transposed views as if they were in order.
    tensors = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    metadata = {**metadata, "fingerprint": _fingerprint(tensors, metadata)}
    data = safetensors.numpy.save(tensors, metadata)
    with replacing(path) as hidden, writing(path):
        hidden.write_bytes(data)


def load(model: str | Path) -> Released:
    """Reads a released model: the name of a shipped one, or a file.

    Raises:
      NvcError: no such model, not a released model, or a damaged one.
    """
    path = find(model)
    try:
        with safetensors.safe_open(path, "numpy") as f:
            metadata = f.metadata() or {}
            tensors = {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118
    except (OSError, safetensors.SafetensorError) as e:
        raise NvcError(f"{path}: cannot be read as a model ({e})") from None
    _check_format(path, metadata.get("format", ""))
    stored = metadata.pop("fingerprint", "")
    if stored != _fingerprint(tensors, metadata):
        raise NvcError(f"{path}: the file is damaged (its contents do not match its fingerprint)")
    variables = {"params": _subtree(tensors, "params/", np.float32)}
    if integers := _subtree(tensors, "integers/"):
        variables["integers"] = integers
    boundaries = tensors["scale_boundaries"]
    return Released(
        name=metadata["name"],
        codec=metadata["codec"],
        module=registry.build(metadata["codec"], json.loads(metadata["size"]), metadata["dtype"]),
        variables=jax.device_put(variables),
        tables=_unpack_tables(tensors),
        spec=_spec(boundaries, metadata),
        fingerprint=bytes.fromhex(stored),
        known_answer=metadata.get("known_answer", ""),
    )


def _families(module: nn.Module, params: dict) -> list[str]:
    """Of the distributions that a codec's latents have, in the order of their tables."""
    steps = registry.steps(module, {"params": params}, 64, 64, exact=False).values()
    return sorted({step.family for unit in steps for step in unit if step.family})


def skip_below(family: str, boundaries: np.ndarray, skip_scale: float) -> int:
    """First level that is coded; `skip_scale` is a Gaussian's."""
    if family != "gaussian" and skip_scale > 0:
        skip_scale = -0.5 / math.log(math.erfc(0.5 / (skip_scale * math.sqrt(2))))
        skip_scale /= likelihood.SPARSE if family == "sparse" else 1
    return int(np.searchsorted(boundaries, skip_scale, side="right"))


def _spec(boundaries: np.ndarray, metadata: dict[str, str]) -> CodingSpec:
    levels = len(boundaries) + 1
    if "families" not in metadata:  # before version 3
        families = {"gaussian": Family(0, int(metadata["skip_below"]))}
        return CodingSpec(boundaries, families, {"z_prior": levels})
    families = {k: Family(*v) for k, v in json.loads(metadata["families"]).items()}
    return CodingSpec(boundaries, families, json.loads(metadata["priors"]))


def _check_format(path: Path, found: str) -> None:
    kind, _, version = found.rpartition("-")
    known_kind, _, known = FORMAT.rpartition("-")
    if kind != known_kind or not (version.isascii() and version.isdigit()):
        raise NvcError(
            f"{path}: not a released model of this program (format {FORMAT}); write one with "
            "`nvc release`"
        )
    newer = int(version[:9]) > int(known)
    if newer or int(version[:9]) < OLDEST_VERSION:
        remedy = "update nvc_jax" if newer else "use an older nvc_jax"
        raise NvcError(
            f"{path}: a model in version {version[:9]} of the format, this program reads versions "
            f"{OLDEST_VERSION} to {known}; {remedy}, or release the model again"
        )


def shipped() -> dict[str, Path]:
    """Names and files of the models in the package."""
    return {p.stem: p for p in sorted(SHIPPED.glob("*.safetensors"))}


def find(model: str | Path) -> Path:
    """File of a shipped model's name, or of a path. Raises NvcError."""
    known = shipped()
    if str(model) in known:
        return known[str(model)]
    path = Path(model)
    if path.suffix == ".safetensors" and path.is_file():
        return path
    raise NvcError(
        f"no model '{model}': give a .safetensors file or one of: {', '.join(known) or '(none)'}"
    )


def without_scale_head(module: nn.Module, params: dict) -> tuple[nn.Module, dict]:
    """The same model for the calibrated mode only."""
    if not registry.has_scale_head(module):
        return module, params
    return module.clone(cfg=_without_scale_head(module.cfg)), _split_heads(params)[1]


def _without_scale_head(cfg: Any) -> Any:
    if isinstance(cfg, with_intra.Config):
        return with_intra.Config(*map(_without_scale_head, (cfg.intra, cfg.inter)))
    return dataclasses.replace(cfg, scale_head=0)


def _split_heads(params: dict) -> tuple[dict[str, dict], dict]:
    """(path of every scale head -> its parameters, all other parameters)."""
    heads, others = {}, {}
    for name, tree in params.items():
        if name.endswith(integer.SCALE_HEAD):
            heads[name] = tree
        elif name in ("intra", "inter"):
            inner, others[name] = _split_heads(tree)
            heads |= {f"{name}/{path}": head for path, head in inner.items()}
        else:
            others[name] = tree
    return heads, others


def trainable_params(model: Released) -> dict:
    """Float parameters to go on training from, those of scale heads included."""
    params = traverse_util.flatten_dict(model.variables["params"], sep="/")
    for path, head in _heads(model).items():
        flat = traverse_util.flatten_dict(integer.thaw(head), sep="/")
        params |= {f"{path}/{name}": value for name, value in flat.items()}
    return traverse_util.unflatten_dict(params, sep="/")


def _heads(model: Released) -> dict[str, dict]:
    return _split_heads(model.variables.get("integers", {}))[0]


def check_integers(model: Released) -> None:
    """Known-answer test of the scale heads on this machine's processor.

    Raises:
      NvcError: it computes something else than the machine that released the model.
    """
    answer = _integer_answer("integers", _heads(model), model.module.frames_per_unit)
    if answer != model.known_answer:
        raise NvcError(
            f"{jax.default_backend()} fails the known-answer test of integer arithmetic with JAX "
            f"{jax.__version__}, so it would decode noise; use another version of JAX, or the CPU "
            "(JAX_PLATFORMS=cpu)"
        )


def _integer_answer(collection: str, heads: dict[str, dict], frames: int) -> str:
    """A hash of what scale heads make of fixed inputs, in two units of 384 x 640 pixels.

    collection: of variables, that the heads are: "integers", or "params" for floats.
    """
    h, w = 24, 40

    def noise(seed, *shape):
        """Small numbers, and some beyond what eight bits hold."""
        numbers = np.arange(seed, seed + np.prod(shape), dtype=np.uint64) * 2654435761 >> 13
        values = (numbers % 41).astype(np.float32) - 20
        return np.where(numbers % 97 == 0, 10 * values, values).reshape(1, *shape)

    @jax.jit
    def answer(variables):
        kind, z_channels = integer.head_of(variables)

        def run(head):
            qp = jnp.array([[9] + [44] * (frames - 1)])
            memories = [None] * head.references
            answers = []
            for seed in (1, 3):  # the second unit refers to the first
                z = noise(seed, h // 4, w // 4, z_channels)
                symbols = noise(seed + 1, h, w, head.channels)
                marks = noise(seed + 2, h, w, head.marks) if head.marks else None
                hidden = head.begin(z, qp, memories, (h, w), marks)
                levels = [head.level(hidden, step, symbols) for step in range(head.steps)]
                answers += levels
                if memories:
                    memories = [head.remember(hidden, symbols, levels[-1])] * len(memories)
                    answers.append(memories[0])
            return answers

        return nn.apply(run, kind)({"params": {}} | {collection: variables})

    digest = hashlib.sha256()
    for _, head in sorted(heads.items()):
        for part in answer(head):
            digest.update(np.asarray(part).astype(np.int8).tobytes())
    return digest.hexdigest()[:16]


def _subtree(tensors: dict[str, np.ndarray], prefix: str, dtype: Any = None) -> dict:
    flat = {
        name.removeprefix(prefix): tensor.astype(dtype or tensor.dtype)
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }
    return traverse_util.unflatten_dict(flat, sep="/")


def _unpack_tables(tensors: dict[str, np.ndarray]) -> CdfTables:
    size = tensors["tables/size"].astype(np.int32)
    frequency = np.zeros((len(size), size.max()), np.uint32)
    frequency[np.arange(size.max()) < size[:, None]] = tensors["tables/frequency"]
    cdf = np.zeros((len(size), size.max() + 1), np.uint32)
    np.cumsum(frequency, axis=1, out=cdf[:, 1:])
    return CdfTables(cdf, size, tensors["tables/offset"].astype(np.int32))


def _fingerprint(tensors: dict[str, np.ndarray], metadata: dict[str, str]) -> str:
    digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype.str} {tensor.shape}".encode())
        digest.update(np.ascontiguousarray(tensor).tobytes())
    return digest.hexdigest()[: 2 * FINGERPRINT_BYTES]
