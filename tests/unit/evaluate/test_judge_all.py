"""All judges in turn, on a cluster that is played here: one that cannot judge keeps no other from it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import RayTaskError

from rose_ray.config.evaluation import EvaluationConfig
from rose_ray.distributed.judging import judge_all
from rose_ray.evaluate.index import Entry, Index
from rose_ray.evaluate.judging import read_verdicts
from rose_ray.stores.manifest import commit_artefact
from rose_ray.stores.workspace import Workspace


class PlayedJob:
    """Runs its tasks when their results are asked for, and wraps their errors as Ray does."""

    def task(self, function: Callable[..., Any], *arguments: Any) -> Callable[[], Any]:
        return lambda: function(*arguments)

    model_task = task


def get(task: Callable[[], Any]) -> Any:
    try:
        return task()
    except Exception as error:
        raise RayTaskError("task", "a traceback", error).as_instanceof_cause() from None


def measured(workspace: Workspace, name: str, logp: float) -> str:
    items = [{"item_id": f"p{i}", "logp_chosen": logp, "tokens_chosen": 2} for i in range(3)]
    record = workspace.write(f"{name}/items.jsonl", "".join(json.dumps(item) + "\n" for item in items).encode())
    commit_artefact(workspace, name, {"name": name}, [record], {}, {}, started=0.0, folder=name)
    return name


def test_a_judge_without_its_model_keeps_no_other_from_judging(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rose_ray.distributed.judging.ray", SimpleNamespace(get=get))
    workspace = Workspace.open(str(tmp_path / "w"), create=True)
    missing = {"name": "lost", "kind": "local_model", "model": str(tmp_path / "no/such/folder")}
    evaluation = EvaluationConfig.model_validate(
        {
            "held_out": [{"name": "h", "pairs": [{"files": ["-"]}]}],
            "judges": [missing, {"name": "entropy", "kind": "cross_entropy"}],
        }
    )
    bench: Any = SimpleNamespace(workspace=workspace, evaluation=evaluation, benchmarks=[], device="cpu")
    ours, theirs = measured(workspace, "ours", -1.0), measured(workspace, "theirs", -2.0)
    entry = Entry("alpha", 0.1, 3, 0, "m", {"pairs/h": ours, "answers/h": ours})
    index = Index([entry], {"pairs/h": theirs, "answers/h": theirs}, [0], 30)
    job: Any = PlayedJob()
    found, stopped = judge_all(job, bench, index)
    assert len(stopped) == 1 and stopped[0].startswith("judge lost: ") and "no/such/folder" in stopped[0]
    assert list(found.entries[0].verdicts) == ["entropy/h"]
    assert [v["score"] for v in read_verdicts(workspace, found.entries[0].verdicts["entropy/h"])] == [1.0] * 3
