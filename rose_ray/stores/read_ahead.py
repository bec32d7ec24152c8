"""Reading while the last thing read is worked on."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

S = TypeVar("S")
T = TypeVar("T")

MEMORY_BYTES = 1 << 27
"""What lies ready may take about this much as stored, twice to three times as much decoded."""

MOST_THREADS = 8
"""Requests that an object store answers at once; a local disk needs fewer."""


def depth_for(num_bytes: int) -> int:
    """How many reads of ``num_bytes`` each may be under way."""
    return max(1, min(MOST_THREADS, MEMORY_BYTES // max(1, num_bytes)))


MOST_LOOKS = 32
"""Looks at small files at once: they wait for storage, not for the processor or for memory."""


def looked_up(look: Callable[[S], T], items: Iterable[S]) -> Iterator[T]:
    """Yield what ``look`` returns for each item, in order, with the next `MOST_LOOKS` under way."""
    return read_ahead((functools.partial(look, item) for item in items), MOST_LOOKS)


def read_ahead(reads: Iterable[Callable[[], T]], depth: int) -> Iterator[T]:
    """Yield what each read returns, in order, with up to ``depth`` of the next ones under way in threads.

    Raises:
        Exception: What a read raised, in its turn.
    """
    waiting: deque[Future[T]] = deque()
    with ThreadPoolExecutor(depth, "read-ahead") as threads:
        try:
            for read in reads:
                waiting.append(threads.submit(read))
                if len(waiting) > depth:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
