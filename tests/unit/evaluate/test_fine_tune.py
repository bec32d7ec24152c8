"""Fine-tuning against steps written out, and what must not matter to it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from rose_ray.config.evaluation import DpoConfig, FineTuningConfig
from rose_ray.config.model import LoraConfig, ModelConfig
from rose_ray.data.tokenize import Sample
from rose_ray.errors import DataError, NonFiniteError
from rose_ray.evaluate.fine_tune import (
    adapter_weights,
    answer_logps,
    fresh_model,
    pair_logps,
    set_adapter,
    train_on_pairs,
    train_on_rows,
)
from rose_ray.kernels.losses import dpo_loss, sequence_logps, sft_loss
from rose_ray.stages.warmup import seeded_order
from tests.tiny import make_samples

LORA = LoraConfig(rank=4, alpha=8.0, dropout=0.0, target_modules=["q_proj", "v_proj"])
SETTINGS = FineTuningConfig(epochs=2, learning_rate=1e-2, warmup_ratio=0.0, batch_size=3)
FLOAT32_STEPS = 2e-5  # a few Adam steps of 1e-2; one large relative error of a small second moment shows as this
IDS = [f"row-{number}" for number in range(5)]


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    return make_samples([9, 14, 6, 20, 11], 300, seed=3)


def model_of(base_folder: str, seed: int = 0, lora: LoraConfig = LORA) -> torch.nn.Module:
    return fresh_model(ModelConfig(base=base_folder, dtype="float32"), lora, seed)


def inputs(sample: Sample) -> tuple[Tensor, Tensor]:
    return torch.tensor(sample.input_ids)[None], torch.tensor(sample.loss_mask)[None]


def plain_steps(model: torch.nn.Module, ids: list[str], settings: FineTuningConfig, losses: list) -> None:  # type: ignore[type-arg]
    """One row at a time, the rate falling in a straight line."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.0)
    steps = []
    for epoch in range(1, settings.epochs + 1):
        order = seeded_order(ids, f"epoch-0-{epoch}")
        steps += [order[i : i + settings.batch_size] for i in range(0, len(order), settings.batch_size)]
    for number, rows in enumerate(steps):
        optimizer.param_groups[0]["lr"] = settings.learning_rate * (1 - number / len(steps))
        optimizer.zero_grad()
        (sum(losses[ids.index(row)]() for row in rows) / len(rows)).backward()
        torch.nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm)
        optimizer.step()


def same(first: dict[str, Tensor], second: dict[str, Tensor], tolerance: float) -> bool:
    return all(torch.allclose(first[name], second[name], rtol=0, atol=tolerance) for name in first)


def test_rows_take_the_steps_written_out(base_folder: str, samples: list[Sample]) -> None:
    model = model_of(base_folder)
    plain = copy.deepcopy(model)
    losses = train_on_rows(model, IDS, samples, SETTINGS, seed=0)  # type: ignore[arg-type]

    def loss(sample: Sample):  # type: ignore[no-untyped-def]
        ids, mask = inputs(sample)
        return lambda: sft_loss(plain(input_ids=ids).logits, ids, mask).sum()

    plain_steps(plain, IDS, SETTINGS, [loss(sample) for sample in samples])
    assert same(adapter_weights(model), adapter_weights(plain), FLOAT32_STEPS)
    assert len(losses) == 2 and losses[1] < losses[0]


def test_pairs_take_the_steps_written_out(base_folder: str, samples: list[Sample]) -> None:
    pairs = [(samples[i], samples[(i + 1) % 5]) for i in range(5)]
    settings = DpoConfig(epochs=2, learning_rate=1e-2, warmup_ratio=0.0, batch_size=2, dpo_beta=0.2)
    model = model_of(base_folder)
    plain, reference = copy.deepcopy(model), copy.deepcopy(model)
    losses = train_on_pairs(model, IDS, pairs, settings, seed=0)  # type: ignore[arg-type]

    def logp(which: torch.nn.Module, sample: Sample) -> Tensor:
        ids, mask = inputs(sample)
        return sequence_logps(which(input_ids=ids).logits, ids, mask)

    def loss(pair: tuple[Sample, Sample]):  # type: ignore[no-untyped-def]
        with torch.no_grad():
            fixed = [logp(reference, side) for side in pair]
        return lambda: dpo_loss(*(logp(plain, side) for side in pair), *fixed, 0.2).sum()

    plain_steps(plain, IDS, settings, [loss(pair) for pair in pairs])
    assert same(adapter_weights(model), adapter_weights(plain), FLOAT32_STEPS)
    assert losses[1] < losses[0]


def test_the_order_given_and_the_batches_do_not_matter(base_folder: str, samples: list[Sample]) -> None:
    first, second = model_of(base_folder), model_of(base_folder)
    train_on_rows(first, IDS, samples, SETTINGS, seed=4)  # type: ignore[arg-type]
    small = SETTINGS.model_copy(update={"max_batch_tokens": 8})
    train_on_rows(second, IDS[::-1], samples[::-1], small, seed=4)  # type: ignore[arg-type]
    assert same(adapter_weights(first), adapter_weights(second), FLOAT32_STEPS)


def test_a_seed_repeats_a_training_and_another_differs(base_folder: str, samples: list[Sample]) -> None:
    lora = LORA.model_copy(update={"dropout": 0.3})
    trained = []
    for seed in (1, 1, 2):
        torch.rand(seed + 3)  # what the process drew before does not matter
        model = model_of(base_folder, seed, lora)
        before = torch.get_rng_state()
        train_on_rows(model, IDS, samples, SETTINGS, seed)  # type: ignore[arg-type]
        assert torch.equal(before, torch.get_rng_state())
        trained.append(adapter_weights(model))
    assert same(trained[0], trained[1], 0.0) and not same(trained[0], trained[2], 1e-3)


def test_weights_go_back_in(base_folder: str, samples: list[Sample]) -> None:
    model, other = model_of(base_folder, 1), model_of(base_folder, 2)
    train_on_rows(model, IDS, samples, SETTINGS, seed=0)  # type: ignore[arg-type]
    set_adapter(other, adapter_weights(model))
    assert torch.equal(answer_logps(model, samples, 64), answer_logps(other, samples, 64))


def test_log_probabilities_do_not_depend_on_batches(base_folder: str, samples: list[Sample]) -> None:
    model = model_of(base_folder, lora=LORA.model_copy(update={"dropout": 0.5}))
    model.train()
    pairs = [(samples[0], samples[1]), (samples[2], samples[3])]
    whole, alone = pair_logps(model, pairs, 10_000), pair_logps(model, pairs, 1)
    # float32 sums of up to 15 log-probabilities of order 10, in another order
    assert torch.allclose(whole, alone, rtol=0, atol=1e-3) and whole.dtype == torch.float64
    assert model.training


def test_refusals(base_folder: str, samples: list[Sample]) -> None:
    with pytest.raises(DataError, match="no row to train on"):
        train_on_rows(model_of(base_folder), [], [], SETTINGS, 0)  # type: ignore[arg-type]
    broken = model_of(base_folder)
    set_adapter(broken, {name: torch.full_like(each, torch.nan) for name, each in adapter_weights(broken).items()})
    with pytest.raises(NonFiniteError, match=r"loss of step 1 is nan\. Lower `evaluation.training.learning_rate`"):
        train_on_rows(broken, IDS, samples, SETTINGS, 0)  # type: ignore[arg-type]
