"""Gradients of a whole batch at once are those of autograd, one sample at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from rose_ray.config.model import LoraConfig, ModelConfig
from rose_ray.distributed.engine import load_scoring_model
from rose_ray.model.batch import pack_batch, pad_batch
from rose_ray.model.layout import layout_of
from rose_ray.model.scoring import ScoringModel
from rose_ray.model.values import Reduction
from tests import oracles
from tests.tiny import ARCHITECTURES, make_samples

FLOAT64 = 1e-12
"""Of a sample's gradient length: float64 rounding (2e-16) through a few hundred sums in another order."""

FLOAT32 = 2e-5
"""The same in float32 (6e-8) with sums of up to 40 tokens, and softmax over 360 logits."""

LORA = LoraConfig(rank=4, alpha=8.0, dropout=0.1, target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "up_proj"])
LENGTHS = (31, 6, 40, 17, 5, 24)
BATCHES = ([[0, 1, 2, 3, 4, 5]], [[5, 3], [0], [4, 2, 1]], [[0], [1], [2], [3], [4], [5]])
VOCABULARY = 330


def _model(base: str, dtype: torch.dtype = torch.float64, **settings: Any) -> ScoringModel:
    config = ModelConfig(base=base, dtype="float32", loader="plain", **settings)
    return load_scoring_model(config, LORA, device="cpu", dtype=dtype)


def _gradients(model: ScoringModel, batches: list[list[int]], reduction: Reduction) -> tuple[Tensor, Tensor]:
    """Values and gradients [N, P] of all samples, however they are batched."""
    samples = make_samples(LENGTHS, VOCABULARY)
    layout = layout_of(model.module)
    grads = torch.zeros(len(samples), layout.num_parameters, dtype=torch.float64)
    values = torch.zeros(len(samples), dtype=torch.float64)
    for indices in batches:
        kept, consume = oracles.collect(list(layout.offsets))
        values[indices] = model.backward_per_sample(
            pad_batch([samples[i] for i in indices]), reduction, consume
        ).double()
        grads[indices] = oracles.rows_of(kept)
    return values, grads


def _one_by_one(base: str, adapter: oracles.Named, reduction: Reduction) -> tuple[Tensor, Tensor]:
    model = oracles.peft_model(base, **oracles.lora_settings(LORA), dtype=torch.float64)
    oracles.set_adapter(model, adapter)
    samples = [(s.input_ids, s.loss_mask) for s in make_samples(LENGTHS, VOCABULARY)]
    values, grads = zip(*(oracles.gradient(model, sample, reduction) for sample in samples), strict=True)
    return torch.stack(values), torch.stack([oracles.flat(named) for named in grads])


def _error(found: Tensor, expected: Tensor) -> float:
    """Largest distance of a row from its oracle, as a share of the oracle's length."""
    return float(((found - expected).norm(dim=1) / expected.norm(dim=1)).max())


@pytest.fixture(scope="module")
def adapter(base_folder: str) -> oracles.Named:
    model = oracles.peft_model(base_folder, **oracles.lora_settings(LORA), dtype=torch.float64)
    return oracles.random_adapter(model, seed=3)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("reduction", ["mean_loss", "sum_logps"])
@pytest.mark.parametrize("merge_adapter", ["auto", "never"])
def test_batched_gradients_are_those_of_autograd(
    architecture: str, reduction: Reduction, merge_adapter: str, base_of: Callable[[str], str], adapter: oracles.Named
) -> None:
    base = base_of(architecture)
    expected_values, expected = _one_by_one(base, adapter, reduction)
    assert expected.norm(dim=1).min() > 0.01
    for checkpointing in (False, True):
        model = _model(base, gradient_checkpointing=checkpointing, merge_adapter=merge_adapter)
        model.load_adapter(adapter)
        for batches in BATCHES:
            values, grads = _gradients(model, batches, reduction)
            torch.testing.assert_close(values, expected_values, rtol=FLOAT64, atol=0)
            assert _error(grads, expected) < FLOAT64


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("merge_adapter", ["auto", "never"])
def test_float32_models_agree_with_the_float64_oracle(
    attention: str, merge_adapter: str, base_folder: str, adapter: oracles.Named
) -> None:
    _, expected = _one_by_one(base_folder, adapter, "mean_loss")
    model = _model(base_folder, torch.float32, attention=attention, merge_adapter=merge_adapter)
    model.load_adapter(adapter)
    for batches in BATCHES:
        assert _error(_gradients(model, batches, "mean_loss")[1], expected) < FLOAT32


def test_every_adapter_parameter_comes_once_a_backward_pass_in_the_layout_s_shape(base_folder: str) -> None:
    model = _model(base_folder)
    layout = layout_of(model.module)
    kept, consume = oracles.collect(list(layout.offsets))
    model.backward_per_sample(pad_batch(make_samples((9, 5), VOCABULARY)), "mean_loss", consume)
    assert {name: tuple(g.shape[1:]) for name, g in kept.items()} == dict(layout.shapes)


def test_padding_tokens_do_not_matter(base_folder: str, adapter: oracles.Named) -> None:
    model = _model(base_folder)
    model.load_adapter(adapter)
    batch = pad_batch(make_samples(LENGTHS, VOCABULARY))
    other_ids = torch.where(batch.attention_mask == 0, 77, batch.input_ids)
    grads = []
    for ids in (batch.input_ids, other_ids):
        kept, consume = oracles.collect(list(layout_of(model.module).offsets))
        model.backward_per_sample(type(batch)(ids, batch.attention_mask, batch.loss_mask), "mean_loss", consume)
        grads.append(oracles.rows_of(kept))
    assert torch.equal(*grads)


def test_gradients_do_not_pile_up(base_folder: str, adapter: oracles.Named) -> None:
    model = _model(base_folder)
    model.load_adapter(adapter)
    first, again = (_gradients(model, BATCHES[1], "mean_loss")[1] for _ in range(2))
    assert torch.equal(first, again)
    assert all(parameter.grad is None for parameter in model.module.parameters())


@pytest.mark.parametrize("architecture", ["llama", "mistral"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("merge_adapter", ["auto", "never"])
def test_packed_samples_do_not_see_each_other(
    architecture: str, attention: str, merge_adapter: str, base_of: Callable[[str], str], adapter: oracles.Named
) -> None:
    base = base_of(architecture)
    _, expected = _one_by_one(base, adapter, "mean_loss")
    model = _model(base, attention=attention, merge_adapter=merge_adapter)
    model.load_adapter(adapter)
    samples = make_samples(LENGTHS, VOCABULARY)
    kept, consume = oracles.collect(list(layout_of(model.module).offsets))
    model.backward_per_sample(pack_batch(samples), "mean_loss", consume)
    # transformers' eager attention takes its softmax in float32
    assert _error(oracles.rows_of(kept).double(), expected) < (FLOAT64 if attention == "sdpa" else FLOAT32)


@pytest.mark.parametrize("merge_adapter", ["auto", "never"])
def test_nothing_runs_backward_below_the_lowest_adapter(
    merge_adapter: str, base_folder: str, adapter: oracles.Named
) -> None:
    model = _model(base_folder, torch.float32, merge_adapter=merge_adapter)
    model.load_adapter(adapter)
    layers = model.module.get_submodule("base_model.model.model.layers")
    seen: list[bool] = []

    def note(module: object, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        seen.append(inputs[0].requires_grad)

    layers[0].self_attn.q_proj.register_forward_hook(note)  # type: ignore[index, union-attr, operator]
    layers[1].register_forward_hook(note)  # type: ignore[index, operator]
    model.backward_per_sample(pad_batch(make_samples((9, 5), VOCABULARY)), "mean_loss", lambda name, grads: None)
    assert seen == [False, True]
