"""Pooled hidden states against loops."""

from __future__ import annotations

import pytest
import torch

from rose_ray.errors import ConfigError, ShapeError
from rose_ray.kernels.pooling import pool_hidden, unit_rows

LENGTHS = [1, 4, 6]
FLOAT32 = 1e-6
"""Relative to the largest state: six float32 products added up, in another order."""


def _states(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(3, 6, 5, generator=torch.Generator().manual_seed(0)).to(dtype)


def test_later_tokens_count_more_by_hand() -> None:
    hidden = torch.tensor([[[6.0, 0.0], [0.0, 6.0], [6.0, 6.0], [100.0, 100.0]]])
    pooled = pool_hidden(hidden, torch.tensor([3]), "position_weighted")
    # (1 * [6, 0] + 2 * [0, 6] + 3 * [6, 6]) / 6; the fourth is padding
    assert pooled.tolist() == [[4.0, 5.0]]
    assert pool_hidden(hidden, torch.tensor([3]), "last_token").tolist() == [[6.0, 6.0]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_pooling_is_a_loop_over_tokens(dtype: torch.dtype) -> None:
    hidden, lengths = _states(dtype), torch.tensor(LENGTHS)
    for row, length in enumerate(LENGTHS):
        total = sum(range(1, length + 1))
        mean = sum((place + 1) / total * hidden[row, place].double() for place in range(length))
        found = pool_hidden(hidden, lengths, "position_weighted")[row].double()
        torch.testing.assert_close(found, torch.as_tensor(mean), rtol=0, atol=5 * FLOAT32)
        last = pool_hidden(hidden, lengths, "last_token")
        assert torch.equal(last[row].double(), hidden[row, length - 1].double())
        assert last.dtype == torch.promote_types(dtype, torch.float32)


def test_nan_at_padding_or_in_a_neighbour_stays_there() -> None:
    hidden = _states()
    expected = pool_hidden(hidden, torch.tensor(LENGTHS), "position_weighted")
    hidden[0, 1:] = hidden[2] = float("nan")
    found = pool_hidden(hidden, torch.tensor(LENGTHS), "position_weighted")
    assert torch.equal(found[:2], expected[:2]) and bool(found[2].isnan().all())


def test_unit_rows_have_length_one_and_zero_stays_zero() -> None:
    assert unit_rows(torch.tensor([[3.0, 4.0], [0.0, 0.0]])).tolist() == [
        [0.6000000238418579, 0.800000011920929],
        [0, 0],
    ]


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ConfigError, match="expected one of position_weighted, last_token"):
        pool_hidden(_states(), torch.tensor(LENGTHS), "mean")  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match=r"expected \[B, S, H\] and \[B\]"):
        pool_hidden(_states(), torch.tensor([1, 2]), "last_token")
    with pytest.raises(ShapeError, match="expected 1 to 6 tokens"):
        pool_hidden(_states(), torch.tensor([0, 2, 7]), "last_token")
