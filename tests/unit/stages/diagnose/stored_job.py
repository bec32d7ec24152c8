"""A finished job's workspace without Ray or a model: a pool, a bank and features of numbers that a test gives."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from rose_ray.config import JobConfig, parse_config
from rose_ray.data.preferences import PreferencePair, read_pairs
from rose_ray.filesystem import locate
from rose_ray.schemas import FEATURE_REJECTED, bank_schema, features_schema
from rose_ray.stages.bank import pairs_digest
from rose_ray.stages.ingest import IngestSettings, PoolFile, ingest_file
from rose_ray.stages.pool import read_pool_entry, settle_pool
from rose_ray.stores.features import REJECTED_FILE, checkpoint_file, shard_folder
from rose_ray.stores.manifest import Manifest, artefact_key, commit_artefact
from rose_ray.stores.runs import StageRecord, write_run
from rose_ray.stores.workspace import Workspace
from tests.tiny import write_jsonl

SPACE = {"base": "b", "adapters": ["one", "two"], "layout": "l", "projection": "sketch/v1"}
RATES = (3e-5, 1e-5)
CHECKPOINTS = ("checkpoint-1", "checkpoint-2")


@dataclass
class StoredJob:
    """The configuration and the workspace of one target named ``t``."""

    config: JobConfig
    workspace: Workspace
    pairs: list[PreferencePair]
    stages: list[StageRecord]

    def finish(self) -> None:
        """Write the record of the run."""
        write_run(self.workspace, {}, self.stages, "finished")

    def add_pool(self, rows: Sequence[Mapping[str, Any]], shard_rows: int = 4) -> Manifest:
        """Ingest a pool of one file."""
        folder = Path(self.config.workspace).parent
        file = PoolFile(locate(str(write_jsonl(folder / "pool.jsonl", [dict(row) for row in rows]))))
        pool = settle_pool(self.workspace, [ingest_file(self.workspace, file, IngestSettings(shard_rows=shard_rows))])
        self._note("ingest", pool)
        return pool

    def add_bank(
        self,
        chosen_CVD: np.ndarray,
        rejected_CVD: np.ndarray,
        *,
        tokens: Sequence[tuple[int, int]],
        reference: Sequence[tuple[float, float]] | None = None,
        space: Mapping[str, Any] = SPACE,
    ) -> Manifest:
        """Commit a warm-up of two checkpoints and a bank of these gradients, which are their own projections."""
        facts = {
            "checkpoints": [
                {"name": name, "adapter": adapter, "mean_learning_rate": rate}
                for name, adapter, rate in zip(CHECKPOINTS, SPACE["adapters"], RATES, strict=True)
            ]
        }
        self._note("warmup", commit_artefact(self.workspace, "warmup", {"w": 1}, [], {}, facts, started=0.0))
        model, target = self.config.model, self.config.targets[0]
        made_from = {
            "space": dict(space),
            "pairs": pairs_digest(self.pairs),
            "encoding": target.encoding,
            "max_tokens": model.max_tokens,
            "dtype": model.dtype,
            "quantized": model.quantized,
        }
        folder = f"bank/{artefact_key(made_from)}"
        files = [
            self.workspace.write_table(
                f"{folder}/{checkpoint_file(name)}", self._bank_table(w_VD, l_VD, tokens, reference)
            )
            for name, w_VD, l_VD in zip(CHECKPOINTS, chosen_CVD, rejected_CVD, strict=True)
        ]
        bank_facts = {"space": dict(space), "checkpoints": list(CHECKPOINTS)}
        bank = commit_artefact(self.workspace, "bank", made_from, files, {}, bank_facts, started=0.0)
        self._note(f"bank {target.name}", bank)
        return bank

    def add_features(self, pool: Manifest, features_CND: np.ndarray) -> None:
        """Store features of all rows of the pool, in its order, of float32 and already of length 1."""
        key, start, made = "f" * 16, 0, {"space": SPACE}
        self.workspace.write_json(f"features/{key}/space.json", made)
        for entry in pool.facts["shards"]:
            ids = read_pool_entry(self.workspace, pool, entry, columns=["row_id"])["row_id"]
            folder = shard_folder(key, entry["shard"])
            part = features_CND[:, start : start + len(ids)]
            start += len(ids)
            files = [
                self.workspace.write_table(f"{folder}/{checkpoint_file(name)}", _feature_table(ids, features_ND))
                for name, features_ND in zip(CHECKPOINTS, part, strict=True)
            ]
            files.append(self.workspace.write_table(f"{folder}/{REJECTED_FILE}", FEATURE_REJECTED.empty_table()))
            commit_artefact(
                self.workspace,
                "features",
                {"s": entry["shard"]},
                files,
                {},
                {"skipped": []},
                started=0.0,
                folder=folder,
            )
        self.stages.append(StageRecord("features", key, f"features/{key}", False, 0.0, {}, 0))

    def _note(self, stage: str, manifest: Manifest) -> None:
        self.stages.append(StageRecord(stage, manifest.key, manifest.folder, False, 0.0, {}, 0))

    def _bank_table(
        self,
        w_VD: np.ndarray,
        l_VD: np.ndarray,
        tokens: Sequence[tuple[int, int]],
        reference: Sequence[tuple[float, float]] | None,
    ) -> pa.Table:
        rows = [
            {
                "pair_id": pair.pair_id,
                "subtask": pair.subtask,
                "gradient_w": w_D,
                "gradient_l": l_D,
                "norm_w": float(np.linalg.norm(w_D)),
                "norm_l": float(np.linalg.norm(l_D)),
                "dot_wl": float(w_D @ l_D),
                "num_tokens_w": tokens[v][0],
                "num_tokens_l": tokens[v][1],
                "num_tokens_cut_w": 0,
                "num_tokens_cut_l": 0,
                "logps_w": -8.0 - v,
                "logps_l": -9.0,
                "reference_logps_w": -9.0 if reference is None else reference[v][0],
                "reference_logps_l": -9.0 if reference is None else reference[v][1],
            }
            for v, (pair, w_D, l_D) in enumerate(zip(self.pairs, w_VD, l_VD, strict=True))
        ]
        return pa.Table.from_pylist(rows, schema=bank_schema(w_VD.shape[1]))


def _feature_table(ids: pa.ChunkedArray, features_ND: np.ndarray) -> pa.Table:
    size, dim = features_ND.shape
    columns = [
        ids.combine_chunks(),
        pa.FixedSizeListArray.from_arrays(pa.array(features_ND.astype(np.float32).reshape(-1)), dim),
        pa.array([1.0] * size),
        pa.array([0.5] * size, pa.float32()),
        pa.array([1.0] * size, pa.float32()),
        *(pa.array([count] * size, pa.int32()) for count in (3, 5, 0)),
    ]
    return pa.Table.from_arrays(columns, schema=features_schema(dim, "float32"))


def pair_record(number: int, subtask: str = "s", **settings: Any) -> dict[str, Any]:
    """A record of a pair; every one has texts of its own."""
    record = {
        "id": f"p{number}",
        "topic": subtask,
        "prompt": f"Question number {number}?",
        "chosen": f"Yes, certainly, it is {number}.",
        "rejected": f"No idea what {number} might be.",
    }
    return {**record, **settings}


def stored_job(folder: Path, records: Sequence[Mapping[str, Any]], *, checked: bool = True, **target: Any) -> StoredJob:
    """Return a job of these pairs, with a workspace in which nothing was made yet."""
    file = str(write_jsonl(folder / "pairs.jsonl", [dict(record) for record in records]))
    content = {
        "workspace": str(folder / "workspace"),
        "model": {"base": "none"},
        "pool": {"inputs": [{"files": [str(folder / "pool.jsonl")]}]},
        "targets": [{"name": "t", "pairs": [{"files": [file], "subtask_field": "topic"}], **target}],
    }
    config = parse_config(json.loads(json.dumps(content)))
    workspace = Workspace.open(config.workspace, create=True)
    pairs = read_pairs([locate(file)], target="t", subtask_field="topic", checked=checked)
    return StoredJob(config, workspace, pairs, [])
