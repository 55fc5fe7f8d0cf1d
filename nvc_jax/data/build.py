"""Builds a training set from videos or images.

  python -m nvc_jax.data.build video_folder FOLDER --name my_videos --data-dir data
  python -m nvc_jax.data.build image_folder FOLDER --name my_photos --data-dir data
  python -m nvc_jax.data.build vimeo90k_septuplet FOLDER --data-dir data

What it writes is a TFDS data set, DATA_DIR/BUILDER/NAME/VERSION, which a config's data section
names. Interrupt it whenever you like; the same command goes on.
"""

import argparse
import sys
from pathlib import Path

import tensorflow_datasets as tfds
from absl import logging
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from nvc_jax.data.builders import VERSION, ClipConfig, ImageFolder, VideoFolder, Vimeo90kSeptuplet
from nvc_jax.errors import NvcError

BUILDERS = {
    "video_folder": VideoFolder,
    "image_folder": ImageFolder,
    "vimeo90k_septuplet": Vimeo90kSeptuplet,
}


def build(kind: str, data_dir: str, config: ClipConfig) -> tuple[str, tuple[str, ...]]:
    """Builds a data set, with progress on standard error.

    Returns:
      (its folder, a message for every source that was left out)

    Raises:
      NvcError: nothing to read, or the data set exists already.
    """
    builder = BUILDERS[kind](config=config, data_dir=data_dir)
    if builder.data_path.exists():
        raise NvcError(f"{builder.data_dir} exists already; give another --name, or remove it")
    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()]
    console = Console(stderr=True)
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as bar:
        task = bar.add_task("", total=None)
        builder.on_source = lambda done, total, name: bar.update(
            task, completed=done, total=total, description=name
        )
        builder.download_and_prepare()
    return builder.data_dir, builder.skipped


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m nvc_jax.data.build",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("builder", choices=BUILDERS)
    parser.add_argument("folder", help="where the videos or images are")
    parser.add_argument("--name", default="default", help="of this data set (default: default)")
    parser.add_argument("--data-dir", default="data", help="where data sets go (default: data)")
    settings = {
        "frames": "of a clip, at most",
        "stride": "pictures from one clip's start to the next one's",
        "min-frames": "shorter clips are left out",
        "min-size": "smaller pictures are left out",
        "tile": "cut pictures into tiles of about this size, so that small crops read less",
    }
    defaults = ClipConfig(name="default", version=VERSION)
    for name, text in settings.items():
        default = getattr(defaults, name.replace("-", "_"))
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{text} ({default})")
    args = vars(parser.parse_args(argv))
    kind, data_dir = args.pop("builder"), args.pop("data_dir")
    for name in ("frames", "stride", "min_frames"):
        if args[name] < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    if not args["name"] or Path(args["name"]).name != args["name"]:
        parser.error("--name must be a plain name, which becomes a folder's")
    if args["tile"] == 1 or args["tile"] < 0:
        parser.error("--tile must be 0 or at least 2")
    args["folder"] = str(Path(args["folder"]).resolve())
    logging.set_verbosity(logging.ERROR)
    tfds.disable_progress_bar()
    try:
        where, skipped = build(kind, data_dir, ClipConfig(version=VERSION, **args))
    except (NvcError, OSError) as e:
        print(f"nvc_jax.data.build: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("nvc_jax.data.build: interrupted; the same command goes on", file=sys.stderr)
        return 130
    for message in skipped:
        print(f"left out: {message}", file=sys.stderr)
    splits = tfds.builder_from_directory(where).info.splits
    clips = ", ".join(f"{info.num_examples} clips in {name}" for name, info in splits.items())
    print(f"{where}: {clips}; {len(skipped)} sources left out")
    return 0


if __name__ == "__main__":
    sys.exit(main())
