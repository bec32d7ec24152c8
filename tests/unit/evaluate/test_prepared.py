"""What an evaluation says of errors that come through Ray."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from ray.exceptions import RayTaskError

from rose_ray.config import JobConfig
from rose_ray.distributed import evaluate
from rose_ray.distributed.session import unwrapped_errors
from rose_ray.errors import ModelError
from tests.tiny import make_pair_rows, write_jsonl


def wrapped(error: Exception) -> Exception:
    raised: Exception = RayTaskError("task", "a traceback", error).as_instanceof_cause()
    return raised


@pytest.mark.parametrize("error", [ModelError("no template"), FileNotFoundError(2, "No such file or directory", "f")])
def test_errors_come_out_of_their_wrappers(error: Exception) -> None:
    with pytest.raises(type(error)) as raised, unwrapped_errors():
        raise wrapped(error)
    assert raised.value is error


def test_a_slip_of_ours_keeps_its_wrapper() -> None:
    slip = wrapped(KeyError("x"))
    with pytest.raises(KeyError) as raised, unwrapped_errors():
        raise slip
    assert raised.value is slip


@pytest.fixture
def config(tmp_path: Path) -> JobConfig:
    pairs = write_jsonl(tmp_path / "p.jsonl", make_pair_rows(2))
    held_out = write_jsonl(tmp_path / "h.jsonl", make_pair_rows(2, seed=31))
    return JobConfig.model_validate(
        {
            "workspace": str(tmp_path / "w"),
            "pool": {"inputs": [{"files": ["-"]}]},
            "model": {"base": "-"},
            "targets": [{"name": "t", "pairs": [{"files": [str(pairs)]}]}],
            "evaluation": {"held_out": [{"name": "h", "pairs": [{"files": [str(held_out)]}]}]},
        }
    )


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ray_session", "opened", "granted_resources"):
        monkeypatch.setattr(evaluate, name, lambda *arguments: nullcontext())
    monkeypatch.setattr(evaluate, "run_job", lambda *arguments, **settings: None)
    monkeypatch.setattr(evaluate, "_prepare", lambda *arguments: None)


def test_an_error_in_what_an_evaluation_does(config: JobConfig) -> None:
    error = ModelError("no template")
    with pytest.raises(ModelError) as raised, evaluate.prepared(config):
        raise wrapped(error)
    assert raised.value is error


def test_an_error_in_its_preparation(config: JobConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    error = ModelError("no template")

    def fails(*arguments: Any) -> None:
        raise wrapped(error)

    monkeypatch.setattr(evaluate, "_prepare", fails)
    with pytest.raises(ModelError) as raised, evaluate.prepared(config):
        pass
    assert raised.value is error
