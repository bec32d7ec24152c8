"""Targets that methods score, in the same run: no model where none is needed, and the same actors where one is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from rose_ray.config import JobConfig
from rose_ray.config.method import Needs, NoOptions
from rose_ray.distributed.plan import plan_job
from rose_ray.distributed.run import run_job
from rose_ray.distributed.validate import validate_job
from rose_ray.errors import ConfigError
from rose_ray.methods.interface import Arrays, Method, MethodModel, PoolRows, Scored, Target
from rose_ray.model.batch import pad_batch
from rose_ray.stages.pool import pool_row_ids
from rose_ray.stages.report import explain_lines, status_lines
from rose_ray.stores.garbage import find_garbage
from rose_ray.stores.verify import verify
from tests.distributed import tiny
from tests.distributed.conftest import FinishedJob
from tests.distributed.reading import digests, opened, read_file

pytestmark = pytest.mark.ray

SCORED = tiny.NUM_UNIQUE - 1
"""One row is too long, whatever scores it."""


class BaseLoss(Method[NoOptions]):
    """A user's method that needs the model: less loss than the pairs' chosen answers have is better."""

    options_model = NoOptions
    needs = Needs(pairs=True, model=True, warmup=True)
    columns = "one"

    def prepare(self, target: Target, statistics: Arrays, model: MethodModel | None) -> Arrays:
        assert model is not None and len(model.checkpoints) == tiny.NUM_EPOCHS
        samples = [model.tokeniser.encode_answer(pair.prompt, pair.chosen) for pair in target.pairs]
        return {"loss": losses(model, samples).mean(keepdims=True)}

    def score(self, rows: PoolRows, state: Arrays, model: MethodModel | None) -> Scored:
        assert model is not None
        return Scored(state["loss"] - losses(model, rows.samples(model.tokeniser))[:, None])


def losses(model: MethodModel, samples: list) -> np.ndarray:
    with torch.no_grad(), model.scoring.without_adapter():
        one_by_one = [model.scoring.sample_values(pad_batch([each]), "mean_loss") for each in samples]
    return torch.cat(one_by_one).double().numpy()


def text_targets(inputs: Path) -> list[dict[str, Any]]:
    pairs = [{"files": [str(inputs / "pairs.jsonl")], "subtask_field": "topic"}]
    return [
        {"name": "plain", "method": "random", "selection": {"count": 12}},
        {"name": "balanced", "method": "random", "method_options": {"balance": "source"}, "selection": {"count": 12}},
        {"name": "words", "method": "bm25", "pairs": pairs, "selection": {"count": 12, "method": "round_robin"}},
        {"name": "grams", "method": "dsir", "pairs": pairs, "selection": {"tokens": 500}},
    ]


def job_of(
    inputs: Path, workspace: Path, targets: list[dict[str, Any]], overrides: list[str] | None = None
) -> JobConfig:
    return tiny.tiny_job(inputs, workspace, [f"targets={targets}", *(overrides or [])])


def without_model(inputs: Path, folder: Path) -> str:
    """A base model without weights: whatever looks for them fails."""
    for file in (inputs / "base").iterdir():
        if file.suffix != ".safetensors":
            folder.mkdir(exist_ok=True)
            (folder / file.name).write_bytes(file.read_bytes())
    return str(folder)


def test_a_job_that_needs_no_model(ray_cluster: None, inputs: Path, tmp_path: Path) -> None:
    base = without_model(inputs, tmp_path / "base")
    # Nor does it need what a model would: more actors than the cluster has do not matter.
    config = job_of(inputs, tmp_path / "ws", text_targets(inputs), [f"model.base={base}", "ray.actors=40"])
    assert "no target needs the model's weights" in "\n".join(validate_job(config))
    result = run_job(config)
    assert result.warmup is None and not result.banks and result.pool is not None
    workspace = opened(tmp_path / "ws")
    assert not any(workspace.list_folder(kind) for kind in ("warmup", "bank", "features"))
    ids = sorted(pool_row_ids(workspace, result.pool))
    for name, scores in result.scores.items():
        assert scores.counts == {"unique": tiny.NUM_UNIQUE, "scored": SCORED, "rejected": 1}
        tables = [read_file(tmp_path / "ws", scores, f"{file}.parquet") for file in ("scores", "rejected")]
        assert sorted(row_id for table in tables for row_id in table["row_id"].to_pylist()) == ids
        assert result.selections[name].counts["selected"] > 0
        assert not result.selections[name].facts["summary"]["warnings"]
    assert result.scores["words"].facts["subtasks"] == list(tiny.SUBTASKS)
    before = digests(tmp_path / "ws")
    again = run_job(config)
    assert all(stage.reused for stage in again.stages) and digests(tmp_path / "ws") == before
    assert any("selection words: version 1" in line for line in status_lines(workspace))
    lines = "\n".join(
        explain_lines(workspace, config, ids[0][:9] if ids[0] != rejected_id(result, tmp_path) else ids[1])
    )
    assert "scored by bm25, which keeps no influence of single pairs" in lines
    planned = plan_job(config, probe_rows=4)
    assert planned.rates is None and planned.others["grams"] == "dsir"
    assert verify(workspace).is_clean and not [each for each in find_garbage(workspace, 1) if not each.unfinished]
    grown = run_job(job_of(inputs, tmp_path / "ws", text_targets(inputs), [
        f"model.base={base}", f"pool.inputs.0.files=['{inputs}/[mn].jsonl','{inputs}/third.jsonl']",
    ]))  # fmt: skip
    made = {stage.stage: stage.counts["shards made"] for stage in grown.stages if "shards made" in stage.counts}
    new, whole = 1, tiny.NUM_SHARDS + 1
    assert made == {
        "lengths": new, "method plain": new, "survey balanced": new, "method balanced": whole,
        "survey words": new, "method words": whole, "survey grams": new, "method grams": whole,
    }  # fmt: skip
    workspace.delete_folder(
        f"shard_scores/{grown.scores['plain'].made_from['method']}/{grown.pool.facts['shards'][0]['shard']}"
    )
    workspace.delete_folder(grown.scores["plain"].folder)
    mended = run_job(grown_config(config, inputs))
    made = {stage.stage: stage.counts["shards made"] for stage in mended.stages if "shards made" in stage.counts}
    assert made == {"lengths": 0, "method plain": 1}


def grown_config(config: JobConfig, inputs: Path) -> JobConfig:
    files = [f"{inputs}/[mn].jsonl", f"{inputs}/third.jsonl"]
    (entry,) = config.pool.inputs
    pool = config.pool.model_copy(update={"inputs": [entry.model_copy(update={"files": files})]})
    return config.model_copy(update={"pool": pool})


def rejected_id(result: Any, folder: Path) -> str:
    rejected: pa.Table = read_file(folder / "ws", result.scores["plain"], "rejected.parquet")
    return str(rejected["row_id"][0])


def test_methods_stand_beside_gradients_and_use_their_actors(finished: FinishedJob, copied: Path) -> None:
    own = {
        "name": "own",
        "method": f"{__name__}:BaseLoss",
        "pairs": [{"files": [str(finished.inputs / "pairs.jsonl")]}],
        "selection": {"count": 12},
    }
    gradients = tiny.tiny_content(finished.inputs, copied)["targets"][0]
    config = job_of(finished.inputs, copied, [gradients, own, text_targets(finished.inputs)[0]])
    result = run_job(config)
    reused = {stage.stage: stage.reused for stage in result.stages}
    assert reused["features"] and reused["score alpha"] and not reused["score own"]
    table = read_file(copied, result.scores["own"], "scores.parquet")
    assert result.scores["own"].counts == {"unique": tiny.NUM_UNIQUE, "scored": SCORED, "rejected": 1}
    alpha = read_file(copied, result.scores["alpha"], "scores.parquet")
    assert table.select(["row_id", "num_tokens", "num_labelled_tokens"]).equals(
        alpha.select(["row_id", "num_tokens", "num_labelled_tokens"])
    )
    assert len(set(table["score"].to_pylist())) > SCORED // 2
    assert result.warmup is not None and result.warmup.folder in result.scores["own"].facts["made_of"]
    refused = config.model_copy(update={"ray": config.ray.model_copy(update={"ranks_per_actor": 2})})
    with pytest.raises(ConfigError, match=r"target own: method \S+:BaseLoss needs its model whole in one actor"):
        run_job(refused)


def test_a_budget_above_the_pool_is_refused(ray_cluster: None, inputs: Path, tmp_path: Path) -> None:
    targets = [{"name": "plain", "method": "random", "selection": {"count": 1000}}]
    with pytest.raises(ConfigError, match=r"targets\.0\.selection \(plain\)\.count: 1,000 rows asked for"):
        run_job(job_of(inputs, tmp_path / "ws", targets))
