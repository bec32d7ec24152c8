"""Loss drop: which rows get easier once the model has learned the target's own chosen answers?

A short training of the adapter on the pairs' chosen answers, then forwards only: a row's score is the share of its loss
that this took away, ``(base - tuned) / base``, each the token-mean cross-entropy of its answers.

Shapes: N rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rose_ray.data.tokenize import Sample
from rose_ray.errors import NonFiniteError
from rose_ray.kernels.loss_scores import loss_drop
from rose_ray.model.batch import pad_batch
from rose_ray.model.scoring import ScoringModel
from rose_ray.stages.forwards import RowValues, joined_rejections, reject_where, sample_logps
from rose_ray.stages.warmup import TrainingStep, plan_training

_ADAM = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}


@dataclass(frozen=True)
class TargetTraining:
    """The short training on a target's answers.

    Attributes:
        epochs: Passes over them.
        batch_size: Answers of one step.
        learning_rate: Peak; rises and falls linearly as in the warm-up.
        warmup_ratio: Share of the steps in which it rises.
        max_grad_norm: A step's gradient is clipped to this length.
        seed: Of the adapter's first values and of the order.
        max_batch_tokens: Bound on rows times longest row; changes no number beyond rounding.
    """

    epochs: int
    batch_size: int
    learning_rate: float
    warmup_ratio: float
    max_grad_norm: float
    seed: int
    max_batch_tokens: int


def fresh_adapter(weights: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
    """Return a LoRA adapter that changes nothing yet, float32 on the CPU: A drawn as PEFT does, B zero.

    Args:
        weights: The slot, for names and shapes.
        seed: Of the one random stream; the parameters take from it in their order.
    """
    generator = torch.Generator().manual_seed(seed)
    adapter = {}
    for name, weight in weights.items():
        adapter[name] = torch.zeros(weight.shape)
        if ".lora_A." in name:  # Kaiming's uniform draw with a = sqrt(5)
            bound = 1 / math.sqrt(weight.shape[1])
            adapter[name].uniform_(-bound, bound, generator=generator)
    return adapter


def train_on_target(
    model: ScoringModel, samples: Sequence[Sample], names: Sequence[str], settings: TargetTraining
) -> dict[str, Tensor]:
    """Train the adapter in the slot on a target's answers and return it, float32 on the CPU.

    A step's loss is the mean over its samples of each one's token-mean cross-entropy; AdamW, no dropout. On equal
    machines equal input gives equal bits.

    Args:
        model: Its slot is overwritten.
        samples: Chosen answers with their prompts.
        names: Of the samples, all different; they settle the order.
        settings: How.

    Raises:
        NonFiniteError: A loss or gradient is NaN or infinite.
    """
    adapter = {name: tensor.to(model.device) for name, tensor in fresh_adapter(model.weights, settings.seed).items()}
    optimizer = torch.optim.AdamW(adapter.values(), lr=settings.learning_rate, foreach=False, **_ADAM)  # type: ignore[arg-type]
    steps = plan_training(
        names,
        [len(sample.input_ids) for sample in samples],
        epochs=settings.epochs,
        batch_size=settings.batch_size,
        max_batch_tokens=settings.max_batch_tokens,
        num_workers=1,
        learning_rate=settings.learning_rate,
        warmup_ratio=settings.warmup_ratio,
        seed=settings.seed,
    )
    for number, step in enumerate(steps, start=1):
        model.load_adapter(adapter)
        grads = _mean_gradient(model, samples, step)
        length = torch.stack([grad.square().sum() for grad in grads.values()]).sum().sqrt()
        if not bool(torch.isfinite(length)):
            raise NonFiniteError(
                f"training on the target: the gradient of step {number} of {len(steps)} is {float(length)}. Lower the "
                "learning rate, or look at the pairs' texts and model.dtype."
            )
        scale = min(1.0, settings.max_grad_norm / max(float(length), 1e-30))
        for name, weight in adapter.items():
            weight.grad = (grads[name] * scale).to(weight.dtype)
        for group in optimizer.param_groups:
            group["lr"] = step.learning_rate
        optimizer.step()
    return {name: weight.detach().cpu() for name, weight in adapter.items()}


def loss_drop_scores(
    model: ScoringModel, samples: Sequence[Sample], adapter: Mapping[str, Tensor], *, max_batch_tokens: int
) -> RowValues:
    """Return the share of each row's loss that the adapter takes away, [N, 1].

    Rejected: ``zero_base_loss`` (nothing to lose); ``non_finite_loss``; ``out_of_memory``.

    Args:
        model: Base model with an adapter slot, which is overwritten.
        samples: Rows of the pool.
        adapter: From `train_on_target`.
        max_batch_tokens: Bound on rows times longest row.
    """
    model.load_adapter(adapter)
    with model.without_adapter():
        before = sample_logps(model, samples, "mean_loss", max_batch_tokens=max_batch_tokens)
    after = sample_logps(model, samples, "mean_loss", max_batch_tokens=max_batch_tokens)
    drops_N = loss_drop(before.values_NU[:, 0], after.values_NU[:, 0])
    rejected = joined_rejections(before.rejected, after.rejected)
    drops_N[list(rejected)] = np.nan
    found = RowValues(drops_N[:, None], rejected)
    return reject_where(found, ~np.isfinite(drops_N), "zero_base_loss", "the base model has a loss of 0 already")


def _mean_gradient(model: ScoringModel, samples: Sequence[Sample], step: TrainingStep) -> dict[str, Tensor]:
    """Gradient of a step's loss by parameter name, float64."""
    sums = {name: torch.zeros_like(weight, dtype=torch.float64) for name, weight in model.weights.items()}

    def consume(name: str, grads_BOI: Tensor) -> None:
        sums[name] += grads_BOI.double().sum(0)

    (micro_batches,) = step.micro_batches
    for micro_batch in micro_batches:
        batch = pad_batch([samples[row] for row in micro_batch.rows], device=model.device)
        model.backward_per_sample(batch, "mean_loss", consume)
    return {name: total / step.num_samples for name, total in sums.items()}
