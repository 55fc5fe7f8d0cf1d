"""What another machine computes differently: recorded on one machine, compared on another.

A record holds, for every unit of a clip, the symbols and the scales that one machine found. Another
machine goes through the same symbols (so that its references differ from the first one's only as
they would in decoding) and compares levels: the largest difference is what a calibration margin has
to cover (section "choosing the margin" of docs/cross_platform.md).
"""

import json
import math
import os
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from nvc_jax import codec as coding
from nvc_jax import schedule as schedules
from nvc_jax.entropy import calibration
from nvc_jax.entropy.calibration import LARGEST_EXPONENT, LEAST_EXPONENT
from nvc_jax.errors import NvcError, WeightsMismatch
from nvc_jax.files import replacing, writing
from nvc_jax.machine import cores, processor
from nvc_jax.unit_program import CodedUnit, UnitCodec, replay_unit
from nvc_jax.video import Planes

FORMAT = "nvc-record-4"
SAFETY = 4  # margins are at least this many times the largest difference seen


class Unit(NamedTuple):
    """One unit of a record.

    Attributes:
      qps: of its frames.
      reliability: see `nvc_jax.schedule.Unit`.
      symbols: int16 [total], all steps in coding order.
      scales: float32 [elements], of all steps that have them.
      motion: of codecs that search it, see `nvc_jax.schedule.Unit`; else None.
    """

    qps: tuple[int, ...]
    reliability: tuple[int, ...]
    symbols: np.ndarray
    scales: np.ndarray
    motion: np.ndarray | None = None


class Record(NamedTuple):
    """What one machine found in a clip.

    Attributes:
      fingerprint: of the model.
      width, height: of the pictures; frames: their number.
      schedule: the coding order.
      machine: words for people.
      units: in coding order.
    """

    fingerprint: bytes
    width: int
    height: int
    frames: int
    schedule: schedules.Schedule
    machine: str
    units: tuple[Unit, ...]


class Difference(NamedTuple):
    """How a machine's scale levels differ from a record's, for one level of the hierarchy.

    Attributes:
      units: number of units compared.
      largest: largest difference, in scale levels.
      changed_units: units in which at least one unprotected element would get another table.
      exponent: recommended margin 2^-exponent; None if even the largest margin is too small.
    """

    units: int
    largest: float
    changed_units: int
    exponent: int | None


def real_levels(codec: UnitCodec, scales: np.ndarray, skip_below: int) -> np.ndarray:
    """Real-valued levels of scales, float64; levels below `skip_below` are not coded.

    Clamped half a level beyond those that tables exist and are used for: where logarithms of scales
    near zero differ much, and where scales are larger than any table's, nothing matters.
    """
    spec = codec.model.spec
    first, step = calibration.ladder(spec.scale_boundaries)
    with np.errstate(divide="ignore", invalid="ignore"):
        levels = (np.log(np.maximum(scales.astype(np.float64), 0)) - first) / step + 1
    lowest = skip_below - 0.5
    return np.clip(np.nan_to_num(levels, nan=lowest), lowest, len(spec.scale_boundaries) + 0.5)


def tables_of(codec: UnitCodec, scales: np.ndarray, skip_below: int) -> np.ndarray:
    """Levels that an unprotected file would use; all that are skipped count as one."""
    levels = np.searchsorted(codec.model.spec.scale_boundaries, scales, side="right")
    return np.maximum(levels, skip_below - 1)


def _skip_below(codec: UnitCodec, unit: schedules.Unit) -> int:
    """First level that is coded in a unit. All latents of one are of one family."""
    (family,) = {step.family for step in codec.steps_of(unit.refs) if step.family}
    return codec.model.spec.families[family].skip_below


def make_record(
    codec: UnitCodec, pictures: Iterable[Planes], qp: int, schedule: schedules.Schedule
) -> Record:
    """Encodes pictures and keeps what the encoder found. The codec must not be in exact mode."""
    units, frames = [], 0
    for unit in coding.encode(codec, pictures, qp, schedule):
        packet, found = unit.packet, unit.coded
        symbols = np.concatenate(found.symbols)
        units.append(Unit(packet.qps, found.reliability, symbols, _scales(found), found.motion))
        frames += len(packet.frames)
    if not units:
        raise NvcError("nothing to record: the clip has no frames")
    return Record(
        codec.model.fingerprint, codec.width, codec.height, frames, schedule, machine(),
        tuple(units),
    )  # fmt: skip


def _scales(unit: CodedUnit) -> np.ndarray:
    return np.concatenate(jax.device_get(unit.scales))


def machine() -> str:
    """What this process computes with, in words."""
    device = jax.devices()[0]
    name = device.device_kind
    if device.platform == "cpu":
        name = f"{processor()}, {cores()} cores"
    words = [f"{device.platform} {name}", f"JAX {jax.__version__}"]
    if flags := os.environ.get("XLA_FLAGS"):
        words.append(flags)
    return ", ".join(words)


def replay(codec: UnitCodec, record: Record) -> Iterator[tuple[schedules.Unit, CodedUnit]]:
    """Goes through a record's symbols on this machine.

    Raises:
      WeightsMismatch: the record is of another model.
    """
    if record.fingerprint != codec.model.fingerprint:
        raise WeightsMismatch(
            f"the record is of weights {record.fingerprint.hex()}, the model at hand "
            f"('{codec.model.name}') has {codec.model.fingerprint.hex()}"
        )
    slots = {}
    plan = schedules.plan(record.schedule, record.frames)
    for number, (unit, recorded) in enumerate(zip(plan, record.units, strict=True)):
        refs = coding.references(unit, slots)
        known = unit._replace(reliability=recorded.reliability, motion=recorded.motion)
        coded = replay_unit(codec, recorded.symbols, refs, recorded.qps, known)
        slots[number] = coded.refs
        for slot in unit.release:
            del slots[slot]
        yield unit, coded


def compare(codec: UnitCodec, record: Record) -> dict[int, Difference]:
    """Differences between this machine and a record's, by layer of the schedule's hierarchy."""
    found: dict[int, list[tuple[float, bool]]] = {}
    for (unit, coded), recorded in zip(replay(codec, record), record.units, strict=True):
        both = _scales(coded), recorded.scales
        skip_below = _skip_below(codec, unit)
        ours, theirs = (real_levels(codec, scales, skip_below) for scales in both)
        tables = [tables_of(codec, scales, skip_below) for scales in both]
        largest = float(np.abs(ours - theirs).max())
        found.setdefault(unit.layer, []).append((largest, bool((tables[0] != tables[1]).any())))
    result = {}
    for layer, pairs in sorted(found.items()):
        largest = max(pair[0] for pair in pairs)
        changed = sum(pair[1] for pair in pairs)
        result[layer] = Difference(len(pairs), largest, changed, recommended_exponent(largest))
    return result


def recommended_exponent(largest: float) -> int | None:
    """The exponent of the least margin that is four times `largest`; None if there is none."""
    if largest == 0:
        return LARGEST_EXPONENT
    exponent = math.floor(-math.log2(SAFETY * largest))
    return min(exponent, LARGEST_EXPONENT) if exponent >= LEAST_EXPONENT else None


def save(path: str | Path, record: Record) -> None:
    """Writes a record as .npz. Raises NvcError if the file cannot be written."""
    facts = {
        "format": FORMAT,
        "fingerprint": record.fingerprint.hex(),
        "width": record.width,
        "height": record.height,
        "frames": record.frames,
        "schedule": list(record.schedule.__dict__.values()),
        "machine": record.machine,
        "qps": [unit.qps for unit in record.units],
        "reliability": [unit.reliability for unit in record.units],
    }
    arrays = {"facts": np.array(json.dumps(facts))}
    for number, unit in enumerate(record.units):
        arrays[f"symbols{number}"], arrays[f"scales{number}"] = unit.symbols, unit.scales
        if unit.motion is not None:
            arrays[f"motion{number}"] = unit.motion
    with replacing(path) as hidden, writing(path), open(hidden, "wb") as file:
        np.savez_compressed(file, **arrays)


def load(path: str | Path) -> Record:
    """Reads what `save` wrote. Raises NvcError if it is something else, or damaged."""
    try:
        with np.load(path) as arrays:
            facts = json.loads(str(arrays["facts"]))
            if facts["format"] != FORMAT:
                raise ValueError(f"format {facts['format']}, not {FORMAT}")
            units = tuple(
                Unit(
                    tuple(qps),
                    tuple(trusted),
                    arrays[f"symbols{n}"],
                    arrays[f"scales{n}"],
                    arrays.get(f"motion{n}"),
                )
                for n, (qps, trusted) in enumerate(
                    zip(facts["qps"], facts["reliability"], strict=True)
                )
            )
        return Record(
            bytes.fromhex(facts["fingerprint"]), facts["width"], facts["height"], facts["frames"],
            schedules.Schedule(*facts["schedule"]), facts["machine"], units,
        )  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as e:
        raise NvcError(f"{path}: cannot be read as a record of `nvc calibrate` ({e})") from None
