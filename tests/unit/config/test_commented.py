"""The YAML that ``rose-ray init`` writes is valid and says everything."""

from __future__ import annotations

import re
from pathlib import Path

import yaml
from typer.testing import CliRunner

from rose_ray.cli import app
from rose_ray.config import JobConfig, load_config, parse_config
from rose_ray.config.cleaning import Decontaminate, Diversity, NearDuplicates
from rose_ray.config.commented import commented_yaml
from rose_ray.config.selection import JointSelectionConfig, TrainingSetConfig
from rose_ray.config.task import TaskInput
from tests.unit.config.test_models import MODELS

EVALUATION = [model for model in MODELS if model.__module__ in ("rose_ray.config.evaluation", "rose_ray.config.judge")]
LEFT_OUT = (TrainingSetConfig, JointSelectionConfig, TaskInput, NearDuplicates, Decontaminate, Diversity, *EVALUATION)
"""Unset by default: there as one key each."""


def test_it_is_a_job_of_defaults() -> None:
    content = yaml.safe_load(commented_yaml())
    config = parse_config(content)
    required = {key: content[key] for key in ("workspace", "model", "pool", "targets")}
    required["model"] = {"base": content["model"]["base"]}
    assert config == JobConfig.model_validate(required)


def test_every_key_stands_in_it_with_its_description() -> None:
    text = commented_yaml()
    for model in MODELS:
        if model in LEFT_OUT:
            continue
        for name, field in model.model_fields.items():
            assert re.search(rf"^ *(- |# )?{name}:", text, re.MULTILINE), name
            assert f"# {field.description}\n" in text, name


def test_init_writes_a_file_once(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    result = CliRunner().invoke(app, ["init", str(path)])
    assert result.exit_code == 0 and f"rose-ray validate {path}" in result.stdout
    assert isinstance(load_config(str(path)), JobConfig)
    path.write_text("mine", encoding="utf-8")
    again = CliRunner().invoke(app, ["init", str(path)])
    assert again.exit_code == 1
    assert again.stderr == f"error: {path} exists already. Name another file, or add --force.\n"
    assert path.read_text(encoding="utf-8") == "mine"
    assert CliRunner().invoke(app, ["init", str(path), "--force"]).exit_code == 0
    assert path.read_text(encoding="utf-8") == commented_yaml()


def test_init_prints() -> None:
    result = CliRunner().invoke(app, ["init", "-"])
    assert result.exit_code == 0 and result.stdout == commented_yaml()
