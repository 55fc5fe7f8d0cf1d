"""Many devices, many hosts: the mesh, and what of a training state and a batch lies where.

Training is data parallel: weights are everywhere, every device computes its part of the batch, and
the compiler adds the all-reduce of the gradients. A second axis, "space", splits pictures into
horizontal bands for crops and clips that no device holds alone; the compiler exchanges the borders.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from nvc_jax.errors import NvcError

T = TypeVar("T")

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
    if coordinator not in ("", "auto") and ":" not in coordinator:
        raise NvcError(f"--coordinator={coordinator}: give HOST:PORT, or auto")
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


def make_mesh(space: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The devices, by default all, as ("data", "space").

    Raises:
      NvcError: `space` does not divide the number of every process's devices.
    """
    devices = jax.devices() if devices is None else devices
    each = Counter(device.process_index for device in devices).values()
    if space < 1 or any(count % space for count in each):
        raise NvcError(
            f"config.mesh.space is {space}; it must divide the number of devices of every process, "
            f"which is {' and '.join(map(str, sorted(set(each))))}"
        )
    # By process, so that no picture is shared by two; and not jax.make_mesh, which may reorder.
    grid = sorted(devices, key=lambda device: (device.process_index, device.id))
    # Explicit axes, the newer default, would need their types in every operation.
    return Mesh(
        np.array(grid).reshape(-1, space), (DATA, SPACE), axis_types=(AxisType.Auto, AxisType.Auto)
    )


# Dense products of bfloat16 per second and chip, in 10^12, from the makers' data sheets, by the
# words in a device's kind; the first that fits counts.
PEAK_TFLOPS = {
    "MIG": None, "v4 lite": None, "v6 lite": 918, "v6e": 918, "v5 lite": 197, "v5e": 197,
    "v5p": 459, "v5": 459, "v4": 275, "H200": 989, "H100 PCIe": 756, "H100 NVL": 835, "H100": 989,
    "A100": 312,
}  # fmt: skip


def peak_tflops(device: jax.Device) -> float | None:
    """What a device could do at most, None if it is not known."""
    for words, peak in PEAK_TFLOPS.items():
        if re.search(rf"\b{words}\b", device.device_kind):
            return peak
    return None


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


def check_batch(mesh: Mesh, batch: int, parts: int, crop: int, where: str) -> None:
    """Raises NvcError if devices and processes cannot share batches of `parts` parts and crops."""
    devices, bands = mesh.shape[DATA], mesh.shape[SPACE]
    if batch // parts % devices or batch % jax.process_count():
        raise NvcError(
            f"{where}.batch is {batch}, in {parts} parts; each part must be a multiple of the "
            f"{devices} devices that share it"
        )
    if crop % bands:
        raise NvcError(f"{where}.crop is {crop}; it cannot be cut into {bands} bands (mesh.space)")


def together(work: Callable[[], T]) -> T:
    """Does something that may fail on one process only, and fails on all of them if it does.

    A process that raised alone would leave the others waiting for it.

    Raises:
      NvcError: of this process, or of the first other one.
    """
    result, error = None, None
    try:
        result = work()
    except NvcError as e:
        error = e
    messages = gather(str(error) if error else "") if jax.process_count() > 1 else []
    if error:
        raise error
    for number, message in enumerate(messages):
        if message:
            raise NvcError(f"process {number}: {message}")
    return result


def check_same(value: Any, what: str) -> None:
    """Raises NvcError on all processes if a value is not the same on them."""
    values = gather(value) if jax.process_count() > 1 else []
    for number, other in enumerate(values):
        if other != values[0]:
            raise NvcError(f"{what} differ between process 0, {values[0]}, and {number}, {other}")


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
