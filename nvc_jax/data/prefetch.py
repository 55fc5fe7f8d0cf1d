"""Batches and pictures made ahead of time in a background thread."""

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def read_ahead(items: Iterable[T], ahead: int) -> Iterator[T]:
    """The same items, read up to `ahead` early in a background thread.

    Exceptions surface at the item they belong to. Close (or drop) the iterator to end the thread.
    """
    source, end = iter(items), object()
    with ThreadPoolExecutor(1, thread_name_prefix="read_ahead") as thread:
        waiting = deque()
        try:
            while True:
                while len(waiting) <= ahead:
                    waiting.append(thread.submit(next, source, end))
                item = waiting.popleft().result()
                if item is end:
                    return
                yield item
        finally:
            for future in waiting:
                future.cancel()
