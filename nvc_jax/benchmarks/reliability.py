"""What judging its references is worth to a codec: frames around scene cuts and other accidents.

Every clip is coded three times: references count as the classifier says (`nvc_jax.models.uni_lvc`),
they always count in full, and they never count, which is intra coding bit for bit. Rates are the
bytes that a frame has in its file, qualities those of the encoder's reconstruction. Accidents that
a clip does not have are made up in its middle.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from nvc_jax import bitstream
from nvc_jax import codec as coding
from nvc_jax.benchmarks.clips import compiled_once, encode_clip, progress, read_clip
from nvc_jax.errors import NvcError
from nvc_jax.models import registry, released
from nvc_jax.models.uni_lvc import RELIABILITIES
from nvc_jax.shots import scene_cuts
from nvc_jax.video import Planes

HIGHEST = RELIABILITIES - 1
FROZEN = 4  # pictures in a row
FLASH = 80  # grey levels


class Scene(NamedTuple):
    """Pictures, and the first that its references do not help much to code."""

    name: str
    pictures: list[Planes]
    strike: int


def scenes(pictures: list[Planes]) -> list[Scene]:
    """A clip's own cuts, or three accidents in the middle of a clip without.

    "flash": one picture is brighter. "other picture": one is upside down, so that the next one's
    reference shows something else. "lost": what a player shows that has lost some packets, the last
    picture before them again and again, is what goes on to be referred to.
    """
    if cuts := scene_cuts(planes.y for planes in pictures):
        return [Scene("cut", pictures, cuts[0])]
    middle = len(pictures) // 2

    def instead(start: int, others: list[Planes]) -> list[Planes]:
        return [*pictures[:start], *others, *pictures[start + len(others) :]]

    here, held = pictures[middle], pictures[middle - FROZEN - 1]
    flash = here._replace(y=np.minimum(here.y, 255 - FLASH) + np.uint8(FLASH))
    upside_down = Planes(*(np.ascontiguousarray(plane[::-1, ::-1]) for plane in here))
    return [
        Scene("flash", instead(middle, [flash]), middle),
        Scene("other picture", instead(middle, [upside_down]), middle),
        Scene("lost", instead(middle - FROZEN, FROZEN * [held]), middle),
    ]


def _constant(level: int) -> Callable[..., np.ndarray]:
    return lambda variables, planes, refs, qp: np.full(len(refs), level)


def benchmark(
    clips: list[str],
    name: str,
    mode: str,
    qps: list[int],
    frames: int,
    size: tuple[int, int],
) -> dict[str, Any]:
    """Codes everything, prints a table and returns it, with bits, PSNR and levels frame by frame.

    Args:
      clips: paths; name: of the model, or its file.
      qps: several for bits at equal PSNR.
      mode: of the model's, e.g. "ld".
      frames, size: of a clip at most, which is cut to them.

    Raises:
      NvcError: a model that does not judge its references, or a clip that is too short or cannot be
        read.
    """
    model = released.load(name)
    if not registry.judges_references(model.module):
        raise NvcError(f"'{model.name}' does not judge its references")
    schedule = coding.schedule_for(model, mode=mode)
    taken = {clip: read_clip(clip, size, frames) for clip in clips}
    for clip, (_, pictures) in taken.items():
        if len(pictures) < 2 * FROZEN + 4:
            raise NvcError(f"{clip}: {len(pictures)} pictures; give at least {2 * FROZEN + 4}")
    runs = [
        (clip, info, scene, qp)
        for clip, (info, pictures) in taken.items()
        for scene in scenes(pictures)
        for qp in qps
    ]
    rows, prepared = [], compiled_once(model)
    with tempfile.TemporaryDirectory() as folder, progress() as bar:
        task = bar.add_task("", total=3 * len(runs))
        for clip, info, scene, qp in runs:
            judging, coded = prepared(info), {}
            for trust, judge in (
                ("judged", judging.judge),
                ("always", _constant(HIGHEST)),
                ("never", _constant(0)),
            ):
                bar.update(task, description=f"{Path(clip).name}, {scene.name}, qp {qp}, {trust}")
                codec, path = judging._replace(judge=judge), Path(folder) / "clip.nvc"
                units, psnr = encode_clip(codec, info, scene.pictures, qp, path, schedule)
                coded[trust] = _by_frame(units, psnr, path)
                bar.advance(task)
            row = {"clip": clip, "scene": scene.name, "strike": scene.strike, "qp": qp, **coded}
            rows.append(row | {"at_strike": _at_strike(coded, scene.strike)})
    for row in rows:
        same = [r for r in rows if (r["clip"], r["scene"]) == (row["clip"], row["scene"])]
        for trust in ("judged", "always"):
            row["at_strike"][f"{trust}_percent_at_equal_psnr"] = _at_equal_psnr(row, trust, same)
    _print(rows)
    return {"model": model.name, "mode": mode, "frames": frames, "size": size, "rows": rows}


def _by_frame(units: list[coding.EncodedUnit], psnr: list[float], path: Path) -> dict[str, list]:
    """Of every frame, in order of display, in lists.

    "bits" in the file, "psnr" (6:1:1), "levels" (0 to 1) of the references and "distances" to them.
    """
    written = bitstream.stream_info(path)["units"]
    found = {}
    for unit, packet, quality in zip(units, written, psnr, strict=True):
        # A frame that is named twice counts once: the first time, as in the codec.
        named = zip(unit.plan.distances, unit.coded.reliability, strict=True)
        levels = dict(reversed(list(named)))
        levels = {distance: levels[distance] / HIGHEST for distance in unit.plan.distances}
        found[unit.packet.frames[0]] = (
            8 * packet["bytes"], quality, list(levels.values()), list(levels)
        )  # fmt: skip
    columns = zip(*(found[frame] for frame in sorted(found)), strict=True)
    names = "bits", "psnr", "levels", "distances"
    return dict(zip(names, map(list, columns), strict=True))


def _at_strike(coded: dict[str, dict], frame: int) -> dict[str, float]:
    """Of the frame where references stop to help: against intra coding it, and how they count.

    The frame's references need not be those of intra coding, so that PSNR can differ, too. Of the
    references those count that are shown before the frame; None if it has none.
    """
    intra, judged = coded["never"], coded["judged"]

    def trust(frames):
        both = zip(judged["levels"][frames], judged["distances"][frames], strict=True)
        past = [lv for own in both for lv, distance in zip(*own, strict=True) if distance < 0]
        return float(np.mean(past)) if past else None

    result = {"level_before": trust(slice(frame)), "level": trust(slice(frame, frame + 1))}
    for trust in ("judged", "always"):
        bits = coded[trust]["bits"][frame] / intra["bits"][frame]
        result[f"{trust}_bits_percent"] = 100 * (bits - 1)
        result[f"{trust}_psnr_difference"] = coded[trust]["psnr"][frame] - intra["psnr"][frame]
    return result


def _at_equal_psnr(row: dict, trust: str, same: list[dict]) -> float | None:
    """How many percent more bits the frame takes than coded intra to the same PSNR.

    By what intra coding takes at several qps, `same`; None if there is but one.
    """
    strike = row["strike"]
    curve = sorted((r["never"]["psnr"][strike], np.log(r["never"]["bits"][strike])) for r in same)
    if len(curve) < 2:
        return None
    psnr, bits = (row[trust][key][strike] for key in ("psnr", "bits"))
    # Between the two nearest points, or beyond the last two.
    after = int(np.clip(np.searchsorted([p for p, _ in curve], psnr), 1, len(curve) - 1))
    (p0, b0), (p1, b1) = curve[after - 1 : after + 1]
    needed = b0 + (b1 - b0) * (psnr - p0) / max(p1 - p0, 1e-6)
    return 100 * float(bits / np.exp(needed) - 1)


def _print(rows: list[dict[str, Any]]) -> None:
    width = max(len(Path(row["clip"]).stem) for row in rows)
    print(
        f"{'':{width}} {'accident':13}  qp | trust before, then | against intra, bits, PSNR, bits "
        "at equal PSNR: judged, always trusted"
    )
    for row in rows:
        at = row["at_strike"]
        print(
            f"{Path(row['clip']).stem:{width}} {row['scene']:13} {row['qp']:3} | "
            f"{_level(at['level_before']):>12} {_level(at['level']):>5} | "
            + " | ".join(
                f"{at[f'{trust}_bits_percent']:+7.1f} % {at[f'{trust}_psnr_difference']:+6.2f} dB"
                f"{_percent(at[f'{trust}_percent_at_equal_psnr'])}"
                for trust in ("judged", "always")
            )
        )


def _level(value: float | None) -> str:
    return "none" if value is None else f"{value:.2f}"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:+7.1f} %"


def plot(rows: list[dict[str, Any]], path: str) -> None:
    """Draws bits, PSNR and trust frame by frame into a picture file, a column per row."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1 + 3.4 * len(rows), 6.5), layout="constrained")
    axes = figure.subplots(3, len(rows), squeeze=False, sharex="col")
    looks = (("never", "0.6", "-"), ("always", "tab:orange", "-"), ("judged", "tab:blue", "--"))
    for (bits, psnr, trust), row in zip(axes.T, rows, strict=True):
        bits.set_title(f"{Path(row['clip']).stem}: {row['scene']}, qp {row['qp']}", fontsize=9)
        for name, colour, line in looks:
            label = f"{name} trusted" if name != "judged" else name
            bits.plot(np.divide(row[name]["bits"], 1000), line, color=colour, label=label)
            psnr.plot(row[name]["psnr"], line, color=colour)
        levels = row["judged"]["levels"]
        for slot, marker in ((0, "o"), (1, "x")):
            there = [(n, own[slot]) for n, own in enumerate(levels) if len(own) > slot]
            if there:
                label = ("first reference", "second")[slot]
                trust.plot(*zip(*there, strict=True), marker, color="tab:blue", ms=4, label=label)
        trust.set_ylim(-0.05, 1.05)
        trust.set_xlabel("frame")
        for ax in (bits, psnr, trust):
            ax.axvline(row["strike"], color="tab:red", lw=0.8, ls=":")
            ax.grid(alpha=0.3)
    for ax, label in zip(axes[:, 0], ("kbit", "PSNR 6:1:1, dB", "trust"), strict=True):
        ax.set_ylabel(label)
    axes[0, 0].legend(fontsize=8)
    axes[2, 0].legend(fontsize=8)
    figure.savefig(path, dpi=130)
