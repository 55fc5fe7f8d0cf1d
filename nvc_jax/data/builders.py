"""TFDS builders: videos and photographs as clips of raw 4:2:0 planes in array_record files.

A record is one clip. Its planes are plain uint8 bytes, so that nothing needs TensorFlow, nor
decoding beyond array_record's own fast compression:

  y [frames, height, width], u and v [frames, height / 2, width / 2]: uint8, even height and width
  source: the file or folder it comes from, relative to the source folder
  first: number of its first picture in the source

4:2:0 because that is what codecs are given in use: training sees the same chroma.

Building can be interrupted at any time. Finished shards wait in a folder `.NAME.parts` beside the
data set, and the same command goes on after the last of them. Sources that cannot be read are left
out and named in `ClipBuilder.skipped`.
"""

import dataclasses
import hashlib
import json
import os
import re
import shutil
from collections import deque
from collections.abc import Callable, Container, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter

from nvc_jax.errors import NvcError
from nvc_jax.files import visible_files
from nvc_jax.shots import with_cuts
from nvc_jax.video import VIDEO_SUFFIXES, Planes, open_video

SHARD_BYTES = 128 << 20  # the source with which a shard passes this size is its last
VERSION = "1.0.0"
IMAGES = {".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}


class Source(NamedTuple):
    """What is read as one video: a file, or the pictures of a folder in their order."""

    name: str  # relative to the source folder
    paths: tuple[Path, ...]


@dataclasses.dataclass
class ClipConfig(tfds.core.BuilderConfig):
    """Where clips come from and how they are cut.

    Attributes:
      folder: of the sources.
      frames: of a clip, at most.
      stride: pictures from one clip's start to the next one's.
      min_frames: shorter clips, as at the ends of shots, are left out.
      min_size: sources of less height or width are left out, and count as skipped.
      tile: pictures are cut into tiles of about this height and width, so that training need not
        read whole pictures for small crops; 0 for whole pictures.
    """

    folder: str = ""
    frames: int = 33
    stride: int = 33
    min_frames: int = 7
    min_size: int = 128
    tile: int = 0


class ClipBuilder(tfds.core.dataset_builder.FileReaderBuilder, skip_registration=True):
    """What the builders below share: shards that outlive an interruption.

    A builder says what its sources are (`_sources`), and whether a source is short enough to be
    held in memory (`SHORT`), in which case several are read at a time.

    Attributes:
      skipped: a message for every source that was left out, from where it could not be read on.
      on_source: is called with (sources done, all sources, the next one's name).
    """

    VERSION = tfds.core.Version(VERSION)
    SHORT: ClassVar[bool] = True
    skipped: tuple[str, ...] = ()
    on_source: Callable[[int, int, str], None] = staticmethod(lambda done, total, name: None)

    def __init__(self, *, config: ClipConfig, **kwargs):
        super().__init__(config=config, file_format="array_record", **kwargs)

    def _sources(self, folder: Path) -> dict[str, list[Source]]:
        """Split -> sources in a fixed order."""
        raise NotImplementedError

    def _info(self) -> tfds.core.DatasetInfo:
        def planes():
            encoding = tfds.features.Encoding.BYTES
            return tfds.features.Tensor(shape=(None,) * 3, dtype=np.uint8, encoding=encoding)

        features = {name: planes() for name in Planes._fields}
        features |= {"source": tfds.features.Text(), "first": np.int64}
        return tfds.core.DatasetInfo(
            builder=self,
            description="Clips of 8-bit 4:2:0 planes, cut from " + self.builder_config.folder,
            features=tfds.features.FeaturesDict(features),
        )

    # What TFDS prints on standard output belongs elsewhere.
    def _log_download_bytes(self):
        pass

    _log_download_done = _log_download_bytes

    def _as_dataset(self, *args, **kwargs):
        raise NotImplementedError("there is no tf.data here; use as_data_source")

    def _download_and_prepare(self, dl_manager, download_config=None):
        splits = self._sources(Path(self.builder_config.folder))
        if not any(splits.values()):
            raise NvcError(f"{self.builder_config.folder}: nothing to read in this folder")
        # self.data_dir is a temporary folder during this call, and lost when it fails.
        target = Path(self.data_dir_root) / self.info.full_name
        parts = target.with_name(f".{target.name}.parts")
        _start_parts(parts, self.builder_config, splits)
        total, done = sum(map(len, splits.values())), 0
        infos, skipped = [], []
        for split, sources in splits.items():
            shards = []
            while (read := sum(s["sources"] for s in shards)) < len(sources):
                path = parts / f"{split}-{len(shards):05}"
                if not path.with_suffix(".json").exists():
                    self._write_shard(path, sources[read:], done + read, total)
                shards.append(json.loads(path.with_suffix(".json").read_text()))
            done += len(sources)
            skipped += [message for shard in shards for message in shard["skipped"]]
            infos.append(self._link_shards(parts, split, [s["clips"] for s in shards]))
        self.skipped = tuple(skipped)
        if not sum(info.num_examples for info in infos):
            shutil.rmtree(parts)
            raise NvcError(
                f"{self.builder_config.folder}: none of {total} sources gives a clip; the first: "
                + (skipped[0] if skipped else "too few pictures")
            )
        self.info.set_splits(tfds.core.SplitDict(infos))
        self._parts = parts

    def _post_download_and_prepare_hook(self) -> None:
        shutil.rmtree(self._parts)

    def _write_shard(self, path: Path, sources: list[Source], done: int, total: int) -> None:
        """Writes path.array_record, then path.json, whose presence says that both are complete."""
        read, clips, size, skipped = 0, 0, 0, []
        writer = ArrayRecordWriter(os.fspath(path.with_suffix(".array_record")), "group_size:1")
        with closing(writer), closing(self._read(sources)) as results:
            for source, records in zip(sources, results, strict=False):
                self.on_source(done + read, total, source.name)
                try:
                    for record in records:
                        data = self.info.features.serialize_example(record)
                        writer.write(data)
                        clips, size = clips + 1, size + len(data)
                except NvcError as e:
                    skipped.append(str(e))
                read += 1
                if size >= SHARD_BYTES:
                    break
        summary = {"sources": read, "clips": clips, "skipped": skipped}
        unfinished = path.with_suffix(".tmp")
        unfinished.write_text(json.dumps(summary))
        unfinished.rename(path.with_suffix(".json"))

    def _read(self, sources: list[Source]) -> Iterator[Iterator[dict]]:
        """The records of every source; errors surface when they are iterated."""
        if not self.SHORT:
            for source in sources:
                yield records(source, self.builder_config)
            return
        workers = os.cpu_count() or 1
        waiting: deque = deque()
        with ThreadPoolExecutor(workers) as pool:
            try:
                for source in sources:
                    waiting.append(pool.submit(_all_records, source, self.builder_config))
                    if len(waiting) > workers:
                        yield _replay(waiting.popleft().result())
                while waiting:
                    yield _replay(waiting.popleft().result())
            finally:
                for future in waiting:
                    future.cancel()

    def _link_shards(self, parts: Path, split: str, lengths: list[int]) -> tfds.core.SplitInfo:
        """Puts the shards that hold clips under their final names; parts keep them till the end."""
        full = [number for number, clips in enumerate(lengths) if clips]
        template = tfds.core.ShardedFileTemplate(
            data_dir=self.data_path, dataset_name=self.name, split=split,
            filetype_suffix=self.info.file_format.file_suffix,
        )  # fmt: skip
        size = 0
        for new, old in enumerate(full):
            path = template.sharded_filepath(shard_index=new, num_shards=len(full))
            shard = parts / f"{split}-{old:05}.array_record"
            size += shard.stat().st_size
            try:
                os.link(shard, path)
            except OSError:  # a file system without links
                shutil.copyfile(shard, path)
        return tfds.core.SplitInfo(
            name=split, shard_lengths=[lengths[n] for n in full], num_bytes=size,
            filename_template=template,
        )  # fmt: skip


def _start_parts(parts: Path, config: ClipConfig, splits: dict[str, list[Source]]) -> None:
    """Makes the folder of finished shards, emptied if they come from other sources or settings."""
    stamp = hashlib.sha256(repr(dataclasses.astuple(config)).encode())
    for split, sources in splits.items():
        for source in sources:
            stamp.update(repr((split, source.name, *map(_mark, source.paths))).encode())
    file = parts / "sources.sha256"
    if not file.exists() or file.read_text() != stamp.hexdigest():
        shutil.rmtree(parts, ignore_errors=True)
        parts.mkdir(parents=True)
        file.write_text(stamp.hexdigest())


def _mark(path: Path) -> tuple[int, int] | None:
    """Changes when a file does; None if it is missing."""
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_size, stat.st_mtime_ns


def _all_records(source: Source, config: ClipConfig) -> tuple[list[dict], NvcError | None]:
    """The records of a short source, and what went wrong after them."""
    found = []
    try:
        found.extend(records(source, config))
    except NvcError as e:
        return found, e
    return found, None


def _replay(result: tuple[list[dict], NvcError | None]) -> Iterator[dict]:
    found, error = result
    yield from found
    if error:
        raise error


def records(source: Source, config: ClipConfig) -> Iterator[dict]:
    """The records of a source.

    Raises:
      NvcError: a picture cannot be read, or is too small. What was yielded before stands.
    """
    with closing(_pictures(source, config.min_size)) as pictures:
        yield from cut_up(pictures, source.name, config)


def cut_up(pictures: Iterable[Planes], name: str, config: ClipConfig) -> Iterator[dict]:
    """Cuts pictures at their shot boundaries, then into clips and tiles."""
    window: list[Planes] = []  # pictures from the next clip's start on
    first = skip = new = 0  # number of the window's first picture; pictures to skip; uncut ones
    least = min(config.min_frames, config.frames)

    def clip():
        stacked = Planes(*map(np.stack, zip(*window, strict=True)))
        for tile in tiles(stacked, config.tile):
            yield {**tile._asdict(), "source": name, "first": first}

    for number, (picture, cut) in enumerate(with_cuts(pictures)):
        if cut:
            if new and len(window) >= least:
                yield from clip()
            window, skip, new = [], 0, 0
        if skip:
            skip -= 1
            continue
        if not window:
            first = number
        window.append(picture)
        new += 1
        if len(window) == config.frames:
            yield from clip()
            skip = max(0, config.stride - config.frames)
            window, first, new = window[config.stride :], first + config.stride, 0
    if new and len(window) >= least:
        yield from clip()


def _pictures(source: Source, min_size: int) -> Iterator[Planes]:
    """Pictures of even size. Raises NvcError if one is too small or unlike the first."""
    shape = None
    for path in source.paths:
        _, pictures = open_video(path)
        with closing(pictures):
            for y, u, v in pictures:
                height, width = y.shape[0] // 2, y.shape[1] // 2
                if 2 * min(height, width) < max(min_size, 2):
                    raise NvcError(
                        f"{path}: {y.shape[1]}x{y.shape[0]} is less than {min_size} pixels"
                    )
                if shape and y.shape != shape:
                    raise NvcError(
                        f"{path}: {y.shape[1]}x{y.shape[0]} pixels, pictures before it "
                        f"{shape[1]}x{shape[0]}"
                    )
                shape = y.shape
                yield Planes(y[: 2 * height, : 2 * width], u[:height, :width], v[:height, :width])


def tiles(clip: Planes, size: int) -> Iterator[Planes]:
    """Equal tiles, of even sides, of `size` or up to twice that; the clip itself if size is 0."""
    _, height, width = clip.y.shape
    rows, cols = (max(1, n // size) if size else 1 for n in (height, width))
    high, wide = height // rows // 2, width // cols // 2
    for top in range(0, rows * high, high):
        for left in range(0, cols * wide, wide):
            area = np.s_[:, top : top + high, left : left + wide]
            luma = np.s_[:, 2 * top : 2 * (top + high), 2 * left : 2 * (left + wide)]
            yield Planes(clip.y[luma], clip.u[area], clip.v[area])


def _natural(path: str | Path) -> list:
    """A key that sorts frame9 before frame10."""
    parts = re.split(r"([0-9]+)", str(path))
    # Every second part is a number. The name itself settles f1 and f01.
    return [int(part) if n % 2 else part for n, part in enumerate(parts)] + [str(path)]


def _files(folder: Path, endings: Container[str]) -> list[Path]:
    """Files below a folder with one of these endings, except hidden ones, in natural order."""
    if not folder.is_dir():
        raise NvcError(f"{folder}: no such folder")
    found = (path for path in visible_files(folder) if path.suffix.lower() in endings)
    return sorted(found, key=_natural)


class VideoFolder(ClipBuilder):
    """Every video file below a folder, and every folder of two images or more, as its frames."""

    SHORT = False  # a film need not fit in memory

    def _sources(self, folder):
        sources = [Source(str(p.relative_to(folder)), (p,)) for p in _files(folder, VIDEO_SUFFIXES)]
        frames: dict[Path, list[Path]] = {}
        for path in _files(folder, IMAGES):
            frames.setdefault(path.parent, []).append(path)
        sources += [
            Source(str(parent.relative_to(folder)), tuple(paths))
            for parent, paths in frames.items()
            if len(paths) > 1
        ]
        return {"train": sorted(sources, key=lambda source: _natural(source.name))}


class ImageFolder(ClipBuilder):
    """Every image below a folder, as a clip of one picture."""

    def __init__(self, *, config: ClipConfig, **kwargs):
        super().__init__(config=dataclasses.replace(config, frames=1, stride=1), **kwargs)

    def _sources(self, folder):
        return {"train": [Source(str(p.relative_to(folder)), (p,)) for p in _files(folder, IMAGES)]}


class Vimeo90kSeptuplet(ClipBuilder):
    """Vimeo-90k septuplets (Xue et al., arXiv 1711.09078), clips of seven pictures of 448x256.

    The folder is the published archive, unpacked: `sequences/00001/0001/im1.png` to `im7.png`, and
    the lists `sep_trainlist.txt` and `sep_testlist.txt`, which become the splits train and test.
    """

    def _sources(self, folder):
        splits = {}
        for split in ("train", "test"):
            listed = folder / f"sep_{split}list.txt"
            try:
                names = listed.read_text().split()
            except (OSError, UnicodeDecodeError) as e:
                raise NvcError(
                    f"{listed}: cannot be read ({e}); the folder must be the unpacked archive "
                    "vimeo_septuplet, see http://toflow.csail.mit.edu"
                ) from None
            splits[split] = [
                Source(name, tuple(folder / "sequences" / name / f"im{i}.png" for i in range(1, 8)))
                for name in names
            ]
        return splits
