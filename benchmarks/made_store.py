"""A workspace of made numbers, written the way a run writes it: shards, features with receipts, banks, score tables."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from rose_ray.config.target import TargetConfig
from rose_ray.kernels.quantization import StoredType, quantize
from rose_ray.schemas import FEATURE_REJECTED, SHARD, bank_schema, features_schema, scores_schema
from rose_ray.stages.pool import settle_pool
from rose_ray.stores.features import REJECTED_FILE, checkpoint_file, shard_folder
from rose_ray.stores.manifest import Manifest, commit_artefact
from rose_ray.stores.workspace import FileRecord, Workspace

SPACE = {"base": "made", "adapters": ["made"], "layout": "made", "projection": "made"}
RATE = 2e-5
NUM_SOURCES = 20
TEXT = "A made record of middling length, so that shards weigh what shards of text weigh. " * 8


@dataclass(frozen=True)
class StoreSize:
    """How much to make: rows of pool and shard, checkpoints, numbers of a feature, subtasks and the pairs of each."""

    rows: int
    shard_rows: int
    checkpoints: int = 4
    dim: int = 1024
    subtasks: int = 18
    pairs: int = 5
    stored: StoredType = "bit1"

    @property
    def names(self) -> list[str]:
        """Names of the checkpoints."""
        return [f"checkpoint-{number}" for number in range(1, self.checkpoints + 1)]


@dataclass(frozen=True)
class Store:
    """What a score task is given."""

    workspace: Workspace
    pool: Manifest
    bank: Manifest
    features: dict[str, Any]
    target: TargetConfig


def make_store(folder: str, size: StoreSize) -> Store:
    """Make a pool, its features and a bank below ``folder``."""
    workspace = Workspace.open(folder, create=True)
    pool = settle_pool(workspace, [_ingested(workspace, size)])
    features: dict[str, Any] = {"key": "made", "space": SPACE, "checkpoints": size.names}
    features |= {"mean_learning_rates": [RATE] * size.checkpoints}
    for number, entry in enumerate(pool.facts["shards"]):
        row_ids = workspace.read_table(entry["path"], columns=["row_id"])["row_id"]
        _write_features(workspace, size, str(entry["shard"]), row_ids, np.random.default_rng([number, 1]))
    target = TargetConfig.model_validate({"name": "made", "pairs": [{"files": ["made"]}]})
    return Store(workspace, pool, _bank(workspace, size), features, target)


def hex_ids(num_rows: int, random: np.random.Generator) -> pa.Array:
    """Random row ids."""
    digits = np.frombuffer(b"0123456789abcdef", dtype=np.uint8)
    characters = digits[random.integers(0, 16, (num_rows, 32), dtype=np.uint8)]
    offsets = np.arange(0, 32 * num_rows + 1, 32, dtype=np.int32)
    return pa.StringArray.from_buffers(num_rows, pa.py_buffer(offsets), pa.py_buffer(characters))


def made_scores(rows: int, subtasks: int, part_rows: int = 1 << 20) -> Iterator[pa.Table]:
    """Yield a score table of random numbers, part by part. Ranks are not made."""
    names = [f"t{number}" for number in range(subtasks)]
    sources = pa.array([f"source-{number:02d}" for number in range(NUM_SOURCES)])
    for start in range(0, rows, part_rows):
        count, random = min(part_rows, rows - start), np.random.default_rng([start, 2])
        values = random.normal(scale=0.004, size=(subtasks, count)).astype(np.float32)
        shards = pa.array([f"made-{number:06d}" for number in range(start // 512, -(-(start + count) // 512))])
        columns = [
            hex_ids(count, random),
            sources.take(pa.array(random.integers(0, NUM_SOURCES, count))),
            pa.array(random.integers(16, 2048, count, dtype=np.int32)),
            pa.array(random.integers(8, 1024, count, dtype=np.int32)),
            pa.array(random.lognormal(size=count).astype(np.float32)),
            pa.array(random.random(count, dtype=np.float32)),
            *(pa.array(column) for column in values),
            pa.array(values.max(axis=0)),
            pa.array(np.zeros(count, np.int64)),
            shards.take(pa.array(np.arange(count) // 512)),
        ]
        yield pa.Table.from_arrays(columns, schema=scores_schema(names))


def _ingested(workspace: Workspace, size: StoreSize) -> Manifest:
    entries: list[dict[str, Any]] = []
    for number, start in enumerate(range(0, size.rows, size.shard_rows)):
        count, random = min(size.shard_rows, size.rows - start), np.random.default_rng([number, 0])
        places = np.arange(start + 1, start + count + 1)
        columns = [
            hex_ids(count, random),
            pa.array([f"source-{code:02d}" for code in random.integers(0, NUM_SOURCES, count)]),
            pa.array(["made.jsonl"] * count),
            pa.array(places),
            pa.array([str(place) for place in places]),
            *[pa.array([f'{{"text": "{place} {TEXT}"}}' for place in places])] * 2,
            pa.array(np.ones(count, np.int32)),
        ]
        path = f"ingest/made/shard-{number:05d}.parquet"
        record = workspace.write_table(path, pa.Table.from_arrays(columns, schema=SHARD))
        entries.append({"shard": f"made-{number:05d}", "path": path, "num_rows": count, "record": vars(record)})
    counts = {"rows_read": size.rows, "unique": size.rows, "duplicates": 0, "rejected": 0, "unsampled": 0}
    facts = {"file": "made.jsonl", "format": "messages", "shards": entries, "sources": {}, "reject_reasons": {}}
    files = [FileRecord(**entry["record"]) for entry in entries]
    return commit_artefact(workspace, "ingest", {"made": 1}, files, counts, facts, started=time.monotonic())


def _write_features(
    workspace: Workspace, size: StoreSize, shard: str, row_ids: pa.ChunkedArray, random: np.random.Generator
) -> None:
    count, folder, started = len(row_ids), shard_folder("made", shard), time.monotonic()
    files = []
    for name in size.names:
        features_ND = random.standard_normal((count, size.dim), dtype=np.float32)
        features_ND /= np.linalg.norm(features_ND, axis=1, keepdims=True)
        codes, scales_N = quantize(features_ND, size.stored)
        columns = [row_ids, pa.FixedSizeListArray.from_arrays(pa.array(codes.reshape(-1)), codes.shape[1])]
        columns += [] if scales_N is None else [pa.array(scales_N)]
        columns += [pa.array(random.lognormal(size=count)), *(pa.array(np.ones(count, np.float32)) for _ in range(2))]
        columns += [pa.array(random.integers(8, 512, count, dtype=np.int32)) for _ in range(3)]
        table = pa.Table.from_arrays(columns, schema=features_schema(size.dim, size.stored))
        files.append(workspace.write_table(f"{folder}/{checkpoint_file(name)}", table))
    files.append(workspace.write_table(f"{folder}/{REJECTED_FILE}", FEATURE_REJECTED.empty_table()))
    counts = {"rows": count, "scored": count, "rejected": 0}
    made_from = {"features": "made", "shard": shard}
    commit_artefact(workspace, "features", made_from, files, counts, {"skipped": []}, started=started, folder=folder)


def _bank(workspace: Workspace, size: StoreSize) -> Manifest:
    files = []
    num_pairs = size.subtasks * size.pairs
    for number, name in enumerate(size.names):
        random = np.random.default_rng([number, 3])
        w, l = (random.standard_normal((num_pairs, size.dim), dtype=np.float32) for _ in range(2))  # noqa: E741
        columns: dict[str, Any] = {
            "pair_id": [f"p{pair}" for pair in range(num_pairs)],
            "subtask": [f"s{pair // size.pairs}" for pair in range(num_pairs)],
            "gradient_w": list(w),
            "gradient_l": list(l),
            "norm_w": np.linalg.norm(w.astype(np.float64), axis=1),
            "norm_l": np.linalg.norm(l.astype(np.float64), axis=1),
            "dot_wl": (w.astype(np.float64) * l).sum(axis=1),
        }
        schema = bank_schema(size.dim)
        for field in schema:
            if field.name not in columns:
                columns[field.name] = np.full(num_pairs, 9)
        table = pa.Table.from_arrays([pa.array(columns[field.name], field.type) for field in schema], schema=schema)
        files.append(workspace.write_table(f"bank/made/{checkpoint_file(name)}", table))
    facts = {"space": SPACE}
    counts = {"pairs": num_pairs}
    return commit_artefact(
        workspace, "bank", {"made": 1}, files, counts, facts, started=time.monotonic(), folder="bank/made"
    )
