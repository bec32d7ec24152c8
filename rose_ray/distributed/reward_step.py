"""The reward step measured on the cluster: one task holds the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import ray

from rose_ray.config.job import JobConfig
from rose_ray.config.target import TargetConfig
from rose_ray.data.conversation import parse_conversation
from rose_ray.data.preferences import PreferencePair
from rose_ray.distributed.actors import BankActor, ScoringSpec
from rose_ray.distributed.bank import BANK_BATCH_TOKENS
from rose_ray.distributed.job import Job
from rose_ray.distributed.resources import granted_resources
from rose_ray.distributed.session import ray_session, root_cause
from rose_ray.distributed.tokens import cached_tokeniser
from rose_ray.errors import ConfigError, RoseError, StoreError
from rose_ray.model.tokenizer import with_absolute_paths
from rose_ray.stages.bank import encode_pairs
from rose_ray.stages.diagnose.pool_scores import stored_pool
from rose_ray.stages.diagnose.reward_step import (
    MeasuredSteps,
    RewardStepReport,
    StepSettings,
    compare_steps,
    measured_steps,
)
from rose_ray.stages.diagnose.stored import StoredBank, needed_bank
from rose_ray.stages.pool import read_pool_shard, skipped_rows
from rose_ray.stages.stored_features import stored_features
from rose_ray.stores.features import find_shard, read_shard_features
from rose_ray.stores.manifest import Manifest
from rose_ray.stores.workspace import Workspace


@dataclass(frozen=True)
class ChosenRows:
    """Rows that take part.

    Attributes:
        row_ids: Their ids.
        conversations: Their texts.
        features_CND, norms_CN: Stored features, divided by exact lengths, and these, by checkpoint.
    """

    row_ids: list[str]
    conversations: list[str]
    features_CND: list[np.ndarray]
    norms_CN: list[np.ndarray]


def reward_step(
    config: JobConfig,
    target: TargetConfig,
    pairs: Sequence[PreferencePair],
    *,
    num_rows: int,
    num_pairs: int,
    share: float,
    seed: int,
) -> RewardStepReport:
    """Measure a few rows and pairs of a finished job; nothing is written.

    The model is loaded whole, in float32 unless its weights are packed, whatever ``model.loader`` and ``model.dtype``
    say: in bfloat16 a short step would be lost in rounding.

    Args:
        config: Of the job.
        target: One of its targets.
        pairs: The target's.
        num_rows, num_pairs: How many take part, drawn at random; all where there are fewer.
        share: Length of the short step over the adapter's own.
        seed: Of the draws.

    Raises:
        ConfigError: Several ranks share an actor's model, or the target's method takes no gradients.
        StoreError: The bank or features are missing.
        RoseError: Whatever a cluster or a model may raise.
    """
    if config.ray.ranks_per_actor > 1:
        raise ConfigError("reward-step holds the model in one process: set ray.ranks_per_actor to 1.")
    workspace, random = Workspace.open(config.workspace), np.random.default_rng(seed)
    bank = needed_bank(workspace, config, target, pairs)
    pool, key = stored_pool(workspace, bank)
    rows = _draw_rows(workspace, pool, key, bank.checkpoints, num_rows, random)
    places = sorted(random.permutation(len(pairs))[:num_pairs].tolist())
    adam = config.gradients.adam
    job = Job(workspace, config.model_copy(update={"model": with_absolute_paths(config.model)}))
    try:
        with ray_session(config.ray), granted_resources(config):
            spec = _spec(job, bank)
            steps = StepSettings(adam, spec.max_batch_tokens, share)
            chosen = [pairs[place] for place in places]
            task = job.model_task(_measure, spec, target, chosen, rows.conversations, steps)
            measured: list[MeasuredSteps] = ray.get(task)
    except Exception as error:
        cause = root_cause(error)
        raise (cause if isinstance(cause, RoseError | OSError) else error) from None
    return compare_steps(bank, places, rows.row_ids, rows.features_CND, rows.norms_CN, measured, share)


def _spec(job: Job, bank: StoredBank) -> ScoringSpec:
    bound = job.config.gradients.max_batch_tokens
    spec = job.spec(bank.warmup, BANK_BATCH_TOKENS if bound == "auto" else bound)
    changes: dict[str, Any] = {"loader": "plain"}
    if spec.model.quantized == "none":
        changes["dtype"] = "float32"
    return replace(spec, model=spec.model.model_copy(update=changes))


def _measure(
    spec: ScoringSpec,
    target: TargetConfig,
    pairs: Sequence[PreferencePair],
    conversations: Sequence[str],
    settings: StepSettings,
) -> list[MeasuredSteps]:
    holder, tokeniser = BankActor(spec), cached_tokeniser(spec.model)
    encoded = encode_pairs(pairs, tokeniser, target)
    samples = [tokeniser.encode(parse_conversation(text)) for text in conversations]
    return [
        measured_steps(holder.model, samples, encoded, checkpoint, spec.layout, settings)
        for checkpoint in holder.checkpoints
    ]


def _draw_rows(
    workspace: Workspace,
    pool: Manifest,
    key: str,
    checkpoints: Sequence[str],
    num_rows: int,
    random: np.random.Generator,
) -> ChosenRows:
    """Draw rows that have features, reading the shards that they lie in alone."""
    skipped, entries = skipped_rows(workspace, pool), pool.facts["shards"]
    counts = [entry["num_rows"] - entry["num_skipped"] for entry in entries]
    # Twice as many, since some of them may have been rejected.
    drawn = np.sort(random.permutation(sum(counts))[: 2 * num_rows])
    ends = np.cumsum(counts)
    found: list[tuple[str, str, list[tuple[np.ndarray, float]]]] = []
    for number in dict.fromkeys(np.searchsorted(ends, drawn, side="right").tolist()):
        shard = entries[number]["shard"]
        receipt = find_shard(workspace, key, shard, skipped.get(shard, []))
        if receipt is None:
            raise StoreError(f"shard {shard} has no features. Run `rose-ray features CONFIG` first.")
        rows = read_pool_shard(workspace, pool, shard, columns=["row_id", "conversation"], skipped=skipped)
        start = ends[number] - counts[number]
        wanted = rows.take(pa.array(drawn[(drawn >= start) & (drawn < ends[number])] - start))
        tables = read_shard_features(workspace, receipt, checkpoints).tables
        places = {row_id: place for place, row_id in enumerate(tables[0]["row_id"].to_pylist())}
        for row_id, text in zip(wanted["row_id"].to_pylist(), wanted["conversation"].to_pylist(), strict=True):
            if row_id in places:
                own = [table.slice(places[row_id], 1) for table in tables]
                found.append(
                    (row_id, text, [(stored_features(one).restored()[0], one["norm"][0].as_py()) for one in own])
                )
    if not found:
        raise StoreError("none of the rows drawn has features. Try another --seed, or look at rejected.parquet.")
    kept = [found[place] for place in sorted(random.permutation(len(found))[:num_rows].tolist())]
    return ChosenRows(
        [row_id for row_id, _, _ in kept],
        [text for _, text, _ in kept],
        [np.stack([numbers[c][0] for _, _, numbers in kept]) for c in range(len(checkpoints))],
        [np.array([numbers[c][1] for _, _, numbers in kept]) for c in range(len(checkpoints))],
    )
