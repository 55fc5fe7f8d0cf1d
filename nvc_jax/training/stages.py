"""Training configs: what they can say, their defaults, and what is wrong with one."""

import runpy
from dataclasses import MISSING, Field, dataclass, field, fields
from pathlib import Path
from typing import Any

import flax.linen as nn
from ml_collections import ConfigDict, FrozenConfigDict

from nvc_jax.errors import NvcError
from nvc_jax.models import registry
from nvc_jax.models.with_intra import WithIntra
from nvc_jax.nn.integer import SCALE_HEAD
from nvc_jax.schedule import MODES

RUN = {
    "seed", "model", "data", "init_from", "transform_start", "stages", "warmup_steps", "clip_norm",
    "weight_decay", "rate_balance", "average_decay", "max_skipped_in_row", "log_every",
    "sample_every", "checkpoint_every_seconds",
}  # fmt: skip
RUN_DEFAULTS = {
    "data_root": "",  # folder that relative paths of the data sections start from
    "init_only": (),  # sub-networks that start from the weights of init_from; (): all
    "mesh": {"space": 1},  # bands into which pictures are cut, see nvc_jax.parallel
    "optimizer": "adamw",
    "workers": 0,  # processes that cut batches; 0: threads
    "checkpoint_every_steps": 0,  # beside those by the clock; 0: none
}
# What a stage has from the config if it does not say it itself.
INHERITED = ("data", "optimizer", "weight_decay", "clip_norm", "rate_balance", "average_decay")
OPTIMIZERS = ("adamw", "muon", "soap")
LR_SCHEDULES = ("cosine", "linear", "constant")
REFERENCES = ("blank", "true", "degraded", "coded")
MAX_SPAN = 64
MOTION = "flow"  # the sub-network that finds it
PENALTY_FIELDS = {"variant", "eta", "delta", "beta"}
PENALTY_TABLES = {"levels", "scale_min", "scale_max", "skip_scale"}  # other than a release's
NOTHING = FrozenConfigDict()


@dataclass(frozen=True)
class Stage:
    """A piece of a training run, as plain data.

    Attributes:
      steps: of the optimiser.
      batch: samples per step, of all devices together.
      crop: side of the training pictures, a multiple of 16.
      units: coded per step (pairs of frames for UI2C), with gradients through all of them. For
        B-frames, of one path through a hierarchy, see `nvc_jax.training.hierarchy`.
      lr, end_lr: learning rate when the stage starts and when it ends.
      data: sets to draw from, see `nvc_jax.data.pipeline.open_sets`. Without `folder` or `sets`,
        those of the config.
      optimizer: "adamw", "muon" or "soap", see `nvc_jax.training.step.make_optimizer`. A stage with
        another one than the stage before forgets its moments.
      weight_decay, clip_norm: of the optimiser, and of the gradient's norm.
      rate_balance: exponent b of the weight lambda^-b on every sample's loss; 0 as published.
      average_decay: of the moving average of the weights, which is what gets released.
      schedule: "cosine", "linear" or "constant", from lr to end_lr.
      walk: steps in a row that go through one clip, each from the references that the one before
        left, without gradients through them.
      accumulate: parts of a step's batch whose gradients are averaged one after the other, for
        less memory.
      remat: whether a unit's activations are computed again for its gradients, for less memory.
      trainable: names of the sub-networks that learn; () for all.
      lr_scale: ((name of a sub-network, factor on its learning rate), ...); at 0 it does not learn.
      references: shares of what a clip's first unit refers to: "blank", the "true" picture before
        it, that picture "degraded", or as the codec itself would have "coded" it; for B-frames, of
        both anchors. {} for a third of each but the last, or "coded" beside an intra codec.
      spans, tail_share: for B-frames, distances of anchors to draw from, and the share of paths
        that begin behind their anchors.
      orders: shares of "ai", "ld" and "ra" in what codecs that code in any order learn, see
        `nvc_jax.training.orders`; {} for a third of each. `units` are then pictures, and `spans`
        distances of the anchors of "ra", which no other picture is farther away than.
      spoil: share of references that are made worse, for such codecs to learn to do without.
      judged: whether their reliability classifier decides how far references count; else fully.
      judge_loss: weight of its cross-entropy against what is known of them.
      temperature: of its decisions, when the stage starts and when it ends.
      flow_loss: weight, beside that of the distortion, of the squared errors that decoded motion
        leaves in references.
      motion_only: nothing is coded, which makes steps quick, and nothing learns but flows, between
        a clip's only unit and what it refers to, by `nvc_jax.training.losses.motion`.
      cut_share: of clips whose first picture comes from elsewhere, as before a scene cut.
      exact: whether scales come from the integer scale head.
      noise: whether noise stands for rounding in the rate. Without, rates are those of the symbols,
        and gradients pass through the rounding as if it were not there.
      rounded: whether noise only stands in for rounding in gradients of latents, see
        `nvc_jax.entropy.bottleneck.Estimate`.
      detached: whether the scale head learns from rounded symbols, and everything from the rate
        under float scales, which is added in full. For `exact`, with `noise`.
      float_share: of the latent's rate that is taken from float scales even if `exact`, so that a
        codec that learns under integer scales stays good in the other modes.
      penalty: on scales near the boundaries of their levels, with its weight `beta`, see
        `nvc_jax.training.losses.scale_penalty`; {} for none.
      teacher: {} for none, or `weights`, "previous" (as they were after the stage before), the
        number of an earlier stage (after that) or a released model, and the weights of the
        distance from its pictures, `recon`, and of the squared distance from the references that
        it leaves, `refs`.
    """

    steps: int
    batch: int
    crop: int
    units: int
    lr: float
    end_lr: float
    data: Any
    optimizer: str
    weight_decay: float
    clip_norm: float
    rate_balance: float
    average_decay: float
    schedule: str = "cosine"
    walk: int = 1
    accumulate: int = 1
    remat: bool = False
    trainable: tuple[str, ...] = ()
    lr_scale: tuple[tuple[str, float], ...] = ()
    references: dict[str, float] = field(default_factory=dict)
    spans: tuple[int, ...] = (32,)
    tail_share: float = 0.1
    orders: dict[str, float] = field(default_factory=dict)
    spoil: float = 0.0
    judged: bool = False
    judge_loss: float = 0.0
    temperature: tuple[float, float] = (1.0, 0.3)
    flow_loss: float = 0.0
    motion_only: bool = False
    cut_share: float = 0.05
    exact: bool = False
    noise: bool = True
    rounded: bool = False
    detached: bool = False
    float_share: float = 0.0
    penalty: FrozenConfigDict = NOTHING
    teacher: FrozenConfigDict = NOTHING

    def taught_by(self, number: int) -> int | None:
        """The stage whose first weights this one, of the given number, learns from, if any's."""
        if not self.teacher or is_released(self.teacher.weights):
            return None
        return number if self.teacher.weights == "previous" else 1 + self.teacher.weights

    def learns(self, name: str) -> bool:
        """Whether the sub-network of this name does. An intra codec beside another one never."""
        if name == "intra":
            return False
        if self.motion_only and name != MOTION:
            return False
        if name.endswith(SCALE_HEAD) and not self.exact:
            return False  # no gradient reaches it, and weight decay alone would wear it down
        if name == "judge" and not self.judged:
            return False
        if dict(self.lr_scale).get(name) == 0:
            return False
        return not self.trainable or name in self.trainable


def is_released(weights: str | int) -> bool:
    """Whether a teacher's weights are a released model, and not what a stage left."""
    return isinstance(weights, str) and weights != "previous"


def load(config_file: str) -> ConfigDict:
    """The config of a file, or of FILE:ARGUMENT as on the command line of train.py.

    Raises:
      NvcError: no such file, or no training config in it.
    """
    file, _, argument = config_file.partition(":")
    if not Path(file).is_file():
        raise NvcError(f"{file}: no such config file")
    try:
        get_config = runpy.run_path(file)["get_config"]
        return complete(get_config(argument) if argument else get_config())
    except (KeyError, SyntaxError, TypeError, ValueError) as e:
        raise NvcError(f"{config_file}: is not a training config ({e!r})") from None


def complete(config: ConfigDict) -> ConfigDict:
    """The config with its defaults. Raises NvcError if a field is missing or unknown."""
    if missing := sorted(RUN - set(config)):
        raise NvcError(
            f"config.{missing[0]} is missing; see configs/ui2c_nano.py for a training config"
        )
    if unknown := sorted(set(config) - RUN - set(RUN_DEFAULTS)):
        raise NvcError(f"config.{unknown[0]} is nothing that a training config can have")
    for name in ("warmup_steps", "log_every", "sample_every", "max_skipped_in_row"):
        if not isinstance(config[name], int) or config[name] < 1:
            raise NvcError(f"config.{name} is {config[name]}; it must be a whole number above 0")
    if not isinstance(config.seed, int) or config.seed < 0:
        raise NvcError(f"config.seed is {config.seed}; it must be a whole number, 0 or more")
    result = ConfigDict(RUN_DEFAULTS | dict(config.items()))
    if result.workers and any("folder" in d for d in _data_sections(result)):
        raise NvcError(
            "config.workers: every worker would get a copy of the clips in memory; threads cut "
            "those of config.data.folder, workers are for data sets"
        )
    return result


def _data_sections(config: ConfigDict) -> list:
    return [config.data, *(stage.get("data", config.data) for stage in config.stages)]


def read(config: ConfigDict) -> tuple[Stage, ...]:
    """A config's stages. Raises NvcError that names the first field that cannot be what it is."""
    if not config.stages:
        raise NvcError("config.stages is empty: there is nothing to train")
    try:
        model = registry.build(config.model.name, config.model.size, config.model.dtype)
    except TypeError as e:
        raise NvcError(f"config.model.dtype is {config.model.dtype!r}: {e}") from None
    if isinstance(model, WithIntra) and not config.init_from:
        raise NvcError(
            f"config.init_from is empty; '{config.model.name}' has an intra codec that does not "
            "learn: give a released one, or a model of this codec to go on from"
        )
    networks = registry.network_names(model)
    inherited = {name: config[name] for name in INHERITED}
    result = []
    for number, values in enumerate(config.stages):
        where, known = f"config.stages[{number}]", {f.name: f for f in fields(Stage)}
        values = inherited | dict(values.items())
        if unknown := sorted(set(values) - set(known)):
            raise NvcError(f"{where}.{unknown[0]} is nothing that a stage can have")
        if missing := [n for n, f in known.items() if n not in values and _is_required(f)]:
            raise NvcError(f"{where}.{missing[0]} is missing")
        for name in values:
            if values[name] and values[name] != known[name].default and not _means(name, model):
                raise NvcError(f"{where}.{name} means nothing to the codec '{config.model.name}'")
        try:
            for name in ("penalty", "teacher"):
                values[name] = FrozenConfigDict(dict(values.get(name) or {}))
            values["references"] = dict(values.get("references") or _references(model))
            values |= {k: tuple(values[k]) for k in ("temperature", "spans") if k in values}
            if not {"folder", "sets"} & set(values["data"]):  # only how to draw from the run's
                values["data"] = ConfigDict({**config.data, **values["data"]})
            values["orders"] = dict(values.get("orders") or dict.fromkeys(MODES, 1 / 3))
            values["lr_scale"] = tuple(dict(values.get("lr_scale", ())).items())
            stage = Stage(**values)
            for name, field in known.items():  # any text would count as True
                if field.type is bool and not isinstance(values.get(name, False), bool):
                    raise TypeError(f"{name}={values[name]!r} is neither True nor False")
            _check(stage, where, networks, model)
            _check_teacher(stage, where, number)
        except (TypeError, ValueError) as e:  # text where a number should be, and the like
            raise NvcError(f"{where} holds a value of a wrong kind ({e})") from None
        result.append(stage)
    return tuple(result)


def _references(model: nn.Module) -> dict[str, float]:
    if isinstance(model, WithIntra):
        return {"coded": 1.0}
    return dict.fromkeys(("blank", "true", "degraded"), 1 / 3)


def _means(name: str, model: nn.Module) -> bool:
    """Whether a field says something to the training of such a codec."""
    if name in ("orders", "spoil", "judged", "judge_loss", "temperature"):
        return registry.in_any_order(model)
    if name == "spans":
        return model.references == 2
    if name == "flow_loss":
        return MOTION in registry.network_names(model)
    if name == "tail_share":
        return model.references == 2 and not registry.in_any_order(model)
    if name == "references":
        return model.references > 0 and not registry.in_any_order(model)
    return True


def _is_required(f: Field) -> bool:
    return f.default is MISSING and f.default_factory is MISSING


def _check(stage: Stage, where: str, networks: tuple[str, ...], model: nn.Module) -> None:
    for name in ("steps", "batch", "crop", "units", "walk", "accumulate"):
        if not isinstance(getattr(stage, name), int):
            raise NvcError(f"{where}.{name} is {getattr(stage, name)}; it must be a whole number")
    for name in ("steps", "batch", "crop", "units", "lr", "walk", "accumulate"):
        if not getattr(stage, name) > 0:
            raise NvcError(f"{where}.{name} is {getattr(stage, name)}; it must be above 0")
    if stage.crop % 16:
        raise NvcError(f"{where}.crop is {stage.crop}; it must be a multiple of 16")
    if stage.batch % stage.accumulate:
        raise NvcError(
            f"{where}.accumulate is {stage.accumulate}; it must divide the batch of {stage.batch}"
        )
    if stage.schedule not in LR_SCHEDULES:
        raise NvcError(f"{where}.schedule is {stage.schedule!r}; give {_listed(LR_SCHEDULES)}")
    if stage.optimizer not in OPTIMIZERS:
        raise NvcError(f"{where}.optimizer is {stage.optimizer!r}; give {_listed(OPTIMIZERS)}")
    if isinstance(stage.trainable, str):
        raise NvcError(f"{where}.trainable must be a tuple of names")
    scaled = [name for name, _ in stage.lr_scale]
    for name, given in (("trainable", stage.trainable), ("lr_scale", scaled)):
        if unknown := sorted(set(given) - set(networks)):
            raise NvcError(
                f"{where}.{name} names {unknown[0]}; the model consists of {', '.join(networks)}"
            )
    shares = stage.references
    if unknown := sorted(set(shares) - set(REFERENCES)):
        raise NvcError(f"{where}.references: {unknown[0]!r} is none of {_listed(REFERENCES)}")
    if min(shares.values(), default=0) < 0 or not sum(shares.values()) > 0:
        raise NvcError(f"{where}.references: no share may be below 0, and one must be above")
    if shares.get("blank") and isinstance(model, WithIntra):
        raise NvcError(f"{where}.references: no first frame of this codec is without a reference")
    if stage.walk > 1 and not model.references:
        raise NvcError(f"{where}.walk is {stage.walk}; a codec without references cannot walk")
    if registry.in_any_order(model):
        _check_orders(stage, where)
    elif model.references == 2:
        _check_hierarchy(stage, where)
    if stage.motion_only and MOTION not in networks:
        raise NvcError(f"{where}.motion_only: this codec has no motion to learn")
    if stage.motion_only and stage.units * stage.walk > 1:
        raise NvcError(f"{where}.motion_only needs clips of one unit, with units=1 and walk=1")
    if stage.motion_only and (stage.teacher or stage.penalty):
        raise NvcError(f"{where}.motion_only: no pictures are coded, for a teacher or a penalty")
    if not any(stage.learns(name) for name in networks):
        raise NvcError(f"{where}: no sub-network learns; see trainable, lr_scale and motion_only")
    if stage.exact and not registry.has_scale_head(model):
        raise NvcError(f"{where}.exact needs a model with a scale head")
    if stage.detached and not (stage.exact and stage.noise):
        raise NvcError(f"{where}.detached needs `exact`, and noise")
    if stage.rounded and not stage.noise:
        raise NvcError(f"{where}.rounded needs noise, for the gradients of latents")
    if stage.penalty:
        if missing := sorted(PENALTY_FIELDS - set(stage.penalty)):
            raise NvcError(f"{where}.penalty.{missing[0]} is missing")
        if unknown := sorted(set(stage.penalty) - PENALTY_FIELDS - PENALTY_TABLES):
            raise NvcError(f"{where}.penalty.{unknown[0]} is nothing that a penalty can have")
        if stage.penalty.variant not in ("gaussian", "hinge"):
            raise NvcError(
                f"{where}.penalty.variant is {stage.penalty.variant!r}; give 'gaussian' or 'hinge'"
            )


def _check_teacher(stage: Stage, where: str, number: int) -> None:
    if not stage.teacher:
        return
    if unknown := sorted(set(stage.teacher) - {"weights", "recon", "refs"}):
        raise NvcError(f"{where}.teacher.{unknown[0]} is nothing that a teacher can have")
    if "weights" not in stage.teacher or len(stage.teacher) < 2:
        raise NvcError(f"{where}.teacher needs `weights`, and `recon` or `refs`")
    weights = stage.teacher.weights
    if isinstance(weights, int) and not 0 <= weights < number:
        raise NvcError(f"{where}.teacher.weights is {weights}, which is not an earlier stage")


def _check_hierarchy(stage: Stage, where: str) -> None:
    _check_spans(stage, where, stage.units)
    if not 0 <= stage.tail_share <= 1:
        raise NvcError(f"{where}: tail_share must be from 0 to 1")


def _check_spans(stage: Stage, where: str, halvings: int) -> None:
    """halvings: how often what lies between two anchors is cut in halves."""
    if stage.walk > 1:
        raise NvcError(f"{where}.walk is {stage.walk}; paths through B-frames do not go on")
    least = 2**halvings
    if not all(isinstance(s, int) and least <= s <= MAX_SPAN for s in stage.spans):
        raise NvcError(
            f"{where}.spans is {stage.spans}; a path of {stage.units} units needs spans of "
            f"{least} to {MAX_SPAN} frames"
        )
    if not stage.spans:
        raise NvcError(f"{where}.spans must not be empty")
    if "refs" in stage.teacher:
        raise NvcError(f"{where}.teacher.refs: there are none behind a path of B-frames")


def _check_orders(stage: Stage, where: str) -> None:
    if unknown := sorted(set(stage.orders) - set(MODES)):
        raise NvcError(f"{where}.orders: {unknown[0]!r} is none of {_listed(MODES)}")
    if min(stage.orders.values()) < 0 or not sum(stage.orders.values()) > 0:
        raise NvcError(f"{where}.orders: no share may be below 0, and one must be above")
    if stage.orders.get("ra") and stage.units < 3:
        raise NvcError(f"{where}.units is {stage.units}; 'ra' needs two anchors and more")
    _check_spans(stage, where, stage.units - 2 if stage.orders.get("ra") else 0)
    if stage.units > 1 + max(stage.spans):
        raise NvcError(f"{where}.spans: {stage.units} units need more than {max(stage.spans)}")
    if not 0 <= stage.spoil <= 1:
        raise NvcError(f"{where}.spoil is {stage.spoil}; it must be from 0 to 1")
    if len(stage.temperature) != 2 or min(stage.temperature) <= 0:
        raise NvcError(f"{where}.temperature is {stage.temperature}; give two numbers above 0")
    if stage.judge_loss and not stage.judged:
        raise NvcError(f"{where}.judge_loss needs `judged`, or nobody judges")
    if stage.spoil and stage.batch == stage.accumulate:
        raise NvcError(f"{where}.spoil needs other clips in the batch, or in each part of it")
    if stage.judge_loss and stage.cut_share:
        raise NvcError(
            f"{where}.judge_loss: nothing is known of first pictures from elsewhere; set cut_share "
            "to 0"
        )


def _listed(names: tuple[str, ...]) -> str:
    return ", ".join(repr(name) for name in names)
