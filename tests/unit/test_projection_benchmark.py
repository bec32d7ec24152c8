"""What the comparison of projections scores is what the job's projections make of rows and pairs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.projections import Feature, Whole, features, row
from rose_ray.kernels.deflated import DeflatedProjection
from rose_ray.kernels.objectives import PairGradients
from rose_ray.kernels.projection import ProjectionKind, make_projection

FLOAT32 = 1e-5
"""Of rows of length 1: sums of 96 numbers in another order."""

SHAPES = (("a", (8, 4)), ("b", (8, 8)))
NUM_PARAMETERS, DIM, SEED = 96, 16, 3


@pytest.mark.parametrize("kind", ["sketch", "factored", "rademacher"])
def test_rows_and_pairs_are_projected_as_in_a_job(kind: ProjectionKind) -> None:
    torch.manual_seed(0)
    units, common = torch.nn.functional.normalize(torch.randn(5, NUM_PARAMETERS)), torch.randn(NUM_PARAMETERS)
    sides = torch.randn(2, 3, NUM_PARAMETERS, dtype=torch.float64)
    ones = np.ones(3)
    bank = PairGradients(["p", "q", "r"], sides[0].numpy(), sides[1].numpy(), ones, ones, 0 * ones, ones, ones)
    job: Any = SimpleNamespace(layout=SimpleNamespace(shapes=SHAPES, num_parameters=NUM_PARAMETERS))
    found = list(features(job, Whole(units, {"t": bank}, common), DIM, kind, SEED))
    assert [(name, num_exact) for name, num_exact, _, _ in found] == [(kind, 0), (f"{kind}, deflated", 1)]
    plain = make_projection(kind, DIM, SEED, NUM_PARAMETERS, shapes=[shape for _, shape in SHAPES])
    for projection, (_, _, rows, banks) in zip((plain, DeflatedProjection(plain, common)), found, strict=True):
        for given, got in ((units, rows), (sides[0], banks["t"].g_w_VD), (sides[1], banks["t"].g_l_VD)):
            expected = torch.zeros(len(given), projection.dim)
            projection.add(expected, 0, given.float())
            torch.testing.assert_close(torch.as_tensor(got).float(), expected, rtol=FLOAT32, atol=10 * FLOAT32)


def test_a_row_of_the_table_by_hand() -> None:
    truth = {"t": np.arange(20.0)}
    seeds = [{"t": truth["t"] + 1}, {"t": -truth["t"]}]
    found = row(Feature("sketch", 8, "int8"), seeds, truth, 12)
    assert (found["seeds"], found["bytes a row"]) == (2, 12)
    assert (found["Spearman"], found["least"], found["greatest"]) == pytest.approx((0.0, -1.0, 1.0))
    assert found["overlap of the best 5 %"] == 0.5  # one row of twenty: the same, and another
    assert found["RMS error of a score"] == pytest.approx((1 + np.sqrt(np.mean((2 * truth["t"]) ** 2))) / 2)
