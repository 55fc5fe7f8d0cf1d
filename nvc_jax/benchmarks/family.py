"""One table of all codecs: what each codes, what it costs, and how well its shipped weights do.

Parameters and arithmetic are counted here. BD-rates come from what `eval.py` measured of the
weights that ship; frames per second from what `bench.py codec --json` did, of these or of random
ones (NAME:SIZE), which cost the same.
"""

import json
import math
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax

from nvc_jax.errors import NvcError
from nvc_jax.models import complexity, registry, released

BEGIN, END = "<!-- bench.py family -->", "<!-- end -->"
HEADS = ["codec", "size", "delay, frames", "parameters", "kMAC per pixel, encode / decode"]


def delay(module: nn.Module) -> str:
    """How many frames an encoder has to wait for before it can code one, as text."""
    modes = registry.modes(module) or {"": module.schedule}
    kinds = {"hierarchical": "a group", "mixed": "a group"}
    found = {m: kinds.get(order, str(module.frames_per_unit - 1)) for m, order in modes.items()}
    return ", ".join(f"{mode} {value}".strip() for mode, value in found.items())


def table(rates: list[str], speeds: list[str]) -> list[dict[str, Any]]:
    """A row for every codec and size.

    Args:
      rates: files `results.json` of evaluations.
      speeds: files of `bench.py codec --json`.

    Raises:
      NvcError: one of them is something else.
    """
    gains = [row for path in rates for row in _read(path, "of an evaluation", _gains)]
    timed = [row for path in speeds for row in _read(path, "of bench.py codec", _timed)]
    rows = []
    for name, codec in registry.CODECS.items():
        for size in codec.sizes:
            module = registry.build(name, size)
            weights = f"{name.replace('_', '-')}-{size}"
            # As `eval.py` calls them, less their intra period.
            labels = {weights: None} | {f"{weights}-{m}": m for m in registry.modes(module)}
            rank = {mode: n for n, mode in enumerate(labels.values())}
            own = [row for row in gains if row["model"].partition("@")[0] in labels]
            runs = [s for s in timed if s["model"] in (weights, f"{name}:{size}")]
            rows.append(
                {
                    "codec": name,
                    "summary": codec.summary,
                    "size": size,
                    "shipped": weights in released.shipped(),
                    "delay": delay(module),
                    "parameters": _parameters(module),
                    **complexity.coding_cost(module),
                    "bd_rates": [
                        row | {"mode": labels[row["model"].partition("@")[0]]} for row in own
                    ],
                    "speeds": sorted(runs, key=lambda s: rank.get(s["mode"], 0)),
                }
            )
    return rows


def _parameters(module: nn.Module) -> int:
    return sum(math.prod(p.shape) for p in jax.tree.leaves(registry.param_shapes(module)))


def _read(path: str, what: str, get) -> list[dict]:
    try:
        return get(json.loads(Path(path).read_text()))
    except (KeyError, TypeError, ValueError, UnicodeDecodeError):
        raise NvcError(f"{path}: not a file of results {what}") from None


def _gains(results: dict) -> list[dict]:
    """Against the codecs of others: what ours are against each other is for their own pages."""
    others = {point["codec"] for point in results["points"] if point["kind"] == "anchor"}
    return [
        {key: row[key] for key in ("model", "anchor", "mean_percent")}
        for row in results["bd_rates"]
        if row["quality"] == "psnr" and row["mean_percent"] is not None and row["anchor"] in others
    ]


def _timed(results: list | dict) -> list[dict]:
    keys = "model", "mode", "width", "height", "device", "encode_fps", "decode_fps"
    rows = results if isinstance(results, list) else [results]
    return [{key: row[key] for key in keys} for row in rows]


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table as GitHub shows it."""
    gains = any(row["bd_rates"] for row in rows)
    sizes = sorted({(s["width"], s["height"]) for row in rows for s in row["speeds"]})
    heads = [*HEADS, *(["BD-rate against"] if gains else [])]
    heads += [f"fps at {width}x{height}" for width, height in sizes]
    lines = [heads, ["---", "---", "---", *["---:"] * (len(heads) - 3)]]
    for row in rows:
        first = row["codec"] not in {other["codec"] for other in rows[: rows.index(row)]}
        what = f"`{row['codec']}`: {row['summary']}" if first else ""
        size = f"**{row['size']}**" if row["shipped"] else row["size"]
        cost = " / ".join(f"{row[f'{side}_kmac_per_pixel']:.0f}" for side in ("encode", "decode"))
        cells = [what, size, row["delay"], f"{row['parameters'] / 1e6:.1f} M", cost]
        if gains:
            cells.append(_listed(row["bd_rates"], _gain))
        for place in sizes:
            found = [s for s in row["speeds"] if (s["width"], s["height"]) == place]
            cells.append(_listed(found, _fps))
        lines.append(cells)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"


def _gain(row: dict) -> str:
    return f"{row['anchor']} {row['mean_percent']:+.0f} %"


def _fps(row: dict) -> str:
    both = row["encode_fps"], row["decode_fps"]
    return " / ".join(f"{fps:.0f}" if fps >= 10 else f"{fps:#.2g}" for fps in both)


def _listed(found: list[dict], show) -> str:
    """By mode, where a model knows several."""
    return ", ".join(f"{row['mode'] or ''} {show(row)}".strip() for row in found)


def write(rows: list[dict[str, Any]], path: str) -> None:
    """Puts the table into a text between the lines `BEGIN` and `END`.

    Raises:
      NvcError: these are not in it.
    """
    text = Path(path).read_text()
    before, begin, rest = text.partition(BEGIN + "\n")
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise NvcError(f"{path}: has no place for the table, the lines {BEGIN} and {END}")
    Path(path).write_text(before + begin + "\n" + markdown(rows) + "\n" + end + after)
