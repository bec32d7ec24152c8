"""A whole small run: nothing is lost, the tables say what they should, and a second run does nothing."""

from __future__ import annotations

import json
import shutil
from itertools import pairwise
from pathlib import Path

import pytest

from rose_ray.distributed.run import STAGES, run_job
from rose_ray.errors import ConfigError
from rose_ray.schemas import scores_schema
from rose_ray.stages.pool import ROW_COUNTS, pool_row_ids
from tests.distributed import tiny
from tests.distributed.conftest import FinishedJob
from tests.distributed.reading import digests, manifests, opened, read_file

pytestmark = pytest.mark.ray

NUM_WARMUP = round(0.3 * tiny.NUM_UNIQUE)


def test_counts_of_the_pool(finished: FinishedJob) -> None:
    pool = finished.result.pool
    assert pool is not None
    assert pool.counts == {
        "rows_read": tiny.NUM_READ,
        "unique": tiny.NUM_UNIQUE,
        "duplicates": tiny.NUM_DUPLICATES,
        "rejected": len(tiny.MALFORMED),
        "unsampled": 0,
    }
    assert len(pool.facts["shards"]) == tiny.NUM_SHARDS
    kept = sum(entry["num_rows"] - entry["num_skipped"] for entry in pool.facts["shards"])
    assert kept == sum(pool.facts["sources"].values()) == tiny.NUM_UNIQUE
    skipped = read_file(finished.workspace, pool, "duplicates.parquet")
    first_shards = {entry["shard"] for entry in pool.facts["shards"] if entry["num_skipped"] == 0}
    assert skipped.num_rows == tiny.NUM_SHARED and set(skipped["owner"].to_pylist()) <= first_shards


def test_counts_of_every_file(finished: FinishedJob) -> None:
    reasons: list[str] = []
    files = list(manifests(finished.workspace, "ingest"))
    for file in files:
        read, *parts = (file.counts[name] for name in ROW_COUNTS)
        assert read == sum(parts)
        shards = [read_file(finished.workspace, file, r.path.split("/")[-1]) for r in file.files if "shard-" in r.path]
        assert sum(shard.num_rows for shard in shards) == file.counts["unique"]
        copies = sum(sum(shard["num_copies"].to_pylist()) for shard in shards)
        assert copies == file.counts["unique"] + file.counts["duplicates"]
        rejected = read_file(finished.workspace, file, "rejected.parquet")
        assert rejected.num_rows == file.counts["rejected"]
        reasons += rejected["reason"].to_pylist()
    assert len(files) == 2 and sorted(reasons) == sorted(tiny.MALFORMED)


def test_the_driver_says_what_every_file_held(
    finished: FinishedJob, copied: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copy(finished.inputs / "n.jsonl", copied.parent / "again.jsonl")
    files = [*(f"{finished.inputs}/{name}.jsonl" for name in "mn"), f"{copied.parent}/again.jsonl"]
    caplog.set_level("INFO")
    run_job(tiny.tiny_job(finished.inputs, copied, [f"pool.inputs.0.files={files}"]), stages=("ingest",))
    said = [record.getMessage() for record in caplog.records]
    reasons = ", ".join(f"{reason} 1" for reason in sorted(tiny.MALFORMED))
    assert (
        f"{files[0]}: format messages, {tiny.NUM_FIRST + tiny.NUM_REPEATED + len(tiny.MALFORMED)} rows read, "
        f"{tiny.NUM_FIRST} unique, {tiny.NUM_REPEATED} duplicates, {len(tiny.MALFORMED)} rejected, 0 unsampled "
        f"({reasons})"
    ) in said
    assert f"these input files hold the same bytes, one of them counts: {files[1]}, {files[2]}" in said


def test_a_selection_that_the_pool_cannot_give_ends_the_run_after_ingest(finished: FinishedJob, copied: Path) -> None:
    before = digests(copied)
    config = tiny.tiny_job(finished.inputs, copied, ["targets.1.selection={count: 100}", "warmup.seed=1"])
    with pytest.raises(ConfigError, match=r"targets\.1\.selection \(beta\)\.count: 100 rows asked for"):
        run_job(config)
    assert digests(copied) == before


def test_counts_of_warmup_and_features(finished: FinishedJob) -> None:
    warmup = finished.result.warmup
    assert warmup is not None
    samples = read_file(finished.workspace, warmup, "samples.parquet")
    assert warmup.counts["rows"] == NUM_WARMUP == warmup.counts["trained"] + warmup.counts["rejected"]
    assert samples.num_rows == warmup.counts["trained"]
    shards = list(manifests(finished.workspace, "features"))
    for shard in shards:
        tables = [read_file(finished.workspace, shard, f"checkpoint-{n + 1}.parquet") for n in range(tiny.NUM_EPOCHS)]
        rejected = read_file(finished.workspace, shard, "rejected.parquet")
        assert {table.num_rows for table in tables} == {shard.counts["scored"]}
        assert shard.counts["rows"] == shard.counts["scored"] + shard.counts["rejected"]
        assert rejected.num_rows == shard.counts["rejected"]
    assert sum(shard.counts["rows"] for shard in shards) == tiny.NUM_UNIQUE


def test_the_totals_of_the_features_stand_beside_the_shards(finished: FinishedJob) -> None:
    pool = finished.result.pool
    assert pool is not None
    (stage,) = (stage for stage in finished.result.stages if stage.stage == "features")
    summary = opened(finished.workspace).read_json(f"{stage.folder}/pool-{pool.key}.json")
    shards = list(manifests(finished.workspace, "features"))
    for name in ("rows", "scored", "rejected"):
        assert summary[name] == stage.counts[name] == sum(shard.counts[name] for shard in shards)
    assert summary["num_tokens"] == sum(shard.facts["num_tokens"] for shard in shards)
    assert summary["num_bytes"] == stage.num_bytes == sum(shard.num_bytes for shard in shards)
    assert (summary["num_shards"], summary["seconds"]) == (len(shards), stage.seconds)
    assert {"rose_ray", "torch", "ray"} <= set(summary["versions"])


@pytest.mark.parametrize("target", ["alpha", "beta"])
def test_score_table(finished: FinishedJob, target: str) -> None:
    scores, pool = finished.result.scores[target], finished.result.pool
    assert pool is not None
    table = read_file(finished.workspace, scores, "scores.parquet")
    rejected = read_file(finished.workspace, scores, "rejected.parquet")
    subtasks = list(tiny.SUBTASKS) if target == "alpha" else ["beta"]
    assert table.schema.equals(scores_schema(subtasks), check_metadata=True)
    assert rejected["reason"].to_pylist() == ["prompt_too_long"]
    assert scores.facts["reject_reasons"] == {"prompt_too_long": 1}
    expected = {"unique": tiny.NUM_UNIQUE, "scored": table.num_rows, "rejected": rejected.num_rows}
    assert scores.counts == expected and table.num_rows + rejected.num_rows == tiny.NUM_UNIQUE
    row_ids = table["row_id"].to_pylist() + rejected["row_id"].to_pylist()
    assert sorted(row_ids) == sorted(pool_row_ids(opened(finished.workspace), pool))
    rows = table.to_pylist()
    assert all(row["score"] == max(row[f"subtask_{name}"] for name in subtasks) for row in rows)
    assert all(row["num_labelled_tokens"] < row["num_tokens"] <= tiny.MAX_TOKENS for row in rows)
    assert all(row["gradient_norm"] > 0 and row["momentum_share"] > 0 for row in rows)


def test_ranks_are_unique_and_ties_go_by_row_id(finished: FinishedJob) -> None:
    table = read_file(finished.workspace, finished.result.scores["alpha"], "scores.parquet")
    rows = sorted(table.to_pylist(), key=lambda row: (-row["score"], row["row_id"]))
    assert [row["rank"] for row in rows] == list(range(1, len(rows) + 1))
    ties = [(a, b) for a, b in pairwise(rows) if a["score"] == b["score"]]
    assert [(a["num_tokens"], b["num_tokens"]) for a, b in ties] == [(tiny.MAX_TOKENS, tiny.MAX_TOKENS)]


def test_selection_holds_the_records_as_they_were(finished: FinishedJob) -> None:
    selection = finished.result.selections["alpha"]
    assert selection.counts["selected"] == 12
    scores = read_file(finished.workspace, finished.result.scores["alpha"], "scores.parquet")
    best = sorted(scores.to_pylist(), key=lambda row: row["rank"])[:12]
    selected = read_file(finished.workspace, selection, "selected.parquet").to_pylist()
    pool = b"".join((finished.inputs / f"{name}.jsonl").read_bytes() for name in "mn")
    originals = set(pool.decode(errors="replace").splitlines())
    lines = (finished.workspace / selection.folder / "selected.jsonl").read_text(encoding="utf-8").splitlines()
    for place, (line, row, score) in enumerate(zip(lines, selected, best, strict=True), start=1):
        assert json.loads(line)["rose_ray"] == {
            "row_id": score["row_id"],
            "score": score["score"],
            "place": place,
            "source": score["source"],
        }
        assert line.split(', "rose_ray": ')[0] + "}" == row["record"] and row["record"] in originals
        assert (row["place"], row["row_id"], row["score"]) == (place, score["row_id"], score["score"])


def test_every_manifest_says_what_went_in_and_what_made_it(finished: FinishedJob) -> None:
    for stage in ("ingest", "pool", "warmup", "bank", "features", "scores", "selections"):
        found = list(manifests(finished.workspace, stage))
        assert found
        for manifest in found:
            assert manifest.made_from and manifest.counts and manifest.files and manifest.created_at
            assert {"rose_ray", "torch", "ray", "deepspeed"} <= set(manifest.versions)
            assert manifest.seconds >= 0 and manifest.num_bytes > 0


def test_checkpoints_load_with_peft_alone(finished: FinishedJob) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    warmup = finished.result.warmup
    assert warmup is not None and len(warmup.facts["checkpoints"]) == tiny.NUM_EPOCHS
    base = AutoModelForCausalLM.from_pretrained(finished.inputs / "base")
    model = PeftModel.from_pretrained(base, finished.workspace / warmup.folder / "checkpoint-2")
    assert any(bool(p.abs().sum() > 0) for name, p in model.named_parameters() if "lora_B" in name)


def test_a_second_run_does_nothing(finished: FinishedJob, copied: Path) -> None:
    before = digests(copied)
    result = run_job(finished.config.model_copy(update={"workspace": str(copied)}))
    assert all(stage.reused for stage in result.stages)
    assert [stage.stage.split()[0] for stage in result.stages if "beta" not in stage.stage] == list(STAGES)
    assert digests(copied) == before
    assert [stage.counts.pop("gradient passes") for stage in result.stages if stage.stage == "features"] == [0]
    keys = [(stage.stage, stage.key, stage.counts) for stage in result.stages]
    first = [(stage.stage, stage.key, dict(stage.counts)) for stage in finished.result.stages]
    assert keys == [
        (name, key, {k: v for k, v in counts.items() if k != "gradient passes"}) for name, key, counts in first
    ]
