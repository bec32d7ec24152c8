"""What a selection is worth: fine-tune the base on it, and on as many random rows, and look at held-out pairs.

Plain torch, transformers and PEFT, sharing no training code with the job, so that it can disagree with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from rose_ray.data.batches import length_batches
from rose_ray.data.tokenize import Sample
from rose_ray.kernels.losses import sequence_logps, sft_loss
from rose_ray.model.batch import pad_batch

MAX_BATCH_TOKENS = 4096


@dataclass(frozen=True)
class FineTuning:
    """How the base is fine-tuned; the same for every set of rows.

    Attributes:
        num_steps: Optimizer steps.
        batch_size: Rows of a step.
        learning_rate: Peak; falls linearly to 0.
        rank: Of the LoRA adapters on q, k, v, o.
        alpha: Their scale times ``rank``.
    """

    num_steps: int = 30
    batch_size: int = 16
    learning_rate: float = 1e-3
    rank: int = 8
    alpha: int = 32


@dataclass(frozen=True)
class HeldOutReward:
    """How far a fine-tuned model leans towards the chosen answers.

    Attributes:
        margin: Mean over the pairs of (logp_w - logref_w) - (logp_l - logref_l), nats; logp are sums over an
            answer's tokens, the reference is the base. The implicit reward margin of DPO over its beta.
        accuracy: Share of the pairs whose margin is above 0.
    """

    margin: float
    accuracy: float


@dataclass(frozen=True)
class Comparison:
    """Outcome of fine-tuning on a selection and on random rows of the same number.

    Attributes:
        selected: After training on the selection.
        random: After training on each random draw.
    """

    selected: HeldOutReward
    random: tuple[HeldOutReward, ...]

    @property
    def random_margin(self) -> float:
        """Mean margin over the random draws, nats."""
        return sum(reward.margin for reward in self.random) / len(self.random)

    @property
    def random_accuracy(self) -> float:
        """Mean accuracy over the random draws."""
        return sum(reward.accuracy for reward in self.random) / len(self.random)


def compare_selection(
    base: Path,
    selection: Sequence[Sample],
    pool: Sequence[Sample],
    held_out: Sequence[tuple[Sample, Sample]],
    *,
    num_draws: int = 2,
    seed: int = 0,
    settings: FineTuning | None = None,
) -> Comparison:
    """Fine-tune the base on the selection and on random rows, and measure both on held-out pairs.

    Args:
        base: Folder of the base model.
        selection: Selected rows.
        pool: All rows that could have been selected.
        held_out: Chosen and rejected sample of each pair; only the answers carry loss.
        num_draws: Number of random sets of ``len(selection)`` rows, at least 1.
        seed: Draws them, orders all rows and starts the adapters.
        settings: Training settings; None means the defaults.

    Returns:
        The rewards. Same arguments, same result on the same machine with the same number of threads.
    """
    settings = settings or FineTuning()
    sides = [side for pair in held_out for side in pair]
    reference = _answer_logps(_load(base), sides)

    def reward(rows: Sequence[Sample]) -> HeldOutReward:
        gains = _answer_logps(_fine_tuned(base, rows, seed, settings), sides) - reference
        margins = gains[0::2] - gains[1::2]
        return HeldOutReward(margins.mean().item(), (margins > 0).double().mean().item())

    draws = [Random(f"draw {seed} {i}").sample(pool, len(selection)) for i in range(num_draws)]
    return Comparison(reward(selection), tuple(reward(rows) for rows in draws))


def _load(base: Path) -> nn.Module:
    model: nn.Module = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return model


def _fine_tuned(base: Path, rows: Sequence[Sample], seed: int, settings: FineTuning) -> nn.Module:
    lora = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=0.0,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: nn.Module = get_peft_model(_load(base), lora)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=settings.learning_rate, weight_decay=0.0)
    model.train()
    for step, batch in enumerate(_row_batches(rows, seed, settings)):
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * (1 - step / settings.num_steps)
        optimizer.zero_grad()
        inputs = pad_batch(batch)
        loss = sft_loss(_logits(model, inputs.input_ids, inputs.attention_mask), inputs.input_ids, inputs.loss_mask)
        loss.mean().backward()
        optimizer.step()
    return model


def _row_batches(rows: Sequence[Sample], seed: int, settings: FineTuning) -> list[list[Sample]]:
    rng = Random(f"order {seed}")
    order: list[Sample] = []
    while len(order) < settings.num_steps * settings.batch_size:
        order += rng.sample(rows, len(rows))
    size = settings.batch_size
    return [order[start : start + size] for start in range(0, settings.num_steps * size, size)]


def _answer_logps(model: nn.Module, samples: Sequence[Sample]) -> Tensor:
    """Return the summed log-probability of each sample's labelled tokens, float64."""
    model.eval()
    logps = torch.zeros(len(samples), dtype=torch.float64)
    with torch.no_grad():
        for batch in length_batches([len(sample.input_ids) for sample in samples], MAX_BATCH_TOKENS):
            inputs = pad_batch([samples[i] for i in batch])
            logits = _logits(model, inputs.input_ids, inputs.attention_mask)
            logps[batch] = sequence_logps(logits, inputs.input_ids, inputs.loss_mask).double()
    return logps


def _logits(model: nn.Module, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    logits: Tensor = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits
    return logits
