"""Losses of training samples and preference pairs.

Shapes: B batch, S tokens of the padded sequence, K selected positions, V vocabulary, R rows of a block. Every
log-probability is in nats. Half-precision logits are worked on in float32, float64 stays float64.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid
from torch.utils.checkpoint import checkpoint

from rose_ray.errors import ConfigError, NumericsError, ShapeError

UPCAST_BLOCK_BYTES = 64 << 20
"""Half-precision logits are turned into float32 in blocks of rows of at most this size."""


def token_logps(logits_BSV: Tensor, input_ids_BS: Tensor) -> Tensor:
    """Log-probability of each token given those before it.

    Args:
        logits_BSV: Output of a causal language model; position s predicts token s + 1. Floating point.
        input_ids_BS: Token ids, integer.

    Returns:
        Tensor [B, S - 1]; column s belongs to token s + 1. float32, or float64 for float64 logits.

    Raises:
        ShapeError: The leading axes of the two differ, or S is 0.
        NumericsError: The logits are no floating-point numbers.
    """
    if logits_BSV.ndim != 3 or logits_BSV.shape[:2] != input_ids_BS.shape or logits_BSV.shape[1] == 0:
        raise ShapeError(
            f"logits have shape {tuple(logits_BSV.shape)} and input_ids {tuple(input_ids_BS.shape)}; "
            "expected [B, S, V] and [B, S] with S at least 1"
        )
    return selected_token_logps(logits_BSV[:, :-1], input_ids_BS[:, 1:])


def selected_token_logps(logits_BKV: Tensor, targets_BK: Tensor) -> Tensor:
    """Log-probability of a given target at each of K positions chosen beforehand.

    Half-precision logits are never held in float32 as a whole: they go through in blocks of rows, and a
    block is upcast once more in the backward pass.

    Args:
        logits_BKV: Logits at the positions that predict the targets. Floating point.
        targets_BK: Target ids in [0, V), integer.

    Returns:
        Tensor [B, K], float32, or float64 for float64 logits. Differentiable in the logits.

    Raises:
        ShapeError: The leading axes of the two differ.
        NumericsError: The logits are no floating-point numbers.
    """
    if logits_BKV.ndim != 3 or logits_BKV.shape[:2] != targets_BK.shape:
        raise ShapeError(
            f"logits have shape {tuple(logits_BKV.shape)} and targets {tuple(targets_BK.shape)}; "
            "expected [B, K, V] and [B, K]"
        )
    if not logits_BKV.is_floating_point():
        raise NumericsError(f"logits are {logits_BKV.dtype}; expected a floating-point type")
    if logits_BKV.dtype in (torch.float32, torch.float64):
        return _target_logps(logits_BKV, targets_BK)
    num_rows = max(1, UPCAST_BLOCK_BYTES // (4 * max(1, logits_BKV.shape[2])))
    samples = zip(logits_BKV.unbind(), targets_BK.unbind(), strict=True)
    logps = [_blockwise_logps(logits_KV, targets_K, num_rows) for logits_KV, targets_K in samples]
    return torch.stack(logps) if logps else torch.zeros(targets_BK.shape, device=logits_BKV.device)


def _blockwise_logps(logits_KV: Tensor, targets_K: Tensor, num_rows: int) -> Tensor:
    # split, not slices: the backward pass of a slice fills a gradient of the whole tensor
    blocks = zip(torch.split(logits_KV, num_rows), torch.split(targets_K, num_rows), strict=True)
    return torch.cat([_upcast_logps(logits_RV, targets_R) for logits_RV, targets_R in blocks])


def _upcast_logps(logits_RV: Tensor, targets_R: Tensor) -> Tensor:
    """Log-probabilities of one block; the float32 copy is made again for the backward pass, not kept."""
    logps: Tensor = checkpoint(_target_logps, logits_RV, targets_R, use_reentrant=False, preserve_rng_state=False)
    return logps


def _target_logps(logits: Tensor, targets: Tensor) -> Tensor:
    if logits.dtype is not torch.float64:
        logits = logits.float()
    chosen = logits.gather(-1, targets.long().unsqueeze(-1)).squeeze(-1)
    return chosen - logits.logsumexp(dim=-1)


def sequence_logps(logits_BSV: Tensor, input_ids_BS: Tensor, loss_mask_BS: Tensor) -> Tensor:
    """Summed log-probability of the labelled tokens of each sequence, the ``logp`` of the DPO loss.

    Args:
        logits_BSV: As in :func:`token_logps`.
        input_ids_BS: As in :func:`token_logps`.
        loss_mask_BS: bool, True where a token counts, at the token's own place. Position 0 never counts:
            nothing predicts it.

    Returns:
        Tensor [B], nats, dtype of :func:`token_logps`. 0 where no token counts.

    Raises:
        ShapeError: The shapes disagree.
        NumericsError: The mask is not bool, or the logits are no floating-point numbers.
    """
    mask = _target_mask(input_ids_BS, loss_mask_BS)
    return _masked(token_logps(logits_BSV, input_ids_BS), mask).sum(dim=1)


def sft_loss(logits_BSV: Tensor, input_ids_BS: Tensor, loss_mask_BS: Tensor) -> Tensor:
    """Token-mean cross-entropy of each sample: its loss in supervised fine-tuning.

    The mean runs over the sample's own labelled tokens, not over the batch.

    Args:
        logits_BSV: As in :func:`token_logps`.
        input_ids_BS: As in :func:`token_logps`.
        loss_mask_BS: As in :func:`sequence_logps`.

    Returns:
        Tensor [B], nats a token, at least 0.

    Raises:
        ShapeError: The shapes disagree, or a sample has no labelled token after position 0.
        NumericsError: The mask is not bool, or the logits are no floating-point numbers.
    """
    mask = _target_mask(input_ids_BS, loss_mask_BS)
    num_labelled_B = mask.sum(dim=1)
    empty = (num_labelled_B == 0).nonzero().flatten().tolist()
    if empty:
        raise ShapeError(
            f"rows {empty} of the batch have no labelled token after position 0; "
            "expected at least one in each: reject such samples before they are batched"
        )
    return -_masked(token_logps(logits_BSV, input_ids_BS), mask).sum(dim=1) / num_labelled_B


def _target_mask(input_ids_BS: Tensor, loss_mask_BS: Tensor) -> Tensor:
    if loss_mask_BS.shape != input_ids_BS.shape or loss_mask_BS.ndim != 2:
        raise ShapeError(
            f"loss_mask has shape {tuple(loss_mask_BS.shape)} and input_ids {tuple(input_ids_BS.shape)}; "
            "expected [B, S] for both"
        )
    if loss_mask_BS.dtype is not torch.bool:
        raise NumericsError(f"loss_mask is {loss_mask_BS.dtype}; expected torch.bool")
    return loss_mask_BS[:, 1:]


def _masked(logps: Tensor, mask: Tensor) -> Tensor:
    """Zero where the mask is False, even if the log-probability there is -inf."""
    return torch.where(mask, logps, torch.zeros((), dtype=logps.dtype, device=logps.device))


def dpo_margin(
    logps_w_B: Tensor, logps_l_B: Tensor, ref_logps_w_B: Tensor, ref_logps_l_B: Tensor, dpo_beta: float
) -> Tensor:
    """Reward margin of the chosen over the rejected answer.

    ``M = dpo_beta * ((logp_w - logref_w) - (logp_l - logref_l))``, the argument of the sigmoid in
    equation 7 of DPO (Rafailov et al. 2023, arXiv:2305.18290).

    Args:
        logps_w_B: Summed log-probability of the chosen answer under the policy, nats.
        logps_l_B: Of the rejected answer under the policy.
        ref_logps_w_B: Of the chosen answer under the reference.
        ref_logps_l_B: Of the rejected answer under the reference.
        dpo_beta: Strength of the pull towards the reference, above 0.

    Returns:
        Tensor [B], nats.

    Raises:
        ShapeError: The four shapes differ.
        ConfigError: ``dpo_beta`` is not a positive finite number.
    """
    shapes = [tuple(logps.shape) for logps in (logps_w_B, logps_l_B, ref_logps_w_B, ref_logps_l_B)]
    if len(set(shapes)) != 1:
        raise ShapeError(f"log-probabilities of the pairs have shapes {shapes}; expected four equal ones")
    if not (math.isfinite(dpo_beta) and dpo_beta > 0):
        raise ConfigError(f"dpo_beta is {dpo_beta!r}; expected a finite number above 0, usually 0.1")
    return dpo_beta * ((logps_w_B - ref_logps_w_B) - (logps_l_B - ref_logps_l_B))


def dpo_loss(
    logps_w_B: Tensor, logps_l_B: Tensor, ref_logps_w_B: Tensor, ref_logps_l_B: Tensor, dpo_beta: float
) -> Tensor:
    """DPO loss of each pair, ``-log sigmoid(M)`` with M of :func:`dpo_margin`.

    Args and errors: those of :func:`dpo_margin`.

    Returns:
        Tensor [B], nats, above 0.
    """
    return -logsigmoid(dpo_margin(logps_w_B, logps_l_B, ref_logps_w_B, ref_logps_l_B, dpo_beta))
