"""Coding order as plain data: which frames are coded together, from which references.

A *unit* is what one call of a codec codes: one frame, or the two frames of a pair. Units are
numbered from 0 in coding order, and unit k leaves its decoded state in slot k, so a slot is named
by the unit that filled it. A unit says which slots it reads and which are dropped afterwards
(itself among them, when nobody will read it); encoder, decoder, training clips and random access
all follow the same list.

An encoder does not know how long its clip is. It therefore plans one *group* of frames at a time
with `units`; only the last group of a clip may be shorter than `group_size` says. Decoding can
start at any unit without references: no unit of a later group reads or drops an older slot.

Hierarchical orders code the end of a group first and then, depth first, the frame in the middle of
every gap from the frames at both its ends, as BRHVC (arXiv 2511.08938) and classical codecs do. The
rules for sizes that are no power of two, for tails and for closed groups are ours.

The quality offsets of the low-delay orders follow DCVC-RT (arXiv 2502.20762, released code): eight
frames with offsets 0, 8, 0, 4, 0, 4, 0, 4 added to the qp of the clip. So does the refresh of
"low_delay_refresh": codecs that see no blank references in training pile up errors in the features
that they hand on, and so begin anew from the picture every 64 frames.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from nvc_jax.errors import NvcError

QP_OFFSETS = (0, 8, 0, 4, 0, 4, 0, 4)
REFRESH_PERIOD = 64  # frames
# Random access, low delay, all intra: what codecs that know several orders call them. Groups of
# "mixed" store their place here.
MODES = ("ra", "ld", "ai")
AUTO = "auto"  # whichever of them is best for a group: "mixed"


class Unit(NamedTuple):
    """Frames coded together, and what their codec reads and leaves behind.

    `frames` holds display indices of real frames only: the last unit of an odd clip coded in pairs
    has one frame, and the codec repeats the picture. `qp_offset` has one entry per frame and is
    added to the qp of the clip; `layer` is that of a hierarchy, 0 for a flat order, `ratio` a
    B-frame's place between its two references: its distance from the first as a share of theirs.
    `distances`: how many frames behind the unit's first one each reference is displayed; negative
    before it. `reliability`: how far each can be trusted, in the codec's levels, for codecs that
    have them; the encoder finds it for every unit, as it does `motion`, int16 [blocks down, blocks
    across, 3], see `nvc_jax.nn.motion`. `layered`: its quality follows its layer.
    """

    frames: tuple[int, ...]
    refs: tuple[int, ...]
    layer: int
    qp_offset: tuple[int, ...]
    release: tuple[int, ...]
    ratio: float = 0.5
    distances: tuple[int, ...] = ()
    reliability: tuple[int, ...] = ()
    motion: Any = None
    layered: bool = False
    picture_only: bool = False  # reads the picture of its reference, not its feature
    shown: bool = False  # a later unit reads its picture: also the encoder has to make it


@dataclass(frozen=True)
class Schedule:
    """A named coding order; a stream's header stores exactly these three values.

    Attributes:
        name: one of `SCHEDULES`.
        gop: frames planned together, see `group_size`.
        intra_period: every so many frames a unit reads no reference, so that decoding can start
            there; 0 for the first frame only. A multiple of `gop`.

    Raises:
        NvcError: for an unknown name, or a `gop` or `intra_period` that the order cannot have.
    """

    name: str
    gop: int
    intra_period: int = 0

    def __post_init__(self):
        if self.name not in SCHEDULES:
            raise NvcError(f"unknown schedule {self.name!r}; known: {', '.join(SCHEDULES)}")
        gop, sizes = self.gop, SCHEDULES[self.name][0]
        if gop not in sizes:
            allowed = f"{sizes[0]} to {sizes[-1]}" if len(sizes) > 1 else f"{sizes[0]}"
            raise NvcError(f"schedule {self.name} codes groups of {allowed} frames, not {gop}")
        if self.intra_period < 0:
            raise NvcError(
                f"intra period {self.intra_period}: give a number of frames, or 0 to start at the "
                "first frame only"
            )
        if self.intra_period % gop:
            raise NvcError(
                f"intra period {self.intra_period}: schedule {self.name} codes {gop} frames at a "
                f"time, so decoding can only start at every {gop}th frame; give a multiple of "
                f"{gop}, or 0 to start at the first frame only"
            )
        if self.name in ("hierarchical_closed", "mixed") and self.intra_period != gop:
            raise NvcError(
                f"intra period {self.intra_period}: groups of {self.name} all have an intra frame; "
                f"give {gop}"
            )


def all_intra() -> Schedule:
    """Every frame alone and without references."""
    return Schedule("all_intra", 1)


def two_frame(intra_period: int = 0) -> Schedule:
    """Pairs (0, 1), (2, 3), ..., each predicted from the pair before it (UI2C, arXiv 2510.14431).

    Raises:
        NvcError: if `intra_period` (in frames) is not a multiple of two.
    """
    return Schedule("two_frame", 2, intra_period)


def low_delay(intra_period: int = 0) -> Schedule:
    """Single frames, each predicted from the one before it."""
    return Schedule("low_delay", 1, intra_period)


def low_delay_refresh(intra_period: int = 0) -> Schedule:
    """Likewise, every 64th of them from nothing but the picture before it."""
    return Schedule("low_delay_refresh", 1, intra_period)


def low_delay_long(intra_period: int = 0) -> Schedule:
    """Likewise, from the one before it and the last one that was coded best before that."""
    return Schedule("low_delay_long", 1, intra_period)


def hierarchical(gop: int = 32, intra_period: int | None = None, closed: bool = False) -> Schedule:
    """B-frames between anchors that are `gop` frames apart.

    Args:
        intra_period: distance of the anchors that are intra frames, by default all of them; 0 for
            the first only. The others are predicted from the anchor before.
        closed: groups do not reach into each other: each begins with an intra frame and ends before
            the next one's, for a price.

    Raises:
        NvcError: gop is not 2 to 64, or the intra period no multiple of it.
    """
    period = gop if intra_period is None else intra_period
    return Schedule("hierarchical_closed" if closed else "hierarchical", gop, period)


def mixed(gop: int = 32) -> Schedule:
    """Groups between intra frames that are `gop` frames apart, each in a mode of its own.

    All whole groups begin with the intra frame that ends them, so that any can follow any. The
    others come in layers ("ra"), one after the other from the one before and the last of the best
    ("ld"), or without references ("ai").

    Raises:
        NvcError: gop is not 2 to 64.
    """
    return Schedule("mixed", gop, gop)


def in_layers(schedule: Schedule) -> bool:
    """Whether a group has many units, in another order than they are shown."""
    return schedule.name in ("hierarchical", "hierarchical_closed", "mixed")


def _is_open(schedule: Schedule) -> bool:
    """Whether groups refer to the end of the one before."""
    return schedule.name in ("hierarchical", "mixed")


def group_size(schedule: Schedule, first_frame: int) -> int:
    """Frames of the group that begins with `first_frame`, unless the clip ends before.

    Between open groups the anchors belong to the group that they end; so frame 0 is one of its own.
    """
    return 1 if _is_open(schedule) and first_frame == 0 else schedule.gop


def group_start(schedule: Schedule, frame: int) -> int:
    """First frame of the group that `frame` belongs to."""
    if _is_open(schedule):
        return (frame - 1) // schedule.gop * schedule.gop + 1 if frame else 0
    return frame // schedule.gop * schedule.gop


def units(
    schedule: Schedule, first_frame: int, count: int, first_unit: int, mode: str | None = None
) -> list[Unit]:
    """Plans one group: `count` frames from `first_frame` on, as units `first_unit`, +1, ...

    Args:
        schedule: the coding order.
        first_frame: display index of the group's first frame, see `group_start`.
        count: `group_size`, or less when the clip ends inside the group.
        first_unit: number of the group's first unit.
        mode: one of `MODES`, for "mixed" and nothing else; random access if not given.

    Raises:
        NvcError: if no group starts there, it has a wrong count, or it cannot have this mode.
    """
    size = group_size(schedule, first_frame)
    if group_start(schedule, first_frame) != first_frame or not 1 <= count <= size:
        raise NvcError(
            f"schedule {schedule.name} cannot code {count} frames from frame {first_frame} on: its "
            f"groups of {schedule.gop} frames (fewer only at the end) start elsewhere"
        )
    if mode is not None and (schedule.name != "mixed" or mode not in MODES):
        raise NvcError(f"groups of schedule {schedule.name} cannot be coded in the mode {mode!r}")
    if mode in ("ld", "ai") and first_frame:
        return _behind_its_end(schedule, first_frame, count, first_unit, mode)
    return SCHEDULES[schedule.name][1](schedule, first_frame, count, first_unit)


def plan(schedule: Schedule, frame_count: int) -> Iterator[Unit]:
    """The units of a whole clip of `frame_count` frames."""
    unit = frame = 0
    while frame < frame_count:
        count = min(group_size(schedule, frame), frame_count - frame)
        group = units(schedule, frame, count, unit)
        unit, frame = unit + len(group), frame + count
        yield from group


def _all_intra(schedule: Schedule, first_frame: int, count: int, first_unit: int) -> list[Unit]:
    return [Unit((first_frame,), (), 0, (0,), (first_unit,))]


def _since_intra(schedule: Schedule, frame: int) -> int:
    """Frames since the last one without references, in a flat order."""
    return frame % schedule.intra_period if schedule.intra_period else frame


def _in_a_row(schedule: Schedule, first_frame: int, count: int, first_unit: int) -> list[Unit]:
    def starts(frame):
        return _since_intra(schedule, frame) == 0

    frames = tuple(range(first_frame, first_frame + count))
    refs = () if starts(first_frame) else (first_unit - 1,)
    # The unit before a fresh start is read by nobody; dropping it there would fail for a decoder
    # that begins at that start.
    last = (first_unit,) if starts(first_frame + schedule.gop) else ()
    offsets = tuple(QP_OFFSETS[frame % len(QP_OFFSETS)] for frame in frames)
    return [Unit(frames, refs, 0, offsets, refs + last, distances=(-1,) * len(refs))]


def _refreshed(schedule: Schedule, first_frame: int, count: int, first_unit: int) -> list[Unit]:
    def refreshes(frame):
        since = _since_intra(schedule, frame)
        # An intra frame leaves nothing but its picture anyway.
        return since > 1 and since % REFRESH_PERIOD == 1

    (unit,) = _in_a_row(schedule, first_frame, count, first_unit)
    return [unit._replace(picture_only=refreshes(first_frame), shown=refreshes(first_frame + 1))]


def _behind_last_best(since: int) -> tuple[int, ...]:
    """Distances of a low-delay frame's references, `since` frames after the one without any."""
    if since < 2:
        return (-1,) * since
    best = since - 2  # from here back to the last of 0, 1, 9, 17, ...
    best -= (best - 1) % len(QP_OFFSETS) if best else 0
    return -1, best - since


def _long_term(schedule: Schedule, first_frame: int, count: int, first_unit: int) -> list[Unit]:
    def references(frame):
        return [frame + far for far in _behind_last_best(_since_intra(schedule, frame))]

    refs = references(first_frame)
    slots = {frame: first_unit - first_frame + frame for frame in (*refs, first_frame)}
    since = _since_intra(schedule, first_frame)
    return [
        Unit(
            (first_frame,),
            tuple(slots[frame] for frame in refs),
            0,
            (QP_OFFSETS[since % len(QP_OFFSETS)] if refs else max(QP_OFFSETS),),
            tuple(slots[frame] for frame in slots if frame not in references(first_frame + 1)),
            distances=_behind_last_best(since),
        )
    ]


def _anchor_before(
    schedule: Schedule, first_frame: int, first_unit: int
) -> tuple[int, dict[int, int]]:
    """The frame that an open group follows, and its slot: its unit opened its own group."""
    before = first_frame - 1
    return before, {before: first_unit - (schedule.gop if before else 1)}


def _hierarchical(schedule: Schedule, first_frame: int, count: int, first_unit: int) -> list[Unit]:
    if first_frame == 0:
        return [_intra(0, schedule.gop)]
    before, slots = _anchor_before(schedule, first_frame, first_unit)
    last = before + count
    whole = count == schedule.gop
    if whole:
        starts = schedule.intra_period and last % schedule.intra_period == 0
    else:
        # A short tail is predicted, for a long one an intra frame at its end is cheaper.
        starts = schedule.intra_period and 2 * count >= schedule.gop
    planned = []
    if whole or starts:
        anchor = _intra(last, schedule.gop) if starts else predicted(before, before, last)
        planned += [anchor, *_all_between(before, last)]
    else:
        planned += _tail(before, last)
    return _numbered(planned, slots, first_unit, kept=last if whole else None)


def _hierarchical_closed(
    schedule: Schedule, first_frame: int, count: int, first_unit: int
) -> list[Unit]:
    planned = [_intra(first_frame, schedule.gop), *_tail(first_frame, first_frame + count - 1)]
    return _numbered(planned, {}, first_unit, kept=None)


def _behind_its_end(
    schedule: Schedule, first_frame: int, count: int, first_unit: int, mode: str
) -> list[Unit]:
    """A group of "mixed" without layers, behind the intra frame that ends it."""
    before, slots = _anchor_before(schedule, first_frame, first_unit)
    whole = count == schedule.gop

    def flat(since):
        refs, offset = (), 0
        if mode == "ld":
            refs = tuple(before + since + far for far in _behind_last_best(since))
            offset = QP_OFFSETS[since % len(QP_OFFSETS)]
        return Unit((before + since,), refs, 0, (offset,), ())

    planned = [_intra(before + count, schedule.gop)] if whole else []
    planned += [flat(since) for since in range(1, count + (not whole))]
    return _numbered(planned, slots, first_unit, kept=before + count if whole else None)


def _layer(span: int) -> int:
    """Layer of a frame in the middle of a gap: 0 for 2 frames, 1 for 3 or 4, 2 for 5 to 8, ..."""
    return (span - 1).bit_length() - 1


# Units whose `refs` are still display frames: what groups, and paths of training, are made of.


def _intra(frame: int, gop: int) -> Unit:
    return Unit((frame,), (), _layer(2 * gop), (0,), (), layered=True)


def of_layer(values: Sequence, unit: Unit):
    """A unit's entry of values by layer; the last one is also for layers above and intra frames."""
    last = len(values) - 1
    return values[min(unit.layer, last) if unit.refs else last]


def predicted(first: int, second: int, frame: int) -> Unit:
    """A frame behind both of its references, in the layer of a gap with as distant ends."""
    ratio = 0.5 if first == second else (frame - first) / (second - first)
    layer = _layer(2 * (frame - first))
    return Unit((frame,), (first, second), layer, (0,), (), ratio, layered=True)


def between(a: int, b: int) -> Unit:
    """The frame in the middle of a gap of more than one frame."""
    middle = (a + b) // 2
    ratio = (middle - a) / (b - a)
    return Unit((middle,), (a, b), _layer(b - a), (0,), (), ratio, layered=True)


def _all_between(a: int, b: int) -> list[Unit]:
    """All frames of a gap, depth first."""
    if b - a < 2:
        return []
    unit = between(a, b)
    middle = unit.frames[0]
    return [unit, *_all_between(a, middle), *_all_between(middle, b)]


def _tail(a: int, last: int) -> list[Unit]:
    """Frames behind the last anchor: ever shorter steps, the gaps filled in between."""
    planned, before = [], a
    while last > a:
        step = min(1 << ((last - a + 1) // 2).bit_length() - 1, 16)
        planned += [predicted(a, before, a + step), *_all_between(a, a + step)]
        before, a = a, a + step
    return planned


def _numbered(
    planned: list[Unit], slots: dict[int, int], first_unit: int, kept: int | None
) -> list[Unit]:
    """Puts slots in the place of frames, and drops each after the last unit that reads it.

    Args:
        slots: of frames of earlier groups.
        kept: the frame that the next group reads.
    """
    slots = slots | {unit.frames[0]: first_unit + i for i, unit in enumerate(planned)}
    last_use = dict.fromkeys(slots, first_unit)
    for number, unit in enumerate(planned, first_unit):
        last_use |= dict.fromkeys((*unit.frames, *unit.refs), number)
    last_use.pop(kept, None)
    return [
        unit._replace(
            refs=tuple(slots[frame] for frame in unit.refs),
            distances=tuple(frame - unit.frames[0] for frame in unit.refs),
            release=tuple(slots[frame] for frame, use in last_use.items() if use == number),
        )
        for number, unit in enumerate(planned, first_unit)
    ]


# Name -> (frames in a group, planner of one group).
SCHEDULES: dict[str, tuple[Sequence[int], Callable[[Schedule, int, int, int], list[Unit]]]] = {
    "all_intra": ((1,), _all_intra),
    "two_frame": ((2,), _in_a_row),
    "low_delay": ((1,), _in_a_row),
    "low_delay_refresh": ((1,), _refreshed),
    "low_delay_long": ((1,), _long_term),
    "hierarchical": (range(2, 65), _hierarchical),
    "hierarchical_closed": (range(2, 65), _hierarchical_closed),
    "mixed": (range(2, 65), _hierarchical),
}
