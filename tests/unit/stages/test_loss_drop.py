"""The short training on a target against autograd and torch's own optimizer, and the drop of losses after it."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from rose_ray.config.model import LoraConfig, ModelConfig
from rose_ray.errors import NonFiniteError
from rose_ray.model.base import attach_adapter, load_base
from rose_ray.model.scoring import ScoringModel
from rose_ray.stages.loss_drop import TargetTraining, fresh_adapter, loss_drop_scores, train_on_target
from rose_ray.stages.warmup import learning_rate_factor, seeded_order
from tests import oracles
from tests.tiny import make_samples

LORA = LoraConfig(rank=2, alpha=4.0, target_modules=["q_proj", "v_proj"])
SAMPLES = make_samples((9, 14, 6, 20, 11), 330)
ANSWERS = make_samples((8, 11, 13), 330, seed=1)
NAMES = ["first", "second", "third"]
TRAINING = TargetTraining(3, 2, 0.02, 0.3, 0.5, seed=4, max_batch_tokens=30)
TRAINED = 1e-9
"""Six steps of Adam on float32 weights whose gradients agree to 1e-13: rounding to float32 comes out alike, except
where a weight lies on a border between two numbers."""
BATCHES = 1e-5
"""The stated bound in float32, of a drop: two losses that agree to a few parts in a million each."""


def _model(base: str, dtype: torch.dtype = torch.float64) -> ScoringModel:
    module = attach_adapter(load_base(ModelConfig(base=base), dtype=dtype), LORA, dropout=0)
    return ScoringModel(module, "cpu")


def _oracle_training(base: str) -> oracles.Named:
    model = oracles.peft_model(base, **oracles.lora_settings(LORA), dtype=torch.float64)
    parameters = oracles.trainable(model)
    weights = fresh_adapter(parameters, TRAINING.seed)
    optimizer = torch.optim.AdamW(weights.values(), lr=1.0, weight_decay=0.0)
    order = [
        [NAMES.index(name) for name in seeded_order(NAMES, f"epoch-4-{epoch}")][start : start + 2]
        for epoch in (1, 2, 3)
        for start in (0, 2)
    ]
    for step, rows in enumerate(order):
        oracles.set_adapter(model, weights)
        losses = [oracles.mean_loss(model, (ANSWERS[row].input_ids, ANSWERS[row].loss_mask)) for row in rows]
        grads = torch.autograd.grad(torch.stack(losses).mean(), list(parameters.values()))
        length = math.sqrt(sum(float(grad.square().sum()) for grad in grads))
        for weight, grad in zip(weights.values(), grads, strict=True):
            weight.grad = (grad * min(1.0, 0.5 / length)).float()
        optimizer.param_groups[0]["lr"] = 0.02 * learning_rate_factor(step, len(order), 0.3)
        optimizer.step()
    return weights


def test_training_is_that_of_autograd_and_torch_s_optimizer(base_folder: str) -> None:
    found = train_on_target(_model(base_folder), ANSWERS, NAMES, TRAINING)
    expected = _oracle_training(base_folder)
    assert found.keys() == expected.keys()
    for name, weight in found.items():
        assert weight.dtype == torch.float32
        torch.testing.assert_close(weight, expected[name], rtol=1e-6, atol=TRAINED)  # 1e-6: a last digit of float32


def test_training_follows_from_names_and_seed(base_folder: str) -> None:
    model = _model(base_folder, torch.float32)
    first = train_on_target(model, ANSWERS, NAMES, TRAINING)
    again = train_on_target(model, ANSWERS[::-1], NAMES[::-1], TRAINING)
    other = train_on_target(model, ANSWERS, NAMES, replace(TRAINING, seed=5))
    for name in first:
        assert torch.equal(first[name], again[name]) and not torch.equal(first[name], other[name])


def test_a_fresh_adapter_changes_nothing(base_folder: str) -> None:
    model = _model(base_folder)
    adapter = fresh_adapter(model.weights, 0)
    bounds = {name: 1 / math.sqrt(tensor.shape[1]) for name, tensor in adapter.items()}
    for name, tensor in adapter.items():
        assert not tensor.any() if "lora_B" in name else 0.8 * bounds[name] < tensor.abs().max() <= bounds[name]
    found = loss_drop_scores(model, SAMPLES, adapter, max_batch_tokens=60)
    np.testing.assert_array_equal(found.values_NU, np.zeros((5, 1)))


def test_drops_are_shares_of_the_base_model_s_loss(base_folder: str) -> None:
    model = _model(base_folder)
    adapter = train_on_target(model, ANSWERS, NAMES, TRAINING)
    found = loss_drop_scores(model, [*SAMPLES, *ANSWERS], adapter, max_batch_tokens=60)
    oracle = oracles.peft_model(base_folder, **oracles.lora_settings(LORA), dtype=torch.float64)
    base = load_base(ModelConfig(base=base_folder), dtype=torch.float64)
    oracles.set_adapter(oracle, adapter)
    with torch.no_grad():
        for n, sample in enumerate([*SAMPLES, *ANSWERS]):
            masked = sample.input_ids, sample.loss_mask
            before, after = float(oracles.mean_loss(base, masked)), float(oracles.mean_loss(oracle, masked))
            # 1e-11: a difference of two losses that agree to 1e-14, over a drop of a hundredth
            assert found.values_NU[n, 0] == pytest.approx((before - after) / before, rel=1e-11)
    assert (found.values_NU[5:] > 0).all(), "what it was trained on gets easier"
    assert not found.rejected


def test_a_batch_of_one_is_a_batch_of_many(base_folder: str) -> None:
    model = _model(base_folder, torch.float32)
    adapter = oracles.random_adapter(model.module, 3)
    found = [loss_drop_scores(model, SAMPLES, adapter, max_batch_tokens=bound).values_NU for bound in (1, 40, 1000)]
    for other in found[1:]:
        np.testing.assert_allclose(other, found[0], rtol=0, atol=BATCHES)


def test_what_cannot_be_trained_or_scored_says_so(base_folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = _model(base_folder, torch.float32)
    adapter = fresh_adapter(model.weights, 0)
    monkeypatch.setattr(model, "sample_values", lambda batch, reduction: torch.zeros(batch.num_samples))
    found = loss_drop_scores(model, SAMPLES[:1], adapter, max_batch_tokens=60)
    assert found.rejected == {0: ("zero_base_loss", "the base model has a loss of 0 already")}
    monkeypatch.setattr(model, "sample_values", lambda batch, reduction: torch.full((batch.num_samples,), torch.inf))
    found = loss_drop_scores(model, SAMPLES[:1], adapter, max_batch_tokens=60)
    assert found.rejected == {0: ("non_finite_loss", "inf under the model")}
    monkeypatch.undo()
    with torch.no_grad():
        model.module.get_input_embeddings().weight.fill_(torch.nan)  # type: ignore[operator]
    with pytest.raises(NonFiniteError, match="gradient of step 1 of 6 is nan"):
        train_on_target(model, ANSWERS, NAMES, TRAINING)
