"""Encodes a clip, decodes a stream: schedule x model x coder x container.

What happens inside a unit: `nvc_jax.unit_program`. What becomes of damage: `nvc_jax.conceal`.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import NamedTuple

import numpy as np

from nvc_jax import schedule as schedules
from nvc_jax.bitstream import AccessPoint, Header, Packet, Stream
from nvc_jax.entropy import coder
from nvc_jax.entropy.calibration import CALIBRATED, EXACT, FLOAT
from nvc_jax.errors import NvcError, OtherTables, StreamError, WeightsMismatch
from nvc_jax.metrics import psnr_611
from nvc_jax.models import registry
from nvc_jax.models.released import Released
from nvc_jax.nn.motion import is_alone
from nvc_jax.quality import MAX_QP, d_yuv, lambda_of_qp
from nvc_jax.schedule import AUTO
from nvc_jax.unit_program import (
    CodedUnit,
    UnitCodec,
    decode_unit,
    encode_unit,
    symbols_crc,
    with_motion,
)
from nvc_jax.video import Planes, VideoInfo

OPEN_END = 2**63  # of frames that are wanted: however many come


class Trial(NamedTuple):
    """A group of frames coded in one of several modes.

    Attributes:
      bytes: of all its packets' payloads.
      psnr: 6:1:1, mean over its frames, dB.
      cost: bits per pixel of one frame, plus the distortion times lambda of the qp.
    """

    bytes: int
    psnr: float
    cost: float


class Choice(NamedTuple):
    """How the frames `first` to `last` came out in every mode; the cheapest was chosen."""

    first: int
    last: int
    trials: dict[str, Trial]


class EncodedUnit(NamedTuple):
    """What `encode` yields per unit.

    Attributes:
      packet: for the container.
      pictures: the originals.
      recons: the decoder's pictures; None unless rendered, which units that a later one needs the
        picture of always are.
      plan: what the schedule says of the unit.
      coded: what the program left; without references and scales where modes were tried.
      ideal_bits: code length of the symbols under the integer tables.
      choice: of the mode of the group that the unit begins, if the encoder had one.
    """

    packet: Packet
    pictures: list[Planes]
    recons: list[Planes] | None
    plan: schedules.Unit
    coded: CodedUnit
    ideal_bits: float
    choice: Choice | None = None


def modes(model: Released) -> dict[str, str]:
    """Name -> coding order, of codecs that know several."""
    own = registry.modes(model.module)
    return own and own | {AUTO: "mixed"}


def schedule_for(
    model: Released,
    intra_period: int | None = None,
    gop: int | None = None,
    closed: bool = False,
    mode: str | None = None,
) -> schedules.Schedule:
    """The coding order of a model.

    Args:
      intra_period: distance of frames at which decoding can start; 0 for the first frame only. By
        default that, and for B-frames the group's size.
      gop, closed: of groups of B-frames, see `schedule.hierarchical`; by default 32 frames, or the
        largest number below that divides the intra period.
      mode: of a codec that knows several; AUTO for groups that differ.

    Raises:
      NvcError: there is no such order, or the model does not code in groups.
    """
    if mode is not None and mode not in modes(model):
        there = ", ".join(modes(model)) or "the one that it was made for"
        raise NvcError(f"'{model.name}' has no mode '{mode}'; there is: {there}")
    name = modes(model)[mode] if mode else model.module.schedule
    if name == "mixed":
        given = {frames for frames in (gop, intra_period) if frames is not None}
        if closed or len(given) > 1:
            raise NvcError(
                f"the mode '{AUTO}' has an intra frame at the end of every group, to which the "
                "next group refers: its intra period is its --gop, and no group is closed"
            )
        gop = min(given, default=32)
        if not 2 <= gop <= 64:
            raise NvcError(f"the mode '{AUTO}' codes groups of 2 to 64 frames, not {gop}")
        return schedules.mixed(gop)
    if name == "hierarchical":
        if gop is None:
            fitting = (n for n in range(32, 1, -1) if not (intra_period or 0) % n)
            gop = next(fitting, 32)
        return schedules.hierarchical(gop, intra_period, closed)
    if gop is not None or closed:
        which = f"the mode '{mode}'" if mode else f"'{model.name}'"
        raise NvcError(f"{which} has no B-frames, so its groups cannot be chosen")
    if name == "all_intra":
        if (intra_period or 0) < 0:
            raise NvcError(f"intra period {intra_period}: give a number of frames")
        return schedules.all_intra()  # decoding can start at every frame, so also at these
    return getattr(schedules, name)(intra_period or 0)


def make_header(codec: UnitCodec, info: VideoInfo, schedule: schedules.Schedule) -> Header:
    """Header of a stream that `codec` writes, for pictures of `info`."""
    c = info.colour
    return Header(
        model=codec.model.name,
        fingerprint=codec.model.fingerprint,
        width=info.width,
        height=info.height,
        fps=info.fps,
        schedule=schedule,
        colour=(c.primaries, c.transfer, c.matrix, c.full_range),
        entropy_mode=codec.entropy_mode,
        margin_exponents=codec.margin_exponents,
    )


def encode(
    codec: UnitCodec,
    pictures: Iterable[Planes],
    qp: int,
    schedule: schedules.Schedule,
    render: bool = False,
    layer_qp: Sequence[int] = (),
    mode_of: Callable[[int], str] | None = None,
) -> Iterator[EncodedUnit]:
    """Encodes pictures as they come, one group of the schedule in memory at a time.

    Args:
      layer_qp: added to the qp by layer of the hierarchy, lowest first; the last one counts for all
        above, where the intra frames are. What leaves the range of qps is set to its end. By
        default those of the codec.
      mode_of: for "mixed" orders, the mode of the group that begins with a frame. By default all
        are tried, and the one that costs least is chosen.

    Raises:
      NvcError: qp out of range, layers where there are none, or `mode_of` says no mode.
    """
    layered = schedules.in_layers(schedule)
    if layer_qp and not layered:
        raise NvcError(f"schedule {schedule.name} has no layers whose qp could differ")
    if not 0 <= qp <= MAX_QP:
        raise NvcError(f"qp {qp} is out of range; give 0 (smallest file) to {MAX_QP} (best)")
    if layered:
        layer_qp = layer_qp or registry.entry(codec.model.codec).layer_qp
    pictures = iter(pictures)
    slots, frame, number = {}, 0, 0
    while group := list(islice(pictures, schedules.group_size(schedule, frame))):
        code = functools.partial(
            _encode_group, codec, group, frame, number, qp=qp, schedule=schedule, layer_qp=layer_qp
        )
        if schedule.name != "mixed":
            coded = code(slots, render=render)
        elif not frame:  # alone in its group: the same in all modes
            coded = code(slots, render=render, mode=schedules.MODES[0])
        elif mode_of:
            mode = mode_of(frame)
            if mode not in schedules.MODES:
                raise NvcError(f"mode_of: {mode!r} is no mode of the group from frame {frame} on")
            coded = code(slots, render=render, mode=mode)
        else:
            entry = registry.entry(codec.model.codec)
            weight = entry.frame_weights[0] * lambda_of_qp(qp, entry.content)
            coded = _best_of_all_modes(code, slots, weight)
        for unit in coded:
            number += 1
            yield unit
        frame += len(group)


def _encode_group(
    codec: UnitCodec,
    group: list[Planes],
    first_frame: int,
    first_unit: int,
    slots: dict[int, tuple],
    *,
    qp: int,
    schedule: schedules.Schedule,
    layer_qp: Sequence[int],
    render: bool,
    mode: str | None = None,
) -> Iterator[EncodedUnit]:
    """Units of one group; `slots` gets what they leave."""
    whole = len(group) == schedules.group_size(schedule, first_frame)
    short = None if whole or not schedules.in_layers(schedule) else len(group)
    planned = schedules.units(schedule, first_frame, len(group), first_unit, mode)
    for number, unit in enumerate(planned, first_unit):
        originals = [group[f - first_frame] for f in unit.frames]
        refs = references(unit, slots)
        of_unit = functools.partial(_qps, codec, unit, qp, layer_qp)
        unit = with_motion(codec, originals, refs, of_unit(not refs), unit)
        qps = of_unit(not refs or _is_cut(codec, refs, unit))
        kept = number not in unit.release
        payload, coded = encode_unit(codec, originals, refs, qps, render, unit, kept)
        slots[number] = coded.refs
        for slot in unit.release:
            del slots[slot]
        steps = list(zip(coded.symbols, coded.indices, strict=True))
        packet = Packet(unit.frames, qps, payload, symbols_crc(coded.symbols, coded.motion))
        if number == first_unit:
            packet = replace(packet, random_access=not unit.refs, group=short, mode=mode)
        bits = coder.code_length_bits(steps, codec.tables) + 8 * coded.motion_bytes
        yield EncodedUnit(packet, originals, coded.pictures, unit, coded, bits)


def _is_cut(codec: UnitCodec, refs: tuple, unit: schedules.Unit) -> bool:
    """Whether nothing of the unit is predicted, though what it refers to was."""
    if not codec.search:
        return False
    return is_alone(unit.motion) and not is_alone(refs[0].field)


def _qps(
    codec: UnitCodec, unit: schedules.Unit, qp: int, layer_qp: Sequence[int], alone: bool
) -> tuple[int, ...]:
    """Of a unit's frames; `alone`: they are predicted from nothing."""
    entry, last_row = registry.entry(codec.model.codec), codec.model.module.qp_rows - 1
    offsets = unit.qp_offset
    if entry.qp_offsets and not unit.layered:
        offsets = entry.offsets(unit.frames, alone)
    elif layer_qp and unit.layered:
        offsets = [o + schedules.of_layer(layer_qp, unit) for o in offsets]
    return tuple(min(max(qp + o, 0), last_row) for o in offsets)


def _best_of_all_modes(code: Callable, slots: dict[int, tuple], weight: float) -> list[EncodedUnit]:
    """A group in the mode that costs least; `slots` gets what it leaves.

    weight: of the distortion.
    """
    trials, best = {}, None
    for mode in schedules.MODES:
        left = dict(slots)
        # What later units refer to is in `left`: two groups of it would fill memories.
        coded = [
            unit._replace(coded=unit.coded._replace(refs=(), scales=[]))
            for unit in code(left, render=True, mode=mode)
        ]
        trials[mode] = _trial(coded, weight)
        if best is None or trials[mode].cost < best[0].cost:
            best = trials[mode], coded, left
    _, (first, *rest), left = best
    slots.clear()
    slots |= left
    frames = [frame for unit in (first, *rest) for frame in unit.packet.frames]
    return [first._replace(choice=Choice(min(frames), max(frames), trials)), *rest]


def _trial(coded: list[EncodedUnit], weight: float) -> Trial:
    """Bits, and what planes are off as training counts it (`D_yuv`), of all frames alike."""
    pairs = [pair for unit in coded for pair in zip(unit.pictures, unit.recons, strict=True)]
    errors = np.array([list(map(_mean_square, *pair)) for pair in pairs])  # [frames, planes], 0..1
    distortion = d_yuv(errors).mean()
    psnr = np.mean([psnr_611(*pair) for pair in pairs])
    payload = sum(len(unit.packet.payload) for unit in coded)
    bpp = 8 * payload / (len(pairs) * pairs[0][0].y.size)
    return Trial(payload, float(psnr), float(bpp + weight * distortion))


def _mean_square(a: np.ndarray, b: np.ndarray) -> float:
    return np.mean((a.astype(np.float32) - b) ** 2) / 255**2


def references(unit: schedules.Unit, slots: dict[int, tuple]) -> tuple:
    """What a unit refers to; slots: unit number -> what it left."""
    return tuple(ref for slot in unit.refs for ref in slots[slot])


def check_model(header: Header, model: Released) -> None:
    """Makes sure that a stream was written with exactly this model.

    Raises:
      WeightsMismatch: it was not.
      StreamError: its frames come in an order that this model cannot have coded.
    """
    if header.fingerprint != model.fingerprint:
        raise WeightsMismatch(
            f"the stream was written with model '{header.model}', weights "
            f"{header.fingerprint.hex()}; the model at hand is '{model.name}', weights "
            f"{model.fingerprint.hex()}. Give the file of the right weights with --model."
        )
    own = model.module.schedule
    known = modes(model).values() or (own, own.removesuffix("_refresh"))
    if header.schedule.name.removesuffix("_closed") not in known:
        raise StreamError(
            f"the stream's schedule '{header.schedule.name}' is not that of its model "
            f"'{header.model}'; the header is damaged"
        )


def decode(
    codec: UnitCodec,
    stream: Stream,
    start: AccessPoint | None = None,
    wanted: range | None = None,
) -> Iterator[tuple[Packet, list[Planes]]]:
    """Decodes a stream unit by unit; frames come in display order.

    Args:
      start: where to begin, which `stream.access_point(frame)` finds; by default the first unit.
      wanted: frames to hand out, by default all from there. Others are decoded only if these refer
        to them.

    Raises:
      StreamError: the file is damaged or cut off (after the last intact unit), or a unit's symbols
        do not have the checksum that the encoder stored.
    """
    first_frame = start.frame if start else 0
    wanted = range(first_frame, OPEN_END) if wanted is None else wanted
    packets = stream.packets(start)
    found = outcomes(codec, stream.header.schedule, packets, first_frame, wanted, {})
    return in_display_order(_unless_lost(found), wanted)


class Lost(NamedTuple):
    """Frames in a row that one unit's failure costs.

    Attributes:
      unit: number of the unit that cannot be decoded or read.
      units: how many of the units with these frames are lost, those included that refer to it.
      frame, frames: display index of the first, and how many they are.
      reason: what is wrong with the unit, for people.

    A file that was cut off does not tell how much is missing: `units` and `frames` are then None.
    """

    unit: int
    units: int | None
    frame: int
    frames: int | None
    reason: str


def decode_part(
    codec: UnitCodec, stream: Stream, start: AccessPoint | None, wanted: range
) -> Iterator[tuple[Packet | Lost, Iterable[Planes]]]:
    """As `decode`; what cannot be decoded comes as one `Lost` at the end, without pictures."""
    frame = wanted.start
    try:
        for packet, pictures in decode(codec, stream, start, wanted):
            yield packet, pictures
            frame += len(pictures)
    except StreamError as e:
        yield Lost(start.unit if start else 0, None, frame, wanted.stop - frame, str(e)), ()


class Outcome(NamedTuple):
    """What became of a unit. `frames`: display indices of those that are wanted."""

    number: int
    frames: list[int]
    what: Packet | Lost
    pictures: list[Planes]


def outcomes(
    codec: UnitCodec,
    order: schedules.Schedule,
    numbered: Iterable[tuple[int, Packet]],
    first_frame: int,
    wanted: range,
    slots: dict[int, tuple | Lost],
    missing: Lost | None = None,
) -> Iterator[Outcome]:
    """Decodes units in a row, in coding order; the first of them must read no reference.

    Units that cannot be decoded, and all that refer to them, come as `Lost`, of which `unit` and
    `reason` are those of the unit to blame.

    Args:
      first_frame: of the first unit. Where it stands inside a group, the group's frames before it
        refer to what came earlier; they are usually not wanted.
      slots: what is left of earlier units; gets what these leave.
      missing: what to blame if a slot is empty.

    Raises:
      StreamError: the packets themselves cannot be read, or not in the schedule's order, or a slot
        is empty and nothing to blame.
    """
    for unit, number, packet, needed in _planned(order, numbered, first_frame, wanted):
        if needed:
            found = [slots.get(slot, missing) for slot in unit.refs]
            if any(left is None for left in found):
                raise StreamError(
                    f"{_place(number, packet)} refers to a unit before the point where decoding "
                    "began; decode the whole file"
                )
            frames = [frame for frame in unit.frames if frame in wanted]
            lost = next((left for left in found if isinstance(left, Lost)), None)
            if lost is None:
                try:
                    refs = references(unit, slots)
                    decoded = _decode_packet(codec, number, packet, unit, refs)
                    slots[number] = decoded.refs
                except StreamError as e:
                    lost = Lost(number, 1, unit.frames[0], len(unit.frames), str(e))
            if lost is None:
                shown = zip(unit.frames, decoded.pictures, strict=True)
                yield Outcome(number, frames, packet, [p for f, p in shown if f in wanted])
            else:
                slots[number] = lost
                lost = lost._replace(frame=unit.frames[0], frames=len(unit.frames))
                yield Outcome(number, frames, lost, [])
        for slot in unit.release:
            slots.pop(slot, None)  # not there if it was not needed


def _unless_lost(outcomes: Iterable[Outcome]) -> Iterator[Outcome]:
    """Raises StreamError with the reason where a unit was lost."""
    for outcome in outcomes:
        if isinstance(outcome.what, Lost):
            raise StreamError(outcome.what.reason)
        yield outcome


def in_display_order(
    outcomes: Iterable[Outcome], wanted: range, fill_gaps: bool = False
) -> Iterator[tuple[Packet | Lost, list[Planes]]]:
    """Hands units out when all frames before theirs were, up to the last that is wanted.

    Args:
      fill_gaps: if the outcomes end with an error, all that were waiting are handed out before it
        is raised, and what they were waiting for comes as `Lost`.

    Raises:
      StreamError: a frame is missing.
    """
    waiting: dict[int, Outcome] = {}
    shown, number = wanted.start, -1  # every frame that is wanted below was handed out
    try:
        for outcome in outcomes:
            number = outcome.number
            if outcome.frames:
                waiting[outcome.frames[0]] = outcome
            while shown in waiting:
                done = waiting.pop(shown)
                yield done.what, done.pictures
                shown += len(done.frames)
            if shown >= wanted.stop:
                return
        if waiting or wanted.stop < OPEN_END:
            raise StreamError(f"frame {shown} is missing; encode the video again")
    except StreamError as e:
        for frame, done in sorted(waiting.items()) if fill_gaps else ():
            if gap := frame - shown:  # in orders that leave gaps, a unit has one frame
                yield Lost(number + 1, gap, shown, gap, str(e)), []
            yield done.what, done.pictures
            shown = frame + len(done.frames)
        raise


def _decode_packet(
    codec: UnitCodec, number: int, packet: Packet, unit: schedules.Unit, refs: tuple
) -> CodedUnit:
    """Decodes a unit and checks its symbols. Raises StreamError."""
    if packet.damage:
        raise StreamError(packet.damage)
    if max(packet.qps) >= codec.model.module.qp_rows:
        raise StreamError(
            f"unit {number} has a qp of {max(packet.qps)}, beyond the model; encode the video again"
        )
    try:
        decoded = decode_unit(codec, packet.payload, refs, packet.qps, unit)
    except OtherTables:
        reason = "its coded data does not end with its last symbol"
        raise _mismatch(codec.entropy_mode, number, packet, reason) from None
    except StreamError as e:
        raise StreamError(f"{_place(number, packet)} cannot be decoded: {e}") from None
    if symbols_crc(decoded.symbols, decoded.motion) != packet.symbols_crc:
        raise _mismatch(codec.entropy_mode, number, packet, "the checksum of its symbols is wrong")
    return decoded


def _planned(
    schedule: schedules.Schedule,
    numbered: Iterable[tuple[int, Packet]],
    first_frame: int,
    wanted: range,
) -> Iterator[tuple[schedules.Unit, int, Packet, bool]]:
    """Units of a run with their numbers, packets, and whether they lead to frames that are wanted.

    Raises:
      StreamError: a packet is not what the schedule has in its place.
    """
    group_first = schedules.group_start(schedule, first_frame)
    planned: list[schedules.Unit] = []
    for number, packet in numbered:
        if not planned:
            size = packet.group or len(packet.frames)
            if schedules.in_layers(schedule):
                size = packet.group or schedules.group_size(schedule, group_first)
            if schedule.name == "mixed" and not packet.mode:
                reason = f"{_place(number, packet)} does not say in which mode its group is coded"
                raise StreamError(packet.damage or f"{reason}; encode the video again")
            try:
                planned = schedules.units(schedule, group_first, size, number, packet.mode)
            except NvcError as e:
                reason = f"the stream cannot be decoded in its order: {e}"
                raise StreamError(packet.damage or reason) from None
            needed = _needed(planned, number, wanted)
            if wanted.stop > group_first + size:
                needed |= {number}  # later groups refer to the frame that begins this one
            group_first, first_unit = group_first + size, number
        unit = planned[number - first_unit]
        starts = number == first_unit and not unit.refs
        if unit.frames != packet.frames or packet.random_access != starts:
            raise StreamError(
                packet.damage
                or f"unit {number} does not follow the schedule in the header; encode the video "
                "again"
            )
        yield unit, number, packet, number in needed
        if number - first_unit + 1 == len(planned):
            planned = []


def _needed(planned: list[schedules.Unit], first_unit: int, wanted: range) -> set[int]:
    """Numbers of the units of a group that hold frames that are wanted, or that those refer to."""
    needed: set[int] = set()
    for number, unit in reversed(list(enumerate(planned, first_unit))):
        if number in needed or any(frame in wanted for frame in unit.frames):
            needed |= {number, *unit.refs}
    return needed


# What a wrong symbol in a file that is intact means, and what helps.
_CAUSES = {
    FLOAT: "arithmetic here differs from the encoder's, and the file was written without "
    "protection against that. Decode it on the kind of machine, and with the version of JAX, that "
    "wrote it, or encode the video again without `--calibration off`.",
    CALIBRATED: "arithmetic here differs from the encoder's by more than the file's calibration "
    "margin. Decode it on the kind of machine, and with the version of JAX, that wrote it, or "
    "encode the video again with a larger `--calibration` (`nvc calibrate` measures which).",
    EXACT: "its scales do not depend on the machine, so a processor or its memory, here or where "
    "the file was written, made an error. Decode it again, on another machine if possible.",
}


def _mismatch(mode: int, number: int, packet: Packet, what: str) -> StreamError:
    return StreamError(
        f"{_place(number, packet)} does not decode to what was encoded: {what}. The file is "
        f"intact, but {_CAUSES[mode]}"
    )


def _place(number: int, packet: Packet) -> str:
    return f"unit {number} (frames {', '.join(map(str, packet.frames))})"
