"""One vector a sequence from its hidden states.

Shapes: B batch, S tokens, H hidden size, N rows.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from rose_ray.errors import ConfigError, ShapeError

Pooling = Literal["position_weighted", "last_token"]


def pool_hidden(hidden_BSH: Tensor, lengths_B: Tensor, pooling: Pooling) -> Tensor:
    """Pool the hidden states of sequences that are padded on the right.

    ``position_weighted`` is the mean with weights 1, 2, ..., n over the n tokens, so later ones, which have seen
    more, count more (RDS+, arXiv:2503.01807); ``last_token`` is the n-th state (RDS).

    Args:
        hidden_BSH: Any floating-point type.
        lengths_B: Tokens of each sequence, at least 1, at most S; int64. What lies behind them is not looked at.
        pooling: Which.

    Returns:
        Tensor [B, H], float32, or float64 where the states are. Not normalised.

    Raises:
        ConfigError: The pooling is unknown.
        ShapeError: The shapes disagree, or a length is out of its range.
    """
    if pooling not in get_args(Pooling):
        raise ConfigError(f"pooling is {pooling!r}; expected one of {', '.join(get_args(Pooling))}")
    if hidden_BSH.ndim != 3 or lengths_B.shape != hidden_BSH.shape[:1]:
        raise ShapeError(
            f"hidden states have shape {tuple(hidden_BSH.shape)} and lengths {tuple(lengths_B.shape)}; "
            "expected [B, S, H] and [B]"
        )
    size = hidden_BSH.shape[1]
    if bool(((lengths_B < 1) | (lengths_B > size)).any()):
        raise ShapeError(f"lengths are {lengths_B.tolist()}; expected 1 to {size} tokens each")
    dtype = torch.promote_types(hidden_BSH.dtype, torch.float32)
    if pooling == "last_token":
        rows_B = torch.arange(len(lengths_B), device=lengths_B.device)
        return hidden_BSH[rows_B, lengths_B - 1].to(dtype)
    positions_S = torch.arange(1, size + 1, device=lengths_B.device)
    inside_BS = positions_S <= lengths_B[:, None]
    weights_BS = positions_S.to(dtype) / (lengths_B * (lengths_B + 1) / 2).to(dtype)[:, None]
    # Filled, not multiplied by 0: a NaN at padding would stay one.
    states_BSH = hidden_BSH.to(dtype).masked_fill(~inside_BS[:, :, None], 0)
    return torch.einsum("bs,bsh->bh", weights_BS, states_BSH)


def unit_rows(vectors_NH: Tensor) -> Tensor:
    """Divide each row by its length; a zero row stays zero."""
    lengths_N1 = torch.linalg.vector_norm(vectors_NH, dim=1, keepdim=True)
    return vectors_NH / torch.where(lengths_N1 > 0, lengths_N1, 1)
