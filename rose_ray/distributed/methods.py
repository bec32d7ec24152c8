"""Targets that a method scores by itself, on Ray: a task per shard, or scoring actors where the model is needed.

Every step is found by its key: a run that was interrupted goes on with the shards that are missing. New pool files cost
their own rows alone, unless the method reads statistics of the whole pool; those change, and all rows are scored again.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import ray

from rose_ray.config.cleaning import RowVectors
from rose_ray.config.job import JobConfig
from rose_ray.config.selection import SelectionConfig
from rose_ray.config.target import TargetConfig
from rose_ray.data.preferences import PreferencePair
from rose_ray.distributed.bank import BANK_BATCH_TOKENS
from rose_ray.distributed.data import set_up_ray_data
from rose_ray.distributed.job import Job
from rose_ray.distributed.progress import Progress
from rose_ray.distributed.roll import ENDLESS, called_roll
from rose_ray.distributed.tokens import count_shard_tokens
from rose_ray.distributed.waiting import said_while_waiting
from rose_ray.errors import AccountingError, ConfigError, DataError
from rose_ray.methods import shards as steps
from rose_ray.methods.interface import Method, Target
from rose_ray.methods.rds import POOLING, RowStates
from rose_ray.methods.registry import method_of
from rose_ray.methods.shards import MethodRun
from rose_ray.methods.table import make_table, table_folder
from rose_ray.stages.pool import skipped_rows
from rose_ray.stages.row_vectors import VectorSource, gradient_vectors
from rose_ray.stores.manifest import Manifest, find_manifest
from rose_ray.stores.read_ahead import looked_up
from rose_ray.stores.runs import StageRecord
from rose_ray.stores.shards import LENGTHS, SHARD_SCORES, SURVEYS, find_receipt, missing_shards

logger = logging.getLogger(__name__)


@dataclass
class _Pool:
    """The pool as steps over its shards see it."""

    job: Job
    manifest: Manifest

    def __post_init__(self) -> None:
        self.skipped = skipped_rows(self.job.workspace, self.manifest)
        self.shards = [entry["shard"] for entry in self.manifest.facts["shards"]]
        self.rows = {e["shard"]: e["num_rows"] - e["num_skipped"] for e in self.manifest.facts["shards"]}
        self.reference = ray.put(self.manifest)

    def missing(self, kind: str, key: str) -> list[str]:
        """Shards without such a receipt, or with one whose files were cut short; the log says so."""
        found = missing_shards(self.job.workspace, kind, key, self.shards, self.skipped)
        for reason in filter(None, found.values()):
            logger.warning(f"made again: {reason}")
            self.job.result.events.append(f"shard made again: {reason}")
        return list(found)

    def totals(self, kind: str, key: str, stage: str) -> tuple[dict[str, int], int]:
        """Counts and bytes of all receipts together."""
        counts: dict[str, int] = {}
        num_bytes = 0

        def look(shard: str) -> Manifest | None:
            return find_receipt(self.job.workspace, kind, key, shard, self.skipped.get(shard, []))

        for shard, receipt in zip(self.shards, looked_up(look, self.shards), strict=True):
            if receipt is None:
                raise AccountingError(f"{stage}: shard {shard} is not complete. Run again.")
            counts = {name: counts.get(name, 0) + value for name, value in receipt.counts.items()}
            num_bytes += receipt.num_bytes
        return counts, num_bytes


def score_by_methods(
    job: Job,
    pool: Manifest,
    warmup: Manifest | None,
    pairs: Mapping[str, Sequence[PreferencePair]],
    *,
    with_model: bool,
) -> None:
    """Find or make the score tables of targets that a method scores.

    Args:
        job: Its configuration names them.
        pool: Rows wanted.
        warmup: Where a method needs it.
        pairs: Of all targets.
        with_model: Take the targets whose method needs the model, or the others.

    Raises:
        RoseError: Whatever is wrong with method, data or pool.
    """
    methods = {target.name: method_of(target) for target in job.config.method_targets}
    targets = [each for each in job.config.method_targets if methods[each.name].needs.any_model == with_model]
    if not targets:
        return
    view = _Pool(job, pool)
    lengths = steps.lengths_key(job.text, job.config.model.max_tokens)
    _count_tokens(view, lengths)
    for target in targets:
        method = methods[target.name]
        told = Target(target.name, tuple(pairs[target.name]) if method.needs.pairs else ())
        model = _model_content(job, method, warmup)
        content = ray.get(job.task(steps.method_content, method, target.method, told, lengths, model))
        run = MethodRun(method, told, content, lengths, pool.key)
        _score_target(view, target, run, model, warmup if method.needs.warmup else None)


def make_row_states(job: Job, pool: Manifest) -> None:
    """Find or make the states of the base model that selections compare rows by, for every row of the pool."""
    if not job.config.row_states:
        return
    view = _Pool(job, pool)
    _count_tokens(view, steps.lengths_key(job.text, job.config.model.max_tokens))
    for vectors in job.config.row_states:
        run, started = _states_run(job, pool, vectors), time.monotonic()
        if find_manifest(job.workspace, run.state_folder) is None:  # an empty one: there is nothing to prepare
            state = ray.get(job.task(steps.make_state, job.workspace, view.reference, run, None))
            job.note(f"prepare {run.target.name}", state, started, reused=False)
        _score(view, run.target.name, run, None)


def vector_source(job: Job, pool: Manifest, selection: SelectionConfig, scores: Manifest) -> VectorSource | None:
    """Return where the vectors of a selection's ``diversity`` lie; None where it does not ask for any.

    Args:
        job: Its model gives states.
        pool: Rows wanted.
        selection: Says which.
        scores: Of the target, or of the first of a set.
    """
    if selection.diversity is None:
        return None
    if selection.diversity.vectors == "gradients":
        return gradient_vectors(scores)
    run = _states_run(job, pool, selection.diversity.vectors)
    made_of = (f"{LENGTHS}/{run.lengths_key}", run.state_folder, f"{SHARD_SCORES}/{run.key}")
    return VectorSource(SHARD_SCORES, run.key, steps.SCORES_FILE, made_of)


def _states_run(job: Job, pool: Manifest, vectors: RowVectors) -> MethodRun:
    method, told = RowStates(POOLING[vectors]), Target(f"states {vectors}", ())
    lengths = steps.lengths_key(job.text, job.config.model.max_tokens)
    content = steps.method_content(method, "row_states", told, lengths, _model_content(job, method, None))
    return MethodRun(method, told, content, lengths, pool.key)


def check_methods(config: JobConfig) -> None:
    """Refuse what the methods of a job cannot have, before anything is computed.

    Raises:
        ConfigError: A method is not there, its options do not fit, or it would have to share its model among ranks.
    """
    for target in config.method_targets:
        if method_of(target).needs.any_model and config.ray.ranks_per_actor > 1:
            raise ConfigError(
                f"target {target.name}: method {target.method} needs its model whole in one actor, but "
                f"ray.ranks_per_actor is {config.ray.ranks_per_actor}: set it to 1, or leave the target out."
            )
    if config.row_states and config.ray.ranks_per_actor > 1:
        raise ConfigError(
            f"selection.diversity.vectors: {config.row_states[0]} needs the model whole in one actor, but "
            f"ray.ranks_per_actor is {config.ray.ranks_per_actor}: set it to 1, or compare rows by gradients."
        )


def _model_content(job: Job, method: Method[Any], warmup: Manifest | None) -> dict[str, Any]:
    needs = method.needs
    if not needs.base_model:
        return {}
    model = job.config.model
    content: dict[str, Any] = {"base": job.identity.base, "dtype": model.dtype, "quantized": model.quantized}
    if needs.adapter or needs.warmup:
        content["lora"] = job.config.lora.model_dump(mode="json")
    if needs.warmup:
        assert warmup is not None
        content["adapters"] = job.bare_space(warmup)["adapters"]
    return content


def _count_tokens(view: _Pool, key: str) -> None:
    started, job = time.monotonic(), view.job
    if any(stage.stage == "lengths" for stage in job.result.stages):
        return
    missing = view.missing(LENGTHS, key)

    def start(shard: str) -> Any:
        skipped = view.skipped.get(shard, [])
        return job.task(count_shard_tokens, job.workspace, view.reference, shard, skipped, key, job.config.model)

    _each_shard(view, "lengths", missing, start)
    _record(view, "lengths", LENGTHS, key, missing, started)
    if not job.result.stages[-1].counts["scored"]:
        raise DataError(
            f"none of {view.manifest.counts['unique']} rows makes a sample; reasons stand in rejected.parquet below "
            f"{LENGTHS}/{key}. Raise `model.max_tokens`, or look at the pool."
        )


def _score_target(
    view: _Pool, target: TargetConfig, run: MethodRun, model: Mapping[str, Any], warmup: Manifest | None
) -> None:
    job, started = view.job, time.monotonic()
    table = find_manifest(job.workspace, table_folder(run, target))
    reused = table is not None
    if table is None:
        if find_manifest(job.workspace, run.state_folder) is None:
            if run.method.needs.pool_statistics:
                _survey(view, target.name, run)
            _prepare(view, target.name, run, warmup)
        _score(view, target.name, run, warmup)
        told = {**model, **({"warmup": warmup.folder} if warmup is not None else {})}
        started = time.monotonic()
        table = ray.get(job.task(make_table, job.workspace, view.reference, run, target, told))
    assert table is not None
    job.result.scores[target.name] = table
    job.note(f"score {target.name}", table, started, reused=reused)


def _survey(view: _Pool, name: str, run: MethodRun) -> None:
    started, job = time.monotonic(), view.job
    missing = view.missing(SURVEYS, run.survey_key)

    def start(shard: str) -> Any:
        return job.task(steps.survey_shard, job.workspace, view.reference, shard, view.skipped.get(shard, []), run)

    stage = f"survey {name}"
    _each_shard(view, stage, missing, start)
    _record(view, stage, SURVEYS, run.survey_key, missing, started)


def _prepare(view: _Pool, name: str, run: MethodRun, warmup: Manifest | None) -> None:
    started, job = time.monotonic(), view.job
    if run.method.needs.any_model:
        from rose_ray.distributed.method_actor import MethodActor

        who = f"workers that prepare {name}"
        with called_roll(1, job.result.events, who) as roll:
            spec = replace(_spec(job, warmup), roll=roll)
            actor = job.actor(MethodActor, spec, view.reference, run, restarts=ENDLESS)
            try:
                state = ray.get(actor.prepare.remote())
            finally:
                ray.kill(actor)
    else:
        state = ray.get(job.task(steps.make_state, job.workspace, view.reference, run, None))
    job.note(f"prepare {name}", state, started, reused=False)


def _score(view: _Pool, name: str, run: MethodRun, warmup: Manifest | None) -> None:
    started, job, stage = time.monotonic(), view.job, f"method {name}"
    missing = view.missing(SHARD_SCORES, run.key)
    if missing and run.method.needs.any_model:
        _score_with_model(view, stage, run, missing, warmup)
    elif missing:
        state = job.task(steps.read_state, job.workspace, run)  # stays in the object store, once a node

        def start(shard: str) -> Any:
            skipped = view.skipped.get(shard, [])
            return job.task(steps.score_shard, job.workspace, view.reference, shard, skipped, run, state, None)

        _each_shard(view, stage, missing, start)
    _record(view, stage, SHARD_SCORES, run.key, missing, started)


def _score_with_model(view: _Pool, stage: str, run: MethodRun, missing: Sequence[str], warmup: Manifest | None) -> None:
    from rose_ray.distributed.method_actor import MethodActor

    settings, events, num_halvings = view.job.config.ray, view.job.result.events, 0
    set_up_ray_data(settings)
    rows = [{"shard": shard, "skipped": view.skipped.get(shard, [])} for shard in missing]
    progress = Progress(stage, sum(view.rows[shard] for shard in missing), "rows")
    with called_roll(settings.actors, events, f"{stage}: scoring actors") as roll:
        spec = replace(_spec(view.job, warmup), roll=roll)
        lines = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
            MethodActor,
            fn_constructor_kwargs={"spec": spec, "pool": view.manifest, "run": run},
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=settings.actors),
            num_cpus=settings.cpus_per_actor,
            num_gpus=settings.gpus_per_actor,
        )
        with said_while_waiting(progress, settings):
            for line in lines.iter_rows():
                num_halvings += int(line["num_halvings"])
                progress.advance(int(line["rows"]), note=f"shard {line['shard']}")
    if num_halvings:
        events.append(f"{stage}: batches halved for memory: {num_halvings}")


def _spec(job: Job, warmup: Manifest | None) -> Any:
    configured = job.config.gradients.max_batch_tokens
    return job.spec(warmup, BANK_BATCH_TOKENS if configured == "auto" else configured)


def _each_shard(view: _Pool, stage: str, missing: Sequence[str], start: Callable[[str], Any]) -> None:
    """Start a task for every shard and wait for all, saying how far it is."""
    if not missing:
        return
    waiting = {start(shard): shard for shard in missing}
    progress = Progress(stage, sum(view.rows[shard] for shard in missing), "rows")
    while waiting:
        (done, *_), _ = ray.wait(list(waiting))
        ray.get(done)
        shard = waiting.pop(done)
        progress.advance(view.rows[shard], note=f"shard {shard}")


def _record(view: _Pool, stage: str, kind: str, key: str, made: Sequence[str], started: float) -> None:
    counts, num_bytes = view.totals(kind, key, stage)
    seconds = round(time.monotonic() - started, 3)
    counts["shards made"] = len(made)
    view.job.record(StageRecord(stage, key, f"{kind}/{key}", not made, seconds, counts, num_bytes))
