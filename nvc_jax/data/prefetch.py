"""Batches and pictures made ahead of time in a background thread."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from itertools import count
from typing import TypeVar

T = TypeVar("T")


def prefetch(make: Callable[[int], T], start: int = 0, ahead: int = 2) -> Iterator[T]:
    """Yields make(start), make(start + 1), ... without end; at most `ahead` results wait.

    Exceptions surface at the item they belong to. Close (or drop) the iterator to end the thread.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="prefetch") as thread:
        waiting = deque()
        try:
            for number in count(start):
                waiting.append(thread.submit(make, number))
                if len(waiting) > ahead:
                    yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def read_ahead(items: Iterable[T], ahead: int) -> Iterator[T]:
    """The same items, read up to `ahead` early in a background thread."""
    source, end = iter(items), object()
    with closing(prefetch(lambda _: next(source, end), ahead=ahead)) as results:
        yield from iter(results.__next__, end)
