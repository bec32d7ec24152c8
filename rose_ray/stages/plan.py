"""What a job will take, before it runs: arithmetic on counts of tokens and on rates that a probe measured.

    seconds of features = start-up + makespan of the shards, each rows x tokens x checkpoints x seconds a token
    bytes of an actor   = what a probe with one checkpoint held + 4 x (3 + deflated + exact) x P for each further one
    hours of a stage    = its seconds x the devices of all its workers, or of all ranks of all its actors

Every stage that the workspace holds already costs nothing.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from rose_ray.config.warmup import WarmupConfig
from rose_ray.kernels.quantization import StoredType
from rose_ray.stages.warmup import TrainingStep, plan_training

BUCKETS = (64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
"""Upper ends of the token histogram."""

ROW_BYTES = 64 + 5 * 8
"""A feature row beside its feature: id, lengths, norm, share, loss."""

SCORE_ROW_BYTES = 64 + 12 * 8
"""A row of the score table beside its subtasks."""


@dataclass(frozen=True)
class PoolTokens:
    """Lengths of a sample of the pool's rows.

    Attributes:
        num_rows: Of the pool.
        lengths: Tokens of the sampled rows after cutting, sorted.
        num_rejected: Sampled rows that make no sample.
        num_cut: Sampled rows that were cut.
    """

    num_rows: int
    lengths: list[int]
    num_rejected: int
    num_cut: int

    @property
    def num_sampled(self) -> int:
        """Rows looked at."""
        return len(self.lengths) + self.num_rejected

    @property
    def num_scored(self) -> int:
        """Rows that will be scored, as the sample says."""
        return round(self.num_rows * len(self.lengths) / max(1, self.num_sampled))

    @property
    def num_tokens(self) -> int:
        """Tokens of the pool at one checkpoint, as the sample says."""
        return round(self.num_scored * float(np.mean(self.lengths))) if self.lengths else 0

    def histogram(self) -> list[tuple[str, float]]:
        """Share of the samples in each bucket of lengths, empty ones at the ends left out."""
        edges = [0, *BUCKETS]
        counts, _ = np.histogram(self.lengths, [*(edge + 0.5 for edge in edges), np.inf])
        names = [*(f"{low + 1:,}-{high:,}" for low, high in zip(edges, BUCKETS, strict=False)), f"> {BUCKETS[-1]:,}"]
        used = np.flatnonzero(counts)
        total = max(1, len(self.lengths))
        return [(names[i], counts[i] / total) for i in range(used[0], used[-1] + 1)] if len(used) else []


@dataclass(frozen=True)
class Rates:
    """What a probe on the cluster measured.

    Attributes:
        scoring: Seconds a token, row of average length, at one checkpoint, in one actor, its ranks together.
        training: Seconds a position of the warm-up, in one worker.
        pairs: By target, seconds a token of its pairs at one checkpoint, both sides counted.
        reducing: By pass, seconds a row and checkpoint for all its targets.
        start_up: Until an actor has its model.
        peak_bytes: Most memory that scoring takes on its device at the batch bound, all checkpoints held; of a rank
            where ranks share a model.
        available_bytes: What an actor, or a rank, may take there.
        max_batch_tokens: The bound.
        host_bytes, host_available_bytes: The same of the host's memory, where the device is a GPU; else 0.
    """

    scoring: float
    training: float
    pairs: dict[str, float]
    reducing: list[float]
    start_up: float
    peak_bytes: int
    available_bytes: int
    max_batch_tokens: int
    host_bytes: int = 0
    host_available_bytes: int = 0


@dataclass(frozen=True)
class Work:
    """What is to be done.

    Attributes:
        actors, workers: Of scoring and of the warm-up.
        gpus: Of an actor, or of each of its ranks.
        num_checkpoints: Features are made at so many.
        num_parameters: Of the adapter.
        dims: Numbers a row and checkpoint, by feature space.
        stored_dtype: Of the projected ones.
        shard_rows: Rows of every shard whose features are missing.
        warmup_positions: Positions of the whole warm-up, padding included; 0 where it is there.
        warmup_start: Seconds until its workers train.
        basis_tokens: By target whose exact basis is missing, tokens of both sides of its pairs.
        pair_tokens: The same by target whose bank is missing.
        spaces: Feature spaces that lack shards, by name as in ``dims``; all of them where a basis is missing.
        num_pairs: By target.
        passes: Targets whose score table is missing; those of one feature space are scored in one pass over it.
        num_subtasks: By target.
        fraction: The largest share of the pool that is selected.
        held_bytes: What an actor or rank holds in the host's memory for all checkpoints.
        basis_lines: What the bases of exact targets keep, for people.
        row_states: States of the base model that selections compare rows by; not foretold.
        ranks: That share an actor's model.
        base_bytes, largest_bytes: Of the base's parameters, and of the largest one.
    """

    actors: int
    workers: int
    gpus: float
    num_checkpoints: int
    num_parameters: int
    dims: dict[str, int]
    stored_dtype: StoredType
    shard_rows: list[int]
    warmup_positions: int
    warmup_start: float
    basis_tokens: dict[str, int]
    pair_tokens: dict[str, int]
    spaces: list[str]
    num_pairs: dict[str, int]
    passes: list[list[str]]
    num_subtasks: dict[str, int]
    fraction: float
    held_bytes: int = 0
    basis_lines: Sequence[str] = ()
    row_states: Sequence[str] = ()
    ranks: int = 1
    base_bytes: int = 0
    largest_bytes: int = 0


@dataclass(frozen=True)
class Plan:
    """A prediction.

    Attributes:
        seconds: Wall time by stage, named as a run names them; stages whose artefact is there are left out. A pass that
            targets share stands at each of them, as a run reports it.
        wall_seconds: Of all stages, a shared pass counted once.
        device_hours: Hours of GPUs, or of actors or their ranks where there are none, by stage; those of a shared pass
            stand at the first that shares it.
        num_bytes: By artefact.
        break_even_epochs: After so many epochs, training on the selection instead of on everything has saved what
            selecting costs; None without a probe.
        training_hours: Device hours of one epoch on everything, and on the selection.
    """

    seconds: dict[str, float] = field(default_factory=dict)
    wall_seconds: float = 0.0
    device_hours: dict[str, float] = field(default_factory=dict)
    num_bytes: dict[str, int] = field(default_factory=dict)
    break_even_epochs: float | None = None
    training_hours: tuple[float, float] | None = None

    def as_json(self) -> dict[str, Any]:
        """For the workspace."""
        return asdict(self)


def no_work(actors: int, gpus: float) -> Work:
    """Return the work of a job without gradients: none that can be foretold."""
    return Work(actors, 0, gpus, 0, 0, {}, "float32", [], 0, 0.0, {}, {}, [], {}, [], {}, 0.0)


def predict(work: Work, tokens: PoolTokens, rates: Rates | None) -> Plan:
    """Return what the work will take; sizes only where there are no rates."""
    sizes = artefact_bytes(work, tokens)
    if rates is None:
        return Plan(num_bytes=sizes)
    seconds: dict[str, float] = {}
    devices: dict[str, float] = {}
    if work.warmup_positions:
        seconds["warmup"] = work.warmup_start + work.warmup_positions * rates.training / work.workers
        devices["warmup"] = work.workers
    start_up = rates.start_up  # the model is loaded once for all pairs
    for stage, counts in (("basis", work.basis_tokens), ("bank", work.pair_tokens)):
        for target, count in counts.items():
            seconds[f"{stage} {target}"] = count * work.num_checkpoints * rates.pairs[target] + start_up
            devices[f"{stage} {target}"] = work.ranks
            start_up = 0.0
    wall = sum(seconds.values())
    if work.shard_rows:
        one = features_seconds(work, tokens, rates)
        stages = [f"features {name}".strip() for name in work.spaces]
        seconds |= dict.fromkeys(stages, one)
        devices[stages[0]] = work.actors * work.ranks
        wall += one
    for targets, rate in zip(work.passes, rates.reducing, strict=True):
        one = tokens.num_scored * work.num_checkpoints * rate
        seconds |= {f"score {target}": one for target in targets}
        wall += one
    hours = {stage: count * (work.gpus or 1.0) * seconds[stage] / 3600 for stage, count in devices.items()}
    whole = tokens.num_tokens * rates.training * (work.gpus or 1.0) / 3600
    saved = whole * (1 - work.fraction)
    break_even = sum(hours.values()) / saved if saved else None
    return Plan(seconds, wall, hours, sizes, break_even, (whole, whole * work.fraction))


def held_bytes(num_parameters: int, num_checkpoints: int, num_exact: int, *, deflates: bool) -> int:
    """Return what an actor holds in the host's memory for so many checkpoints, in bytes, float32 each.

    Args:
        num_parameters: P, of the adapter.
        num_checkpoints: Each with its weights and both moments.
        num_exact: Directions of all exact bases together, P numbers each.
        deflates: Whether the projection keeps a common direction of P numbers.
    """
    return 4 * num_parameters * num_checkpoints * (3 + deflates + num_exact)


def features_seconds(work: Work, tokens: PoolTokens, rates: Rates) -> float:
    """Return the wall time of the features stage: actors start, then take shards as they become free."""
    share = tokens.num_scored / max(1, tokens.num_rows)
    row = float(np.mean(tokens.lengths)) * work.num_checkpoints * rates.scoring * share
    return rates.start_up + makespan([rows * row for rows in work.shard_rows], work.actors)


def warmup_positions(settings: WarmupConfig, lengths: Sequence[int], num_rows: int) -> int:
    """Return the positions of a whole warm-up, padding included.

    Args:
        settings: Its batches.
        lengths: Of a sample of the pool's rows.
        num_rows: Rows of the pool.
    """
    number = max(1, round(settings.fraction * num_rows))
    drawn = np.random.default_rng(settings.seed).choice(lengths, min(number, 20 * settings.batch_size))
    steps = plan_training(
        [str(row) for row in range(len(drawn))],
        drawn.tolist(),
        epochs=1,
        batch_size=settings.batch_size,
        max_batch_tokens=settings.max_batch_tokens,
        num_workers=1,
        learning_rate=settings.learning_rate,
        warmup_ratio=settings.warmup_ratio,
        seed=settings.seed,
    )
    return round(settings.epochs * num_positions(steps, drawn.tolist()) * number / len(drawn))


def num_positions(steps: Sequence[TrainingStep], lengths: Sequence[int]) -> int:
    """Return the positions that go through the models of all workers, padding included."""
    batches = [batch for step in steps for worker in step.micro_batches for batch in worker]
    return sum(len(batch.rows) * max(lengths[row] for row in batch.rows) for batch in batches)


def makespan(durations: Sequence[float], workers: int) -> float:
    """Return when the last of these pieces ends, each taken in order by the worker that is free first."""
    free = [0.0] * workers
    for duration in durations:
        heapq.heapreplace(free, free[0] + duration)
    return max(free)


def stored_bytes(dim: int, stored_dtype: StoredType) -> float:
    """Return the bytes of one stored feature, its scale included."""
    return {"float32": 4.0 * dim, "float16": 2.0 * dim, "int8": dim + 4.0, "bit1": dim / 8 + 4.0}[stored_dtype]


def artefact_bytes(work: Work, tokens: PoolTokens) -> dict[str, int]:
    """Return the size of each kind of artefact when all is done, before compression."""
    rows, checkpoints = tokens.num_scored, work.num_checkpoints
    sizes: Mapping[str, float] = {
        "warmup": 3 * 4 * work.num_parameters * checkpoints,
        "bank": sum(work.num_pairs.values()) * 2 * 4 * max(work.dims.values(), default=0) * checkpoints,
        "features": sum(
            rows * checkpoints * (stored_bytes(dim, work.stored_dtype if name == "" else "float32") + ROW_BYTES)
            for name, dim in work.dims.items()
        ),
        "scores": sum(rows * (SCORE_ROW_BYTES + 4 * subtasks) for subtasks in work.num_subtasks.values()),
    }
    return {name: round(size) for name, size in sizes.items()}
