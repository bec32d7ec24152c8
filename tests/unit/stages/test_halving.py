"""Batches that do not fit are halved, and whoever wants to know how often can count."""

from __future__ import annotations

import pytest
import torch

from rose_ray.data.tokenize import Sample
from rose_ray.model.batch import Batch
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


def test_a_row_that_did_not_fit_alone_is_tried_again_after_the_others() -> None:
    samples = [Sample([1] * length, [True] * length) for length in (4, 3, 2)]
    refused, order = [4, 4, 4, 3], []

    def compute(batch: Batch) -> int:
        length = batch.input_ids.shape[1]
        order.append(length)
        if length in refused:
            refused.remove(length)
            raise torch.OutOfMemoryError("taken by a neighbour")
        return length

    runner = HalvingRunner(torch.device("cpu"), 4)
    assert [length for _, length in runner.batches(samples, compute)] == [2, 3]
    assert order == [4, 3, 2, 4, 3]
    assert runner.too_large == {0: "4 tokens alone: taken by a neighbour"}


@pytest.mark.parametrize(
    ("message", "halved"),
    [
        ("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried", True),
        (
            "[enforce fail at alloc_cpu.cpp:98] data. DefaultCPUAllocator: not enough memory: you tried",
            True,
        ),
        ("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported at some other API call", True),
        ("CUDA driver error: out of memory", True),
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", True),
        ("cuDNN error: CUDNN_STATUS_ALLOC_FAILED", True),
        ("cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`", True),
        ("Triton Error [CUDA]: out of memory", True),
        ("CUDA error: an illegal memory access was encountered", False),
        ("CUDA error: device-side assert triggered", False),
        ("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm(handle)`", False),
        ("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`", False),
        ("Triton Error [CUDA]: invalid argument", False),
        ("out of resource: shared memory, Required: 262144, Hardware limit: 232448", False),
        ("CUDA error: too many resources requested for launch", False),
        ("mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)", False),
    ],
)
def test_only_used_up_memory_halves_a_batch(message: str, halved: bool) -> None:
    samples = [Sample([1, 2, 3, 4], [False, True, True, True])] * 2
    runner = HalvingRunner(torch.device("cpu"), 8)

    def compute(batch: Batch) -> int:
        if batch.num_samples > 1:
            raise RuntimeError(message)
        return batch.num_samples

    if halved:
        assert [indices for indices, _ in runner.batches(samples, compute)] == [[0], [1]]
        assert runner.num_halvings == 1
    else:
        with pytest.raises(RuntimeError) as raised:
            list(runner.batches(samples, compute))
        assert str(raised.value) == message
