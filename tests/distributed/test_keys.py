"""What is said about a changed key agrees with the keys of the artefacts. No Ray."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rose_ray.config.changes import STAGES, recomputed_stages
from rose_ray.distributed.bank import _basis_made_from, bank_made_from
from rose_ray.distributed.checkpoints import _warmup_settings
from rose_ray.distributed.job import Job
from rose_ray.distributed.plan import _work
from rose_ray.model.describe import describe_model
from rose_ray.stages.plan import PoolTokens
from rose_ray.stages.target_pairs import read_target_pairs
from rose_ray.stores.manifest import Manifest, artefact_key
from rose_ray.stores.workspace import Workspace
from tests.distributed.tiny import tiny_job, write_inputs

WARMUP = Manifest("warmup", "", {}, [], {}, {"checkpoints": [{"name": "checkpoint-1", "adapter": "0"}]}, 0.0, {}, "")
"""The same for all: its part in later keys is the digest of what it made."""


NEEDED = {
    "gradients.packing=true": ["model.attention=flash_attention_2"],
    "gradients.kernel=triton": ["ray.gpus_per_actor=1"],
}
"""What an override needs beside it."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    inputs = tmp_path_factory.mktemp("keys")
    write_inputs(inputs)
    return inputs


def job_of(folder: Path, overrides: list[str]) -> Job:
    config = tiny_job(folder, folder / "workspace", overrides)
    job = Job(Workspace.open(config.workspace, create=True), config)
    vars(job)["identity"] = describe_model(config.model, config.lora)  # asked for here, not on a worker
    return job


def keys_of(folder: Path, overrides: list[str]) -> dict[str, str]:
    job = job_of(folder, overrides)
    target = job.config.targets[0]
    made_from: dict[str, dict[str, Any]] = {
        "warmup": _warmup_settings(job),
        "bank": bank_made_from(job, job.feature_set(WARMUP, target), target, read_target_pairs(target)),
        "features": job.feature_set(WARMUP, target).made_from,
    }
    return {stage: artefact_key(content) for stage, content in made_from.items()}


@pytest.mark.parametrize(
    "override",
    [
        "model.max_tokens=80",
        "model.dtype=bfloat16",
        "model.template=tulu",
        "model.loss_on_turn_tail=true",
        "model.attention=eager",
        "model.merge_adapter=never",
        "model.trust_remote_code=true",
        "model.loader=plain",
        "model.deepspeed.zero_stage=3",
        "model.gradient_checkpointing=true",
        "lora.rank=2",
        "lora.alpha=4",
        "lora.dropout=0",
        "lora.target_modules=[k_proj]",
        "targets.0.objective=rose_simpo",
        "targets.0.normalize=projected",
        "targets.0.aggregation=mean",
        "targets.0.selection.count=2",
        "targets.0.shots=1",
        "targets.0.encoding=rose_official",
        "targets.0.pairs.0={files: [{folder}/other_pairs.jsonl]}",
        "training_set={}",
        "warmup.fraction=0.5",
        "warmup.seed=1",
        "warmup.epochs=1",
        "warmup.learning_rate=1e-3",
        "warmup.batch_size=4",
        "warmup.adam_eps=1e-6",
        "warmup.max_batch_tokens=100",
        "warmup.workers=2",
        "warmup.zero_stage=1",
        "gradients.adam=sgd",
        "gradients.projection.dim=32",
        "gradients.projection.kind=rademacher",
        "gradients.projection.seed=1",
        "gradients.stored_dtype=float32",
        "gradients.stored_dtype=float16",
        "gradients.projection.deflate=false",
        "gradients.max_batch_tokens=100",
        "gradients.kernel=triton",
        "gradients.packing=true",
        "model.quantized=nf4",
        "ray.actors=3",
        "ray.threads_per_actor=2",
    ],
)
def test_a_change_recomputes_what_is_said(folder: Path, override: str) -> None:
    needed = NEEDED.get(override, [])
    before, after = keys_of(folder, needed), keys_of(folder, [*needed, override.replace("{folder}", str(folder))])
    changed = {stage for stage in before if before[stage] != after[stage]}
    said = set(recomputed_stages(override.partition("=")[0]))
    assert said <= set(STAGES)
    if "warmup" in changed:  # and with its adapters all behind it
        assert said == set(STAGES) - {"ingest"}
    else:
        assert said & set(before) == changed


def test_a_basis_goes_by_what_it_keeps_and_not_by_how_that_was_decided(folder: Path) -> None:
    def made_from(*overrides: str) -> dict[str, Any]:
        job = job_of(folder, ["targets.0.exact=true", *overrides])
        target = job.config.targets[0]
        return _basis_made_from(job, WARMUP, target, read_target_pairs(target))

    pairs, subtasks = (made_from(f"gradients.exact_basis={kept}") for kept in ("pairs", "subtasks"))
    assert pairs["objective"] is None and subtasks["objective"] == ["rose", "exact", 0.1]
    assert made_from() == pairs and made_from("gradients.exact_basis_gib=1e-6") == subtasks
    assert made_from("gradients.exact_basis_gib=1e-6", "targets.0.selection.method=round_robin_pairs") == pairs
    assert made_from("gradients.exact_basis_gib=1e-6", "gradients.exact_basis=pairs") == pairs
    # Neither the machine nor its neighbours have a say: devices, actors, and what other targets take.
    assert made_from("ray.gpus_per_actor=0.5", "ray.actors=3", "targets.1.exact=true") == pairs


@pytest.mark.parametrize(("gib", "keeps", "num_rows"), [(8, "pairs", 12), (1e-6, "subtasks", 2)])
def test_a_plan_foretells_the_basis_that_a_run_makes(folder: Path, gib: float, keeps: str, num_rows: int) -> None:
    job = job_of(folder, ["targets.0.exact=true", f"gradients.exact_basis_gib={gib}"])
    pairs = {target.name: read_target_pairs(target) for target in job.config.gradient_targets}
    pool = Manifest("pool", "", {}, [], {}, {"shards": [{"shard": "s", "num_rows": 9, "num_skipped": 0}]}, 0.0, {}, "")
    work = _work(
        job, pool, PoolTokens(9, [5] * 9, 0, 0), pairs, {name: [7] * len(each) for name, each in pairs.items()}
    )
    choice = job.basis_choice(job.config.targets[0], pairs["alpha"])
    assert choice.keeps == keeps and list(work.basis_lines) == [choice.line()]
    assert work.dims["alpha"] == choice.num_rows == num_rows
    deflated_and_adam = 4 * work.num_parameters * work.num_checkpoints * 4
    assert work.held_bytes == deflated_and_adam + choice.num_bytes


def test_the_bound_of_bases_is_no_part_of_a_batch_s_bound(folder: Path) -> None:
    files = {job_of(folder, [f"gradients.exact_basis_gib={gib}"]).budget_file(WARMUP) for gib in (1, 2)}
    assert len(files) == 1


def test_actors_that_share_a_memory_measure_a_batch_s_bound_of_their_own(folder: Path) -> None:
    files = {job_of(folder, [f"ray.actors={actors}"]).budget_file(WARMUP) for actors in (1, 2)}
    assert len(files) == 2
