"""Batches that do not fit are halved, and whoever wants to know how often can count."""

from __future__ import annotations

import pytest
import torch

from rose_ray.data.tokenize import Sample
from rose_ray.stages.halving import HalvingRunner, counted_halvings


def test_halvings_of_runners_out_of_sight_are_counted_while_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    samples = [Sample([1, 2, 3, 4], [False, True, True, True])] * 4

    def run() -> list[int]:
        runner = HalvingRunner(torch.device("cpu"), 16)
        return [len(indices) for indices, _ in runner.batches(samples, lambda batch: batch)]

    with counted_halvings() as none:
        assert run() == [4]
    monkeypatch.setenv("ROSE_RAY_FAILPOINT", "out_of_memory:8")
    with counted_halvings() as outer:
        assert run() == [2, 2]
        with counted_halvings() as inner:
            assert run() == [2, 2]
    run()
    assert (none.number, outer.number, inner.number) == (0, 2, 1)
