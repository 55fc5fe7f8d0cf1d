"""Work done ahead of time: in order, with its exceptions, and without threads left behind."""

import threading
import time
from itertools import count, islice

import pytest

from nvc_jax.data.prefetch import read_ahead


@pytest.fixture(autouse=True)
def no_threads_left():
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= before


def fails_at(bad: int):
    def make(number):
        if number == bad:
            raise ValueError(f"number {number}")
        return number

    return make


@pytest.mark.parametrize("ahead", [0, 1, 4, 100])
@pytest.mark.parametrize("length", [0, 1, 5, 20])
def test_items_are_the_same(ahead, length):
    assert list(read_ahead(range(length), ahead)) == list(range(length))
    assert list(read_ahead(iter([None] * length), ahead)) == [None] * length


@pytest.mark.parametrize("ahead", [0, 1, 3])
def test_reading_is_ahead_but_not_without_bound(ahead):
    begun = []
    items = read_ahead(map(begun.append, count()), ahead)
    for taken in range(1, 6):
        next(items)
        time.sleep(0.01)
        assert taken <= len(begun) <= taken + ahead
    items.close()
    assert begun == list(range(len(begun)))


@pytest.mark.parametrize("ahead", [0, 2, 5])
def test_an_exception_comes_with_its_item(ahead):
    items = read_ahead(map(fails_at(4), count()), ahead)
    assert list(islice(items, 4)) == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="number 4"):
        next(items)


def test_closing_before_the_first_item_reads_nothing():
    source = iter(range(3))
    read_ahead(source, 2).close()
    assert next(source) == 0


def test_closing_early_leaves_the_rest():
    source = iter(range(100))
    items = read_ahead(source, ahead=3)
    assert next(items) == 0
    items.close()
    assert 1 <= next(source) <= 4


def test_dropping_ends_the_thread():
    items = read_ahead(count(), 2)
    next(items)
    del items
