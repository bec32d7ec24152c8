"""Thin shells around stage functions: what runs in Ray's workers, holding a model or a tokenizer."""

from __future__ import annotations

import functools
import os
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from rose_ray.config.models import GradientConfig, LoraConfig, ModelConfig, RayConfig, TargetConfig
from rose_ray.data.preferences import PreferencePair
from rose_ray.data.tokenize import Tokeniser
from rose_ray.distributed.engine import load_scoring_model
from rose_ray.distributed.session import carried_errors
from rose_ray.kernels.projection import Projection, make_projection
from rose_ray.model.base import load_tokeniser
from rose_ray.model.checkpoint import Checkpoint, read_checkpoint
from rose_ray.model.layout import ParameterLayout
from rose_ray.model.scoring import ScoringModel
from rose_ray.stages.bank import encode_pairs, pair_gradients, reference_logps
from rose_ray.stages.features import DirectionSettings, shard_features, tokenize_shard
from rose_ray.stages.pool import read_pool_shard
from rose_ray.stores.features import REJECTED_FILE, checkpoint_file, shard_folder
from rose_ray.stores.manifest import Manifest, commit_artefact
from rose_ray.stores.workspace import FileRecord, Workspace


@dataclass(frozen=True)
class ScoringSpec:
    """What a scoring actor needs to know; travels by pickle.

    Attributes:
        workspace: Where checkpoints are read and results written.
        model, lora, gradients: As configured.
        layout: Of the adapter.
        checkpoints: Folders of the checkpoints, relative to the workspace, in order of training.
        checkpoint_files: What the warm-up's manifest knows of the files in them.
        device: ``cpu`` or ``cuda``.
        threads: Torch threads.
        features_key: Key of the feature space.
    """

    workspace: Workspace
    model: ModelConfig
    lora: LoraConfig
    gradients: GradientConfig
    layout: ParameterLayout
    checkpoints: tuple[str, ...]
    checkpoint_files: tuple[FileRecord, ...]
    device: str
    threads: int
    features_key: str

    @property
    def projection(self) -> Projection:
        """The configured projection, for this layout."""
        settings = self.gradients.projection
        return make_projection(settings.kind, settings.dim, settings.seed, self.layout.num_parameters)

    def read_checkpoints(self) -> list[Checkpoint]:
        """Read every checkpoint from storage: an actor that starts again needs nothing of the one that died.

        Raises:
            AlteredFileError: A file differs from its record.
        """
        for record in self.checkpoint_files:
            self.workspace.read(record.path, record)
        return [read_checkpoint(self.workspace.location(folder), self.layout) for folder in self.checkpoints]

    def checkpoint_names(self) -> list[str]:
        """Names of the checkpoints, the last part of their folders."""
        return [folder.rsplit("/", 1)[-1] for folder in self.checkpoints]


class _ModelHolder:
    """Holds the base model and all checkpoints, loaded when first asked for: what a constructor raises, Ray loses."""

    def __init__(self, spec: ScoringSpec) -> None:
        torch.set_num_threads(spec.threads)
        self.spec = spec

    @functools.cached_property
    def checkpoints(self) -> list[Checkpoint]:
        return self.spec.read_checkpoints()

    @functools.cached_property
    def model(self) -> ScoringModel:
        return load_scoring_model(self.spec.model, self.spec.lora, device=self.spec.device)


class ScoringActor(_ModelHolder):
    """Turns one tokenised shard into feature files."""

    def __init__(self, spec: ScoringSpec) -> None:
        super().__init__(spec)
        self.projection = spec.projection
        self.settings = DirectionSettings(
            spec.gradients.adam, spec.gradients.stored_dtype, spec.gradients.max_batch_tokens
        )

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[Any]]:
        """Score the shards of a Ray Data batch and return one line about each."""
        columns = (batch[name] for name in ("shard", "tokens", "rejected", "skipped"))
        with carried_errors():
            lines = [
                self.score_shard(str(shard), _table(tokens), _table(rejected), _table(skipped))
                for shard, tokens, rejected, skipped in zip(*columns, strict=True)
            ]
        return {key: [line[key] for line in lines] for key in lines[0]}

    def score_shard(self, shard: str, tokens: pa.Table, rejected: pa.Table, skipped: pa.Table) -> dict[str, Any]:
        """Compute and commit one shard's features; the receipt goes last."""
        start = time.monotonic()
        spec = self.spec
        features = shard_features(self.model, tokens, self.checkpoints, spec.layout, self.projection, self.settings)
        rejected = pa.concat_tables([rejected, features.rejected])
        folder = shard_folder(spec.features_key, shard)
        files = [
            spec.workspace.write_table(f"{folder}/{checkpoint_file(name)}", table)
            for name, table in zip(spec.checkpoint_names(), features.tables, strict=True)
        ]
        files.append(spec.workspace.write_table(f"{folder}/{REJECTED_FILE}", rejected))
        num_scored = features.tables[0].num_rows
        manifest = commit_artefact(
            spec.workspace,
            "features",
            {"features": spec.features_key, "shard": shard},
            files,
            {"rows": num_scored + rejected.num_rows, "scored": num_scored, "rejected": rejected.num_rows},
            {
                "skipped": skipped["row_id"].to_pylist(),
                "host": socket.gethostname(),
                "pid": os.getpid(),
                "num_tokens": sum(len(ids) for ids in tokens["input_ids"]),
                "num_tokens_cut": int(np.sum(tokens["num_tokens_cut"].to_numpy())),
                "num_rows_cut": int(np.sum(tokens["num_tokens_cut"].to_numpy() > 0)),
            },
            started=start,
            folder=folder,
        )
        return {
            "shard": shard,
            **manifest.counts,
            "num_tokens": manifest.facts["num_tokens"],
            "num_bytes": manifest.num_bytes,
            "seconds": manifest.seconds,
        }


class BankActor(_ModelHolder):
    """Turns targets' pairs into bank tables."""

    def bank(self, target: TargetConfig, pairs: Sequence[PreferencePair]) -> list[pa.Table]:
        """Return a target's bank, a table per checkpoint."""
        encoded = encode_pairs(pairs, cached_tokeniser(self.spec.model), target)
        max_batch_tokens = self.spec.gradients.max_batch_tokens
        reference_V2 = reference_logps(self.model, encoded, max_batch_tokens=max_batch_tokens)
        beta = target.dpo_beta if target.encoding == "rose_official" else None
        return [
            pair_gradients(
                self.model,
                encoded,
                checkpoint,
                self.spec.layout,
                self.spec.projection,
                max_batch_tokens=max_batch_tokens,
                reference_V2=reference_V2,
                half_precision_beta=beta,
            )
            for checkpoint in self.checkpoints
        ]


def tokenize_task(row: dict[str, Any], spec: ScoringSpec, pool: Manifest) -> dict[str, Any]:
    """Turn the name of a shard into its samples: one Ray row is one shard, so no block ever cuts a shard."""
    shard = str(row["shard"])
    table = read_pool_shard(spec.workspace, pool, shard)
    tokens, rejected = tokenize_shard(table, cached_tokeniser(spec.model))
    skipped = pa.table({"row_id": pa.array(list(row["skipped"]), pa.string())})
    return {"shard": shard, "tokens": _bytes(tokens), "rejected": _bytes(rejected), "skipped": _bytes(skipped)}


@functools.lru_cache(maxsize=1)
def cached_tokeniser(model: ModelConfig) -> Tokeniser:
    """Load a worker process's tokenizer once."""
    return load_tokeniser(model)


def device_of(settings: RayConfig) -> str:
    """``cuda`` where actors get GPUs, else ``cpu``."""
    return "cuda" if settings.gpus_per_actor else "cpu"


def _bytes(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    data: bytes = sink.getvalue().to_pybytes()
    return data


def _table(data: bytes) -> pa.Table:
    return pa.ipc.open_stream(data).read_all()
