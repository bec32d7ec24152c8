"""The features stage on Ray against as many bare engine processes with as many threads, on the same shards.

    python benchmarks/stage.py --data ../shared           rows and base model of the shared folder
    python benchmarks/stage.py --data ../shared --rows 300 --rounds 1

Ray's side is the stage as a job runs it, its receipts saying what each actor did when. The bare side has each shard's
tokens and each checkpoint in memory before its clock starts, takes shards from one queue, and writes nothing. So whole
stage over bare is the price of Ray, tokenising, loading and writing; from the first shard's start to the last one's end
it is that of Ray, tokenising and writing.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import shutil
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from benchmarks.timing import write_results
from rose_ray.config import JobConfig, parse_config
from rose_ray.distributed.actors import ScoringActor, ScoringSpec
from rose_ray.distributed.checkpoints import warm_up
from rose_ray.distributed.features import make_features, missing_features
from rose_ray.distributed.ingest import ingest
from rose_ray.distributed.job import Job
from rose_ray.distributed.session import ray_session, worker_environment
from rose_ray.distributed.tokens import cached_tokeniser
from rose_ray.stages.features import shard_features
from rose_ray.stages.pool import read_pool_shard, skipped_rows
from rose_ray.stages.tokens import tokenize_shard
from rose_ray.stores.features import find_shard
from rose_ray.stores.manifest import Manifest
from rose_ray.stores.workspace import Workspace

POOL_ROWS = 43_192
"""Of the shared pool; ``--rows`` becomes a share of them."""


def job_content(data: Path, workspace: Path, rows: int, actors: int, threads: int) -> dict[str, Any]:
    """Return a job on the shared pool: two checkpoints, default projection."""
    return {
        "workspace": str(workspace),
        "model": {"base": str(data / "models/tiny-llama-4m"), "dtype": "float32", "max_tokens": 1024},
        "lora": {"rank": 32, "alpha": 128, "dropout": 0.0},
        "pool": {
            "inputs": [{"files": [str(data / "data/pool/pool.jsonl.gz")], "source_field": "source"}],
            "sample_fraction": rows / POOL_ROWS,
            "shard_rows": 64,
        },
        "targets": [{"name": "se", "pairs": [{"files": [str(data / "data/preferences/se_val.jsonl.gz")]}], "shots": 4}],
        "warmup": {"fraction": 0.1, "epochs": 2, "learning_rate": 1e-3, "batch_size": 16, "max_batch_tokens": 2048},
        "gradients": {"max_batch_tokens": 2048},
        # A quarter of a core each is the readers'; the actors' own threads are fixed beside it.
        "ray": {
            "address": "local",
            "actors": actors,
            "cpus_per_actor": 0.75 * threads,
            "threads_per_actor": threads,
        },
    }


@dataclass(frozen=True)
class StageTimes:
    """Seconds of one run of the stage on Ray.

    Attributes:
        whole: Of the stage, as the job reports it.
        start_up: Until the first actor computes: workers starting, imports, the first tokens, model and checkpoints.
        span: From then to the last shard's end.
        computing, writing: Of all actors together.
        idle_share: Part of the actors' span, start to end for all of them, in which an actor had no shard.
    """

    whole: float
    start_up: float
    span: float
    computing: float
    writing: float
    idle_share: float


def on_ray(job: Job, pool: Manifest, warmup: Manifest, tokens: int) -> StageTimes:
    """Run the stage from nothing and read its receipts."""
    key = job.feature_sets(warmup)[""].key
    shutil.rmtree(Path(job.config.workspace) / "features", ignore_errors=True)
    begun, began = time.monotonic(), time.time()
    make_features(job, pool, warmup, missing_features(job, pool, warmup), tokens)
    whole = time.monotonic() - begun
    spans: dict[tuple[str, int], list[tuple[float, float]]] = defaultdict(list)
    computing = writing = 0.0
    skipped = skipped_rows(job.workspace, pool)
    for entry in pool.facts["shards"]:
        receipt = find_shard(job.workspace, key, entry["shard"], skipped.get(entry["shard"], []))
        assert receipt is not None
        end = datetime.fromisoformat(receipt.created_at).timestamp()
        facts = receipt.facts
        spans[facts["host"], facts["pid"]].append((end - receipt.seconds + facts["load_seconds"], end))
        computing += facts["compute_seconds"]
        writing += receipt.seconds - facts["load_seconds"] - facts["compute_seconds"]
    first = min(start for each in spans.values() for start, _ in each)
    last = max(end for each in spans.values() for _, end in each)
    busy = sum(end - start for each in spans.values() for start, end in each)
    actors = job.config.ray.actors
    return StageTimes(whole, first - began, last - first, computing, writing, 1 - busy / (actors * (last - first)))


def bare(spec: ScoringSpec, shards: Sequence[pa.Table], processes: int) -> float:
    """Return the seconds that bare processes need for all shards, from a common start to the last one's end."""
    context = multiprocessing.get_context("spawn")
    queue: Any = context.Queue()
    for number in _longest_first(shards):
        queue.put(number)
    ready, results = context.Barrier(processes + 1), context.Queue()
    workers = [context.Process(target=_bare, args=(spec, shards, queue, ready, results)) for _ in range(processes)]
    for worker in workers:
        worker.start()
    ready.wait()
    start = time.monotonic()
    scored = sum(results.get() for _ in workers)
    seconds = time.monotonic() - start
    for worker in workers:
        worker.join()
    assert scored == sum(shard.num_rows for shard in shards), f"{scored} rows scored"
    return seconds


def _longest_first(shards: Sequence[pa.Table]) -> list[int]:
    tokens = [sum(map(len, shard["input_ids"])) for shard in shards]
    return sorted(range(len(shards)), key=lambda number: -tokens[number])


def _bare(spec: ScoringSpec, shards: Sequence[pa.Table], queue: Any, ready: Any, results: Any) -> None:
    holder = ScoringActor(spec)
    model, checkpoints = holder.model, holder.checkpoints
    maps = [holder.projections(space) for space in spec.spaces]
    ready.wait()
    scored = 0
    while True:
        try:
            number = queue.get(timeout=1.0) if scored == 0 else queue.get_nowait()
        except Exception:
            break
        made = shard_features(model, shards[number], checkpoints, spec.layout, maps, holder.settings)
        scored += made.tables[0][0].num_rows
    results.put(scored)


def tokenised(job: Job, pool: Manifest) -> tuple[list[pa.Table], float]:
    """Return every shard's samples, and the seconds that one process needs for them."""
    tokeniser = cached_tokeniser(job.config.model)
    skipped = skipped_rows(job.workspace, pool)
    start = time.monotonic()
    tables = [
        tokenize_shard(read_pool_shard(job.workspace, pool, entry["shard"], skipped=skipped), tokeniser)[0]
        for entry in pool.facts["shards"]
    ]
    return tables, time.monotonic() - start


def measure(config: JobConfig, rounds: int) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return a row a round, and what they depend on."""
    job = Job(Workspace.open(config.workspace, create=True), config)
    rows = []
    with ray_session(config.ray):
        pool = ingest(job)
        warmup = warm_up(job, pool, False)
        budget = config.gradients.max_batch_tokens
        assert isinstance(budget, int)
        shards, token_seconds = tokenised(job, pool)
        spec = job.spec(warmup, budget, [each.spec for each in job.feature_sets(warmup).values()])
        sides = {
            "ray": lambda: on_ray(job, pool, warmup, budget),
            "bare": lambda: bare(spec, shards, config.ray.actors),
        }
        for number in range(rounds):
            done: dict[str, Any] = {}
            for side in list(sides)[:: 1 if number % 2 == 0 else -1]:
                done[side] = sides[side]()
            times: StageTimes = done["ray"]
            rows.append(
                {
                    "bare s": done["bare"],
                    "stage s": times.whole,
                    "start-up s": times.start_up,
                    "span s": times.span,
                    "actors computing s": times.computing,
                    "actors writing s": times.writing,
                    "actors idle": times.idle_share,
                    "bare / stage": done["bare"] / times.whole,
                    "bare / span": done["bare"] / times.span,
                }
            )
    num_tokens = sum(len(ids) for shard in shards for ids in shard["input_ids"])
    facts = {
        "actors": config.ray.actors,
        "threads of each": config.ray.threads_per_actor,
        "shards": len(shards),
        "rows": sum(shard.num_rows for shard in shards),
        "checkpoints": len(warmup.facts["checkpoints"]),
        "tokens of a checkpoint": num_tokens,
        "tokenising, one process, s": round(token_seconds, 2),
        "median bare / stage": round(statistics.median(row["bare / stage"] for row in rows), 3),
        "median bare / span": round(statistics.median(row["bare / span"] for row in rows), 3),
    }
    return rows, facts


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with data/ and models/tiny-llama-4m")
    parser.add_argument("--rows", type=int, default=1200)
    parser.add_argument("--actors", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        content = job_content(options.data.resolve(), Path(folder), options.rows, options.actors, options.threads)
        config = parse_config(content)
        os.environ.update(worker_environment(config.ray))  # the bare processes' threads as well
        rows, facts = measure(config, options.rounds)
    write_results("stage", {"features stage": rows}, facts, options.out)


if __name__ == "__main__":
    main()
