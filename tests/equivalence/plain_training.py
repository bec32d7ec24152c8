"""A warm-up in a dozen lines of plain torch, one sample at a time, that writes checkpoints as the real one does."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rose_ray.model.checkpoint import MOMENTS_FILE, STATE_FILE, OptimizerState, moments_bytes, state_json
from tests import oracles


@dataclass
class PlainTraining:
    """AdamW over the adapter of a model: mean of the samples' gradients, clipped, a given learning rate a step."""

    model: Any
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    max_grad_norm: float = 1.0
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        self.parameters = oracles.trainable(self.model)
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(),
            lr=1.0,
            betas=(self.beta1, self.beta2),
            eps=self.eps,
            weight_decay=self.weight_decay,
        )
        self.num_updates = 0
        self.loss_sum = 0.0
        self.num_clipped = 0

    def step(self, samples: Sequence[oracles.Masked], learning_rate: float) -> None:
        """Take one step."""
        self.optimizer.zero_grad()
        for sample in samples:
            loss = oracles.mean_loss(self.model, sample)
            (loss / len(samples)).backward()
            self.loss_sum += loss.item()
        norm = torch.nn.utils.clip_grad_norm_(self.parameters.values(), self.max_grad_norm)
        self.num_clipped += int(norm > self.max_grad_norm)
        self.optimizer.param_groups[0]["lr"] = learning_rate
        self.optimizer.step()
        self.num_updates += 1

    def moments(self, key: str) -> oracles.Named:
        """Adam's state by parameter name."""
        return {name: self.optimizer.state[p][key].detach().clone() for name, p in self.parameters.items()}

    def save(self, folder: Path, mean_learning_rate: float, epoch: int) -> None:
        """Write a checkpoint."""
        self.model.save_pretrained(folder)
        state = OptimizerState(
            self.num_updates, mean_learning_rate, self.beta1, self.beta2, self.eps, self.max_grad_norm, epoch
        )
        moments = (
            {name: tensor.float() for name, tensor in self.moments(key).items()} for key in ("exp_avg", "exp_avg_sq")
        )
        (folder / MOMENTS_FILE).write_bytes(moments_bytes(*moments))
        (folder / STATE_FILE).write_text(json.dumps(state_json(state)))
