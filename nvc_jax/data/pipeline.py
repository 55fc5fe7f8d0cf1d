"""Grain pipelines: from clips to batches.

A batch is a pure function of (seed, step): whoever resumes at step n, on however many processes,
gets the batches that would have come. Nothing about the data needs to be saved but n.
"""

import dataclasses
import logging
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import grain
import numpy as np
import tensorflow_datasets as tfds
from absl import flags

from nvc_jax.data.clips import Clip, ClipSet, load_clips, stats
from nvc_jax.data.crops import cut_out
from nvc_jax.data.synthetic import made_up_clips
from nvc_jax.data.synthetic_motion import Scene, Scenes, film
from nvc_jax.errors import NvcError

EPOCHS = 1 << 24  # for ever, but lengths must stay below 2^63

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Source:
    """Clips to draw from.

    Attributes:
      records: random access to `Clip`s, or to `Scene`s that clips are made of.
      weight: share of the samples, relative to the other sources' weights.
    """

    records: Sequence[Clip | Scene]
    weight: float


class Weighted(Sequence):
    """Clips in memory, each as often as it is long and large: in fourths of the smallest one."""

    def __init__(self, clips: Sequence[Clip]):
        pixels = np.array([clip.y.size for clip in clips])
        self._clips, self._ends = clips, np.cumsum(4 * pixels // pixels.min())

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> Clip:
        return self._clips[np.searchsorted(self._ends, index, side="right")]


class Stored(Sequence):
    """The clips of a data set that `nvc_jax.data.build` wrote."""

    def __init__(self, folder: str, split: str):
        try:
            builder = tfds.builder_from_directory(folder)
            self._source = builder.as_data_source(split)
        except Exception as e:  # TFDS raises whatever its parts raise
            reason = str(e).strip().splitlines() or [type(e).__name__]
            raise NvcError(
                f"{folder}: no data set with a split {split!r} can be read there ({reason[0]}); "
                "python -m nvc_jax.data.build makes data sets"
            ) from None
        if set(Clip._fields) - set(builder.info.features):
            raise NvcError(f"{folder}: a data set, but not one of clips")

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Clip:
        if not 0 <= index < len(self):
            raise IndexError(index)
        record = self._source[int(index)]
        return Clip(*(record[name] for name in Clip._fields))


def open_sets(data: Any, root: str = "", loaded: dict[str, ClipSet] | None = None) -> list[Source]:
    """The clips that a config's data section names, with paths that start from `root`.

    data: either `folder`, of videos and photographs that are decoded into memory ("" for a few
      clips that are made up, which teach a codec next to nothing), `synthetic_share`, the share of
      samples that `nvc_jax.data.synthetic_motion` makes of the photographs (default 0), and
      `image_share`, the photographs' share of the others (default 0.25); or `sets`, a tuple of
      dicts with `path` of a data set that `nvc_jax.data.build` wrote, `split` (default "train")
      and `weight` (default 1).
    loaded: folder -> clips that are in memory already; gets those that are read.

    Raises:
      NvcError: no such folder or data set, or a section that says neither.
    """
    if ("sets" in data) == ("folder" in data):
        raise NvcError("config.data must have either `folder` or `sets`; see nvc_jax.data.pipeline")
    known = {"sets"} if "sets" in data else {"folder", "image_share", "synthetic_share"}
    if unknown := sorted(set(data) - known):
        raise NvcError(f"config.data.{unknown[0]} is nothing that {sorted(known)[0]} can have")
    if "sets" in data:
        if not data["sets"]:
            raise NvcError("config.data.sets is empty: there is nothing to train on")
        sets = enumerate(data["sets"])
        return [_open_set(dict(s), root, f"config.data.sets[{n}]") for n, s in sets]
    folder = data["folder"]
    shares = {"image_share": data.get("image_share", 0.25)}
    shares["synthetic_share"] = data.get("synthetic_share", 0.0)
    for name, share in shares.items():
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share <= 1:
            raise NvcError(f"config.data.{name} is {share!r}; it must be from 0 to 1")
    loaded = {} if loaded is None else loaded
    if folder not in loaded:
        loaded[folder] = load_clips(os.path.join(root, folder)) if folder else made_up_clips()
        log.info("training data: %s", stats(loaded[folder]))
    return memory_sources(loaded[folder], **shares)


def _open_set(values: dict, root: str, where: str) -> Source:
    if unknown := sorted(set(values) - {"path", "split", "weight"}):
        raise NvcError(f"{where}.{unknown[0]} is nothing that a data set can have")
    if "path" not in values:
        raise NvcError(f"{where}.path is missing")
    weight = values.get("weight", 1.0)
    if not isinstance(weight, int | float) or not weight > 0:
        raise NvcError(f"{where}.weight is {weight!r}; it must be a number above 0")
    path = os.path.join(root, values["path"])
    return Source(Stored(path, values.get("split", "train")), weight)


def memory_sources(
    clips: ClipSet, image_share: float, synthetic_share: float = 0.0
) -> list[Source]:
    """Videos by their pixels and frames, images all alike, and a share of clips made of these.

    image_share: of the samples that are not synthetic.

    Raises:
      NvcError: no photograph to make clips of.
    """
    if synthetic_share and not clips.images:
        raise NvcError(
            f"config.data.synthetic_share is {synthetic_share}, but there are no photographs in "
            "config.data.folder, of which such clips are made; add some, or set it to 0"
        )
    rest, result = 1 - synthetic_share, []
    if clips.videos:
        weight = 1 - image_share if clips.images else 1.0
        result.append(Source(Weighted(clips.videos), rest * weight))
    if clips.images:
        result.append(Source(clips.images, rest * (image_share if clips.videos else 1.0)))
        result.append(Source(Scenes(clips.images), synthetic_share))
    return [source for source in result if source.weight > 0]


def batches(
    sources: Sequence[Source],
    *,
    seed: int,
    batch: int,
    frames: int,
    crop: int,
    cut_share: float = 0.05,
    process: int = 0,
    processes: int = 1,
) -> grain.MapDataset:
    """Batches without end, of which this process computes its part only.

    Every record of a source is drawn once before any is drawn again. What a sample consists of does
    not depend on the number of processes: their parts, one after the other, are the batch that one
    would make.

    Args:
      batch: samples, of all processes together.
      frames, crop: shape of a sample.
      cut_share: of samples whose first picture comes from elsewhere, as after a hard scene cut.

    Returns:
      uint8 [batch / processes, frames, crop, crop, 3], Y U V at 4:4:4, chroma repeated.

    Raises:
      NvcError: sizes that cannot be, or no clip to draw from.
    """
    if min(batch, frames, crop) < 1 or crop % 2:
        raise NvcError(
            f"batch {batch}, frames {frames}, crop {crop}: all must be positive and the crop even"
        )
    if batch % processes:
        raise NvcError(f"a batch of {batch} cannot be shared by {processes} processes")
    if not sources or not all(len(source.records) for source in sources):
        raise NvcError("there is no clip to draw from")
    shares = np.array([source.weight for source in sources], float)
    shares /= shares.sum()
    parts = [
        grain.MapDataset.source(source.records).seed(seed + number).shuffle().repeat(EPOCHS)
        for number, source in enumerate(sources)
    ]
    mixed = grain.MapDataset.mix(parts, shares) if len(parts) > 1 else parts[0]
    draw = partial(
        _sample, records=[s.records for s in sources], shares=shares, frames=frames, crop=crop,
        cut_share=cut_share,
    )  # fmt: skip
    samples = mixed.seed(seed).random_map(draw)
    # Before the slice, so that a sample's random numbers follow from its place in the whole.
    return samples.batch(batch // processes).slice(slice(process, None, processes))


def _sample(
    record: Clip | Scene, rng: np.random.Generator, records, shares, frames, crop, cut_share
) -> np.ndarray:
    sample = np.empty((frames, crop, crop, 3), np.uint8)
    _fill(sample, record, rng)
    if rng.random() < cut_share:
        other = records[rng.choice(len(records), p=shares)]
        _fill(sample[:1], other[int(rng.integers(len(other)))], rng)
    return sample


def _fill(sample: np.ndarray, record: Clip | Scene, rng: np.random.Generator) -> None:
    (film if isinstance(record, Scene) else cut_out)(record, sample, rng)


def _follow_parent(worker: int, workers: int) -> None:
    """For worker processes: they end when their parent does, however it does.

    Ctrl-C and SIGTERM are for the parent, which may still want batches.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    parent = os.getppid()

    def watch():
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def iterate(batches: grain.MapDataset, start: int, workers: int = 0) -> Iterator[np.ndarray]:
    """The batches from number `start` on, made ahead of time.

    workers: processes that make them; 0 for threads of this one.
    """
    rest = batches.slice(slice(start, None))
    if not workers:
        options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)
        return iter(rest.to_iter_dataset(options))
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # Grain's workers ask for flags even outside of absl programs
    options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2)
    threads = grain.ReadOptions(num_threads=1, prefetch_buffer_size=1)
    return iter(rest.to_iter_dataset(threads).mp_prefetch(options, _follow_parent))
