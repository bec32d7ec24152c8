"""One model's work, without Ray: trained once, measured once, nothing lost."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rose_ray.config.evaluation import EvaluationConfig, HeldOutConfig
from rose_ray.config.model import LoraConfig, ModelConfig
from rose_ray.config.target import PairInput
from rose_ray.data.conversation import parse_conversation
from rose_ray.data.preferences import read_pairs
from rose_ray.errors import AccountingError, StoreError
from rose_ray.evaluate.benchmarks import held_out_benchmark
from rose_ray.evaluate.fine_tune import adapter_weights, fresh_model, train_on_rows
from rose_ray.evaluate.index import Index, make_index, read_index, write_index
from rose_ray.evaluate.trials import TrainingPlanner, Trial
from rose_ray.evaluate.work import Workbench, pool_texts, read_items, store_rows, stored_adapter, work_on
from rose_ray.filesystem import locate
from rose_ray.model.describe import describe_model
from rose_ray.model.tokenizer import load_tokeniser
from rose_ray.stages.ingest import IngestSettings, PoolFile, ingest_file
from rose_ray.stages.pool import pool_row_ids, settle_pool
from rose_ray.stores.manifest import read_manifest
from rose_ray.stores.workspace import Workspace
from tests.tiny import make_pair_rows, make_pool_rows, write_jsonl

LORA = LoraConfig(rank=2, alpha=4.0, dropout=0.0, target_modules=["q_proj", "v_proj"])


@pytest.fixture
def bench(tmp_path: Path, base_folder: str) -> Workbench:
    workspace = Workspace.open(str(tmp_path / "w"), create=True)
    file = PoolFile(locate(str(write_jsonl(tmp_path / "pool.jsonl", make_pool_rows(10)))))
    pool = settle_pool(workspace, [ingest_file(workspace, file, IngestSettings(shard_rows=4))])
    pairs = read_pairs([locate(str(write_jsonl(tmp_path / "p.jsonl", make_pair_rows(3))))], target="a")
    others = read_pairs([locate(str(write_jsonl(tmp_path / "h.jsonl", make_pair_rows(4, seed=9))))], target="h")
    held_out = HeldOutConfig(name="h", pairs=[PairInput(files=["-"])])
    settings: dict[str, Any] = {
        "held_out": [held_out],
        "training": {"epochs": 1, "learning_rate": 1e-2, "batch_size": 4},
        "dpo": {"epochs": 1, "learning_rate": 1e-2, "batch_size": 2},
    }
    model = ModelConfig(base=base_folder, dtype="float32", max_tokens=96)
    benchmarks = [held_out_benchmark(held_out, others)]
    return Workbench(workspace, pool, EvaluationConfig(**settings), model, LORA, {"a": pairs}, benchmarks)


def planner_of(bench: Workbench) -> TrainingPlanner:
    return TrainingPlanner(bench.evaluation, bench.model, bench.lora, describe_model(bench.model, bench.lora))


def test_rows_are_trained_on_and_found_again(bench: Workbench) -> None:
    rows = sorted(pool_row_ids(bench.workspace, bench.pool))[:6]
    store_rows(bench.workspace, rows)
    training = planner_of(bench).on_rows(rows, 3)
    folders = work_on(bench, training)
    manifest = read_manifest(bench.workspace, training.folder)
    assert manifest.key == training.key and manifest.counts["used"] == 6 and len(manifest.facts["epoch_losses"]) == 1
    items = read_items(bench.workspace, folders["pairs/h"])
    assert [item["item_id"] for item in items] == [pair.pair_id for pair in bench.benchmarks[0].pairs]

    tokeniser = load_tokeniser(bench.model)
    texts = dict(pool_texts(bench.workspace, bench.pool, set(rows)))
    plain = fresh_model(bench.model, bench.lora, 3)
    samples = [tokeniser.encode(parse_conversation(texts[row])) for row in rows]
    train_on_rows(plain, rows, samples, bench.evaluation.training, 3)
    stored = stored_adapter(bench.workspace, training.key)
    assert all(torch.equal(stored[name], weight) for name, weight in adapter_weights(plain).items())
    before = read_manifest(bench.workspace, training.folder).created_at
    assert work_on(bench, training) == folders
    assert read_manifest(bench.workspace, training.folder).created_at == before


def test_the_stored_adapter_loads_into_peft(bench: Workbench) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    training = planner_of(bench).on_chosen("a", bench.pairs["a"], 0)
    work_on(bench, training)
    folder = bench.workspace.location(training.folder).path
    base = AutoModelForCausalLM.from_pretrained(bench.model.base, dtype=torch.float32)
    loaded = adapter_weights(PeftModel.from_pretrained(base, folder))
    stored = stored_adapter(bench.workspace, training.key)
    assert all(torch.equal(loaded[name], weight) for name, weight in stored.items())


def test_dpo_goes_on_from_its_parent(bench: Workbench) -> None:
    planner = planner_of(bench)
    parent = planner.on_chosen("a", bench.pairs["a"], 0)
    child = planner.on_pairs("a", bench.pairs["a"], 0, parent)
    with pytest.raises(StoreError):
        work_on(bench, child)
    work_on(bench, parent, is_parent=True)
    work_on(bench, child)
    alone = planner.on_pairs("a", bench.pairs["a"], 0, None)
    work_on(bench, alone)
    first, second = (stored_adapter(bench.workspace, each.key) for each in (child, alone))
    assert any(not torch.equal(first[name], second[name]) for name in first)


def test_numbers_outlive_their_model(bench: Workbench) -> None:
    training = planner_of(bench).on_chosen("a", bench.pairs["a"], 0)
    folders = work_on(bench, training)
    bench.workspace.delete_folder(training.folder)
    assert work_on(bench, training) == folders
    assert not bench.workspace.exists(f"{training.folder}/manifest.json")
    work_on(bench, training, is_parent=True)
    assert bench.workspace.exists(f"{training.folder}/manifest.json")


def test_the_untrained_model_is_measured_and_not_stored(bench: Workbench) -> None:
    training = planner_of(bench).untrained()
    folders = work_on(bench, training)
    assert read_items(bench.workspace, folders["pairs/h"]) and not bench.workspace.list_folder(training.folder)


def test_rows_that_are_not_there_or_do_not_fit(bench: Workbench) -> None:
    rows = sorted(pool_row_ids(bench.workspace, bench.pool))
    store_rows(bench.workspace, [*rows, "nowhere"])
    with pytest.raises(AccountingError, match="11 rows asked for, 10 found in pool"):
        work_on(bench, planner_of(bench).on_rows([*rows, "nowhere"], 0))
    short = replace(bench, model=bench.model.model_copy(update={"max_tokens": 40}), benchmarks=[])
    store_rows(bench.workspace, rows)
    training = planner_of(short).on_rows(rows, 0)
    work_on(short, training, is_parent=True)
    counts = read_manifest(bench.workspace, training.folder).counts
    assert counts["rows"] == 10 == counts["used"] + counts["unusable"] and counts["unusable"] > 0


def test_the_index_says_what_failed(bench: Workbench) -> None:
    planner = planner_of(bench)
    good, bad = planner.on_rows(["a"], 0), planner.on_rows(["a"], 1)
    trials = [Trial("rose", 0.1, 1, 0, good), Trial("rose", 0.1, 1, 1, bad)]
    untrained = planner.untrained().key
    measured = {good.key: {"pairs/h": "f"}, untrained: {"pairs/h": "r"}}
    index = make_index(trials, measured, {bad.key: "diverged"}, untrained=untrained, seeds=[0, 1], pool_rows=9)
    with pytest.raises(StoreError, match="nothing was evaluated here"):
        read_index(bench.workspace)
    write_index(bench.workspace, index)
    assert read_index(bench.workspace) == index == Index(index.entries, {"pairs/h": "r"}, [0, 1], 9)
    assert [entry.failure for entry in index.entries] == ["", "diverged"] and index.entries[1].measures == {}
    bench.workspace.write("evaluation/index.json", json.dumps({"entries": []}).encode())
    with pytest.raises(StoreError, match="not an index"):
        read_index(bench.workspace)
