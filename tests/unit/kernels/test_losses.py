"""Losses against loops over tokens and hand arithmetic."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import rose_ray.kernels.losses as losses
from rose_ray.errors import ConfigError, NumericsError, ShapeError
from rose_ray.kernels.losses import (
    dpo_loss,
    dpo_margin,
    selected_token_logps,
    sequence_logps,
    sft_loss,
    token_logps,
)

torch.set_num_threads(1)  # tiny tensors: handing them to threads costs more than the sums

FLOAT64_ROUNDING = 1e-12  # a few hundred additions of numbers of order 1 in float64
FLOAT32_ROUNDING = 1e-5  # the same in float32


def _batch(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(3, 6, 11, generator=generator, dtype=torch.float64) * 3
    input_ids = torch.randint(0, 11, (3, 6), generator=generator)
    mask = torch.tensor([[1, 0, 1, 1, 0, 0], [0, 1, 0, 0, 0, 1], [0, 0, 0, 1, 0, 0]], dtype=torch.bool)
    return logits.to(dtype), input_ids, mask


def _slow_logp(logits: list[float], target: int) -> float:
    total = sum(math.exp(value) for value in logits)
    return logits[target] - math.log(total)


def _slow_token_logps(logits: Tensor, input_ids: Tensor) -> list[list[float]]:
    return [
        [_slow_logp(logits[b, s].tolist(), int(input_ids[b, s + 1])) for s in range(input_ids.shape[1] - 1)]
        for b in range(input_ids.shape[0])
    ]


def test_token_logps_equal_a_loop() -> None:
    logits, input_ids, _ = _batch()
    expected = torch.tensor(_slow_token_logps(logits, input_ids), dtype=torch.float64)
    torch.testing.assert_close(token_logps(logits, input_ids), expected, atol=FLOAT64_ROUNDING, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows_per_block", [1, 2, 1000])
def test_half_precision_is_upcast_in_blocks(
    dtype: torch.dtype, rows_per_block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits, input_ids, _ = _batch(dtype)
    monkeypatch.setattr(losses, "UPCAST_BLOCK_BYTES", rows_per_block * 4 * logits.shape[2])
    logits.requires_grad_()
    logps = token_logps(logits, input_ids)
    assert logps.dtype is torch.float32
    weights = torch.arange(1.0, 1 + logps.numel()).view(logps.shape)
    (gradient,) = torch.autograd.grad((logps * weights).sum(), logits)

    plain = logits.detach().float().requires_grad_()
    expected = token_logps(plain, input_ids)
    (plain_gradient,) = torch.autograd.grad((expected * weights).sum(), plain)
    torch.testing.assert_close(logps, expected, atol=FLOAT32_ROUNDING, rtol=0)
    torch.testing.assert_close(gradient, plain_gradient.to(dtype))


def test_empty_batch_gives_an_empty_result() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        logps = selected_token_logps(torch.zeros(0, 4, 7, dtype=dtype), torch.zeros(0, 4, dtype=torch.long))
        assert logps.shape == (0, 4) and logps.dtype is torch.float32


def test_selected_positions_equal_the_same_positions_of_the_whole() -> None:
    logits, input_ids, _ = _batch()
    places = torch.tensor([0, 2, 4])
    selected = selected_token_logps(logits[:, places], input_ids[:, places + 1])
    torch.testing.assert_close(selected, token_logps(logits, input_ids)[:, places])


def test_sums_and_means_count_labelled_tokens_only() -> None:
    logits, input_ids, mask = _batch()
    slow = _slow_token_logps(logits, input_ids)
    labelled = [[slow[b][s - 1] for s in range(1, 6) if mask[b, s]] for b in range(3)]
    sums = torch.tensor([sum(row) for row in labelled], dtype=torch.float64)
    means = torch.tensor([-sum(row) / len(row) for row in labelled], dtype=torch.float64)
    torch.testing.assert_close(sequence_logps(logits, input_ids, mask), sums, atol=FLOAT64_ROUNDING, rtol=0)
    torch.testing.assert_close(sft_loss(logits, input_ids, mask), means, atol=FLOAT64_ROUNDING, rtol=0)


def test_sft_loss_is_torchs_cross_entropy_of_each_row() -> None:
    logits, input_ids, mask = _batch()
    labels = input_ids.masked_fill(~mask, -100)
    expected = torch.stack([torch.nn.functional.cross_entropy(logits[b, :-1], labels[b, 1:]) for b in range(3)])
    torch.testing.assert_close(sft_loss(logits, input_ids, mask), expected, atol=FLOAT64_ROUNDING, rtol=0)


def test_padding_changes_nothing() -> None:
    logits, input_ids, mask = _batch()
    garbage = torch.full((3, 2, 11), -torch.inf, dtype=torch.float64)
    garbage[..., 0] = 0.0  # the padding's own target, 1, gets probability zero
    padded = torch.cat([logits, garbage], dim=1)
    padded.requires_grad_()
    ids = torch.cat([input_ids, torch.ones(3, 2, dtype=torch.long)], dim=1)
    longer = torch.cat([mask, torch.zeros(3, 2, dtype=torch.bool)], dim=1)
    loss = sft_loss(padded, ids, longer)
    torch.testing.assert_close(loss, sft_loss(logits, input_ids, mask), atol=FLOAT64_ROUNDING, rtol=0)
    (gradient,) = torch.autograd.grad(loss.sum(), padded)
    assert bool((gradient[:, 6:] == 0).all())


def test_rows_without_labelled_tokens_are_named() -> None:
    logits, input_ids, mask = _batch()
    mask[1] = False
    mask[2] = torch.tensor([True] + [False] * 5)
    with pytest.raises(ShapeError, match=r"rows \[1, 2\]"):
        sft_loss(logits, input_ids, mask)
    assert sequence_logps(logits, input_ids, mask)[1:].tolist() == [0.0, 0.0]


def test_shapes_and_types_are_checked() -> None:
    logits, input_ids, mask = _batch()
    with pytest.raises(ShapeError, match="expected"):
        token_logps(logits, input_ids[:, :-1])
    with pytest.raises(ShapeError, match="expected"):
        token_logps(logits[:, :0], input_ids[:, :0])
    with pytest.raises(ShapeError, match="expected"):
        selected_token_logps(logits, input_ids[:2])
    with pytest.raises(ShapeError, match="loss_mask"):
        sequence_logps(logits, input_ids, mask[:, :-1])
    with pytest.raises(NumericsError, match=r"torch\.bool"):
        sequence_logps(logits, input_ids, mask.long())
    with pytest.raises(NumericsError, match="floating-point"):
        token_logps(logits.long(), input_ids)


def test_dpo_by_hand() -> None:
    # margin 0.1 * ((-10 + 12) - (-20 + 15)) = 0.7; second pair 0.1 * ((-5 + 5) - (-5 + 5)) = 0
    logps = torch.tensor([[-10.0, -5.0], [-20.0, -5.0], [-12.0, -5.0], [-15.0, -5.0]], dtype=torch.float64)
    margin = dpo_margin(logps[0], logps[1], logps[2], logps[3], 0.1)
    loss = dpo_loss(logps[0], logps[1], logps[2], logps[3], 0.1)
    torch.testing.assert_close(margin, torch.tensor([0.7, 0.0], dtype=torch.float64))
    expected = torch.tensor([math.log(1 + math.exp(-0.7)), math.log(2)], dtype=torch.float64)
    torch.testing.assert_close(loss, expected, atol=FLOAT64_ROUNDING, rtol=0)


def test_dpo_stays_finite_far_out() -> None:
    far = torch.tensor([1e6, -1e6])
    loss = dpo_loss(far, -far, torch.zeros(2), torch.zeros(2), 0.5)
    assert loss.tolist() == [0.0, 1e6]


def test_dpo_refuses_what_it_cannot_mean() -> None:
    logps = torch.zeros(2)
    with pytest.raises(ShapeError, match="four equal"):
        dpo_loss(logps, logps, logps, torch.zeros(3), 0.1)
    for beta in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ConfigError, match="dpo_beta"):
            dpo_margin(logps, logps, logps, logps, beta)
