"""The reducer and the selection at scale: rows and bytes a second beside disk and matrix product, and peak memory.

Everything is measured in a fresh process with one thread for BLAS, as a Ray task of one CPU has it:

    PYTHONPATH=. python benchmarks/reduce.py --folder SCRATCH --part million
    PYTHONPATH=. python benchmarks/reduce.py --folder SCRATCH --part shards
    PYTHONPATH=. python benchmarks/reduce.py --folder SCRATCH --part wide
    PYTHONPATH=. python benchmarks/reduce.py --folder SCRATCH --part select

Features are signs, the default of a job, unless ``--stored`` says otherwise; ``wide`` has the default's 16,384 of them,
unless ``--dim`` says otherwise. ``million`` needs 2 GB in SCRATCH, 6 GB in int8, 10 GB in float16, the others 2 to 6;
``select`` needs 6 GB of memory. What is made is deleted.
"""

from __future__ import annotations

import argparse
import hashlib
import multiprocessing
import os
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np

from benchmarks.made_store import Store, StoreSize, made_scores, make_store
from benchmarks.timing import write_results
from rose_ray.config.selection import SelectionConfig
from rose_ray.distributed.tasks import CORRELATED_COLUMNS, ScorePlan, score_targets
from rose_ray.kernels.quantization import StoredType
from rose_ray.kernels.ranking import ranks
from rose_ray.stages.candidates import Candidates, Scores, choose, target_candidates
from rose_ray.stages.select import selection_summary
from rose_ray.stores.workspace import FileRecord, Workspace

BLOCK_BYTES = 1 << 22
SIZES = {
    "million": [StoreSize(1_000_000, 512)],
    "shards": [StoreSize(100_000, shard_rows) for shard_rows in (128, 512, 2048, 8192)],
    "wide": [StoreSize(50_000, 512, dim=16384)],
}
QUOTAS = {"source-00": 0.02, "source-01": 0.01}


def in_process(function: Callable[..., Any], *arguments: Any) -> tuple[float, Any, float]:
    """Run in a fresh process; return its seconds, what it returned, and its peak resident memory in MiB."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        result: tuple[float, Any, float] = pool.apply(_timed, (function, arguments))
        return result


def _timed(function: Callable[..., Any], arguments: tuple[Any, ...]) -> tuple[float, Any, float]:
    started = time.perf_counter()
    result = function(*arguments)
    seconds = time.perf_counter() - started
    (peak,) = re.findall(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    return seconds, result, int(peak) / 1024


def files_below(folder: Path) -> list[Path]:
    """Feature files of the checkpoints."""
    return sorted(folder.glob("features/made/*/checkpoint-*.parquet"))


def forget(paths: list[Path]) -> None:
    """Drop files from the page cache."""
    for path in paths:
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_all(paths: list[Path], digest: bool) -> None:
    """Read files one after the other, as dd does, or with their SHA-256."""
    for path in paths:
        sha256 = hashlib.sha256()
        with open(path, "rb", buffering=0) as file:
            while block := file.read(BLOCK_BYTES):
                if digest:
                    sha256.update(block)


def reduce(store: Store, targets: int) -> None:
    """Score the store, with the target under several names where asked."""
    plans = [
        ScorePlan(
            store.target.model_copy(update={"name": f"made{number}"}), store.bank, {"n": number}, f"scores/{number}"
        )
        for number in range(targets)
    ]
    score_targets(store.workspace, store.pool, store.features, plans)


def product(size: StoreSize) -> float:
    """Seconds for the bare float32 products of all rows with one vector a subtask, features in memory."""
    random, rows = np.random.default_rng(0), 8192
    features_ND = random.standard_normal((rows, size.dim), dtype=np.float32)
    vectors_DT = random.standard_normal((size.dim, size.subtasks), dtype=np.float32)
    features_ND @ vectors_DT
    started = time.perf_counter()
    for _ in range(20):
        features_ND @ vectors_DT
    return (time.perf_counter() - started) / 20 * size.checkpoints * size.rows / rows


def reduce_rows(folder: Path, size: StoreSize, num_targets: int) -> list[dict[str, Any]]:
    """Make a store, reduce it in several ways, and delete it."""
    started = time.perf_counter()
    store = make_store(str(folder), size)
    made = time.perf_counter() - started
    paths = files_below(folder)
    num_bytes = sum(path.stat().st_size for path in paths)
    lines: list[dict[str, Any]] = []

    def add(name: str, seconds: float, peak: float | None) -> None:
        base = lines[0]["seconds"] if lines else seconds
        line = {"variant": name, "seconds": seconds, "rows/s": size.rows / seconds, "MB/s": num_bytes / 1e6 / seconds}
        lines.append({**line, "over cold read": base / seconds, "peak MiB": peak})

    def measure(name: str, cold: bool, function: Callable[..., Any], *arguments: Any) -> None:
        if cold:
            forget(paths)
        seconds, _, peak = in_process(function, *arguments)
        add(name, seconds, peak)

    measure("sequential read, cold", True, read_all, paths, False)
    measure("sequential read, warm", False, read_all, paths, False)
    measure("read and SHA-256, warm", False, read_all, paths, True)
    add("float32 products alone, in memory", in_process(product, size)[1], None)
    measure("reduce, cold", True, reduce, store, 1)
    measure("reduce, warm", False, reduce, store, 1)
    measure(f"reduce for {num_targets} targets, warm", False, reduce, store, num_targets)
    add("making the store", made, None)
    add("a process that imports and does nothing", *in_process(int)[::2])
    shutil.rmtree(folder)
    return lines


def selections(folder: Path, rows: int, subtasks: int) -> list[dict[str, Any]]:
    """Make a score table, select 5 % of it in several ways, rank it, and delete it."""
    workspace = Workspace.open(str(folder), create=True)
    table = next(made_scores(1, subtasks))
    started = time.perf_counter()
    record = workspace.write_tables("scores.parquet", made_scores(rows, subtasks), table.schema)
    lines: list[dict[str, Any]] = []

    def add(name: str, seconds: float, peak: float | None) -> None:
        per_row = None if peak is None else peak * 2**20 / rows
        line = {"variant": name, "seconds": seconds, "million rows/s": rows / 1e6 / seconds}
        lines.append({**line, "peak MiB": peak, "peak bytes a row": per_row})

    add(f"writing the table, {record.num_bytes / 1e9:.1f} GB", time.perf_counter() - started, None)
    ways: dict[str, SelectionConfig] = {
        "top k": SelectionConfig(fraction=0.05),
        "top k, two sources with quotas": SelectionConfig(fraction=0.05, source_quotas=QUOTAS),
        "top k by tokens": SelectionConfig(tokens=rows // 20 * 1000),
        f"round robin of {subtasks}": SelectionConfig(fraction=0.05, method="round_robin"),
        f"round robin of {subtasks}, quotas": SelectionConfig(
            fraction=0.05, method="round_robin", source_quotas=QUOTAS
        ),
    }
    for name, selection in ways.items():
        seconds, count, peak = in_process(_select, workspace, record, subtasks, selection)
        add(f"{name}: {count:,} rows", seconds, peak)
    seconds, _, peak = in_process(_summarise, workspace, record, subtasks)
    add("top k and its summary", seconds, peak)
    seconds, _, peak = in_process(_rank, rows)
    add("ranks of made scores, in memory", seconds, peak)
    add("a process that imports and does nothing", *in_process(int)[::2])
    shutil.rmtree(folder)
    return lines


def _candidates(workspace: Workspace, record: FileRecord, subtasks: int) -> Candidates:
    scores = Scores(workspace.open_table(record.path, record))
    return target_candidates(scores, [f"t{number}" for number in range(subtasks)], scores.num_rows)


def _select(workspace: Workspace, record: FileRecord, subtasks: int, selection: SelectionConfig) -> int:
    return len(choose(_candidates(workspace, record, subtasks), selection))


def _summarise(workspace: Workspace, record: FileRecord, subtasks: int) -> None:
    candidates = _candidates(workspace, record, subtasks)
    positions = choose(candidates, SelectionConfig(fraction=0.05))
    columns = {name: (lambda name=name: candidates.scores.numbers(name)) for name in CORRELATED_COLUMNS}
    selection_summary(candidates, columns, positions)


def _rank(rows: int) -> None:
    random = np.random.default_rng(0)
    words_N2 = random.integers(0, 2**64, (rows, 2), dtype=np.uint64)
    ranks(random.normal(scale=0.004, size=rows).astype(np.float32), words_N2)


def main() -> None:
    """Run one part and write its result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=[*SIZES, "select"], required=True)
    parser.add_argument("--folder", type=Path, required=True, help="an empty or new folder with room")
    parser.add_argument("--rows", type=int, help="another number of rows")
    parser.add_argument("--stored", choices=get_args(StoredType), default="bit1", help="form of the features")
    parser.add_argument("--dim", type=int, help="another number of numbers of a feature")
    parser.add_argument("--subtasks", type=int, default=4, help="of the score table; features meet 18 of 5 pairs")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"  # of the processes to come
    if options.folder.exists() and any(options.folder.iterdir()):
        parser.error(f"{options.folder} is not empty")
    sections: dict[str, list[dict[str, Any]]] = {}
    if options.part == "select":
        rows = options.rows or 100_000_000
        sections[f"5 % of {rows:,} rows, scores only"] = selections(options.folder / "table", rows, options.subtasks)
    else:
        for size in SIZES[options.part]:
            size = replace(size, rows=options.rows or size.rows, stored=options.stored, dim=options.dim or size.dim)
            shape = f"{size.checkpoints} checkpoints, D {size.dim}, {size.stored}"
            title = f"{size.rows:,} rows, {shape}, shards of {size.shard_rows}"
            sections[title] = reduce_rows(options.folder / "store", size, 3)
    write_results(
        "reduce-select" if options.part == "select" else f"reduce-{options.part}-{options.stored}",
        sections,
        {"threads of BLAS": 1},
        options.out,
    )


if __name__ == "__main__":
    main()
