"""Models that do something to their logits give the values and gradients of their own whole logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, CohereConfig, Gemma2Config, GraniteConfig, PretrainedConfig

from rose_ray.config.model import LoraConfig
from rose_ray.kernels.logit_shape import LogitShape
from rose_ray.model import values
from rose_ray.model.base import attach_adapter
from rose_ray.model.batch import pad_batch
from rose_ray.model.layout import adapter_parameters
from rose_ray.model.scoring import ScoringModel
from tests import oracles
from tests.tiny import make_samples

ROUNDING = 1e-6
"""Relative, of values and of gradients' lengths: these models take norms and attention weights in float32 (6e-8),
whatever their own type."""

SAMPLES = make_samples((12, 5, 21), 330)
SIZES: dict[str, Any] = {
    "vocab_size": 330,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    # Large weights, so that logits are large and what is done to them tells.
    "initializer_range": 0.5,
}
MODELS: dict[str, tuple[PretrainedConfig, LogitShape]] = {
    "gemma2": (Gemma2Config(**SIZES, final_logit_softcapping=3.0), LogitShape(1.0, 3.0)),
    "cohere": (CohereConfig(**SIZES, logit_scale=0.3), LogitShape(0.3)),
    "granite": (GraniteConfig(**SIZES, logits_scaling=6.0), LogitShape(1 / 6)),
}
LORA = LoraConfig(rank=2, alpha=4.0, dropout=0.0, target_modules=["q_proj", "v_proj"])


def peft_model(name: str, dropout: float = 0.0) -> Any:
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(MODELS[name][0], attn_implementation="eager", dtype=torch.float64)
    model = attach_adapter(base, LORA, dropout=dropout)
    oracles.set_adapter(model, oracles.random_adapter(model, 1))
    return model


@pytest.mark.parametrize("name", list(MODELS))
@pytest.mark.parametrize("reduction", ["mean_loss", "sum_logps"])
def test_values_and_gradients_are_those_of_the_model_s_own_logits(
    name: str, reduction: values.Reduction, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = peft_model(name)
    expected = [oracles.gradient(module.eval(), (s.input_ids, s.loss_mask), reduction) for s in SAMPLES]
    # A block at a time and no other way, from the first batch on.
    monkeypatch.setattr(values, "_logps_of_logits", None)
    model = ScoringModel(module, "cpu")
    for _ in range(2):
        kept, consume = oracles.collect(list(adapter_parameters(module)))
        found = model.backward_per_sample(pad_batch(SAMPLES), reduction, consume)
        torch.testing.assert_close(found, torch.stack([value for value, _ in expected]), rtol=ROUNDING, atol=0)
        for row, (_, gradient) in zip(oracles.rows_of(kept), expected, strict=True):
            flat = oracles.flat(gradient, kept)
            assert (row - flat).norm() < ROUNDING * flat.norm()
    innermost = module.get_base_model()
    shape = vars(innermost)["rose_ray_logit_shape"]
    expected_shape = MODELS[name][1]
    assert shape.scale == pytest.approx(expected_shape.scale, rel=ROUNDING)
    assert (shape.cap or 0) == pytest.approx(expected_shape.cap or 0, rel=ROUNDING)
    model.close()
    assert "rose_ray_logit_shape" not in vars(innermost)


class Shifted(torch.nn.Module):
    """Does to its logits what is neither a scale nor a cap, or alters them in place."""

    def __init__(self, *, in_place: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.in_place = in_place
        self.embed, self.head = torch.nn.Embedding(330, 8), torch.nn.Linear(8, 330)
        self.passes = 0

    def get_output_embeddings(self) -> torch.nn.Linear:
        return self.head

    def forward(self, input_ids: torch.Tensor, **_: Any) -> Any:
        self.passes += 1
        logits = self.head(self.embed(input_ids).cumsum(1))
        logits = logits.mul_(0.5) if self.in_place else logits - 0.1 * logits**2
        return type("Output", (), {"logits": logits})


@pytest.mark.parametrize("in_place", [False, True])
def test_no_alteration_is_missed(in_place: bool, caplog: pytest.LogCaptureFixture) -> None:
    model = Shifted(in_place=in_place).double()
    with torch.no_grad(), caplog.at_level("INFO"):
        expected = torch.stack([oracles.sum_logps(model, (s.input_ids, s.loss_mask)) for s in SAMPLES])
        found = [values.sample_values(model, pad_batch(SAMPLES), "sum_logps") for _ in range(2)]
    for each in found:
        torch.testing.assert_close(each, expected, rtol=ROUNDING, atol=0)
    said = [record.message for record in caplog.records if "Shifted alters its logits" in record.message]
    assert len(said) == (0 if in_place else 1)
    # Once to see that they are altered, once to see how, then once a batch.
    assert model.passes == len(SAMPLES) + 4


def test_a_look_that_ran_out_of_memory_is_taken_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_room(*_: Any) -> None:
        raise torch.OutOfMemoryError("no room")

    model = Shifted(in_place=False).double()
    with torch.no_grad():
        expected = torch.stack([oracles.sum_logps(model, (s.input_ids, s.loss_mask)) for s in SAMPLES])
        with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError):
            patch.setattr(values, "_probed_shape", no_room)
            values.sample_values(model, pad_batch(SAMPLES), "sum_logps")
        found = values.sample_values(model, pad_batch(SAMPLES), "sum_logps")
    torch.testing.assert_close(found, expected, rtol=ROUNDING, atol=0)


def test_dropout_goes_on_as_if_nothing_had_been_looked_at() -> None:
    drawn = []
    for looked_at in (False, True):
        module = peft_model("granite", dropout=0.5).train()
        if looked_at:
            with torch.random.fork_rng():
                values.sample_values(module, pad_batch(SAMPLES), "mean_loss")
        torch.manual_seed(5)
        drawn.append(values.sample_values(module, pad_batch(SAMPLES), "mean_loss").detach())
    assert torch.equal(*drawn)
