"""Numbers and pictures of a run: JSON lines and TensorBoard, with clu's method names.

clu's own metric writers need TensorFlow, which this project does without.
"""

import json
import math
from contextlib import suppress
from pathlib import Path

import numpy as np
from PIL import Image
from tensorboardX import SummaryWriter

from nvc_jax.files import replacing, writing


class MetricWriter:
    """Writes `metrics.jsonl`, TensorBoard events and `samples/*.png` below `workdir`.

    Raises:
      NvcError: from everything but `close`, when `workdir` cannot be written.
    """

    def __init__(self, workdir: str | Path):
        self._dir = Path(workdir)
        with writing(workdir):
            self._dir.mkdir(parents=True, exist_ok=True)
            self._lines = open(self._dir / "metrics.jsonl", "a", buffering=1)  # noqa: SIM115
            self._events = SummaryWriter(str(self._dir))

    def keep_until(self, step: int) -> None:
        """Drops lines of later steps: of a run that ended after its last checkpoint."""
        file = self._dir / "metrics.jsonl"
        with writing(self._dir):
            lines = [line for line in file.read_text().splitlines() if _is_until(line, step)]
            self._lines.close()
            with replacing(file) as hidden:
                hidden.write_text("".join(line + "\n" for line in lines))
            self._lines = open(file, "a", buffering=1)  # noqa: SIM115

    def write_scalars(self, step: int, scalars: dict[str, float]) -> None:
        with writing(self._dir):
            # Strict readers of JSON know no NaN, which skipped steps have.
            finite = {n: value if math.isfinite(value) else None for n, value in scalars.items()}
            self._lines.write(json.dumps({"step": step, **finite}) + "\n")
            for name, value in scalars.items():
                self._events.add_scalar(name, value, step)

    def write_images(self, step: int, images: dict[str, np.ndarray]) -> None:
        """images: name -> uint8 [height, width, 3]."""
        with writing(self._dir):
            for name, image in images.items():
                folder = self._dir / name
                folder.mkdir(exist_ok=True)
                Image.fromarray(image).save(folder / f"{step:08d}.png")
                self._events.add_image(name, image, step, dataformats="HWC")

    def close(self) -> None:
        with suppress(OSError):  # a disk that was full still is, and that was said
            self._lines.close()
        with suppress(OSError):
            self._events.close()


def _is_until(line: str, step: int) -> bool:
    try:
        return json.loads(line)["step"] <= step
    except (ValueError, KeyError, TypeError):  # cut off when the process was killed
        return False


class SilentWriter:
    """What the other processes of a run have: nothing is written twice."""

    def keep_until(self, step: int) -> None:
        pass

    def write_scalars(self, step: int, scalars: dict[str, float]) -> None:
        pass

    def write_images(self, step: int, images: dict[str, np.ndarray]) -> None:
        pass

    def close(self) -> None:
        pass
