"""Many devices, many hosts: the mesh, and what of a training state and a batch lies where.

Training is data parallel: weights are everywhere, every device computes its part of the batch, and
the compiler adds the all-reduce of the gradients. A second axis, "space", splits pictures into
horizontal bands for crops and clips that no device holds alone; the compiler exchanges the borders.
"""

import json
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from nvc_jax.errors import NvcError

DATA, SPACE = "data", "space"


def initialize(coordinator: str = "", processes: int = 1, process: int = 0) -> None:
    """Joins the processes of a run; to be called before anything else of JAX.

    Args:
      coordinator: "HOST:PORT" of process 0; "auto" where JAX finds out by itself (TPU pods, Slurm,
        Open MPI, Kubernetes); "" for a run of one process.
      processes, process: how many there are, and which this one is; not used for "auto".

    Raises:
      NvcError: the others were not found.
    """
    if not coordinator:
        if processes != 1 or process != 0:
            raise NvcError("several processes need --coordinator=HOST:PORT of process 0")
        return
    settings = {}
    if coordinator != "auto":
        if not 0 <= process < processes:
            raise NvcError(f"--process={process}: there are {processes}, counted from 0")
        settings = dict(
            coordinator_address=coordinator, num_processes=processes, process_id=process
        )
    try:
        jax.distributed.initialize(**settings)
    except (RuntimeError, ValueError) as e:
        reason = str(e).strip().splitlines()[0]
        raise NvcError(
            f"--coordinator={coordinator}: the run could not be joined ({reason})"
        ) from None


def make_mesh(space: int = 1) -> Mesh:
    """All devices as ("data", "space"). Raises NvcError if `space` does not divide their number."""
    devices = len(jax.devices())
    if space < 1 or devices % space:
        raise NvcError(f"config.mesh.space is {space}; it must divide the {devices} devices")
    # Explicit axes, the newer default, would need their types in every operation.
    return jax.make_mesh(
        (devices // space, space), (DATA, SPACE), axis_types=(AxisType.Auto, AxisType.Auto)
    )


def replicated(mesh: Mesh) -> NamedSharding:
    """Everything on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh, array: Any, rows: int | None = None) -> NamedSharding:
    """Where a batch's array lies: samples over "data", and rows of pictures over "space".

    rows: number of the axis that counts rows of pictures, None if there is none.
    """
    spec = [None] * np.ndim(array)
    spec[0] = DATA
    if rows is not None and mesh.shape[SPACE] > 1:
        spec[rows] = SPACE
    return NamedSharding(mesh, PartitionSpec(*spec))


def check_batch(mesh: Mesh, batch: int, parts: int, where: str) -> None:
    """Raises NvcError if devices and processes cannot share a batch that is cut into parts."""
    devices = mesh.shape[DATA]
    if batch // parts % devices or batch % jax.process_count():
        raise NvcError(
            f"{where}.batch is {batch}, in {parts} parts; each part must be a multiple of the "
            f"{devices} devices that share it"
        )


def is_main() -> bool:
    """Whether this process writes logs and pictures."""
    return jax.process_index() == 0


def gather(value: Any) -> list[Any]:
    """The values of all processes, in their order; anything that JSON holds."""
    data = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.array([data.size])).reshape(-1)
    padded = np.zeros(sizes.max(), np.uint8)
    padded[: data.size] = data
    everything = multihost_utils.process_allgather(padded).reshape(len(sizes), -1)
    return [json.loads(row[:size].tobytes()) for row, size in zip(everything, sizes, strict=True)]
