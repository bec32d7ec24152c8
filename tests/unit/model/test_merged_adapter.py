"""Which layers run on weights with the adapter in them, and that they follow the adapter slot."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from rose_ray.config.model import LoraConfig, ModelConfig
from rose_ray.errors import ResourceError
from rose_ray.model.base import attach_adapter, load_base
from rose_ray.model.batch import pad_batch
from rose_ray.model.scoring import ScoringModel
from rose_ray.model.taps import MERGED_SHARE, Taps
from tests import oracles
from tests.tiny import make_samples

LORA = LoraConfig(rank=2, alpha=4.0, dropout=0.0, target_modules=["q_proj", "v_proj"])
BATCH = pad_batch(make_samples((12, 5, 21), 330))

FLOAT64 = 1e-12
"""Relative: the same sums in another order."""


def _scoring(base: str, *, merge_adapter: bool, dtype: torch.dtype = torch.float64) -> ScoringModel:
    module = attach_adapter(load_base(ModelConfig(base=base), dtype=dtype), LORA, dropout=0.0)
    for name, parameter in module.named_parameters():
        parameter.data = parameter.data.to(dtype) if "lora_" in name else parameter.data
    return ScoringModel(module, "cpu", merge_adapter=merge_adapter)


def _num_base_calls(model: ScoringModel) -> int:
    """How often layers with an adapter ran on weights without it, in one pass."""
    calls: list[nn.Module] = []
    layers = [module.base_layer for module in model.module.modules() if hasattr(module, "lora_A")]
    handles: list[Any] = [layer.register_forward_hook(lambda m, i, o: calls.append(m)) for layer in layers]  # type: ignore[union-attr]
    model.backward_per_sample(BATCH, "mean_loss", lambda name, grads: None)
    for handle in handles:
        handle.remove()
    return len(calls)


def test_merged_weights_follow_the_adapter_that_was_loaded_last(base_folder: str) -> None:
    merged, apart = (_scoring(base_folder, merge_adapter=merge) for merge in (True, False))
    found = []
    for seed in (1, 2, 1):
        adapter = oracles.random_adapter(apart.module, seed)
        values = []
        for model in (merged, apart):
            model.load_adapter(adapter)
            values.append(model.sample_values(BATCH, "sum_logps").detach())
        torch.testing.assert_close(*values, rtol=FLOAT64, atol=0)
        found.append(values[0])
    assert torch.equal(found[0], found[2]) and not torch.equal(found[0], found[1])


def test_without_room_for_copies_the_setting_to_change_is_named(
    base_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = _scoring(base_folder, merge_adapter=True)
    adapter = oracles.random_adapter(model.module, 1)
    model.load_adapter(adapter)

    def scarce(*arguments: Any, **named: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with monkeypatch.context() as patched:
        patched.setattr(torch, "addmm", scarce)
        with pytest.raises(ResourceError, match=r"^no memory for a copy .*Set model\.merge_adapter: never\.$"):
            model.load_adapter(adapter)
    assert _num_base_calls(model) > 0  # no copy that was not finished is in use


def test_the_base_s_weights_and_the_base_model_stay_as_they_are(base_folder: str) -> None:
    model = _scoring(base_folder, merge_adapter=True, dtype=torch.float32)
    weights = {name: tensor.clone() for name, tensor in model.module.state_dict().items() if "lora_" not in name}
    with model.without_adapter():
        before = model.sample_values(BATCH, "sum_logps")
    model.load_adapter(oracles.random_adapter(model.module, 1))
    with model.without_adapter():
        after = model.sample_values(BATCH, "sum_logps")
    assert torch.equal(before, after)
    assert not torch.equal(after, model.sample_values(BATCH, "sum_logps"))
    assert all(torch.equal(tensor, model.module.state_dict()[name]) for name, tensor in weights.items())


def test_an_adapter_of_zeros_changes_no_bit(base_folder: str) -> None:
    """So a policy that is its reference still has margins of exactly 0."""
    model = _scoring(base_folder, merge_adapter=True, dtype=torch.float32)
    model.load_adapter({name: torch.zeros_like(weight) for name, weight in model.weights.items()})
    with model.without_adapter():
        base = model.sample_values(BATCH, "sum_logps")
    assert torch.equal(base, model.sample_values(BATCH, "sum_logps"))


@pytest.mark.parametrize(
    ("merge_adapter", "dtype", "num_base_calls"),
    [
        (True, torch.float32, 0),
        (True, torch.float64, 0),
        (True, torch.bfloat16, 4),  # 8 bits: a small adapter would be rounded away
        (False, torch.float32, 4),
    ],
)
def test_wide_types_alone_are_merged(
    merge_adapter: bool, dtype: torch.dtype, num_base_calls: int, base_folder: str
) -> None:
    model = _scoring(base_folder, merge_adapter=merge_adapter, dtype=dtype)
    assert _num_base_calls(model) == 4  # until an adapter is loaded
    model.load_adapter(oracles.random_adapter(model.module, 1))
    assert _num_base_calls(model) == num_base_calls


@pytest.mark.parametrize(("width", "merged"), [(int(2 / MERGED_SHARE), True), (int(2 / MERGED_SHARE) + 1, False)])
def test_a_layer_too_wide_for_its_rank_is_left(width: int, merged: bool) -> None:
    taps = _one_layer(nn.Linear(width, width))
    taps.merge()
    assert bool(taps._merged) == merged


def test_a_layer_of_another_kind_is_left() -> None:
    """Packed weights, and such as another forward pass goes with."""

    class Packed(nn.Linear):
        pass

    taps = _one_layer(Packed(4, 4))
    taps.merge()
    assert not taps._merged


def test_a_partitioned_layer_is_left() -> None:
    base = nn.Linear(4, 4)
    base.weight.ds_id = 0  # type: ignore[attr-defined]  # as DeepSpeed marks what it cuts up
    taps = _one_layer(base)
    taps.merge()
    assert not taps._merged


def _one_layer(base: nn.Module) -> Taps:
    """Taps on a layer with an adapter of rank 1."""
    from peft.tuners.lora import Linear
    from peft.tuners.lora import LoraConfig as PeftLoraConfig

    layer = Linear(base, adapter_name="default", config=PeftLoraConfig(r=1, lora_alpha=1), r=1, lora_alpha=1)
    model = nn.Sequential(layer).requires_grad_(False)
    weights = {
        "0.lora_A.weight": layer.lora_A["default"].weight,
        "0.lora_B.weight": layer.lora_B["default"].weight,
    }
    return Taps(model, weights)
