"""Batches, values of samples, and what the scoring model does besides gradients."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    FalconConfig,
    MixtralConfig,
    OPTConfig,
    PreTrainedConfig,
)

from rose_ray.config.model import LoraConfig, ModelConfig
from rose_ray.data.tokenize import Sample
from rose_ray.errors import ModelError
from rose_ray.model.base import attach_adapter, load_base
from rose_ray.model.batch import pad_batch
from rose_ray.model.layout import adapter_parameters
from rose_ray.model.scoring import ScoringModel
from rose_ray.model.values import sample_values
from tests import oracles
from tests.tiny import make_samples

FLOAT64 = 1e-12
"""Relative: sums of a few dozen log-probabilities in another order."""

LORA = LoraConfig(rank=2, alpha=4.0, dropout=0.1, target_modules=["q_proj", "v_proj"])
SAMPLES = make_samples((12, 5, 21), 330)


def _peft(base: str, dtype: torch.dtype = torch.float64, dropout: float = 0.0) -> Any:
    return attach_adapter(load_base(ModelConfig(base=base), dtype=dtype), LORA, dropout=dropout)


@pytest.fixture(scope="module")
def adapters(base_folder: str) -> list[oracles.Named]:
    """Three adapters of the model's shapes."""
    model = _peft(base_folder)
    return [oracles.random_adapter(model, seed) for seed in range(3)]


def test_padding_goes_to_the_right_and_is_masked() -> None:
    batch = pad_batch([Sample([7, 8, 9], [False, True, True]), Sample([5], [False])])
    assert batch.input_ids.tolist() == [[7, 8, 9], [5, 0, 0]]
    assert batch.attention_mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch.loss_mask.tolist() == [[False, True, True], [False, False, False]]
    assert (batch.input_ids.dtype, batch.loss_mask.dtype) == (torch.int64, torch.bool)


def test_values_are_those_of_one_sequence_at_a_time(base_folder: str, adapters: list[oracles.Named]) -> None:
    model = _peft(base_folder).eval()
    oracles.set_adapter(model, adapters[0])
    with torch.no_grad():
        batch = pad_batch(SAMPLES)
        for reduction, oracle in (("mean_loss", oracles.mean_loss), ("sum_logps", oracles.sum_logps)):
            expected = torch.stack([oracle(model, (s.input_ids, s.loss_mask)) for s in SAMPLES])
            found = sample_values(model, batch, reduction)  # type: ignore[arg-type]
            torch.testing.assert_close(found, expected, rtol=FLOAT64, atol=0)


def test_a_labelled_first_token_has_no_log_probability(base_folder: str) -> None:
    model = _peft(base_folder).eval()
    samples = [Sample([9, 8, 7], [first, True, False]) for first in (True, False)]
    with torch.no_grad():
        values = sample_values(model, pad_batch(samples), "mean_loss")
    assert values[0] == values[1]


def test_models_that_cannot_restrict_logits_give_the_same_values() -> None:
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.embed, self.head = nn.Embedding(330, 8), nn.Linear(8, 330)

        def forward(self, input_ids: torch.Tensor) -> Any:
            logits = self.head(self.embed(input_ids).cumsum(1))
            return type("Output", (), {"logits": logits})

    model = Bare().double()
    expected = []
    for sample in SAMPLES:
        logps = model(torch.tensor([sample.input_ids])).logits[0].log_softmax(-1)
        labelled = [i for i in range(1, len(sample.input_ids)) if sample.loss_mask[i]]
        expected.append(sum(logps[i - 1, sample.input_ids[i]] for i in labelled))
    torch.testing.assert_close(
        sample_values(model, pad_batch(SAMPLES), "sum_logps"), torch.stack(expected), rtol=FLOAT64, atol=0
    )


def test_everything_is_frozen_and_the_adapter_slot_takes_one_adapter_after_another(
    base_folder: str, adapters: list[oracles.Named]
) -> None:
    model = ScoringModel(_peft(base_folder), "cpu")
    assert not any(p.requires_grad for p in model.module.parameters()) and not model.module.training
    addresses = {name: p.data_ptr() for name, p in adapter_parameters(model.module).items()}
    values = []
    for seed in (1, 2, 1):
        model.load_adapter(adapters[seed])
        values.append(model.sample_values(pad_batch(SAMPLES), "mean_loss").detach())
        for name, parameter in adapter_parameters(model.module).items():
            assert torch.equal(parameter, adapters[seed][name].double()) and parameter.data_ptr() == addresses[name]
    assert torch.equal(values[0], values[2]) and not torch.equal(values[0], values[1])


def test_without_the_adapter_it_is_the_base_model(base_folder: str, adapters: list[oracles.Named]) -> None:
    model = ScoringModel(_peft(base_folder), "cpu")
    model.load_adapter(adapters[0])
    batch = pad_batch(SAMPLES)
    with torch.no_grad():
        with model.without_adapter():
            inside = model.sample_values(batch, "sum_logps")
        base = sample_values(load_base(ModelConfig(base=base_folder), dtype=torch.float64), batch, "sum_logps")
        after = model.sample_values(batch, "sum_logps")
    torch.testing.assert_close(inside, base, rtol=FLOAT64, atol=0)
    assert (after - inside).abs().min() > 1e-3


def test_the_adapter_stays_frozen_once_it_was_left_out(base_folder: str) -> None:
    model = ScoringModel(_peft(base_folder), "cpu")
    with pytest.raises(ValueError, match="inside"), model.without_adapter():
        raise ValueError("inside")
    model.backward_per_sample(pad_batch(SAMPLES), "mean_loss", lambda name, grads: None)
    assert not any(p.requires_grad or p.grad is not None for p in model.module.parameters())


@pytest.mark.parametrize("checkpointed", [False, True])
def test_checkpointing_recomputes_activations_without_dropout(
    checkpointed: bool, base_folder: str, adapters: list[oracles.Named]
) -> None:
    peft_model = _peft(base_folder, dropout=0.5)
    peft_model.get_submodule("base_model.model.model.layers.0.self_attn").attention_dropout = 0.5
    if checkpointed:
        peft_model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model = ScoringModel(peft_model, "cpu", checkpointed=checkpointed)
    model.load_adapter(adapters[0])
    first, second = (
        model.backward_per_sample(pad_batch(SAMPLES), "mean_loss", lambda name, grads: None) for _ in range(2)
    )
    assert torch.equal(first, second)
    if checkpointed:
        assert _num_saved(model) < _num_saved(ScoringModel(_peft(base_folder), "cpu"))


SMALL: dict[str, Any] = {"vocab_size": 330, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.mark.parametrize(
    ("config", "targets"),
    [
        (OPTConfig(ffn_dim=32, word_embed_proj_dim=16, dropout=0.5, layerdrop=0.5, **SMALL), ["q_proj", "v_proj"]),
        (FalconConfig(hidden_dropout=0.5, attention_dropout=0.5, **SMALL), ["query_key_value"]),
        (
            MixtralConfig(intermediate_size=32, num_key_value_heads=2, router_jitter_noise=0.5, **SMALL),
            ["q_proj", "v_proj"],
        ),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_layers_that_recompute_leave_nothing_to_chance(config: PreTrainedConfig, targets: list[str]) -> None:
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(config)
    base.config.use_cache = False
    lora = LoraConfig(rank=2, alpha=4.0, target_modules=targets)

    num_saved = 0

    def values(checkpointed: bool) -> list[torch.Tensor]:
        nonlocal num_saved
        torch.manual_seed(1)
        adapted: Any = attach_adapter(copy.deepcopy(base), lora, dropout=0.5)
        if checkpointed:
            adapted.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        adapted.train()
        model = ScoringModel(adapted, "cpu", checkpointed=checkpointed)
        found, norms = [], []
        for _ in range(2):
            grads: list[torch.Tensor] = []
            batch = pad_batch(SAMPLES)
            found.append(model.backward_per_sample(batch, "mean_loss", lambda name, each, g=grads: g.append(each)))
            norms.append(torch.stack([each.square().sum() for each in grads]))
        assert torch.equal(*found) and torch.equal(*norms)
        if checkpointed:
            assert _num_saved(model) < num_saved
        else:
            num_saved = _num_saved(model)
        model.close()
        assert all(part.training for part in adapted.modules())
        return [found[0], norms[0]]

    whole, recomputed = values(checkpointed=False), values(checkpointed=True)
    torch.testing.assert_close(recomputed, whole, rtol=0, atol=0)  # the same operations
    torch.manual_seed(1)
    with pytest.raises(ModelError, match="gradient_checkpointing_enable was not called"):
        ScoringModel(attach_adapter(copy.deepcopy(base), lora, dropout=0.5), "cpu", checkpointed=True)


def _num_saved(model: ScoringModel) -> int:
    """Numbers that autograd keeps for the backward pass."""
    total = 0

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal total
        total += tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.backward_per_sample(pad_batch(SAMPLES), "mean_loss", lambda name, grads: None)
    return total


def test_values_are_known_before_backward(base_folder: str) -> None:
    model = ScoringModel(_peft(base_folder), "cpu")
    order: list[Any] = []
    values = model.backward_per_sample(
        pad_batch(SAMPLES), "mean_loss", lambda name, grads: order.append(name), lambda found: order.append(found)
    )
    assert torch.equal(order[0], values) and not values.requires_grad
    assert sorted(order[1:]) == sorted(adapter_parameters(model.module))


def test_a_half_precision_base_gives_float32_gradients(base_folder: str, adapters: list[oracles.Named]) -> None:
    model = ScoringModel(_peft(base_folder, torch.bfloat16), "cpu")
    model.load_adapter(adapters[0])
    kept, consume = oracles.collect(list(adapter_parameters(model.module)))
    values = model.backward_per_sample(pad_batch(SAMPLES), "mean_loss", consume)
    assert values.dtype == torch.float32
    assert {grads.dtype for grads in kept.values()} == {torch.float32}
    exact = _peft(base_folder).eval()
    oracles.set_adapter(exact, adapters[0])
    for row, sample in zip(oracles.rows_of(kept), SAMPLES, strict=True):
        expected = oracles.flat(oracles.gradient(exact, (sample.input_ids, sample.loss_mask), "mean_loss")[1], kept)
        assert oracles.cosine(row, expected) > 0.99  # bfloat16 has 8 bits
