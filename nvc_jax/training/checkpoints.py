"""What a run keeps on disk, how it goes on from there, and how weights leave it.

WORKDIR/checkpoints/STEP   training states, the newest two (Orbax; asynchronous, of any number of
                           hosts and devices)
WORKDIR/stages/NUMBER      averaged weights with which each stage but the first began, as the one
                           before left them; of the first, if it learns from them
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from jax.sharding import Mesh
from orbax.checkpoint import checkpoint_managers

from nvc_jax import parallel
from nvc_jax.errors import NvcError
from nvc_jax.models import registry, released
from nvc_jax.models.with_intra import WithIntra
from nvc_jax.training import stages
from nvc_jax.training import step as training
from nvc_jax.training.transform_start import transform_start

CHECKPOINTS, STAGES = "checkpoints", "stages"


@contextmanager
def manager_of(workdir: str) -> Iterator[ocp.CheckpointManager]:
    """The manager of a run's checkpoints; waits at the end for one that is still being written."""
    options = ocp.CheckpointManagerOptions(preservation_policy=checkpoint_managers.LatestN(2))
    manager = ocp.CheckpointManager(Path(workdir).absolute() / CHECKPOINTS, options=options)
    try:
        yield manager
    finally:
        with saving(manager.directory):
            manager.close()


@contextmanager
def saving(folder: Any) -> Iterator[None]:
    """Turns errors of writing a checkpoint, this one or the one before, into ours."""
    try:
        yield
    except (OSError, ValueError) as e:  # ValueError: TensorStore's name for a full disk
        reason = str(e).splitlines()[0]
        raise NvcError(f"{folder}: a checkpoint cannot be written ({reason})") from e


def save(manager: ocp.CheckpointManager, step: int, state: training.TrainState) -> None:
    """Starts to write a checkpoint. Raises NvcError if that, or the one before, cannot be done."""
    with saving(manager.directory):
        manager.save(step, args=ocp.args.StandardSave(state))


def placed(mesh: Mesh, state: training.TrainState) -> training.TrainState:
    """The shapes of a state, with where its parts lie on the devices.

    Weights are everywhere, carried references with the samples that they belong to.
    """

    def place(x, sharding):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    everywhere = parallel.replicated(mesh)

    def place_carried(x):
        return place(x, parallel.batch_sharding(mesh, x) if x.ndim > 1 else everywhere)

    carry = jax.tree.map(place_carried, state.carry)
    return jax.tree.map(lambda x: place(x, everywhere), state).replace(carry=carry)


def put(mesh: Mesh, state: training.TrainState) -> training.TrainState:
    """A state that every process has whole, onto the devices."""
    shardings = jax.tree.map(lambda x: x.sharding, placed(mesh, state))
    return jax.jit(lambda x: x, out_shardings=shardings)(state)


def resume(
    manager: ocp.CheckpointManager,
    model: nn.Module,
    config: ml_collections.ConfigDict,
    run: tuple[stages.Stage, ...],
    mesh: Mesh,
) -> training.TrainState:
    """The newest checkpoint's state; else a fresh one, or one with released weights to start from.

    A checkpoint may come from another number of processes and devices.

    Raises:
      NvcError: the checkpoint belongs to another model.
    """
    codec = registry.entry(config.model.name)
    newest = manager.latest_step()
    if newest is None:
        return fresh(model, config, run[0], mesh)
    ends = np.cumsum([stage.steps for stage in run])
    number = int(np.searchsorted(ends, newest - 1, side="right"))
    stage = run[min(number, len(run) - 1)]  # the config may have been shortened since
    shapes = training.state_shapes(codec, model, stage)
    try:
        state = manager.restore(newest, args=ocp.args.StandardRestore(placed(mesh, shapes)))
    except ValueError as e:
        raise NvcError(
            f"{manager.directory}: checkpoint {newest} does not fit this config's model, or the "
            "optimizer, batch, crop or walk of the stage that left it; give another --workdir "
            f"({str(e).splitlines()[0]})"
        ) from None
    logging.info("going on from step %d", newest)
    return state


def fresh(
    model: nn.Module, config: ml_collections.ConfigDict, stage: stages.Stage, mesh: Mesh
) -> training.TrainState:
    """The state before the first step.

    Raises:
      NvcError: the config starts from weights that are not there or do not fit.
    """
    params = registry.random_params(model, config.seed)
    if config.transform_start:
        params = transform_start(config.model.name, model.cfg, params)
    if config.init_from:
        loaded = released.load(config.init_from)
        if isinstance(model, WithIntra) and not isinstance(loaded.module, WithIntra):
            if config.init_only:
                raise NvcError(f"config.init_only: {config.init_from} is an intra codec alone")
            params = _with_intra_of(config.init_from, loaded, model, params)
        else:
            params = _with_weights_of(config.init_from, loaded, params, config.init_only)
        logging.info("starting from the weights of %s", config.init_from)
    params = jax.tree.map(jnp.asarray, params)
    return put(mesh, training.init_state(registry.entry(config.model.name), model, stage, params))


def _with_weights_of(
    name: str, loaded: released.Released, params: dict, only: Sequence[str] = ()
) -> dict:
    """`params` with those of a released model, or of some sub-networks of it.

    An intra codec that does not learn is always among them.

    Raises:
      NvcError: they do not fit.
    """
    given = released.trainable_params(loaded)
    if only:
        given = registry.networks(loaded.module, given)
        if missing := sorted(set(only) - set(given)):
            raise NvcError(f"config.init_only names {missing[0]}, which {name} does not have")
        given = {k: given[k] for k in {*only, "intra"} & set(given)}
        own = registry.networks(loaded.module, params)
        result = registry.together(loaded.module, own | given)
    else:
        result = params | given
    if jax.tree.map(jnp.shape, result) != jax.tree.map(jnp.shape, params):
        raise NvcError(f"{name}: its weights do not fit this config's model")
    return result


def _with_intra_of(name: str, loaded: released.Released, model: WithIntra, params: dict) -> dict:
    """`params` with those of a released intra codec. Raises NvcError if it is another codec."""
    module, weights = loaded.module, released.trainable_params(loaded)
    if not registry.has_scale_head(model):
        module, weights = released.without_scale_head(module, weights)
    if module.cfg != model.cfg.intra:
        raise NvcError(f"{name}: not the intra codec of this config's model")
    return params | {"intra": weights}


def check_weights(config: ml_collections.ConfigDict, run: tuple[stages.Stage, ...]) -> None:
    """Raises NvcError if weights that a run starts or learns from cannot be read."""
    for name in {config.init_from} - {""} | _released_teachers(run):
        released.load(name)


def check_teachers(run: tuple[stages.Stage, ...], params: dict) -> None:
    """Raises NvcError if released weights that any stage learns from do not fit the model.

    Before the first step, and not when the stage begins.
    """
    for name in _released_teachers(run):
        _with_weights_of(name, released.load(name), params)


def _released_teachers(run: tuple[stages.Stage, ...]) -> set[str]:
    named = {stage.teacher.weights for stage in run if stage.teacher}
    return {name for name in named if stages.is_released(name)}


def _stage_folder(workdir: str, number: int) -> Path:
    return Path(workdir).absolute() / STAGES / str(number)


def keep_weights(workdir: str, number: int, state: training.TrainState) -> None:
    """Keeps the averaged weights with which the stage of this number begins."""
    folder = _stage_folder(workdir, number)
    with saving(folder), ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder, state.average, force=True)


def _kept_weights(workdir: str, number: int, shapes: Any) -> dict:
    """Those that `keep_weights` kept. Raises NvcError if they do not fit, or are not there."""
    folder = _stage_folder(workdir, number)
    if not folder.is_dir():
        raise NvcError(f"{folder}: no weights there; a run keeps them when a stage begins")
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            return checkpointer.restore(folder, shapes)
    except ValueError as e:
        reason = str(e).splitlines()[0]
        raise NvcError(f"{folder}: does not fit this config's model ({reason})") from None


def check_teacher(workdir: str, number: int, stage: stages.Stage) -> None:
    """Raises NvcError if the run lacks the weights that the stage of this number learns from."""
    if (of := stage.taught_by(number)) is not None and not _stage_folder(workdir, of).is_dir():
        raise NvcError(
            f"{_stage_folder(workdir, of)} is missing, from which config.stages[{number}] learns"
        )


def load_teacher(
    workdir: str, number: int, stage: stages.Stage, state: training.TrainState, mesh: Mesh
) -> dict | None:
    """Parameters that the stage of this number learns from, None if there are none.

    Raises:
      NvcError: the weights are not there, or do not fit the model.
    """
    if not stage.teacher:
        return None
    if (of := stage.taught_by(number)) is not None:
        return _kept_weights(workdir, of, placed(mesh, state).average)
    name = stage.teacher.weights
    params = _with_weights_of(name, released.load(name), state.average)
    return jax.jit(lambda x: x, out_shardings=parallel.replicated(mesh))(params)


def release(
    config_file: str, workdir: str, output: str, stage: int | None = None, **tables: Any
) -> Path:
    """Writes a run's averaged weights as a released model.

    A scale head is left out if the run had not begun a stage with `exact`.

    Args:
      output: the .safetensors file to write.
      stage: weights as config.stages[stage] left them; None for those of the newest checkpoint.
      tables: of the scales, see `nvc_jax.models.released.freeze`.

    Raises:
      NvcError: no such config, no such weights in `workdir`, or `output` cannot be written.
    """
    output = Path(output)
    if output.suffix != ".safetensors":
        raise NvcError(f"{output}: give a name that ends in .safetensors")
    config = stages.load(config_file)
    if not (Path(workdir) / CHECKPOINTS).is_dir():
        raise NvcError(f"{workdir}: no checkpoint there to release")
    run = stages.read(config)
    model = registry.build(config.model.name, config.model.size, config.model.dtype)
    one = parallel.make_mesh(devices=jax.devices()[:1])
    if stage is not None and not 0 <= stage < len(run):
        raise NvcError(f"{config_file}: no stage {stage}; they count from 0 to {len(run) - 1}")
    if stage is None or stage == len(run) - 1:
        with manager_of(workdir) as manager:
            if manager.latest_step() is None:
                raise NvcError(f"{workdir}: no checkpoint there to release")
            state = resume(manager, model, config, run, one)
        params, step = state.average, int(state.step)
        if stage is not None and step < sum(s.steps for s in run):
            raise NvcError(f"{workdir}: stage {stage} has not ended, at step {step}")
    else:
        shapes = training.state_shapes(registry.entry(config.model.name), model, run[0])
        params = _kept_weights(workdir, stage + 1, placed(one, shapes).average)
        step = sum(s.steps for s in run[: stage + 1])
    if registry.has_scale_head(model) and not _head_has_learnt(run, step):
        # Integer scales from an untrained head would cost many times the bits.
        model, params = released.without_scale_head(model, params)
    tensors, metadata = released.freeze(output.stem, config.model.name, model, params, **tables)
    released.save(output, tensors, metadata)
    return output


def _head_has_learnt(run: tuple[stages.Stage, ...], step: int) -> bool:
    """Whether a stage that trains the scale head has begun by this step."""
    begins = np.cumsum([0, *(stage.steps for stage in run[:-1])])
    return any(stage.exact and begin < step for stage, begin in zip(run, begins, strict=True))
