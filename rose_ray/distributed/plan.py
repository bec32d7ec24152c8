"""`rose-ray plan`: what a job will take on this cluster, before anything is spent on it."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
import ray

from rose_ray.config.job import JobConfig
from rose_ray.config.target import TargetConfig
from rose_ray.config.warmup import WarmupConfig
from rose_ray.data.preferences import PreferencePair
from rose_ray.distributed.actors import ScoringSpec, device_of
from rose_ray.distributed.bank import BANK_BATCH_TOKENS, missing_banks, missing_bases
from rose_ray.distributed.checkpoints import pinned_warmup
from rose_ray.distributed.engine import ProcessGroup
from rose_ray.distributed.features import missing_features
from rose_ray.distributed.gang import released_gangs
from rose_ray.distributed.ingest import ingest
from rose_ray.distributed.job import Job
from rose_ray.distributed.probe import (
    PROBE_FOLDER,
    PROBED_CHECKPOINT,
    ProbeActor,
    evenly,
    pair_tokens,
    pool_tokens,
    probed_space,
    sample_shard,
    time_reduction,
    time_training,
)
from rose_ray.distributed.probe_gang import ProbeGang, time_shared_training
from rose_ray.distributed.resources import cluster_nodes, granted_resources, processes_at_once
from rose_ray.distributed.session import ray_session, root_cause
from rose_ray.distributed.spaces import deflates
from rose_ray.distributed.training import WarmupJob
from rose_ray.errors import RoseError
from rose_ray.model.tokenizer import with_absolute_paths
from rose_ray.stages.budget import MOST_TOKENS, MemoryNeed
from rose_ray.stages.clean import check_test_text
from rose_ray.stages.plan import Plan, PoolTokens, Rates, Work, held_bytes, no_work, predict, warmup_positions
from rose_ray.stages.selection_check import check_selections
from rose_ray.stages.target_pairs import read_target_pairs
from rose_ray.stores.lease import opened
from rose_ray.stores.manifest import Manifest
from rose_ray.stores.plans import write_plan

logger = logging.getLogger(__name__)

Pairs = Mapping[str, Sequence[PreferencePair]]

SAMPLED_ROWS = 4096
"""Rows that are tokenised for the histogram."""

SAMPLED_SHARDS = 512
"""At most so many shards are looked into."""

PROBED_PAIRS = 4
"""Pairs of each target that are probed, evenly spaced by length."""

TRAIN_SECONDS = 6.0
"""What Ray Train takes to set up its workers besides loading the model, measured on one machine of two cores."""


@dataclass(frozen=True)
class JobPlan:
    """Everything `plan_lines` has to say.

    Attributes:
        pool: The pool, ingested.
        tokens: Its lengths.
        work: What is to be done.
        rates: What the probe measured, if there was one.
        plan: The prediction.
        num_shards: Of the pool.
        others: Targets that are not foretold, with the method that scores them.
    """

    pool: Manifest
    tokens: PoolTokens
    work: Work
    rates: Rates | None
    plan: Plan
    num_shards: int
    others: dict[str, str]


def plan_job(config: JobConfig, *, probe_rows: int) -> JobPlan:
    """Read the pool, look at what is done, measure a few rows, and predict the rest.

    The pool's shards are kept: a run goes on with them.

    Args:
        config: The checked configuration.
        probe_rows: Rows that an actor, or each rank of one, scores for the rates; 0 for no probe.

    Raises:
        RoseError: As in `run_job`.
    """
    with opened(config.workspace, config.lease.term, create=True) as workspace:
        job = Job(workspace, config.model_copy(update={"model": with_absolute_paths(config.model)}))
        try:
            with ray_session(config.ray), granted_resources(config):
                made = _plan(job, probe_rows)
        except Exception as error:
            cause = root_cause(error)
            raise (cause if isinstance(cause, RoseError | OSError) else error) from None
        if made.rates is not None:
            write_plan(workspace, config.model_dump(mode="json"), made.plan.as_json())
        return made


def _plan(job: Job, probe_rows: int) -> JobPlan:
    job.check_offload()
    pool = ingest(job)
    check_selections(job.config, pool.facts["sources"])
    check_test_text(job.config)
    pairs = {target.name: read_target_pairs(target) for target in job.config.gradient_targets}
    tokens, samples = _sampled(job, pool)
    lengths = _pair_lengths(job, pairs)
    work = _work(job, pool, tokens, pairs, lengths)
    rates = None
    probe_rows = probe_rows if pairs else 0
    if probe_rows and tokens.lengths:
        try:
            rates = _Prober(job, work, pairs, lengths, samples, probe_rows).rates()
        finally:
            job.workspace.delete_folder(PROBE_FOLDER)
        work = replace(work, warmup_start=rates.start_up + TRAIN_SECONDS)
    others = {target.name: target.method for target in job.config.method_targets}
    return JobPlan(pool, tokens, work, rates, predict(work, tokens, rates), len(pool.facts["shards"]), others)


def _sampled(job: Job, pool: Manifest) -> tuple[PoolTokens, pa.Table]:
    shards = [entry["shard"] for entry in pool.facts["shards"]]
    shards = shards[:: -(-len(shards) // SAMPLED_SHARDS)]
    rows = sum(entry["num_rows"] for entry in pool.facts["shards"] if entry["shard"] in set(shards))
    step = max(1, rows // SAMPLED_ROWS)
    logger.info(f"plan: tokenising every {step} of {rows:,} rows")
    parts = ray.get([job.task(sample_shard, job.workspace, pool, name, job.config.model, step) for name in shards])
    return pool_tokens(parts, pool.counts["unique"]), pa.concat_tables([part.tokens for part in parts])


def _pair_lengths(job: Job, pairs: Pairs) -> dict[str, list[int]]:
    targets = {target.name: target for target in job.config.targets}
    found = [job.task(pair_tokens, job.config.model, targets[name], each) for name, each in pairs.items()]
    return dict(zip(pairs, ray.get(found), strict=True))


def _work(job: Job, pool: Manifest, tokens: PoolTokens, pairs: Pairs, lengths: Mapping[str, Sequence[int]]) -> Work:
    config = job.config
    entries = {entry["shard"]: entry["num_rows"] - entry["num_skipped"] for entry in pool.facts["shards"]}
    if not pairs:
        return replace(no_work(config.ray.actors, config.ray.gpus_per_actor), row_states=config.row_states)
    warmup = pinned_warmup(job)
    missing, bases, banks = list(entries), [t.name for t in config.targets if config.is_exact(t)], list(pairs)
    spaces = [*([] if config.gradients.projection.kind == "exact" else [""]), *bases]
    if warmup is not None:
        bases = missing_bases(job, warmup, pairs)
        banks = missing_banks(job, warmup, pairs)
        if not bases:
            lacking = missing_features(job, pool, warmup)
            missing, numbers = list(lacking), {number for each in lacking.values() for number in each}
            spaces = [name for number, name in enumerate(job.feature_sets(warmup)) if number in numbers]
    trains = warmup is None and config.warmup.adapters is None
    kinds = config.gradients.projection.kind
    dims = {"": config.gradients.projection.dim if kinds != "none" else job.identity.layout.num_parameters}
    choices = [job.basis_choice(target, pairs[target.name]) for target in config.targets if config.is_exact(target)]
    exact = {choice.target: choice.num_rows for choice in choices}
    num_checkpoints = config.warmup.num_checkpoints
    return Work(
        actors=config.ray.actors,
        workers=config.warmup.workers,
        gpus=config.ray.gpus_per_actor,
        num_checkpoints=num_checkpoints,
        num_parameters=job.identity.layout.num_parameters,
        dims={**({} if kinds == "exact" else dims), **exact},
        stored_dtype=config.gradients.stored_type,
        shard_rows=[entries[shard] for shard in missing],
        warmup_positions=warmup_positions(config.warmup, tokens.lengths, tokens.num_rows) if trains else 0,
        warmup_start=0.0,
        basis_tokens={name: sum(lengths[name]) for name in bases},
        pair_tokens={name: sum(lengths[name]) for name in banks},
        spaces=spaces,
        num_pairs={name: len(each) for name, each in pairs.items()},
        passes=_passes(list(pairs) if missing else banks, exact),
        num_subtasks={name: len({pair.subtask for pair in each}) for name, each in pairs.items()},
        fraction=max(_fraction(target, tokens) for target in config.gradient_targets),
        held_bytes=_held_bytes(job, num_checkpoints, exact),
        basis_lines=[choice.line() for choice in choices],
        row_states=job.config.row_states,
        ranks=config.ray.ranks_per_actor,
        base_bytes=job.identity.base_bytes,
        largest_bytes=job.identity.largest_bytes,
    )


def _held_bytes(job: Job, num_checkpoints: int, exact: Mapping[str, int]) -> int:
    gradients, size = job.config.gradients, job.identity.layout.num_parameters
    return held_bytes(size, num_checkpoints, sum(exact.values()), deflates=deflates(gradients))


def _passes(targets: Sequence[str], exact: Mapping[str, int]) -> list[list[str]]:
    """Group targets by the features they are scored on: an exact one has its own."""
    shared = [name for name in targets if name not in exact]
    return [*([shared] if shared else []), *([name] for name in targets if name in exact)]


def _fraction(target: TargetConfig, tokens: PoolTokens) -> float:
    kind, amount = target.selection.budget
    whole = {"fraction": 1.0, "count": tokens.num_scored, "tokens": tokens.num_tokens}[kind]
    return min(1.0, amount / whole) if whole else 1.0


class _Prober:
    """Measures on as many actors at once as one node will hold: they share its memory and its cores.

    Args:
        job, work: What is foretold.
        pairs, lengths: By target, and tokens of each pair.
        samples: Of the pool.
        probe_rows: For each actor, rank or worker.
    """

    def __init__(
        self,
        job: Job,
        work: Work,
        pairs: Pairs,
        lengths: Mapping[str, Sequence[int]],
        samples: pa.Table,
        probe_rows: int,
    ) -> None:
        self.job, self.work, self.pairs, self.lengths = job, work, pairs, lengths
        self.samples, self.probe_rows = samples, probe_rows

    def rates(self) -> Rates:
        """Probe scoring, pairs, training and reducing."""
        configured = self.job.config.gradients.max_batch_tokens
        spaces = [probed_space(name, dim) for name, dim in self.work.dims.items()]
        spec = self.job.spec(None, BANK_BATCH_TOKENS if configured == "auto" else configured, spaces)
        spec = replace(spec, checkpoints=(PROBED_CHECKPOINT,))
        tokens = self._scored()
        with released_gangs(spec):
            together = processes_at_once(self.job.config, cluster_nodes())
            actors = self._actors(spec, max(1, together // spec.ranks), tokens.num_rows)
            try:
                started = time.monotonic()
                ray.get([actor.ready.remote() for actor in actors])
                start_up = time.monotonic() - started
                need, host = self._memory(actors[0], spec.device, together)
                budget = need.budget(MOST_TOKENS[spec.device]) if configured == "auto" else configured
                scored = ray.get([actor.score.remote(tokens, budget) for actor in actors])
                pairs = {name: self._pair_rate(actors[0], name) for name in self.work.pair_tokens}
            finally:
                for actor in actors:
                    ray.kill(actor)
        num_tokens = sum(len(ids) for ids in tokens["input_ids"])
        return Rates(
            scoring=sum(seconds for seconds, _ in scored) / len(actors) / num_tokens,
            training=self._training(spec),
            pairs=pairs,
            reducing=[self._reducing(scored[0][1], targets) for targets in self.work.passes],
            start_up=start_up,
            peak_bytes=need.peak_bytes(budget),
            available_bytes=need.available,
            max_batch_tokens=budget,
            host_bytes=host[0],
            host_available_bytes=host[1],
        )

    def _scored(self) -> pa.Table:
        """The samples that an actor scores; ranks are dealt the batches of one shard, so no more than it holds."""
        ranks = self.work.ranks
        most = self.probe_rows if ranks == 1 else min(ranks * self.probe_rows, self.job.config.pool.shard_rows)
        return evenly(self.samples, most)

    def _actors(self, spec: ScoringSpec, number: int, num_rows: int) -> list[Any]:
        shared = f" of {spec.ranks} ranks" if spec.ranks > 1 else ""
        logger.info(f"plan: probing {num_rows} rows in each of {number} actors{shared}")
        if spec.ranks == 1:
            return [self.job.actor(ProbeActor, spec) for _ in range(number)]
        gang: Any = ray.remote(num_cpus=0)(ProbeGang)  # a gang's coordinator needs nothing itself
        return [gang.remote(spec) for _ in range(number)]

    def _memory(self, actor: Any, device: str, together: int) -> tuple[MemoryNeed, tuple[int, int]]:
        """Return what an actor needs of its device, and where that is a GPU, bytes of the host and those there are.

        Args:
            actor: Any of them. Where ranks share its model, all this is of the rank that needs the most.
            device: ``cpu`` or ``cuda``.
            together: Actors or ranks that share a host.
        """
        need: MemoryNeed = ray.get(actor.need.remote())
        # The probe holds one checkpoint, its maps and bases; an actor holds them all.
        more = self.work.held_bytes - self.work.held_bytes // self.work.num_checkpoints
        if device == "cpu":
            return replace(need, one_row=need.one_row + more), (0, 0)
        own, available = ray.get(actor.host_memory.remote())
        return need, (own + more, own + max(0, available - own) // together)

    def _pair_rate(self, actor: Any, name: str) -> float:
        target = next(each for each in self.job.config.targets if each.name == name)
        order = sorted(range(len(self.pairs[name])), key=lambda place: self.lengths[name][place])
        step = max(1, len(order) // PROBED_PAIRS)
        some = [self.pairs[name][place] for place in order[step // 2 :: step][:PROBED_PAIRS]]
        rate: float = ray.get(actor.pairs.remote(target, some, self.work.num_checkpoints))
        return rate

    def _reducing(self, tables: Sequence[pa.Table], targets: Sequence[str]) -> float:
        spaces = list(self.work.dims)
        table = tables[spaces.index(targets[0] if targets[0] in spaces else "")]
        rows = max(self.work.shard_rows, default=self.job.config.pool.shard_rows)
        num_pairs = [self.work.num_pairs[name] for name in targets]
        seconds: float = ray.get(self.job.task(time_reduction, self.job.workspace, table, rows, num_pairs))
        return seconds

    def _training(self, spec: ScoringSpec) -> float:
        job, config = self.job, self.job.config
        settings = self._trained()
        samples = evenly(self.samples, settings.workers * self.probe_rows)
        training = WarmupJob(
            job.workspace,
            PROBE_FOLDER,
            job.workspace.write_table(f"{PROBE_FOLDER}/samples.parquet", samples),
            config.model,
            config.lora,
            settings,
            device_of(config.ray),
            config.ray.threads_per_actor,
        )
        if settings.workers > 1:
            return time_shared_training(training, spec)
        seconds: float = ray.get(job.model_task(time_training, training, ProcessGroup()))
        return seconds

    def _trained(self) -> WarmupConfig:
        """Settings of the probed warm-up: one worker, or all that share the base."""
        settings = self.job.config.warmup.model_copy(update={"epochs": 1, "adapters": None})
        if self.work.ranks > 1 and not self.work.warmup_positions:
            # No warm-up is to come, which only says what training would cost: the base need not fit one device.
            return settings.model_copy(update={"workers": self.work.ranks, "zero_stage": 3})
        return settings if settings.zero_stage == 3 else settings.model_copy(update={"workers": 1})
