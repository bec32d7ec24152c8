"""Slow, obvious versions of what the project computes: one sample at a time, loops, explicit matrices, float64.

None of them calls the project's code. Parameters go by the names they have in a saved adapter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

Named = dict[str, Tensor]
Masked = tuple[Sequence[int], Sequence[bool]]
"""Token ids, and for each whether it carries loss."""


def peft_model(base: str, *, rank: int, alpha: float, targets: Sequence[str], dtype: torch.dtype) -> nn.Module:
    """A base model with a fresh adapter, made by transformers and peft alone."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    settings = LoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=0.0, target_modules=list(targets), task_type="CAUSAL_LM"
    )
    adapted: nn.Module = get_peft_model(model, settings).eval()
    return adapted.to(dtype)


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The adapter's parameters, in the order in which the model holds them."""
    return {name.replace(".default", ""): p for name, p in model.named_parameters() if "lora_" in name}


def set_adapter(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Overwrite the adapter."""
    parameters = trainable(model)
    assert parameters.keys() == weights.keys()
    for name, parameter in parameters.items():
        parameter.data.copy_(weights[name])


def random_adapter(model: nn.Module, seed: int, scale: float = 0.2) -> Named:
    """Weights in which neither factor is zero, as they are after some training."""
    generator = torch.Generator().manual_seed(seed)
    return {name: scale * torch.randn(p.shape, generator=generator) for name, p in trainable(model).items()}


def random_moments(model: nn.Module, seed: int) -> tuple[Named, Named]:
    """First moments, and second ones that are positive and differ by orders of magnitude."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {name: p.shape for name, p in trainable(model).items()}
    first = {name: 0.01 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    second = {name: 10 ** (-5 + torch.randn(shape, generator=generator)) for name, shape in shapes.items()}
    return first, second


def token_logps(model: nn.Module, ids: Sequence[int]) -> list[Tensor | None]:
    """Log-probability of each token given those before it; the first has none. One sequence, no padding."""
    logits = model(input_ids=torch.tensor([list(ids)])).logits[0]
    logps: list[Tensor | None] = [None]
    for place in range(1, len(ids)):
        distribution = torch.log_softmax(logits[place - 1], dim=0)
        logps.append(distribution[ids[place]])
    return logps


def sum_logps(model: nn.Module, sample: Masked) -> Tensor:
    """Summed log-probability of the tokens that carry loss."""
    ids, mask = sample
    total = torch.zeros((), dtype=torch.float64)
    for logp, labelled in zip(token_logps(model, ids), mask, strict=True):
        if labelled and logp is not None:
            total = total + logp.double()
    return total


def mean_loss(model: nn.Module, sample: Masked) -> Tensor:
    """Token-mean cross-entropy of the tokens that carry loss."""
    return -sum_logps(model, sample) / sum(sample[1][1:])


def gradient(model: nn.Module, sample: Masked, value: Literal["mean_loss", "sum_logps"]) -> tuple[Tensor, Named]:
    """Value and gradient of one sample, by autograd in the adapter's parameters."""
    parameters = trainable(model)
    result = mean_loss(model, sample) if value == "mean_loss" else sum_logps(model, sample)
    grads = torch.autograd.grad(result, list(parameters.values()))
    return result.detach(), dict(zip(parameters, grads, strict=True))


def flat(named: Mapping[str, Tensor], order: Iterable[str] | None = None) -> Tensor:
    """One float64 vector, parameters in the given order, else in that of the mapping."""
    return torch.cat([named[name].detach().double().flatten() for name in (named if order is None else order)])


def adam_direction(
    mode: str, g: Tensor, m: Tensor, v: Tensor, *, num_updates: int, beta1: float, beta2: float, eps: float
) -> Tensor:
    """The direction of a flat gradient, entry by entry in Python's floats."""
    t = num_updates + 1
    if mode == "less_code":
        beta1, beta2 = 0.9, 0.999
    result = []
    for g_i, m_i, v_i in zip(g.tolist(), m.tolist(), v.tolist(), strict=True):
        m_new = beta1 * m_i + (1 - beta1) * g_i
        v_new = beta2 * v_i + (1 - beta2) * g_i**2
        v_hat = v_new / (1 - beta2**t)
        result.append(
            {
                "torch": (m_new / (1 - beta1**t)) / (math.sqrt(v_hat) + eps),
                "less_code": m_new / math.sqrt(v_new + 1e-8),
                "v_only": g_i / (math.sqrt(v_hat) + eps),
                "sgd": g_i,
            }[mode]
        )
    return torch.tensor(result, dtype=torch.float64)


def adam_step(g: Tensor, m: Tensor, v: Tensor, *, num_updates: int, beta1: float, beta2: float, eps: float) -> Tensor:
    """What ``torch.optim.Adam`` adds to the parameters at learning rate 1, in float64."""
    parameter = nn.Parameter(torch.zeros_like(g, dtype=torch.float64))
    optimizer = torch.optim.Adam([parameter], lr=1.0, betas=(beta1, beta2), eps=eps)
    optimizer.state[parameter] = {
        "step": torch.tensor(float(num_updates)),
        "exp_avg": m.double().clone(),
        "exp_avg_sq": v.double().clone(),
    }
    parameter.grad = g.double().clone()
    optimizer.step()
    return parameter.detach().clone()


def momentum_share(g: Tensor, m: Tensor, beta1: float) -> float:
    """Length of the common moment term over that of the first moment."""
    return float((beta1 * m).norm() / (beta1 * m + (1 - beta1) * g).norm())


def projection_matrix(kind: str, dim: int, seed: int, num_parameters: int) -> np.ndarray:
    """The whole matrix [D, P] of a projection, an entry at a time, in Python's integers."""
    if kind == "none":
        return np.eye(num_parameters)
    matrix = np.zeros((dim, num_parameters))
    for index in range(num_parameters):
        if kind == "sketch":
            turn = _hash_word("SKET", seed, 0, index // dim)
            bits = _hash_word("SKET", seed, 1, index // 32)
            matrix[(index + turn) % dim, index] = 1.0 if bits >> index % 32 & 1 else -1.0
        else:
            for word in range(-(-dim // 32)):
                bits = _hash_word("RADE", seed, word, index)
                for bit in range(min(32, dim - 32 * word)):
                    matrix[32 * word + bit, index] = (1.0 if bits >> bit & 1 else -1.0) / math.sqrt(dim)
    return matrix


def _mix(x: int) -> int:
    for shift, factor in ((16, 0x21F0AAAD), (15, 0x735A2D97)):
        x = (x ^ x >> shift) * factor % 2**32
    return x ^ x >> 15


def _hash_word(letters: str, seed: int, word: int, index: int) -> int:
    state = _mix(_mix(int.from_bytes(letters.encode(), "big") ^ seed % 2**32) ^ seed >> 32)
    first = _mix(state ^ _mix(2 * word + 1))
    return _mix(_mix(index ^ first) ^ _mix(first ^ _mix(2 * word + 2)))


def cosine(a: np.ndarray | Tensor, b: np.ndarray | Tensor) -> float:
    """Cosine of two vectors, in float64."""
    x, y = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    return float(x @ y / math.sqrt((x @ x) * (y @ y)))


def scores(
    features_CNP: np.ndarray, directions_CVP: np.ndarray, weights_C: Sequence[float], subtasks: Sequence[str]
) -> tuple[np.ndarray, np.ndarray]:
    """Mean over shots, then max over subtasks, of weighted cosines: subtask scores [N, T] and scores [N]."""
    names = list(dict.fromkeys(subtasks))
    table = np.zeros((features_CNP.shape[1], len(names)))
    for n in range(features_CNP.shape[1]):
        for t, name in enumerate(names):
            shots = [v for v, subtask in enumerate(subtasks) if subtask == name]
            influences = [
                sum(w * cosine(features_CNP[c, n], directions_CVP[c, v]) for c, w in enumerate(weights_C))
                for v in shots
            ]
            table[n, t] = sum(influences) / len(shots)
    return table, table.max(axis=1)


def collect(names: Sequence[str]) -> tuple[dict[str, Tensor], Callable[[str, Tensor], None]]:
    """A consumer of per-sample gradients that keeps them, and what it keeps: [B, O, I] by name."""
    kept: dict[str, Tensor] = dict.fromkeys(names)  # type: ignore[arg-type]

    def consume(name: str, grads_BOI: Tensor) -> None:
        assert kept[name] is None, f"{name} came twice"
        kept[name] = grads_BOI.clone()

    return kept, consume


def rows_of(kept: Mapping[str, Tensor]) -> Tensor:
    """Kept gradients as [B, P], float64."""
    return torch.cat([grads.flatten(1).double() for grads in kept.values()], dim=1)


def lora_settings(lora: Any) -> dict[str, Any]:
    """Arguments of `peft_model` for a configured adapter."""
    return {"rank": lora.rank, "alpha": lora.alpha, "targets": lora.target_modules}


def dot_cosine(unit_D: np.ndarray, other_D: np.ndarray) -> float:
    """Cosine of unit vectors."""
    return float(unit_D.astype(np.float64) @ other_D.astype(np.float64))


def sign_cosine(features_D: np.ndarray, other_D: np.ndarray, shared: tuple[float, float] = (0, 0)) -> float:
    """Cosine of vectors by their projections' signs, and by each one's exact part along what they share."""
    agreeing = sum((a >= 0) == (b >= 0) for a, b in zip(features_D.tolist(), other_D.tolist(), strict=True))
    angle = math.pi * (1 - agreeing / len(features_D))
    own = math.sqrt(1 - shared[0] ** 2) * math.sqrt(1 - shared[1] ** 2)
    return own * math.cos(angle) + shared[0] * shared[1]


def greedy_diverse_rows(
    rows: Sequence[Any], max_cosine: float, cosine: Callable[[Any, Any], float] = dot_cosine
) -> tuple[list[int], dict[int, int]]:
    """Rows kept in order while no cosine with a kept one is above a bound; of others, the first that is too near."""
    kept: list[int] = []
    refused: dict[int, int] = {}
    for place, row in enumerate(rows):
        near = [other for other in kept if cosine(row, rows[other]) > max_cosine]
        if near:
            refused[place] = near[0]
        else:
            kept.append(place)
    return kept, refused
