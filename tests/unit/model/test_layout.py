"""Names, order and shapes of the adapter's parameters."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

from rose_ray.config.model import LoraConfig, ModelConfig
from rose_ray.errors import ModelError
from rose_ray.model.base import attach_adapter, load_base
from rose_ray.model.layout import ParameterLayout, adapter_layers, adapter_parameters, layout_of

LORA = LoraConfig(rank=3, alpha=6.0, target_modules=["q_proj", "v_proj"])
LAYOUT = ParameterLayout((("a", (2, 3)), ("b", (4,)), ("c", (1, 5))))


def _model(base: str, *, device: str = "cpu") -> nn.Module:
    return attach_adapter(load_base(ModelConfig(base=base, dtype="float32"), device=device), LORA, dropout=0.0)


def test_offsets_follow_each_other() -> None:
    assert LAYOUT.offsets == {"a": 0, "b": 6, "c": 10}
    assert LAYOUT.num_parameters == 15


def test_the_digest_stands_for_names_order_and_shapes() -> None:
    others = [
        ParameterLayout((("a", (2, 3)), ("b", (4,)), ("d", (1, 5)))),
        ParameterLayout((("b", (4,)), ("a", (2, 3)), ("c", (1, 5)))),
        ParameterLayout((("a", (3, 2)), ("b", (4,)), ("c", (1, 5)))),
    ]
    assert len({LAYOUT.digest, *(other.digest for other in others)}) == 4
    assert replace(LAYOUT).digest == LAYOUT.digest
    assert len(LAYOUT.digest) == 16


def test_check_names_what_does_not_fit() -> None:
    tensors = {name: torch.zeros(shape) for name, shape in LAYOUT.shapes}
    LAYOUT.check(tensors, "adapter")
    with pytest.raises(ModelError, match=r"x/adapter is not an adapter of this model: 1 parameters missing \['b'\]"):
        LAYOUT.check({name: tensor for name, tensor in tensors.items() if name != "b"}, "x/adapter")
    with pytest.raises(ModelError, match=r"1 unknown \['z'\]"):
        LAYOUT.check({**tensors, "z": torch.zeros(1)}, "x")
    with pytest.raises(ModelError, match=r"x: a has shape \(6,\), this model needs \(2, 3\)"):
        LAYOUT.check({**tensors, "a": torch.zeros(6)}, "x")


def test_names_and_shapes_are_those_of_a_saved_peft_adapter(base_folder: str, tmp_path: Path) -> None:
    model = _model(base_folder)
    model.save_pretrained(tmp_path)  # type: ignore[operator]
    saved = safetensors.torch.load_file(tmp_path / "adapter_model.safetensors")
    layout = layout_of(model)
    assert dict(layout.shapes) == {name: tuple(tensor.shape) for name, tensor in saved.items()}
    assert layout.num_parameters == sum(tensor.numel() for tensor in saved.values())


def test_the_layout_is_known_without_weights(base_folder: str) -> None:
    assert layout_of(_model(base_folder, device="meta")) == layout_of(_model(base_folder))


def test_parameters_and_layers_are_the_model_s_own(base_folder: str) -> None:
    model = _model(base_folder)
    parameters, layers = adapter_parameters(model), adapter_layers(model)
    assert list(parameters) == list(layers) == [name for name, _ in layout_of(model).shapes]
    assert {id(p) for p in parameters.values()} == {id(p) for n, p in model.named_parameters() if "lora_" in n}
    assert all(layers[name].weight is parameter for name, parameter in parameters.items())
