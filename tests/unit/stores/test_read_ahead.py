"""Reads in threads come back in order, no more of them than asked for, and fail in their turn."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest

from rose_ray.stores.read_ahead import MEMORY_BYTES, MOST_THREADS, depth_for, read_ahead


@pytest.mark.parametrize("depth", [1, 3, 20])
def test_results_come_in_order(depth: int) -> None:
    assert list(read_ahead((lambda n=n: n for n in range(10)), depth)) == list(range(10))  # type: ignore[misc]


def test_no_more_is_started_than_asked_for() -> None:
    started: list[int] = []

    def reads() -> Iterator[Callable[[], int]]:
        for number in range(10):
            started.append(number)
            yield lambda number=number: number  # type: ignore[misc]

    results = read_ahead(reads(), 2)
    for number in range(3):
        assert next(results) == number and len(started) == number + 3
    results.close()  # type: ignore[attr-defined]
    assert len(started) == 5


def test_the_next_one_is_read_while_the_last_is_worked_on() -> None:
    second = threading.Event()
    results = read_ahead([lambda: True, lambda: second.set() or True], 1)
    assert next(results) and second.wait(10)


def test_an_error_comes_in_its_turn() -> None:
    def fail() -> int:
        raise OSError("no disk")

    results = read_ahead([lambda: 1, fail, lambda: 3], 2)
    assert next(results) == 1
    with pytest.raises(OSError, match="no disk"):
        next(results)


def test_large_reads_are_few() -> None:
    assert [depth_for(size) for size in (0, MEMORY_BYTES // 3, 5 * MEMORY_BYTES)] == [MOST_THREADS, 3, 1]
