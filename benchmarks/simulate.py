"""The whole job on 1 to 1,000 GPUs, simulated: how long, how dear, and how much a failing node costs.

    PYTHONPATH=. python benchmarks/simulate.py

A discrete-event simulation, seeded. GPUs take shards from one queue; a node of eight fails at random times, its shards
go back to the front of the queue, it is replaced, and its actors load the model again. Warm-up and bank come before, on
few GPUs, and start over when their node fails; scores are reduced after, on one core. What the numbers rest on stands
with each field.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import math
from collections import deque
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np

from benchmarks.svg_plot import Axis, line_chart, write_chart
from benchmarks.timing import write_results
from rose_ray.data.batches import length_batches, padding_fraction

NUM_SEEDS = 20
GPUS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1000)
SHARD_ROWS = (32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
FAILURE_RATES = (0.0, 0.01, 0.1, 1.0)


@dataclass(frozen=True)
class Job:
    """What there is to do.

    Attributes:
        rows: Of the pool.
        checkpoints: Of the warm-up.
        sample_seconds: Of a GPU for one row at one checkpoint: 18.5 ms for a 7B model at 300 tokens on an H200, by a
            count of operations and bytes at 45 % of its peak, not measured.
        warmup_fraction, warmup_epochs, warmup_gpus: The warm-up's rows, passes and GPUs. A training step is taken to
            cost what scoring does.
        num_pairs: Of all targets; two passes each at every checkpoint, on one GPU.
        reduced_rows: A second, of signs of 16,384 numbers, on an AMD EPYC of 2021: ``benchmarks/reduce.py --part wide``
            had 5,600 to 5,900 alone; its kept table, with another benchmark beside, has 4,600.
    """

    rows: int = 1_000_000
    checkpoints: int = 4
    sample_seconds: float = 0.0185
    warmup_fraction: float = 0.05
    warmup_epochs: int = 4
    warmup_gpus: int = 8
    num_pairs: int = 90
    reduced_rows: float = 5_500.0


@dataclass(frozen=True)
class Cluster:
    """Where it is done.

    Attributes:
        gpus: Scoring actors of one GPU.
        gpus_per_node: They fail together.
        load_seconds: Until an actor has Python, libraries and model: assumed.
        failures: Of a node, per hour: exponential.
        replacement_seconds: Until another node is there: assumed.
    """

    gpus: int = 64
    gpus_per_node: int = 8
    load_seconds: float = 120.0
    failures: float = 0.0
    replacement_seconds: float = 600.0


@dataclass(frozen=True)
class Shards:
    """How the pool is cut, and what a shard costs beside its rows.

    Attributes:
        rows: Of a shard.
        fixed_seconds: Per shard: six files. 10 ms measured on a disk, and 50 ms assumed for each of
            six PUTs.
        row_seconds: Per row, for encoding features: measured at D 8192, four checkpoints, one core.
        padding: Share of positions that are padding, since lengths are sorted within a shard only.
        spread: Of a shard's work, relative, for one row; divided by the root of its rows.
    """

    rows: int = 512
    fixed_seconds: float = 0.31
    row_seconds: float = 0.0008
    padding: float = 0.0
    spread: float = 0.8


@dataclass
class Outcome:
    """Seconds of each stage, and where the GPU seconds of the features went: they add up to GPUs times its duration."""

    warmup: float = 0.0
    bank: float = 0.0
    features: float = 0.0
    reduce: float = 0.0
    useful: float = 0.0
    overhead: float = 0.0
    lost: float = 0.0
    loading: float = 0.0
    down: float = 0.0
    idle: float = 0.0
    failures: int = 0

    @property
    def total(self) -> float:
        """Wall seconds of the job."""
        return self.warmup + self.bank + self.features + self.reduce


def simulate(job: Job, cluster: Cluster, shards: Shards, seed: int = 0) -> Outcome:
    """Run a job once."""
    random = np.random.default_rng(seed)
    outcome = Outcome(reduce=job.rows / job.reduced_rows)
    gpus = min(job.warmup_gpus, cluster.gpus)
    steps = job.rows * job.warmup_fraction * job.warmup_epochs
    outcome.warmup = started_over(steps * job.sample_seconds / gpus, gpus, cluster, random)
    outcome.bank = started_over(2 * job.num_pairs * job.checkpoints * job.sample_seconds, 1, cluster, random)
    Features(job, cluster, shards, seed, outcome).run()
    return outcome


def started_over(seconds: float, gpus: int, cluster: Cluster, random: np.random.Generator) -> float:
    """Wall seconds of work that a failure of one of its nodes starts over, loading included."""
    whole, elapsed = cluster.load_seconds + seconds, 0.0
    rate = cluster.failures / 3600 * math.ceil(gpus / cluster.gpus_per_node)
    while rate:
        until_failure = random.exponential(1 / rate)
        if until_failure >= whole:
            break
        elapsed += until_failure + cluster.replacement_seconds
    return elapsed + whole


class Features:
    """The feature stage: a queue of shards, actors that take from it, nodes that fail."""

    def __init__(self, job: Job, cluster: Cluster, shards: Shards, seed: int, outcome: Outcome) -> None:
        self.cluster, self.outcome = cluster, outcome
        # Nodes fail at the same times whatever the shards, so that shard sizes are compared on the same luck.
        self.luck = [np.random.default_rng([seed, 1, node]) for node in range(_num_nodes(cluster))]
        counts = np.full(-(-job.rows // shards.rows), shards.rows)
        counts[-1] = job.rows - shards.rows * (len(counts) - 1)
        work = counts * job.checkpoints * job.sample_seconds / (1 - shards.padding)
        variance = math.log1p(shards.spread**2 / shards.rows)
        self.work = work * np.random.default_rng([seed, 0]).lognormal(-variance / 2, math.sqrt(variance), len(counts))
        self.overhead = shards.fixed_seconds + counts * shards.row_seconds
        self.queue = deque(range(len(counts)))
        self.left = len(counts)
        self.running: dict[int, tuple[int, float]] = {}
        self.loaded = [0.0] * cluster.gpus
        self.idle_since: dict[int, float] = {}
        self.lives = [0] * cluster.gpus
        self.order = itertools.count()
        self.events: list[tuple[float, int, str, int, int]] = []

    def run(self) -> None:
        """Simulate until the last shard is done, and account for every GPU second."""
        for gpu in range(self.cluster.gpus):
            self._push(self.cluster.load_seconds, "ready", gpu)
        for node in range(_num_nodes(self.cluster)):
            self._push_failure(0.0, node)
        now = 0.0
        while self.left:
            now, _, kind, number, life = heapq.heappop(self.events)
            if kind == "fail":
                self._fail(now, number)
            elif life == self.lives[number]:
                if kind == "done":
                    self._finish(number)
                else:
                    self.outcome.loading += now - self.loaded[number]
                self._start(now, number)
        self._settle(now)

    def _push(self, time: float, kind: str, number: int) -> None:
        life = self.lives[number] if kind != "fail" else 0
        heapq.heappush(self.events, (time, next(self.order), kind, number, life))

    def _push_failure(self, now: float, node: int) -> None:
        if self.cluster.failures:
            self._push(now + self.luck[node].exponential(3600 / self.cluster.failures), "fail", node)

    def _start(self, now: float, gpu: int) -> None:
        self._end_idleness(now, gpu)
        if not self.queue:
            self.idle_since[gpu] = now
        else:
            shard = self.queue.popleft()
            self.running[gpu] = (shard, now)
            self._push(now + self.work[shard] + self.overhead[shard], "done", gpu)

    def _end_idleness(self, now: float, gpu: int) -> None:
        self.outcome.idle += now - self.idle_since.pop(gpu, now)

    def _finish(self, gpu: int) -> None:
        shard, _ = self.running.pop(gpu)
        self.left -= 1
        self.outcome.useful += self.work[shard]
        self.outcome.overhead += self.overhead[shard]

    def _fail(self, now: float, node: int) -> None:
        self.outcome.failures += 1
        back = now + self.cluster.replacement_seconds
        first = node * self.cluster.gpus_per_node
        for gpu in range(first, min(first + self.cluster.gpus_per_node, self.cluster.gpus)):
            if gpu in self.running:
                shard, started = self.running.pop(gpu)
                self.outcome.lost += now - started
                self.queue.appendleft(shard)
            elif gpu in self.idle_since:
                self._end_idleness(now, gpu)
            else:
                self.outcome.loading += now - self.loaded[gpu]
            self.lives[gpu] += 1
            self.outcome.down += self.cluster.replacement_seconds
            self.loaded[gpu] = back
            self._push(back + self.cluster.load_seconds, "ready", gpu)
        self._push_failure(back, node)
        self._wake(now)

    def _wake(self, now: float) -> None:
        """Give shards that came back to actors that had run out of them."""
        for gpu in list(self.idle_since)[: len(self.queue)]:
            self._start(now, gpu)

    def _settle(self, now: float) -> None:
        """Count what is under way when the last shard is done."""
        self.outcome.features = now
        for gpu in range(self.cluster.gpus):
            if gpu in self.idle_since:
                self._end_idleness(now, gpu)
            elif self.loaded[gpu] > now:
                self.outcome.down -= self.loaded[gpu] - now
            else:
                self.outcome.loading += now - self.loaded[gpu]


def _num_nodes(cluster: Cluster) -> int:
    return math.ceil(cluster.gpus / cluster.gpus_per_node)


def padding_of(shard_rows: int, tokens: float = 300.0, batch_tokens: int = 16_384, num_rows: int = 16_384) -> float:
    """Share of padding where lengths (log-normal, at most 2,048) are sorted within a shard, by the engine's batches."""
    lengths = np.random.default_rng(0).lognormal(math.log(tokens) - 0.32, 0.8, num_rows).clip(16, 2048).astype(int)
    parts = [lengths[start : start + shard_rows].tolist() for start in range(0, num_rows, shard_rows)]
    positions = sum(sum(part) / (1 - padding_fraction(part, length_batches(part, batch_tokens))) for part in parts)
    return 1 - float(lengths.sum()) / float(positions)


def averaged(job: Job, cluster: Cluster, shards: Shards, num_seeds: int = NUM_SEEDS) -> dict[str, float]:
    """Means over seeds: hours by stage, GPU hours, shares of the features' GPU time."""
    outcomes = [simulate(job, cluster, shards, seed) for seed in range(num_seeds)]
    mean_of = {key: mean(float(asdict(each)[key]) for each in outcomes) for key in asdict(outcomes[0])}
    total = mean(each.total for each in outcomes)
    spent = cluster.gpus * mean_of["features"]
    rows = job.rows * job.checkpoints * job.sample_seconds
    line = {f"{key} h": mean_of[key] / 3600 for key in ("warmup", "bank", "features", "reduce")}
    line |= {"all h": total / 3600, "GPU h held": cluster.gpus * total / 3600}
    gpus = min(job.warmup_gpus, cluster.gpus)
    line |= {"GPU h used": (gpus * mean_of["warmup"] + mean_of["bank"] + spent) / 3600}
    line |= {"rows %": 100 * rows / spent, "padding %": 100 * (mean_of["useful"] - rows) / spent}
    line |= {f"{key} %": 100 * mean_of[key] / spent for key in ("overhead", "lost", "loading", "down", "idle")}
    return {**line, "failures": mean_of["failures"]}


def by_gpus(job: Job, shards: Shards, rate: float, num_seeds: int) -> list[dict[str, Any]]:
    """A line for each size of the cluster."""
    return [{"GPUs": gpus, **averaged(job, Cluster(gpus, failures=rate), shards, num_seeds)} for gpus in GPUS]


def by_shards(job: Job, gpus: int, rate: float) -> list[dict[str, Any]]:
    """A line for each shard size."""
    lines = []
    for size in SHARD_ROWS:
        shards = Shards(size, padding=padding_of(size))
        line = averaged(job, Cluster(gpus, failures=rate), shards)
        shares = {key: value for key, value in line.items() if key.endswith("%")}
        lines.append({"shard rows": size, "features h": line["features h"], **shares})
    return lines


def main() -> None:
    """Simulate, and write tables and charts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--charts", type=Path, default=Path(__file__).parents[1] / "docs" / "images")
    options = parser.parse_args()
    large = Shards(2048, padding=padding_of(2048))
    pools = {
        "1 million rows": (Job(), NUM_SEEDS),
        "100 million rows": (Job(rows=100_000_000, warmup_fraction=0.0005), 3),
    }
    sections: dict[str, list[dict[str, Any]]] = {}
    lines: dict[str, list[tuple[float, float]]] = {}
    for title, (job, num_seeds) in pools.items():
        rows = by_gpus(job, large, 0.01, num_seeds)
        sections[f"{title}, warm-up on {job.warmup_fraction:.2%}, shards of 2048, 0.01 failures a node and hour"] = rows
        lines[f"{title}: job"] = [(row["GPUs"], row["all h"]) for row in rows]
        lines[f"{title}: features"] = [(row["GPUs"], row["features h"]) for row in rows]
    axes = Axis("GPUs", log=True), Axis("hours", log=True)
    write_chart(options.charts / "scaling-gpus.svg", line_chart("Hours, simulated (7B, 4 checkpoints)", lines, *axes))
    shares: dict[str, list[tuple[float, float]]] = {}
    for num_rows, gpus in ((10_000, 8), (1_000_000, 64), (1_000_000, 512)):
        for rate in FAILURE_RATES:
            rows = by_shards(Job(rows=num_rows), gpus, rate)
            sections[f"{num_rows:,} rows, {gpus} GPUs, {rate:g} failures a node and hour"] = rows
            if rate in (FAILURE_RATES[0], FAILURE_RATES[-1]):
                name = f"{num_rows:,} rows, {gpus} GPUs" + (", failing" if rate else "")
                shares[name] = [(row["shard rows"], row["rows %"]) for row in rows]
    axes = Axis("rows of a shard", log=True, ticks=SHARD_ROWS[::2]), Axis("per cent")
    chart = line_chart("Share of the features' GPU time that goes into rows, simulated", shares, *axes)
    write_chart(options.charts / "scaling-shards.svg", chart)
    facts: dict[str, Any] = {"seeds": NUM_SEEDS, "simulated": "yes: no figure here is a run's"}
    facts |= {type(each).__name__: asdict(each) for each in (Job(), Cluster(), large)}
    write_results("simulate", sections, facts, options.out)


if __name__ == "__main__":
    main()
