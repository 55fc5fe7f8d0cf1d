"""Coding order as plain data: which frames are coded together, from which references.

A *unit* is what one call of a codec codes: one frame, or the two frames of a pair. Units are
numbered from 0 in coding order, and unit k leaves its decoded state in slot k, so a slot is named
by the unit that filled it. A unit says which slots it reads and which are dropped afterwards
(itself among them, when nobody will read it); encoder, decoder, training clips and random access
all follow the same list.

An encoder does not know how long its clip is. It therefore plans one *group* of `schedule.gop`
frames at a time with `units`; only the last group of a clip may be shorter. Decoding can start at
any unit without references: no unit from there on reads or drops an older slot.

The quality offsets of the low-delay orders follow DCVC-RT (arXiv 2502.20762, released code): eight
frames with offsets 0, 8, 0, 4, 0, 4, 0, 4 added to the qp of the clip.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from nvc_jax.errors import NvcError

QP_OFFSETS = (0, 8, 0, 4, 0, 4, 0, 4)


class Unit(NamedTuple):
    """Frames coded together, and what their codec reads and leaves behind.

    `frames` holds display indices of real frames only: the last unit of an odd clip coded in pairs
    has one frame, and the codec repeats the picture. `qp_offset` has one entry per frame and is
    added to the qp of the clip; `level` is the layer of a hierarchy, 0 for a flat order, `ratio` a
    B-frame's place between its two references: its distance from the first as a share of theirs.
    """

    frames: tuple[int, ...]
    refs: tuple[int, ...]
    level: int
    qp_offset: tuple[int, ...]
    release: tuple[int, ...]
    ratio: float = 0.5


@dataclass(frozen=True)
class Schedule:
    """A named coding order; a stream's header stores exactly these three values.

    Attributes:
        name: one of `SCHEDULES`.
        gop: frames planned together, see `units`.
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
        gop = SCHEDULES[self.name][0]
        if self.gop != gop:
            raise NvcError(f"schedule {self.name} codes groups of {gop} frames, not {self.gop}")
        if self.intra_period < 0 or self.intra_period % gop:
            raise NvcError(
                f"intra period {self.intra_period}: schedule {self.name} codes {gop} frames at a "
                f"time, so decoding can only start at every {gop}th frame; give a multiple of "
                f"{gop}, or 0 to start at the first frame only"
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


def units(schedule: Schedule, first_frame: int, count: int, first_unit: int) -> list[Unit]:
    """Plans one group: `count` frames from `first_frame` on, as units `first_unit`, +1, ...

    Args:
        schedule: the coding order.
        first_frame: display index of the group's first frame, a multiple of `schedule.gop`.
        count: `schedule.gop`, or less when the clip ends inside the group.
        first_unit: number of the group's first unit.

    Raises:
        NvcError: if the group does not start at a multiple of `schedule.gop` or has a wrong count.
    """
    gop = schedule.gop
    if first_frame % gop or not 1 <= count <= gop:
        raise NvcError(
            f"schedule {schedule.name} cannot code {count} frames from frame {first_frame} on: "
            f"a group has {gop} frames (fewer only at the end) and starts at a multiple of {gop}"
        )
    return SCHEDULES[schedule.name][1](schedule, first_frame, count, first_unit)


def plan(schedule: Schedule, frame_count: int) -> Iterator[Unit]:
    """The units of a whole clip of `frame_count` frames."""
    unit = 0
    for frame in range(0, frame_count, schedule.gop):
        group = units(schedule, frame, min(schedule.gop, frame_count - frame), unit)
        unit += len(group)
        yield from group


def validate(planned: Iterable[Unit], first_unit: int = 0, first_frame: int = 0) -> Iterator[Unit]:
    """Passes units through and makes sure that they can be decoded in this order.

    Lazy, so that a decoder can wrap the units of a stream that it reads as it goes. `first_unit`
    and `first_frame` say where decoding starts: earlier slots and frames do not exist.

    Raises:
        NvcError: at the first unit that reads or drops a slot which does not exist (any more), or
            holds no frame, a frame coded before or one without its own qp offset; and at the end
            if a frame was left out.
    """
    slots: set[int] = set()
    early: set[int] = set()  # frames coded before one that is displayed earlier
    shown = first_frame  # every frame below is coded
    for number, unit in enumerate(planned, first_unit):
        for slot in unit.refs:
            if slot not in slots:
                raise NvcError(f"unit {number} reads slot {slot}, which holds nothing")
        if not unit.frames or len(unit.frames) != len(unit.qp_offset):
            raise NvcError(
                f"unit {number} has {len(unit.frames)} frames and {len(unit.qp_offset)} qp offsets"
            )
        for frame in unit.frames:
            if frame < shown or frame in early:
                raise NvcError(f"unit {number} codes frame {frame}, which is already coded")
            early.add(frame)
        while shown in early:
            early.remove(shown)
            shown += 1
        slots.add(number)
        for slot in unit.release:
            if slot not in slots:
                raise NvcError(f"unit {number} drops slot {slot}, which holds nothing")
            slots.remove(slot)
        yield unit
    if early:
        raise NvcError(f"frame {shown} is missing, but frame {min(early)} is coded")


def _all_intra(schedule: Schedule, first_frame: int, count: int, first_unit: int) -> list[Unit]:
    return [Unit((first_frame,), (), 0, (0,), (first_unit,))]


def _in_a_row(schedule: Schedule, first_frame: int, count: int, first_unit: int) -> list[Unit]:
    def starts(frame):
        return frame % schedule.intra_period == 0 if schedule.intra_period else frame == 0

    frames = tuple(range(first_frame, first_frame + count))
    refs = () if starts(first_frame) else (first_unit - 1,)
    # The unit before a fresh start is read by nobody; dropping it there would fail for a decoder
    # that begins at that start.
    last = (first_unit,) if starts(first_frame + schedule.gop) else ()
    offsets = tuple(QP_OFFSETS[frame % len(QP_OFFSETS)] for frame in frames)
    return [Unit(frames, refs, 0, offsets, refs + last)]


# Name -> (frames in a group, planner of one group).
SCHEDULES: dict[str, tuple[int, Callable[[Schedule, int, int, int], list[Unit]]]] = {
    "all_intra": (1, _all_intra),
    "two_frame": (2, _in_a_row),
    "low_delay": (1, _in_a_row),
}
