"""The measured bound of a batch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from rose_ray.model.memory import ProcessMeter, memory_meter
from rose_ray.stages.budget import USED_FRACTION, measured_budget, memory_need

MIB = 2**20


class _Linear:
    """A device where a row costs 10 MiB on top of 100."""

    def __init__(self, available: int) -> None:
        self.available, self.rows = available, 0

    def run(self, rows: int) -> None:
        self.rows = rows

    def peak_bytes(self, step: Callable[[], object]) -> int:
        step()
        return (100 + 10 * self.rows) * MIB

    def available_bytes(self) -> int:
        return self.available


@pytest.mark.parametrize(
    ("available_mib", "most", "expected"),
    [
        (1000, 10**6, 70 * 128),  # 800 MiB to use, 110 for the first row, 69 more at 10 each
        (1000, 4096, 4096),
        (100, 4096, 128),  # not even one row: it is tried, and rejected where it does not fit
        (150, 4096, 2 * 128),
    ],
)
def test_rows_fill_the_memory_and_no_more(available_mib: int, most: int, expected: int) -> None:
    device = _Linear(available_mib * MIB)
    assert USED_FRACTION == 0.8
    assert measured_budget(device.run, 128, most, device) == expected


def test_a_process_s_share_counts() -> None:
    device = _Linear(1000 * MIB)
    assert measured_budget(device.run, 128, 10**6, device, share=0.5) == 30 * 128


def test_one_row_is_enough_where_no_batch_has_two() -> None:
    device = _Linear(1000 * MIB)
    most: list[int] = []

    def run(rows: int) -> None:
        most.append(rows)
        device.run(rows)

    one = memory_need(run, 128, device, one_row_only=True)
    assert set(most) == {1} and one.per_row == 0
    assert one.peak_bytes(255) == one.one_row == memory_need(device.run, 128, device).one_row


def test_the_process_meter_sees_a_peak_that_has_passed() -> None:
    meter = memory_meter(torch.device("cpu"))
    assert isinstance(meter, ProcessMeter)
    low = meter.peak_bytes(lambda: None)
    high = meter.peak_bytes(lambda: torch.ones(64 * MIB, dtype=torch.uint8).sum())
    again = meter.peak_bytes(lambda: None)
    assert high - low > 48 * MIB and high - again > 48 * MIB  # some of the 64 may come from freed memory
    assert meter.available_bytes() > low
