"""Small measurements in the cluster's own workers, with the resources and the model that the stages will have."""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import torch

from rose_ray.config.model import ModelConfig
from rose_ray.config.target import TargetConfig
from rose_ray.data.preferences import PreferencePair
from rose_ray.distributed.actors import BankActor
from rose_ray.distributed.engine import ProcessGroup, deepspeed_in_group
from rose_ray.distributed.spaces import SpaceSpec
from rose_ray.distributed.tokens import cached_tokeniser
from rose_ray.distributed.training import WarmupJob, WarmupTrainer
from rose_ray.kernels.influence import influence
from rose_ray.kernels.projection import Projection
from rose_ray.kernels.span import SpanProjection
from rose_ray.model.checkpoint import Checkpoint, OptimizerState
from rose_ray.model.layout import ParameterLayout
from rose_ray.model.memory import ProcessMeter, memory_meter
from rose_ray.stages.bank import EncodedPair, encode_pairs, pair_gradients, reference_logps
from rose_ray.stages.budget import MemoryNeed, memory_need
from rose_ray.stages.features import shard_features
from rose_ray.stages.plan import PoolTokens, num_positions
from rose_ray.stages.pool import read_pool_shard
from rose_ray.stages.stored_features import normalized_features
from rose_ray.stages.tokens import tokenize_shard
from rose_ray.stores.manifest import Manifest
from rose_ray.stores.workspace import FileRecord, Workspace

PROBE_FOLDER = "probe"
"""Where a probe writes in the workspace; deleted when it is done."""

PROBED_CHECKPOINT = "probe"
"""The one checkpoint of a probe."""


@dataclass(frozen=True)
class SampledShard:
    """Samples of every so many-th row of a shard."""

    tokens: pa.Table
    num_rejected: int
    seconds: float


def sample_shard(workspace: Workspace, pool: Manifest, shard: str, model: ModelConfig, step: int) -> SampledShard:
    """Tokenise every ``step``-th row of a shard; the seconds are those of tokenising alone."""
    table = read_pool_shard(workspace, pool, shard, columns=["row_id", "conversation"])
    rows = table.take(pa.array(range(0, table.num_rows, step), pa.int64()))
    tokeniser = cached_tokeniser(model)
    start = time.monotonic()
    tokens, rejected = tokenize_shard(rows, tokeniser)
    return SampledShard(tokens, rejected.num_rows, time.monotonic() - start)


def pool_tokens(parts: Sequence[SampledShard], num_rows: int) -> PoolTokens:
    """Join the samples of several shards."""
    lengths = sorted(len(ids) for part in parts for ids in part.tokens["input_ids"])
    cut = sum(int(np.sum(part.tokens["num_tokens_cut"].to_numpy() > 0)) for part in parts)
    return PoolTokens(num_rows, lengths, sum(part.num_rejected for part in parts), cut)


def evenly(tokens: pa.Table, number: int) -> pa.Table:
    """Return so many samples, evenly spaced by length: their mean is the table's."""
    order = np.argsort([len(ids) for ids in tokens["input_ids"]], kind="stable")
    if len(order) > number:
        order = order[((np.arange(number) + 0.5) * len(order) / number).astype(int)]
    return tokens.take(pa.array(order))


def pair_tokens(model: ModelConfig, target: TargetConfig, pairs: Sequence[PreferencePair]) -> list[int]:
    """Return the tokens of each pair, both sides together."""
    return [_num_tokens([pair]) for pair in encode_pairs(pairs, cached_tokeniser(model), target)]


def _num_tokens(encoded: Sequence[EncodedPair]) -> int:
    return sum(len(side.input_ids) for pair in encoded for side in (pair.chosen, pair.rejected))


def made_up_checkpoint(layout: ParameterLayout) -> Checkpoint:
    """Return weights and moments of the size that training leaves, where no warm-up is at hand yet."""
    generator = torch.Generator().manual_seed(0)

    def drawn(scale: float) -> dict[str, torch.Tensor]:
        return {name: scale * torch.randn(shape, generator=generator) for name, shape in layout.shapes}

    second = {name: tensor.square() for name, tensor in drawn(1e-4).items()}
    return Checkpoint(
        PROBED_CHECKPOINT, drawn(0.02), drawn(1e-4), second, OptimizerState(100, 1e-4, 0.9, 0.999, 1e-8, 1.0, 1)
    )


def probed_space(name: str, dim: int) -> SpaceSpec:
    """Return the stand-in for the projected space, named ``""``, or for an exact target's of so many directions."""
    return SpaceSpec(f"probe {name}".strip(), (FileRecord("", 0, "", num_rows=dim),) if name else None)


class ProbeActor(BankActor):
    """Scores a few rows as a scoring actor does, and a few pairs as the bank's actor does.

    Its specification has the spaces of `probed_space`.
    """

    @functools.cached_property
    def checkpoints(self) -> list[Checkpoint]:
        """The one of the probe."""
        return [made_up_checkpoint(self.spec.layout)]

    def projections(self, space: SpaceSpec) -> list[Projection]:
        """What makes features of directions; an exact basis is random here, of the size that it will have."""
        if space.basis is None:
            return super().projections(space)
        if space not in self._projections:
            basis_JP = torch.randn(space.basis[0].num_rows, self.spec.layout.num_parameters)
            basis_JP = torch.nn.functional.normalize(basis_JP, dim=1)
            self._projections[space] = [SpanProjection(basis_JP, space.features_key)]
        return self._projections[space]

    def ready(self) -> bool:
        """Load the model."""
        return self.model is not None

    def _maps(self) -> list[Projection]:
        return [self.projections(space)[0] for space in self.spec.spaces]

    def need(self) -> MemoryNeed:
        """Return what batches take of this actor's device, and what there is."""
        run, length = self.longest_rows(self._maps())
        meter, configured = memory_meter(self.model.device), self.spec.gradients.max_batch_tokens
        one_row_only = configured != "auto" and configured < 2 * length
        return memory_need(run, length, meter, self.spec.memory_share, one_row_only=one_row_only)

    def host_memory(self) -> tuple[int, int]:
        """Return the bytes of the host's memory that scoring takes of this process, and all that it could take."""
        run, _ = self.longest_rows(self._maps())
        meter = ProcessMeter()
        return meter.peak_bytes(lambda: run(1)), meter.available_bytes()

    def score(self, tokens: pa.Table, max_batch_tokens: int) -> tuple[float, list[pa.Table]]:
        """Return the seconds that these samples take at one checkpoint, and their features by space."""
        settings = replace(self.direction_settings(), max_batch_tokens=max_batch_tokens)
        spaces = [[projection] for projection in self._maps()]
        for part in (tokens.slice(0, 4), tokens):  # the first warms up
            start = time.monotonic()
            made = shard_features(self.model, part, self.checkpoints, self.spec.layout, spaces, settings)
        return time.monotonic() - start, [tables[0] for tables in made.tables]

    def pairs(self, target: TargetConfig, pairs: Sequence[PreferencePair], num_checkpoints: int) -> float:
        """Return the seconds a token of these pairs at one checkpoint, with its part of the reference."""
        encoded = encode_pairs(pairs, cached_tokeniser(self.spec.model), target)
        start = time.monotonic()
        reference_V2 = reference_logps(self.model, encoded, max_batch_tokens=self.spec.max_batch_tokens)
        reference = time.monotonic() - start
        pair_gradients(
            self.model,
            encoded,
            self.checkpoints[0],
            self.spec.layout,
            self._maps()[0],
            max_batch_tokens=self.spec.max_batch_tokens,
            reference_V2=reference_V2,
            half_precision_beta=None,
        )
        gradients = time.monotonic() - start - reference
        return (gradients + reference / num_checkpoints) / _num_tokens(encoded)


def time_reduction(workspace: Workspace, features: pa.Table, num_rows: int, num_pairs: Sequence[int]) -> float:
    """Return the seconds a row that reading features once and multiplying them with every bank takes.

    Args:
        workspace: Where the features lie meanwhile.
        features: Of a few rows; repeated until there are ``num_rows``.
        num_rows: Of a shard.
        num_pairs: Of each target.
    """
    copies = -(-num_rows // features.num_rows)
    table = pa.concat_tables([features] * copies).slice(0, num_rows)
    record = workspace.write_table(f"{PROBE_FOLDER}/features.parquet", table)
    dim = normalized_features(features, "exact").shape[1]
    rng = np.random.default_rng(0)
    banks = [rng.standard_normal((number, dim)) for number in num_pairs]
    start = time.monotonic()
    read = workspace.read_table(record.path, record)
    for directions_UD in banks:
        influence(normalized_features(read, "exact"), directions_UD)
    return (time.monotonic() - start) / num_rows


def time_training(job: WarmupJob, group: ProcessGroup) -> float:
    """Return the seconds a position of its own, padding included, that a warm-up worker takes in this group."""
    torch.set_num_threads(job.threads)
    deepspeed_in_group(job.device, group)
    trainer = WarmupTrainer(job, rank=group.rank, num_workers=group.world_size)
    trainer.step(trainer.steps[0])
    start = time.monotonic()
    for step in trainer.steps:
        trainer.step(step)
    positions = num_positions(trainer.steps, [len(each.input_ids) for each in trainer.samples])
    return (time.monotonic() - start) * group.world_size / positions
