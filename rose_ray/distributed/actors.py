"""Thin shells around stage functions: what runs in Ray's workers, holding a model or a tokenizer."""

from __future__ import annotations

import functools
import os
import socket
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from rose_ray.config.cluster import RayConfig
from rose_ray.config.gradients import GradientConfig
from rose_ray.config.model import LoraConfig, ModelConfig
from rose_ray.config.target import TargetConfig
from rose_ray.data.batches import DealtBatches
from rose_ray.data.preferences import PreferencePair
from rose_ray.data.tokenize import Sample
from rose_ray.distributed.engine import load_scoring_model
from rose_ray.distributed.metrics import count, count_shard
from rose_ray.distributed.roll import Enrolment
from rose_ray.distributed.session import carried_errors
from rose_ray.distributed.spaces import SpaceSpec, basis_bytes, load_projections
from rose_ray.distributed.tokens import cached_tokeniser
from rose_ray.failpoints import die_at
from rose_ray.kernels.projection import Projection
from rose_ray.model.attention import attention_that_runs
from rose_ray.model.checkpoint import Checkpoint, read_checkpoint
from rose_ray.model.layout import ParameterLayout
from rose_ray.model.memory import memory_meter
from rose_ray.model.scoring import ScoringModel
from rose_ray.stages.bank import EncodedPair, encode_pairs, pair_gradients, reference_logps
from rose_ray.stages.basis import BasisSettings, pair_basis
from rose_ray.stages.budget import MOST_TOKENS, measured_budget
from rose_ray.stages.directions import BatchRunner, DirectionSettings
from rose_ray.stages.features import ShardFeatures, shard_features
from rose_ray.stores.features import REJECTED_FILE, checkpoint_file, shard_folder
from rose_ray.stores.manifest import commit_artefact
from rose_ray.stores.workspace import FileRecord, Workspace

BANK_WORKERS = "bank workers"
"""Actors that work on pairs, for people."""


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
        max_batch_tokens: Bound on rows times length of a batch.
        memory_share: Part of its device's memory that an actor may plan with.
        spaces: What features are made for.
        roll: Where actors report, if anywhere; see `called_roll`.
        ranks: Ranks that share an actor's model.
        cpus, gpus: Of each rank.
        stall_seconds: A gang that is silent for so long has come apart.
        gang: What the names of its coordinators' placement groups begin with.
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
    max_batch_tokens: int
    memory_share: float = 1.0
    spaces: tuple[SpaceSpec, ...] = ()
    roll: Any = None
    ranks: int = 1
    cpus: float = 1.0
    gpus: float = 0.0
    stall_seconds: float = 3600.0
    gang: str = field(default_factory=lambda: f"rose-ray-gang-{uuid.uuid4().hex}")

    def read_checkpoints(self) -> list[Checkpoint]:
        """Read every checkpoint from storage: an actor that starts again needs nothing of the one that died.

        Raises:
            AlteredFileError: A file differs from its record.
        """
        for record in self.checkpoint_files:
            self.workspace.read(record.path, record)
        return [read_checkpoint(self.workspace.location(folder), self.layout) for folder in self.checkpoints]

    def computed_with(self) -> dict[str, Any]:
        """What moves features by rounding and is no part of their key."""
        return {
            "device": self.device,
            "ranks": self.ranks,
            "threads": self.threads,
            "max_batch_tokens": self.max_batch_tokens,
            "attention": attention_that_runs(self.model.attention, self.device, getattr(torch, self.model.dtype)),
            "merge_adapter": self.model.merge_adapter,
            "loader": self.model.loader,
            "zero_stage": self.model.deepspeed.zero_stage,
            "kernel": self.gradients.kernel,
            "packing": self.gradients.packing,
        }

    def checkpoint_names(self) -> list[str]:
        """Names of the checkpoints, the last part of their folders."""
        return [folder.rsplit("/", 1)[-1] for folder in self.checkpoints]


class ModelHolder:
    """Holds the base model and all checkpoints, loaded when first asked for: what a constructor raises, Ray loses."""

    def __init__(self, spec: ScoringSpec) -> None:
        torch.set_num_threads(spec.threads)
        self.spec = spec
        self._projections: dict[SpaceSpec, list[Projection]] = {}

    @functools.cached_property
    def checkpoints(self) -> list[Checkpoint]:
        """Of the warm-up, in order."""
        return self.spec.read_checkpoints()

    @functools.cached_property
    def model(self) -> ScoringModel:
        """With its adapter slot."""
        return load_scoring_model(self.spec.model, self.spec.lora, device=self.spec.device)

    def projections(self, space: SpaceSpec) -> list[Projection]:
        """What makes features of directions, one for each checkpoint; read once."""
        if space not in self._projections:
            spec = self.spec
            self._projections[space] = load_projections(
                spec.workspace, space, spec.gradients, spec.layout, self.checkpoints
            )
        return self._projections[space]

    def direction_settings(self) -> DirectionSettings:
        """As configured."""
        gradients = self.spec.gradients
        return DirectionSettings(
            gradients.adam,
            gradients.stored_type,
            self.spec.max_batch_tokens,
            packing=gradients.packing,
            kernel=gradients.kernel,
        )


class ScoringActor(ModelHolder):
    """Turns one tokenised shard into feature files."""

    def __init__(self, spec: ScoringSpec) -> None:
        super().__init__(spec)
        self.settings = self.direction_settings()
        self._idle_since: float | None = None
        self.enrolment = Enrolment(spec.roll)
        if self.enrolment.refusal is None:
            die_at("actor_start")

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[Any]]:
        """Score the shards of a Ray Data batch and return one line about each."""
        columns = (batch[name] for name in ("shard", "tokens", "rejected", "skipped", "spaces"))
        with carried_errors():
            self.enrolment.check()
            lines = [
                self.score_shard(
                    str(shard), _table(tokens), _table(rejected), _table(skipped), [int(number) for number in spaces]
                )
                for shard, tokens, rejected, skipped, spaces in zip(*columns, strict=True)
            ]
        return {key: [line[key] for line in lines] for key in lines[0]}

    def prepare(self, spaces: Sequence[SpaceSpec]) -> None:
        """Load what is not there yet: model, checkpoints, and the maps of these spaces."""
        for space in spaces:
            self.projections(space)
        assert self.model

    def features(self, tokens: pa.Table, spaces: Sequence[SpaceSpec]) -> ShardFeatures:
        """Compute a shard's features."""
        maps = [self.projections(space) for space in spaces]
        return shard_features(self.model, tokens, self.checkpoints, self.spec.layout, maps, self.settings)

    def score_shard(
        self, shard: str, tokens: pa.Table, rejected: pa.Table, skipped: pa.Table, spaces: Sequence[int]
    ) -> dict[str, Any]:
        """Compute and commit one shard's features in the spaces of these numbers; receipts go last."""
        start = time.monotonic()
        if self._idle_since is not None:
            count("phase_seconds", start - self._idle_since, phase="idle")
        spec = self.spec
        wanted = [spec.spaces[number] for number in spaces]
        self.prepare(wanted)
        loaded = time.monotonic()
        features = self.features(tokens, wanted)
        if spec.device == "cuda":
            # What did not fit will not fit in the next shard either. Not on the CPU, where a shard's bytes must not
            # depend on what its actor did before.
            self.settings = replace(self.settings, max_batch_tokens=features.max_batch_tokens)
        computed = time.monotonic()
        rejected = pa.concat_tables([rejected, features.rejected])
        num_scored = features.tables[0][0].num_rows
        counts = {"rows": num_scored + rejected.num_rows, "scored": num_scored, "rejected": rejected.num_rows}
        facts = {
            "skipped": skipped["row_id"].to_pylist(),
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "num_tokens": sum(len(ids) for ids in tokens["input_ids"]),
            "num_tokens_cut": int(np.sum(tokens["num_tokens_cut"].to_numpy())),
            "num_rows_cut": int(np.sum(tokens["num_tokens_cut"].to_numpy() > 0)),
            "num_positions": features.num_positions,
            "num_halvings": features.num_halvings,
            "computed_with": spec.computed_with() | {"max_batch_tokens": features.max_batch_tokens},
            "load_seconds": round(loaded - start, 3),
            "compute_seconds": round(computed - loaded, 3),
            "ended_at": round(time.time(), 3),
        }
        num_bytes = 0
        for space, tables in zip(wanted, features.tables, strict=True):
            folder = shard_folder(space.features_key, shard)
            files = [
                spec.workspace.write_table(f"{folder}/{checkpoint_file(name)}", table)
                for name, table in zip(spec.checkpoint_names(), tables, strict=True)
            ]
            files.append(spec.workspace.write_table(f"{folder}/{REJECTED_FILE}", rejected))
            die_at("before_receipt")
            made_from = {"features": space.features_key, "shard": shard}
            receipt = commit_artefact(
                spec.workspace, "features", made_from, files, counts, facts, started=start, folder=folder
            )
            num_bytes += receipt.num_bytes
        self.enrolment.finished()
        self._idle_since = time.monotonic()
        count_shard(counts, facts, len(spec.checkpoints), self._idle_since - computed)
        told = {name: facts[name] for name in ("num_tokens", "num_halvings")}
        seconds = round(self._idle_since - start, 3)
        told["max_batch_tokens"] = features.max_batch_tokens
        return {"shard": shard, **counts, **told, "num_bytes": num_bytes, "seconds": seconds}


class BankActor(ModelHolder):
    """Turns targets' pairs into bank tables and exact bases, and finds out what fits into memory."""

    writes = True
    """Of ranks that share a model one writes what all of them compute."""

    in_step = False
    """Whether other ranks run the same batches beside it, so that it cannot halve one on its own."""

    def __init__(self, spec: ScoringSpec) -> None:
        super().__init__(spec)
        self.enrolment = bank_enrolment(spec)

    def budget(self, spaces: Sequence[SpaceSpec]) -> int:
        """Return the largest batch that fits beside the maps of these spaces, in tokens."""
        self.enrolment.check()
        run, length = self.longest_rows([self.projections(space)[0] for space in spaces])
        meter, device = memory_meter(self.model.device), self.model.device.type
        return measured_budget(run, length, MOST_TOKENS[device], meter, share=self.spec.memory_share)

    def longest_rows(self, maps: Sequence[Projection]) -> tuple[Callable[[int], None], int]:
        """Return what scores so many rows of the greatest length, and that length."""
        length = self.spec.model.max_tokens
        sample = Sample([0] * length, [True] * length)
        settings = replace(self.direction_settings(), max_batch_tokens=2 * length)
        runner = BatchRunner(self.model, self.spec.layout, settings)

        def run(rows: int) -> None:
            projections = [projection.to(self.model.device) for projection in maps]
            samples, checkpoint, places = [sample] * rows, self.checkpoints[0], list(range(rows))
            if self.in_step:
                dealt = DealtBatches(places, [places], sample)
                list(runner.run_dealt(samples, dealt, checkpoint, projections))
            else:
                list(runner.run(samples, checkpoint, projections))

        return run, length

    def bank(self, target: TargetConfig, pairs: Sequence[PreferencePair], space: SpaceSpec) -> list[pa.Table]:
        """Return a target's bank, a table per checkpoint."""
        self.enrolment.check()
        encoded, reference_V2 = self._encoded(target, pairs)
        tables = [
            pair_gradients(
                self.model,
                encoded,
                checkpoint,
                self.spec.layout,
                projection,
                max_batch_tokens=self.spec.max_batch_tokens,
                reference_V2=reference_V2,
                half_precision_beta=_half_precision_beta(target),
            ).table()
            for checkpoint, projection in zip(self.checkpoints, self.projections(space), strict=True)
        ]
        self.enrolment.finished()
        return tables

    def basis(
        self, target: TargetConfig, pairs: Sequence[PreferencePair], folder: str, per_subtask: bool
    ) -> list[FileRecord]:
        """Write a target's exact basis, a file per checkpoint: it is too large to travel."""
        self.enrolment.check()
        encoded, reference_V2 = self._encoded(target, pairs)
        spec = self.spec
        settings = BasisSettings(per_subtask, spec.max_batch_tokens, _half_precision_beta(target))
        records = []
        for name, checkpoint in zip(spec.checkpoint_names(), self.checkpoints, strict=True):
            basis_JP = pair_basis(self.model, encoded, checkpoint, spec.layout, target, reference_V2, settings)
            if self.writes:
                path = f"{folder}/{name}.safetensors"
                records.append(spec.workspace.write(path, basis_bytes(basis_JP), num_rows=len(basis_JP)))
        self.enrolment.finished()
        return records

    def _encoded(self, target: TargetConfig, pairs: Sequence[PreferencePair]) -> tuple[list[EncodedPair], torch.Tensor]:
        encoded = encode_pairs(pairs, cached_tokeniser(self.spec.model), target)
        die_at("mid_pairs")
        return encoded, reference_logps(self.model, encoded, max_batch_tokens=self.spec.max_batch_tokens)


def bank_enrolment(spec: ScoringSpec) -> Enrolment:
    """Take a place on the roll of the actors that work on pairs."""
    return Enrolment(spec.roll, BANK_WORKERS, "a target")


def _half_precision_beta(target: TargetConfig) -> float | None:
    return target.dpo_beta if target.encoding == "rose_official" else None


def device_of(settings: RayConfig) -> str:
    """``cuda`` where actors get GPUs, else ``cpu``."""
    return "cuda" if settings.gpus_per_actor else "cpu"


def _table(data: bytes) -> pa.Table:
    return pa.ipc.open_stream(data).read_all()
