"""Which attention a model runs where the configuration leaves it open."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rose_ray.kernels.causal_attention import SHORT_ROW, causal_attention

SHORT_ROWS = "rose_ray_short_rows"
"""Name under which transformers knows it."""

_ALTERING = ("position_bias", "softcap", "s_aux", "cache")
"""What some models hand to their attention, and the products here do not know."""


def has_bfloat16_products() -> bool:
    """Whether this machine's processor multiplies bfloat16 matrices: AVX-512 BF16 or AMX.

    Without, torch's products of bfloat16 take twice as long as its fused attention.
    """
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def attention_that_runs(attention: str, device: str | None, dtype: torch.dtype) -> str:
    """Return what a setting of `model.attention` comes to on this machine: ``auto`` is `SHORT_ROWS` or ``sdpa``.

    Args:
        attention: The setting.
        device: Where the model runs; None where DeepSpeed decides, since what is registered looks at the tensors.
        dtype: Of its weights.
    """
    if attention != "auto":
        return attention
    return SHORT_ROWS if device != "cuda" and dtype == torch.bfloat16 and has_bfloat16_products() else "sdpa"


def attend_short_rows(base: nn.Module) -> None:
    """Let a model of transformers run causal rows of up to 256 bfloat16 tokens on a CPU by matrix products.

    All else goes to the fused operator (``sdpa``) as before. A model whose code has attention of its own keeps it.

    Args:
        base: Loaded with ``sdpa``. Changed in place.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    if base.config._attn_implementation != "sdpa" or not base._can_set_attn_implementation():  # type: ignore[union-attr, operator]
        return
    AttentionInterface.register(SHORT_ROWS, _short_rows)
    AttentionMaskInterface.register(SHORT_ROWS, sdpa_mask)
    base.set_attn_implementation(SHORT_ROWS)  # type: ignore[operator]


def _short_rows(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """What transformers calls in each layer; [B, H, S, K] in, [B, S, H, V] out."""
    from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward

    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    plain = attention_mask is None and causal and not dropout and all(others.get(name) is None for name in _ALTERING)
    short = 1 < query.shape[2] == key.shape[2] <= SHORT_ROW
    if not (plain and short and query.device.type == "cpu" and query.dtype == key.dtype == torch.bfloat16):
        attended, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal, **others
        )
        return attended, None
    groups = query.shape[1] // key.shape[1]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    attended = causal_attention(query, repeat_kv(key, groups), repeat_kv(value, groups), scale)
    return attended.transpose(1, 2).contiguous(), None
