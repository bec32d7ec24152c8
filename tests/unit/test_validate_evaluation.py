"""``rose-ray validate`` looks at what `evaluate` will need too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rose_ray.config import JobConfig, parse_config
from rose_ray.distributed.validate import validate_job
from rose_ray.errors import ConfigError, ModelError, PairError
from tests.tiny import make_pair_rows, make_pool_rows, write_jsonl


def job(tmp_path: Path, base: str, held_out_seed: int = 31, **evaluation: Any) -> JobConfig:
    files = {
        "pool": make_pool_rows(4),
        "pairs": make_pair_rows(3),
        "held_out": make_pair_rows(2, seed=held_out_seed),
    }
    paths = {name: str(write_jsonl(tmp_path / f"{name}.jsonl", rows)) for name, rows in files.items()}
    held_out = {"name": "h", "pairs": [{"files": [paths["held_out"]]}]}
    return parse_config(
        {
            "workspace": str(tmp_path / "w"),
            "model": {"base": base, "max_tokens": 96},
            "lora": {"rank": 2, "target_modules": ["q_proj"]},
            "pool": {"inputs": [{"files": [paths["pool"]]}]},
            "targets": [{"name": "t", "pairs": [{"files": [paths["pairs"]]}]}],
            "evaluation": {"held_out": [held_out], **evaluation},
        }
    )


def test_what_is_measured_is_said(tmp_path: Path, base_folder: str) -> None:
    lines = list(validate_job(job(tmp_path, base_folder, judges=[{"name": "r", "kind": "rouge_l"}])))
    assert lines[-3:] == ["evaluation h: 2 items (pairs)", "evaluation h: 2 items (answers)", "valid"]
    other = list(validate_job(job(tmp_path, base_folder, lora={"rank": 2, "target_modules": ["v_proj"]})))
    assert any(line.startswith(f"evaluation model {base_folder}: ") for line in other)


def test_what_an_evaluation_lacks(tmp_path: Path, base_folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(PairError, match="evaluation h: 2 of 2 items ask what a target's pairs ask"):
        list(validate_job(job(tmp_path, base_folder, held_out_seed=1)))
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    judge = {"name": "big", "kind": "endpoint", "url": "http://h/v1", "model": "m", "api_key_env": "JUDGE_KEY"}
    with pytest.raises(ConfigError, match="judge big: the environment variable JUDGE_KEY is not set"):
        list(validate_job(job(tmp_path, base_folder, judges=[judge])))
    missing = str(tmp_path / "no/such/model")
    with pytest.raises(ModelError, match="no/such/model"):
        list(validate_job(job(tmp_path, base_folder, model={"base": missing})))
