"""Coding orders: what they promise for any clip length, and that `validate` notices when broken."""

from dataclasses import asdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nvc_jax import schedule
from nvc_jax.errors import NvcError
from nvc_jax.schedule import Schedule, Unit

pairs = st.integers(0, 12).map(lambda pairs: schedule.two_frame(2 * pairs))
singles = st.integers(0, 24).map(schedule.low_delay)
schedules = st.one_of(st.just(schedule.all_intra()), pairs, singles)
lengths = st.integers(0, 70)


def flat(planned):
    return [frame for unit in planned for frame in unit.frames]


@given(schedules, lengths)
def test_every_frame_is_coded_once_and_references_exist(order, length):
    planned = list(schedule.validate(schedule.plan(order, length)))
    assert sorted(flat(planned)) == list(range(length))
    assert all(len(unit.frames) == len(unit.qp_offset) for unit in planned)


@given(schedules, lengths)
def test_memory_stays_bounded(order, length):
    held = set()
    for number, unit in enumerate(schedule.plan(order, length)):
        held = (held | {number}) - set(unit.release)
        assert len(held) <= 1


@given(schedules, st.integers(1, 70))
def test_decoding_can_start_at_any_unit_without_references(order, length):
    planned = list(schedule.plan(order, length))
    for number, unit in enumerate(planned):
        if not unit.refs:
            list(schedule.validate(planned[number:], number, unit.frames[0]))


@given(st.integers(1, 20), st.integers(1, 70))
def test_two_frame_starts_afresh_every_intra_period(half_period, length):
    planned = schedule.plan(schedule.two_frame(2 * half_period), length)
    starts = [unit.frames[0] for unit in planned if not unit.refs]
    assert starts == list(range(0, length, 2 * half_period))


def test_two_frame_pairs_chain_and_vary_quality():
    assert list(schedule.plan(schedule.two_frame(), 5)) == [
        Unit((0, 1), (), 0, (0, 8), ()),
        Unit((2, 3), (0,), 0, (0, 4), (0,)),
        Unit((4,), (1,), 0, (0,), (1,)),
    ]
    offsets = [unit.qp_offset for unit in schedule.plan(schedule.two_frame(), 12)]
    assert offsets == [(0, 8), (0, 4), (0, 4), (0, 4), (0, 8), (0, 4)]


def test_low_delay_frames_chain_and_vary_quality():
    assert list(schedule.plan(schedule.low_delay(2), 4)) == [
        Unit((0,), (), 0, (0,), ()),
        Unit((1,), (0,), 0, (8,), (0, 1)),
        Unit((2,), (), 0, (0,), ()),
        Unit((3,), (2,), 0, (4,), (2, 3)),
    ]


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
        list(schedule.validate(planned))


def test_frames_may_be_coded_out_of_display_order():
    planned = [
        Unit((0,), (), 0, (0,), ()),
        Unit((2,), (0,), 0, (0,), ()),
        Unit((1,), (0, 1), 1, (2,), (0,)),
    ]
    assert flat(schedule.validate(planned)) == [0, 2, 1]
