"""Before an evaluation, on a cluster that is played here: needs are looked at first, errors come as they are."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import RayTaskError

from rose_ray.config import JobConfig
from rose_ray.distributed import evaluate
from rose_ray.distributed.session import unwrapped_errors
from rose_ray.errors import ConfigError, ModelError
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
    monkeypatch.setattr(evaluate, "Job", lambda *arguments: SimpleNamespace(task=task))
    monkeypatch.setattr(evaluate, "ray", SimpleNamespace(get=lambda waiting: waiting()))
    monkeypatch.setattr(evaluate, "describe_model", lambda *arguments: None)
    monkeypatch.setattr(evaluate, "run_job", lambda *arguments, **settings: None)
    monkeypatch.setattr(evaluate, "_prepare", lambda *arguments: None)


def task(function: Callable[..., Any], *arguments: Any) -> Callable[[], Any]:
    return lambda: function(*arguments)


def refuses_to_run(*arguments: Any, **settings: Any) -> None:
    raise AssertionError("the job runs before its needs were looked at")


def changed(config: JobConfig, **evaluation: Any) -> JobConfig:
    content = config.model_dump(mode="json")
    return JobConfig.model_validate({**content, "evaluation": {**content["evaluation"], **evaluation}})


def test_a_key_that_is_not_there_is_missed_first(config: JobConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    monkeypatch.setattr(evaluate, "run_job", refuses_to_run)
    judge = {"name": "big", "kind": "endpoint", "url": "http://h/v1", "model": "m", "api_key_env": "JUDGE_KEY"}
    with (
        pytest.raises(ConfigError, match="judge big: the environment variable JUDGE_KEY is not set"),
        evaluate.prepared(changed(config, judges=[judge])),
    ):
        pass


def test_the_model_is_looked_at_first(config: JobConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def missing(model: Any, lora: Any) -> None:
        seen.append((model.base, lora.rank))
        raise ModelError("no such folder")

    monkeypatch.setattr(evaluate, "describe_model", missing)
    monkeypatch.setattr(evaluate, "run_job", refuses_to_run)
    other = changed(config, model={"base": "other"}, lora={"rank": 3})
    with pytest.raises(ModelError, match="no such folder"), evaluate.prepared(other):
        pass
    assert seen == [("other", 3)]


def test_budgets_are_compared_with_the_pool(config: JobConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def run_job(*arguments: Any, check_pool: Callable[[Any], None]) -> None:
        check_pool(SimpleNamespace(facts={"sources": {"a": 5, "b": 4}}))

    monkeypatch.setattr(evaluate, "run_job", run_job)
    with evaluate.prepared(changed(config, counts=[9])):
        pass
    with (
        pytest.raises(ConfigError, match=r"evaluation\.counts: 10 are above the 9 unique rows of the pool"),
        evaluate.prepared(changed(config, counts=[9, 10])),
    ):
        pass


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
