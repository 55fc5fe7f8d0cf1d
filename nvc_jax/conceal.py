"""Decodes as much of a damaged stream as there is, and says what is lost."""

import functools
from collections.abc import Iterable, Iterator
from itertools import chain, groupby, repeat

import numpy as np

from nvc_jax import schedule as schedules
from nvc_jax.bitstream import BrokenStream, Packet, Stream
from nvc_jax.codec import OPEN_END, Lost, in_display_order, outcomes
from nvc_jax.errors import StreamError
from nvc_jax.unit_program import UnitCodec
from nvc_jax.video import Planes


def decode_concealing(
    codec: UnitCodec, stream: Stream
) -> Iterator[tuple[Packet | Lost, Iterable[Planes]]]:
    """As `decode`, but goes on after a unit that cannot be decoded.

    Only units that refer to it are lost with it, if it is at least clear where it ends; otherwise,
    decoding resumes at the next random-access unit that the index lists. Frames in a row that are
    lost for the same reason come as one `Lost` with the picture before repeated for each of them;
    mid-grey if there was none yet. No exception for bad data.
    """
    picture = _grey(codec)
    for loss, run in groupby(_salvage(codec, stream), key=_one_loss):
        if loss is None:
            for unit, pictures in run:
                yield unit, pictures
                picture = pictures[-1]
        else:
            lost = functools.reduce(_together, (unit for unit, _ in run))
            yield lost, repeat(picture, lost.frames or 0)


def _one_loss(found: tuple[Packet | Lost, list[Planes]]) -> tuple[int, bool] | None:
    """What frames in a row that are lost for the same reason have in common."""
    unit, _ = found
    return (unit.unit, unit.frames is None) if isinstance(unit, Lost) else None


def _together(a: Lost, b: Lost) -> Lost:
    return a._replace(units=a.units + b.units, frames=a.frames + b.frames)


def _salvage(codec: UnitCodec, stream: Stream) -> Iterator[tuple[Packet | Lost, list[Planes]]]:
    """All frames of a stream in display order, as far as anything is known of them."""
    order = stream.header.schedule
    frame = 0  # the first that was not handed out
    stuck, reason = 0, None  # the unit at which there is no going on, and why
    blamed = set()  # units that losses were put down to
    first, slots, missing = 0, {}, None  # see `codec.outcomes`
    start, broken = None, None

    def packets():
        nonlocal read_units, read_frames
        for number, packet in stream.packets(start, salvage=True):
            read_units = number + 1
            read_frames += len(packet.frames)
            yield number, packet

    def lost_before(next_unit, next_frame):
        frames = max(next_frame - frame, 0)
        # In layers, some of the units in between are of frames that were or will be decoded.
        units = frames if schedules.in_layers(order) else max(next_unit - stuck, 0)
        return Lost(stuck, units, frame, frames, reason), []

    while True:
        read_units, read_frames = (start.unit, start.frame) if start else (0, 0)
        numbered = packets()
        try:
            for number, packet in numbered:
                if reason:
                    first, last_frame = packet.frames[0], max(packet.frames)
                    known = stream.frame_count or read_frames + order.gop
                    possible = frame <= first <= last_frame < known and not packet.damage
                    if not (packet.random_access and possible):
                        continue
                    # Frames that come after it but are shown before it may have their references.
                    begin = max(frame, schedules.group_start(order, first))
                    yield lost_before(number, begin)
                    missing = Lost(stuck, 1, first, 1, reason)
                    frame, reason = begin, None
                    slots = {n: left for n, left in slots.items() if n >= number - order.gop}
                run = chain([(number, packet)], numbered)
                wanted = range(frame, OPEN_END)
                found = outcomes(codec, order, run, first, wanted, slots, missing)
                try:
                    for unit, pictures in in_display_order(found, wanted, fill_gaps=True):
                        if isinstance(unit, Lost):
                            blamed.add(unit.unit)
                            frame += unit.frames
                        frame += len(pictures)
                        yield unit, pictures
                except BrokenStream:
                    raise
                except StreamError as e:
                    stuck, reason = read_units - 1, str(e)
            break
        except BrokenStream as e:
            broken = str(e)
            if not reason:
                stuck, reason = read_units, broken
            start = stream.next_access_point(read_units)
            if start is None:
                break
    if stream.index:
        read_units, read_frames, *_ = stream.index
    elif broken and not read_units > stuck:
        reason = None  # nothing was read of what follows
    if reason and (read_frames > frame or stuck not in blamed):
        yield lost_before(read_units, read_frames)
        frame = max(frame, read_frames)
    if broken and not stream.index:
        yield Lost(read_units, None, frame, None, broken), []


def _grey(codec: UnitCodec) -> Planes:
    chroma = (-(-codec.height // 2), -(-codec.width // 2))
    shapes = (codec.height, codec.width), chroma, chroma
    return Planes(*(np.full(shape, 128, np.uint8) for shape in shapes))
