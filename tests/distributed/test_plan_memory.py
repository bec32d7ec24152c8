"""What a probe of one checkpoint says of an actor that holds them all. Without Ray."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest
import ray

from rose_ray.distributed.plan import _Prober
from rose_ray.stages.budget import MemoryNeed

NEED = MemoryNeed(row_tokens=100, one_row=1000, per_row=500, available=10_000)


class Probe:
    need = SimpleNamespace(remote=lambda: NEED)
    host_memory = SimpleNamespace(remote=lambda: (4000, 10_000))


def prober(monkeypatch: pytest.MonkeyPatch) -> _Prober:
    monkeypatch.setattr(ray, "get", lambda value: value)
    work: Any = SimpleNamespace(held_bytes=1200, num_checkpoints=4)
    return _Prober(SimpleNamespace(), work, {}, {}, pa.table({}), probe_rows=4)  # type: ignore[arg-type]


def test_on_the_cpu_further_checkpoints_take_room_from_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    need, host = prober(monkeypatch)._memory(Probe(), "cpu", 2)
    assert need.peak_bytes(100) == 1000 + 900 and host == (0, 0)
    assert need.budget(10_000) < NEED.budget(10_000)


def test_on_a_gpu_they_take_the_hosts_memory_which_actors_of_a_node_share(monkeypatch: pytest.MonkeyPatch) -> None:
    need, host = prober(monkeypatch)._memory(Probe(), "cuda", 2)
    assert need == NEED and host == (4000 + 900, 4000 + (10_000 - 4000) // 2)
