"""Fine-tuning of one model in one process, on rows or on pairs: plain torch and PEFT.

It shares the order of rows and the learning rates with the warm-up (section 4.1 of LESS, arXiv:2402.04333) and nothing
of its training: what is trained here may disagree with it. Shapes: B batch, V pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from rose_ray.config.evaluation import DpoConfig, FineTuningConfig
from rose_ray.config.model import LoraConfig, ModelConfig
from rose_ray.data.batches import length_batches
from rose_ray.data.tokenize import Sample
from rose_ray.errors import DataError, NonFiniteError
from rose_ray.kernels.losses import dpo_loss
from rose_ray.model.base import attach_adapter, load_base
from rose_ray.model.batch import pad_batch
from rose_ray.model.layout import adapter_parameters
from rose_ray.model.values import sample_values
from rose_ray.stages.warmup import TrainingStep, plan_training

if TYPE_CHECKING:
    from peft import PeftModel

FINE_TUNE_VERSION = 1
"""Raised whenever the same input would give another model."""

SamplePair = tuple[Sample, Sample]
"""Chosen and rejected side."""


def fresh_model(model: ModelConfig, lora: LoraConfig, seed: int, device: str = "cpu") -> PeftModel:
    """Return the base model with an adapter that changes nothing yet; ``seed`` draws its first values."""
    with torch.random.fork_rng(devices=[] if device == "cpu" else None):
        torch.manual_seed(seed)
        adapted = attach_adapter(load_base(model, device=device), lora, dropout=lora.dropout)
    if model.gradient_checkpointing:
        adapted.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        adapted.enable_input_require_grads()
    return adapted


def adapter_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return copies of the adapter's parameters by layout name, on the CPU."""
    return {name: parameter.detach().cpu().clone() for name, parameter in adapter_parameters(model).items()}


def set_adapter(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copy weights into the adapter, by layout name."""
    with torch.no_grad():
        for name, parameter in adapter_parameters(model).items():
            parameter.copy_(weights[name])


def train_on_rows(
    model: PeftModel, row_ids: Sequence[str], samples: Sequence[Sample], settings: FineTuningConfig, seed: int
) -> list[float]:
    """Fine-tune the adapter on rows: the mean over a step's samples of each one's token-mean cross-entropy.

    Args:
        model: From `fresh_model`; changed in place.
        row_ids, samples: One each; the order of training depends on the ids and the seed, not on the order given.
        settings: Epochs, rates, batches.
        seed: Orders the rows and draws dropout.

    Returns:
        The mean loss of every epoch, nats.

    Raises:
        DataError: There is no row.
        NonFiniteError: The loss became NaN or infinite.
    """

    def losses(places: Sequence[int]) -> Tensor:
        return sample_values(model, pad_batch([samples[i] for i in places], device=_device(model)), "mean_loss")

    return _train(model, row_ids, [len(sample.input_ids) for sample in samples], settings, seed, losses)


def train_on_pairs(
    model: PeftModel, pair_ids: Sequence[str], pairs: Sequence[SamplePair], settings: DpoConfig, seed: int
) -> list[float]:
    """Fine-tune the adapter by DPO (arXiv:2305.18290); the reference is the model as it comes.

    Args:
        model: As in `train_on_rows`; an adapter that was trained before is part of the reference.
        pair_ids, pairs: One each, as rows there.
        settings: Beta as well.
        seed: As there.

    Returns:
        The mean DPO loss of every epoch, nats.

    Raises:
        DataError: There is no pair.
        NonFiniteError: The loss became NaN or infinite.
    """
    reference_V2 = pair_logps(model, pairs, settings.max_batch_tokens).float().to(_device(model))

    def losses(places: Sequence[int]) -> Tensor:
        sides = [side for i in places for side in pairs[i]]
        logps_B2 = sample_values(model, pad_batch(sides, device=_device(model)), "sum_logps").unflatten(0, (-1, 2))
        reference_B2 = reference_V2[list(places)]
        sides_B = (logps_B2[:, 0], logps_B2[:, 1], reference_B2[:, 0], reference_B2[:, 1])
        return dpo_loss(*sides_B, dpo_beta=settings.dpo_beta)

    # Both sides go through together, padded to the longer.
    lengths = [2 * max(len(side.input_ids) for side in pair) for pair in pairs]
    return _train(model, pair_ids, lengths, settings, seed, losses)


def pair_logps(model: nn.Module, pairs: Sequence[SamplePair], max_batch_tokens: int) -> Tensor:
    """Summed log-probabilities of both sides of every pair: [V, 2], float64, on the CPU, nats."""
    sides = [side for pair in pairs for side in pair]
    return answer_logps(model, sides, max_batch_tokens).reshape(-1, 2)


def answer_logps(model: nn.Module, samples: Sequence[Sample], max_batch_tokens: int) -> Tensor:
    """Summed log-probability of each sample's labelled tokens: [N], float64, on the CPU, nats. Dropout is off."""
    logps_N = torch.zeros(len(samples), dtype=torch.float64)
    with evaluating(model):
        for places in length_batches([len(sample.input_ids) for sample in samples], max_batch_tokens):
            batch = pad_batch([samples[i] for i in places], device=_device(model))
            logps_N[places] = sample_values(model, batch, "sum_logps").double().cpu()
    return logps_N


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """No gradients and no dropout; the mode the model was in comes back."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def _train(
    model: PeftModel,
    ids: Sequence[str],
    lengths: Sequence[int],
    settings: FineTuningConfig,
    seed: int,
    losses: Callable[[Sequence[int]], Tensor],
) -> list[float]:
    if not ids:
        raise DataError("fine-tuning: there is no row to train on. Look at the budget and at `model.max_tokens`.")
    parameters = list(adapter_parameters(model).values())
    optimizer = torch.optim.AdamW(
        parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay, foreach=False
    )
    sums, counts = [0.0] * settings.epochs, [0] * settings.epochs
    model.train()
    on_gpu = _device(model).type == "cuda"
    # The caller's random numbers go on as if nothing had been trained.
    with torch.random.fork_rng(devices=None if on_gpu else []):
        for number, step in enumerate(_steps(ids, lengths, settings, seed), start=1):
            torch.manual_seed(1_000_003 * seed + number)  # dropout's own stream, whatever ran before
            for group in optimizer.param_groups:
                group["lr"] = step.learning_rate
            optimizer.zero_grad()
            total = 0.0
            for micro_batch in step.micro_batches[0]:
                losses_B = losses(micro_batch.rows)
                (losses_B.sum() / step.num_samples).backward()
                total += losses_B.detach().double().sum().item()
            if not abs(total) < float("inf"):
                raise NonFiniteError(
                    f"fine-tuning: the loss of step {number} is {total}. Lower `evaluation.training.learning_rate` "
                    "(or that of `evaluation.dpo`), or look at the base model's weights and `model.dtype`."
                )
            torch.nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm, foreach=False)
            optimizer.step()
            sums[step.epoch - 1] += total
            counts[step.epoch - 1] += step.num_samples
    model.eval()
    return [total / count for total, count in zip(sums, counts, strict=True)]


def _steps(ids: Sequence[str], lengths: Sequence[int], settings: FineTuningConfig, seed: int) -> list[TrainingStep]:
    return plan_training(
        ids,
        lengths,
        epochs=settings.epochs,
        batch_size=settings.batch_size,
        max_batch_tokens=settings.max_batch_tokens,
        num_workers=1,
        learning_rate=settings.learning_rate,
        warmup_ratio=settings.warmup_ratio,
        seed=seed,
    )


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
