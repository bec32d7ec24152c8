"""The order in which adapter parameters form one flat vector."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor, nn

from rose_ray.errors import ModelError


@dataclass(frozen=True)
class ParameterLayout:
    """Names, shapes and places of the adapter's parameters.

    Attributes:
        shapes: Shape by name, in order. Names are those of a saved PEFT adapter, without the adapter's own name.
    """

    shapes: tuple[tuple[str, tuple[int, ...]], ...]

    @cached_property
    def offsets(self) -> dict[str, int]:
        """Place of each parameter's first element in the flat vector."""
        offsets, position = {}, 0
        for name, shape in self.shapes:
            offsets[name] = position
            position += math.prod(shape)
        return offsets

    @property
    def num_parameters(self) -> int:
        """Length P of the flat vector."""
        return sum(math.prod(shape) for _, shape in self.shapes)

    @cached_property
    def digest(self) -> str:
        """16 hex digits that stand for names, order and shapes."""
        return hashlib.sha256(json.dumps(self.shapes).encode()).hexdigest()[:16]

    def check(self, tensors: Mapping[str, Tensor], what: str) -> None:
        """Refuse tensors of another model.

        Args:
            tensors: By parameter name.
            what: Where they come from, for the message.

        Raises:
            ModelError: A name is missing, unknown, or has another shape.
        """
        expected = dict(self.shapes)
        missing, unknown = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
        if missing or unknown:
            raise ModelError(
                f"{what} is not an adapter of this model: {len(missing)} parameters missing {missing[:3]}, "
                f"{len(unknown)} unknown {unknown[:3]}. Check `model.base`, `lora.target_modules` and the adapter."
            )
        for name, tensor in tensors.items():
            if tuple(tensor.shape) != expected[name]:
                raise ModelError(
                    f"{what}: {name} has shape {tuple(tensor.shape)}, this model needs {expected[name]}. "
                    "Check `lora.rank` and `model.base`."
                )


def adapter_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the LoRA linear layers of a PEFT model by the name of their weight, in the layout's order."""
    return {
        f"{name.replace('.default', '')}.weight": module
        for name, module in model.named_modules()
        if name.endswith((".lora_A.default", ".lora_B.default"))
    }


def layout_of(model: nn.Module) -> ParameterLayout:
    """Return the layout of a PEFT model's adapter. Works on the meta device, before DeepSpeed takes the model."""
    return ParameterLayout(
        tuple((name, tuple(layer.weight.shape)) for name, layer in adapter_layers(model).items())  # type: ignore[arg-type]
    )


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the adapter's parameters by their layout names."""
    return {name: layer.weight for name, layer in adapter_layers(model).items()}  # type: ignore[misc]
