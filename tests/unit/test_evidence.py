"""The protocol's configurations fit their data, and what is said of selections is right by hand."""

from __future__ import annotations

import gzip
import json
import subprocess
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest

from benchmarks.evidence.pairs import CONTROL_SOURCE, PREFERENCES, TASKS
from benchmarks.evidence.protocol import SELECTORS, Protocol, Scale, protocol
from benchmarks.evidence.run import evaluated, failures
from benchmarks.evidence.selected import selected_rows
from benchmarks.evidence.sides import moved_sides
from rose_ray.config import parse_config
from rose_ray.config.job import JobConfig
from rose_ray.errors import ConfigError
from rose_ray.evaluate.benchmarks import check_apart
from rose_ray.evaluate.index import Entry, Index, write_index
from rose_ray.stages.target_pairs import read_target_asked
from rose_ray.stores.history import make_latest
from rose_ray.stores.manifest import Manifest, commit_artefact
from rose_ray.stores.workspace import Workspace
from tests.tiny import make_pair_rows, make_pool_rows

SCALE = Scale(share=1.0, shots=2, held_out=3, seeds=(0,))


def write_gz(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """The shared folder in small: half of the pool is the control's; `se` has pairs that cannot be used."""
    pool = [row | {"source": [CONTROL_SOURCE, "b"][n % 2]} for n, row in enumerate(make_pool_rows(60))]
    write_gz(tmp_path / "data/pool/pool.jsonl.gz", pool)
    for number, stem in enumerate(stem for subtasks in PREFERENCES.values() for _, stem in subtasks):
        for split, seed in (("val", number), ("test", 100 + number)):
            rows = [row | {"id": f"{stem}-{split}-{row['id']}"} for row in make_pair_rows(8, seed)]
            if stem == "se":
                rows[0] |= {"prompt": "word " * 5000}
            if (stem, split) == ("se", "test"):
                rows[1] |= {"prompt": make_pair_rows(8, number)[1]["prompt"]}  # the first steering pair that fits
            write_gz(tmp_path / f"data/preferences/{stem}_{split}.jsonl.gz", rows)
    return tmp_path


def planned(data: Path, base: str, scale: Scale = SCALE) -> Protocol:
    return protocol(data, data / "scratch", scale, TASKS, list(SELECTORS), base, "float32")


def test_every_task_is_a_valid_job_that_differs_in_its_evaluation_alone(data: Path, base_folder: str) -> None:
    configs = {task: parse_config(content) for task, content in planned(data, base_folder).configs.items()}
    assert list(configs) == ["hh", "se", "shp", "control"]
    without = [config.model_copy(update={"evaluation": None}) for config in configs.values()]
    assert without == without[:1] * 4 and len(without[0].targets) == 4 * len(SELECTORS)
    hh = configs["hh"].evaluation
    assert hh is not None and hh.arms == [f"hh-{name}" for name in SELECTORS]
    control = configs["control"].evaluation
    others = [f"{task}-{name}" for task in ("hh", "se", "shp") for name in ("rose", "less")]
    assert control is not None and control.arms == [*(f"control-{name}" for name in SELECTORS), *others]
    assert [held_out.name for held_out in hh.held_out] == ["hh_helpful", "hh_harmless"]
    assert (hh.references, hh.controls) == (["zero_shot", "random"], ["dpo_shots", "sft_chosen"])


def pair_ids(config: JobConfig) -> tuple[set[str], set[str]]:
    """Of steering and held-out pairs; the evaluation's own check of them is passed."""
    assert config.evaluation is not None
    steering = {target.name: read_target_asked(target) for target in config.targets}
    held_out = {
        entry.name: read_target_asked(config.targets[0].model_copy(update={"pairs": entry.pairs, "shots": None}))
        for entry in config.evaluation.held_out
    }
    check_apart({name: asked.values() for name, asked in steering.items()}, held_out)
    first = (config.evaluation.arms or [])[0]
    return set(steering[first]), {pair_id for asked in held_out.values() for pair_id in asked}


def test_pairs_that_cannot_be_used_are_passed_over_and_counted(data: Path, base_folder: str) -> None:
    plan = planned(data, base_folder)
    for task, num_subtasks in (("hh", 2), ("se", 1), ("shp", 1), ("control", 1)):
        steering, held_out = pair_ids(parse_config(plan.configs[task]))
        assert (len(steering), len(held_out)) == (2 * num_subtasks, 3 * num_subtasks)
        assert not steering & held_out
        if task == "se":
            assert steering == {"se-val-pair-1", "se-val-pair-2"}
            assert not held_out & {"se-test-pair-0", "se-test-pair-1"}
    assert plan.left_out["se_val.jsonl.gz"] == 1 and plan.left_out["shp_val.jsonl.gz"] == 0
    with pytest.raises(ConfigError, match=r"se_test\.jsonl\.gz: 6 of 8 pairs can be used, 7 wanted"):
        planned(data, base_folder, Scale(shots=2, held_out=7))


def test_rows_of_the_control_are_not_in_the_pool(data: Path, base_folder: str) -> None:
    config = parse_config(planned(data, base_folder).configs["control"])
    steering, held_out = pair_ids(config)
    left = [json.loads(line) for line in Path(config.pool.inputs[0].files[0]).read_text().splitlines()]
    ids = {row["id"] for row in left}
    assert not ids & (steering | held_out)
    pairs = [
        json.loads(line)
        for name in ("control_val", "control_test")
        for line in (data / f"scratch/{name}.jsonl").read_text().splitlines()
    ]
    assert len(pairs) == 2 * SCALE.shots + 5  # for three held-out pairs, in case that two are too long
    with gzip.open(data / "data/pool/pool.jsonl.gz", "rt") as file:
        rows = {row["id"]: row["messages"][-1]["content"] for row in map(json.loads, file)}
    gone = {row_id for row_id in rows if row_id not in ids}
    assert {row_id for row_id in gone if row_id in {pair["id"] for pair in pairs}} == {pair["id"] for pair in pairs}
    assert {pair["rejected"] for pair in pairs} <= {rows[row_id] for row_id in gone}


def test_another_draw_takes_other_rows_and_pairs(data: Path, base_folder: str) -> None:
    first, second, again = (planned(data, base_folder, replace(SCALE, draw=draw)).configs for draw in (0, 1, 1))
    assert second == again
    assert (second["se"]["pool"]["sample_seed"], second["se"]["warmup"]["seed"]) == (1, 1)
    asked = []
    for draw in (0, 1):
        configs = planned(data, base_folder, replace(SCALE, draw=draw)).configs  # each writes its pairs
        asked.append({task: pair_ids(parse_config(content)) for task, content in configs.items()})
    assert first.keys() == second.keys() and any(asked[0][task][0] != asked[1][task][0] for task in asked[0])


def committed(workspace: Workspace, stage: str, folder: str, table: pa.Table, facts: dict[str, Any]) -> Manifest:
    name = {"score": "scores.parquet", "select": "selected.parquet"}.get(stage, "table.parquet")
    record = workspace.write_table(f"{folder}/{name}", table)
    counts = {"selected": table.num_rows, "tokens": 0}
    made_from = {"folder": folder}
    return commit_artefact(
        workspace, stage, made_from, [record], counts, facts, started=time.monotonic(), folder=folder
    )


def test_recall_precision_and_agreement_of_every_budget(tmp_path: Path) -> None:
    workspace = Workspace.open(str(tmp_path), create=True)
    rows = [("c0", CONTROL_SOURCE, 10), ("c1", CONTROL_SOURCE, 20), ("b0", "b", 30), ("b1", "b", 40), ("b2", "b", 50)]

    def table(*places: int) -> pa.Table:
        names = ("row_id", "source", "num_labelled_tokens")
        chosen = [dict(zip(names, rows[place], strict=True)) | {"score": -1.0 * place} for place in places]
        return pa.Table.from_pylist(chosen)

    # A third row of the source was rejected, and counts as one that was not found.
    sources = {CONTROL_SOURCE: 3, "b": 3}
    pool = committed(workspace, "pool", "pool/p", table(0), {"sources": sources})
    selections: dict[str, dict[int, tuple[int, ...]]] = {
        "control-rose": {1: (0,), 2: (0, 1)},
        "control-bm25": {1: (2,), 2: (1, 3)},
        "se-rose": {1: (4,)},
    }
    entries = []
    for arm, by_size in selections.items():
        scores = committed(workspace, "score", f"scores/{arm}/k", table(0, 1, 2, 3, 4), {"pool": {"folder": "pool/p"}})
        for size, places in by_size.items():
            facts = {"scores": [scores.folder]}
            made = committed(workspace, "select", f"evaluation/selections/{arm}/{size}", table(*places), facts)
            entries.append(Entry(arm, size / 10, size, 0, "model"))
        other = {"scores": ["scores/earlier/k"]}
        committed(workspace, "select", f"evaluation/selections/{arm}/0", table(4, 3), other)
        make_latest(workspace, arm, made, pool.key)
    entries += [Entry("control-bm25", 1.0, 5, 0, "model"), Entry("random", 0.1, 1, 0, "model")]
    found = selected_rows(workspace, Index(entries, {}, [0], 6), "control")
    keys = ("target", "budget", "rows", "answer tokens, median", f"recall of {CONTROL_SOURCE}")
    assert [tuple(row[key] for key in keys) for row in found] == [
        ("all that control-rose scored", None, 5, 30.0, 2 / 3),
        ("control-rose", 0.1, 1, 10.0, 1 / 3),
        ("control-rose", 0.2, 2, 15.0, 2 / 3),
        ("control-bm25", 0.1, 1, 30.0, 0.0),
        ("control-bm25", 0.2, 2, 30.0, 1 / 3),
        ("control-bm25", 1.0, 5, 30.0, 2 / 3),
    ]
    assert [row[f"precision of {CONTROL_SOURCE}"] for row in found] == [2 / 5, 1.0, 1.0, 0.0, 0.5, 2 / 5]
    assert [row["Jaccard with rose"] for row in found] == [None, 1.0, 1.0, 0.0, 1 / 3, None]
    assert [row["answer tokens"] for row in found] == [150, 10, 30, 30, 60, 150]
    assert found[0]["score by length"] is None
    assert [row["score by length"] for row in found[1:]] == pytest.approx([-1.0] * 5)  # the best answer is shortest
    assert found[4]["most from"] == f"{CONTROL_SOURCE} 50%, b 50%"


def test_margins_come_from_both_sides() -> None:
    def items(chosen: float, rejected: float) -> list[dict[str, Any]]:
        return [{"logp_chosen": chosen + n, "logp_rejected": rejected - n} for n in range(2)]

    found = {"untrained": items(-5, -7), "m0": items(-4, -9), "m1": items(-6, -9)}
    entries = [
        Entry("zero_shot", None, 0, None, "base", {"pairs/se": "untrained"}),
        *(Entry("se-rose", 0.05, 9, seed, f"m{seed}", {"pairs/se": f"m{seed}"}) for seed in (0, 1)),
        Entry("se-rose", 0.01, 2, 0, "m2", failure="the loss is nan"),
    ]
    index = Index(entries, {"pairs/se": "untrained"}, [0, 1], 9)
    expected = {"held out": "se", "arm": "se-rose", "budget": 0.05, "seeds": 2, "chosen": 0.0, "rejected": -2.0}
    assert moved_sides(index, found.__getitem__) == [expected]


def test_a_failed_training_leaves_a_table_and_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    workspace = Workspace.open(str(tmp_path), create=True)
    entries = [Entry("se-rose", 0.01, 5, 0, "model", failure="the loss of step 2 is nan"), Entry("b", 0.01, 5, 0, "m")]

    def evaluates(*_: Any, **__: Any) -> SimpleNamespace:
        write_index(workspace, Index(entries, {}, [0], 6))
        for name in ("table.json", "table.txt"):
            workspace.write(f"evaluation/report/{name}", b"[]")
        return SimpleNamespace(returncode=1)

    monkeypatch.setattr(subprocess, "run", evaluates)
    assert failures(evaluated(tmp_path / "c.yaml", tmp_path)) == ["se-rose at 0.01, seed 0: the loss of step 2 is nan"]
    # An earlier task's table is not taken for that of a run which wrote none.
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=1))
    with pytest.raises(SystemExit, match="no table, exit status 1"):
        evaluated(tmp_path / "c.yaml", tmp_path)
