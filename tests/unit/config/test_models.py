"""The models are the reference: every field says what it is, and the schema is complete."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, get_args

import pytest
from pydantic import BaseModel
from typer.testing import CliRunner

from rose_ray.cli import app
from rose_ray.config import JobConfig
from rose_ray.config.selection import SelectionConfig, TrainingSetConfig


def models(kind: Any) -> Iterator[type[BaseModel]]:
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        yield kind
        for field in kind.model_fields.values():
            yield from models(field.annotation)
    for argument in get_args(kind):
        yield from models(argument)


MODELS = sorted(set(models(JobConfig)), key=lambda model: model.__name__)


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.__name__)
def test_every_field_is_described(model: type[BaseModel]) -> None:
    assert model.__doc__
    for name, field in model.model_fields.items():
        assert field.description and field.description.endswith((".", "?")), f"{model.__name__}.{name}"


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.__name__)
def test_every_model_is_strict(model: type[BaseModel]) -> None:
    settings = model.model_config
    assert (settings.get("extra"), settings.get("strict"), settings.get("frozen")) == ("forbid", True, True)


def test_the_schema_prints() -> None:
    result = CliRunner().invoke(app, ["schema"])
    assert result.exit_code == 0
    schema = json.loads(result.stdout)
    assert schema["additionalProperties"] is False and schema["required"] == ["workspace", "model", "pool", "targets"]
    assert {model.__name__ for model in MODELS} - {"JobConfig"} == set(schema["$defs"])
    for definition in (schema, *schema["$defs"].values()):
        assert all("description" in part or "$ref" in part for part in definition["properties"].values())


@pytest.mark.parametrize(
    ("settings", "budget"),
    [
        ({}, ("fraction", 0.05)),
        ({"fraction": 0.5}, ("fraction", 0.5)),
        ({"count": 3}, ("count", 3)),
        ({"tokens": 9}, ("tokens", 9)),
    ],
)
def test_budgets(settings: dict[str, Any], budget: tuple[str, float]) -> None:
    assert SelectionConfig(**settings).budget == budget


def test_a_dumped_configuration_reads_back() -> None:
    config = JobConfig.model_validate(
        {
            "workspace": "ws",
            "model": {"base": "m"},
            "pool": {"inputs": [{"files": ["p.jsonl"]}]},
            "targets": [{"name": "t", "pairs": [{"files": ["q.jsonl"]}]}],
            "training_set": {},
        }
    )
    assert JobConfig.model_validate(json.loads(json.dumps(config.model_dump(mode="json")))) == config


@pytest.mark.parametrize("selection", [{}, {"count": 5}])
def test_targets_take_turns_in_a_joint_set_whatever_else_is_set(selection: dict[str, int]) -> None:
    assert TrainingSetConfig.model_validate({"selection": selection}).selection.method == "round_robin"
