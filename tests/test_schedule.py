"""Coding orders: what they promise for any clip length, and that a checker notices when broken."""

from collections.abc import Iterable, Iterator
from dataclasses import asdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nvc_jax import schedule
from nvc_jax.errors import NvcError
from nvc_jax.schedule import Schedule, Unit

pairs = st.integers(0, 12).map(lambda pairs: schedule.two_frame(2 * pairs))
singles = st.one_of(
    st.integers(0, 24).map(schedule.low_delay),
    st.integers(0, 80).map(schedule.low_delay_refresh),
    st.integers(0, 24).map(schedule.low_delay_long),
)
flats = st.one_of(st.just(schedule.all_intra()), pairs, singles)
layered = st.builds(
    lambda gop, periods, closed: schedule.hierarchical(
        gop, None if closed else periods * gop, closed
    ),
    st.integers(2, 64),
    st.integers(0, 3),
    st.booleans(),
)
schedules = st.one_of(flats, layered, st.integers(2, 64).map(schedule.mixed))
lengths = st.integers(0, 140)


def validate(planned: Iterable[Unit], first_unit: int = 0, first_frame: int = 0) -> Iterator[Unit]:
    """Passes units through and makes sure that they can be decoded in this order.

    `first_unit` and `first_frame` say where decoding starts: earlier slots and frames do not exist.

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


def flat(planned):
    return [frame for unit in planned for frame in unit.frames]


@given(schedules, lengths)
def test_every_frame_is_coded_once_and_references_exist(order, length):
    planned = list(validate(schedule.plan(order, length)))
    assert sorted(flat(planned)) == list(range(length))
    assert all(len(unit.frames) == len(unit.qp_offset) for unit in planned)
    for unit in planned:
        read = [max(planned[slot].frames) for slot in unit.refs]
        assert unit.distances == tuple(frame - unit.frames[0] for frame in read)


def plan_mixed(gop, modes, length):
    """Groups of a "mixed" order in these modes, over and over."""
    order, planned, frame, number = schedule.mixed(gop), [], 0, 0
    while frame < length:
        count = min(schedule.group_size(order, frame), length - frame)
        mode = modes[number % len(modes)]
        planned.append(schedule.units(order, frame, count, sum(map(len, planned)), mode))
        frame, number = frame + count, number + 1
    return planned


@given(st.integers(2, 64), st.lists(st.sampled_from(schedule.MODES), min_size=1), lengths)
def test_any_mode_can_follow_any_other(gop, modes, length):
    groups = plan_mixed(gop, modes, length)
    planned = [unit for group in groups for unit in group]
    assert sorted(flat(validate(planned))) == list(range(length))
    held = set()
    for number, unit in enumerate(planned):
        read = [planned[slot].frames[0] for slot in unit.refs]
        assert unit.distances == tuple(frame - unit.frames[0] for frame in read)
        held = (held | {number}) - set(unit.release)
        assert len(held) <= 2 + (gop - 1).bit_length()
    for number, group in enumerate(groups[1:], 1):
        mode, whole = modes[number % len(modes)], len(group) == gop
        assert not whole or (group[0].refs == () and group[0].frames[0] % gop == 0)
        others = group[1:] if whole else group
        if mode == "ai":
            assert not any(unit.refs for unit in others)
        if mode == "ld":
            assert all(unit.refs and max(unit.distances) < 0 for unit in others)
            assert [unit.frames[0] for unit in others] == sorted(flat(others))
        if mode == "ra" and whole:
            assert all(len(unit.refs) == 2 for unit in others)
        # From its intra frame on, what comes later can be decoded.
        if whole:
            there = set()
            start = sum(map(len, groups[:number]))
            for later, unit in enumerate(planned[start:], start):
                if set(unit.refs) <= there:
                    there.add(later)
                else:
                    assert unit.frames[0] < group[0].frames[0]


def test_the_long_term_reference_is_the_last_of_the_best():
    def read(order, length):
        return {u.frames[0]: u.refs for u in schedule.plan(order, length)}

    once = read(schedule.low_delay_long(), 20)
    assert (once[0], once[1], once[2]) == ((), (0,), (1, 0))
    assert all(once[n] == (n - 1, 1) for n in range(3, 11))
    assert all(once[n] == (n - 1, 9) for n in range(11, 19))
    assert once[19] == (18, 17)
    # Every intra frame starts anew.
    again = list(schedule.plan(schedule.low_delay_long(12), 24))
    assert [(u.refs, u.qp_offset) for u in again[12:]] == [
        (tuple(12 + r for r in u.refs), u.qp_offset) for u in again[:12]
    ]
    assert [u.qp_offset for u in again[:6]] == [(8,), (8,), (0,), (4,), (0,), (4,)]


@given(schedules, lengths)
def test_memory_stays_bounded(order, length):
    """By the references, or by the depth of the hierarchy and the anchors of a tail."""
    if schedule.in_layers(order):
        limit = 2 + (order.gop - 1).bit_length()
    else:
        limit = 2 if order.name == "low_delay_long" else 1
    held = set()
    for number, unit in enumerate(schedule.plan(order, length)):
        assert len(held | {number}) <= limit + 1  # itself
        held = (held | {number}) - set(unit.release)
        assert len(held) <= limit


@given(flats, st.integers(1, 70))
def test_decoding_can_start_at_any_unit_without_references(order, length):
    planned = list(schedule.plan(order, length))
    for number, unit in enumerate(planned):
        if not unit.refs:
            list(validate(planned[number:], number, unit.frames[0]))


@given(layered, st.integers(1, 140))
def test_later_groups_do_not_refer_to_what_came_before_an_intra_frame(order, length):
    """From an intra frame on, all frames that are shown after it can be decoded."""
    planned = list(schedule.plan(order, length))
    for start, intra in enumerate(planned):
        if intra.refs:
            continue
        there = set()
        for number, unit in enumerate(planned[start:], start):
            if set(unit.refs) <= there:
                there.add(number)
            else:
                assert unit.frames[0] < intra.frames[0]


def test_the_published_order_of_32_frames():
    """Coding order, references and layers as in BRHVC (arXiv 2511.08938, released code)."""
    planned = list(schedule.plan(schedule.hierarchical(32), 33))
    frames = [unit.frames[0] for unit in planned]
    half = [16, 8, 4, 2, 1, 3, 6, 5, 7, 12, 10, 9, 11, 14, 13, 15]
    quarters = [24, 20, 18, 17, 19, 22, 21, 23, 28, 26, 25, 27, 30, 29, 31]
    assert frames == [0, 32, *half, *quarters]
    for number, unit in enumerate(planned[2:], 2):
        frame = frames[number]
        layer = (frame & -frame).bit_length() - 1  # trailing zeros
        assert unit.layer == layer and unit.ratio == 0.5
        assert [frames[slot] for slot in unit.refs] == [frame - 2**layer, frame + 2**layer]


@given(layered, st.integers(1, 140))
def test_places_between_references(order, length):
    planned = list(schedule.plan(order, length))
    frames = [unit.frames[0] for unit in planned]
    for unit in planned:
        if unit.refs and unit.refs[0] != unit.refs[1]:
            first, second = (frames[slot] for slot in unit.refs)
            assert first + unit.ratio * (second - first) == pytest.approx(unit.frames[0])


def test_tails():
    """Ever shorter steps from two earlier frames; an intra frame where the tail is long."""
    tail = schedule.units(schedule.hierarchical(32), 65, 15, 65)
    anchors = [unit.frames[0] for unit in tail if unit.ratio < 0 or unit.refs[0] == unit.refs[1]]
    assert anchors == [72, 76, 78, 79]
    assert tail[0].refs == (33, 33)
    long = schedule.units(schedule.hierarchical(32), 65, 16, 65)
    assert (long[0].frames, long[0].refs) == ((80,), ())


@given(layered, st.integers(1, 140))
def test_groups_can_be_found_from_any_frame(order, length):
    first = 0
    while first < length:
        size = schedule.group_size(order, first)
        assert {schedule.group_start(order, f) for f in range(first, first + size)} == {first}
        first += size


@given(st.integers(1, 20), st.integers(1, 70))
def test_two_frame_starts_afresh_every_intra_period(half_period, length):
    planned = schedule.plan(schedule.two_frame(2 * half_period), length)
    starts = [unit.frames[0] for unit in planned if not unit.refs]
    assert starts == list(range(0, length, 2 * half_period))


def test_two_frame_pairs_chain_and_vary_quality():
    assert list(schedule.plan(schedule.two_frame(), 5)) == [
        Unit((0, 1), (), 0, (0, 8), ()),
        Unit((2, 3), (0,), 0, (0, 4), (0,), distances=(-1,)),
        Unit((4,), (1,), 0, (0,), (1,), distances=(-1,)),
    ]
    offsets = [unit.qp_offset for unit in schedule.plan(schedule.two_frame(), 12)]
    assert offsets == [(0, 8), (0, 4), (0, 4), (0, 4), (0, 8), (0, 4)]


def test_low_delay_frames_chain_and_vary_quality():
    assert list(schedule.plan(schedule.low_delay(2), 4)) == [
        Unit((0,), (), 0, (0,), ()),
        Unit((1,), (0,), 0, (8,), (0, 1), distances=(-1,)),
        Unit((2,), (), 0, (0,), ()),
        Unit((3,), (2,), 0, (4,), (2, 3), distances=(-1,)),
    ]


@pytest.mark.parametrize("period, refreshed", [(0, [65, 129, 193]), (96, [65, 96 + 65])])
def test_refreshes_need_the_picture_before(period, refreshed):
    planned = list(schedule.plan(schedule.low_delay_refresh(period), 200))
    assert [u.frames[0] for u in planned if u.picture_only] == refreshed
    assert [u.frames[0] + 1 for u in planned if u.shown] == refreshed
    plain = [unit._replace(picture_only=False, shown=False) for unit in planned]
    assert plain == list(schedule.plan(schedule.low_delay(period), 200))


def test_all_intra_reads_and_keeps_nothing():
    planned = list(schedule.plan(schedule.all_intra(), 3))
    assert [unit.frames for unit in planned] == [(0,), (1,), (2,)]
    assert all(unit.refs == () and unit.qp_offset == (0,) for unit in planned)


@given(schedules)
def test_schedule_survives_a_dictionary(order):
    assert Schedule(**asdict(order)) == order


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("sideways", 2), "unknown schedule 'sideways'; known: all_intra, two_frame, low_delay"),
        (("two_frame", 4), "groups of 2 frames, not 4"),
        (("hierarchical", 1), "groups of 2 to 64 frames, not 1"),
        (("hierarchical", 65), "groups of 2 to 64 frames, not 65"),
        (("hierarchical", 8, 12), "multiple of 8"),
        (("hierarchical_closed", 8, 16), "give 8"),
        (("two_frame", 2, 7), "multiple of 2"),
        (("two_frame", 2, -2), "intra period -2"),
    ],
)
def test_impossible_schedules_are_explained(arguments, words):
    with pytest.raises(NvcError, match=words):
        Schedule(*arguments)


@pytest.mark.parametrize(("first", "count"), [(1, 2), (0, 0), (0, 3)])
def test_impossible_groups_are_explained(first, count):
    with pytest.raises(NvcError, match="cannot code"):
        schedule.units(schedule.two_frame(), first, count, 0)


@pytest.mark.parametrize(
    ("planned", "words"),
    [
        ([Unit((0,), (0,), 0, (0,), ())], "reads slot 0"),
        ([Unit((0,), (), 0, (0,), (0,)), Unit((1,), (0,), 0, (0,), ())], "unit 1 reads slot 0"),
        ([Unit((0,), (), 0, (0,), (1,))], "drops slot 1"),
        ([Unit((0,), (), 0, (0,), (0, 0))], "drops slot 0"),
        ([Unit((0,), (), 0, (0,), ()), Unit((0,), (), 0, (0,), ())], "frame 0, which is already"),
        ([Unit((0, 0), (), 0, (0, 0), ())], "frame 0, which is already"),
        ([Unit((1,), (), 0, (0,), ())], "frame 0 is missing"),
        ([Unit((), (), 0, (), ())], "0 frames"),
        ([Unit((0, 1), (), 0, (0,), ())], "2 frames and 1 qp offsets"),
    ],
)
def test_broken_orders_are_found(planned, words):
    with pytest.raises(NvcError, match=words):
        list(validate(planned))


def test_frames_may_be_coded_out_of_display_order():
    planned = [
        Unit((0,), (), 0, (0,), ()),
        Unit((2,), (0,), 0, (0,), ()),
        Unit((1,), (0, 1), 1, (2,), (0,)),
    ]
    assert flat(validate(planned)) == [0, 2, 1]
