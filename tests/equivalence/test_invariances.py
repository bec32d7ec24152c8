"""What must not change a score, what must negate it, and what must be refused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from rose_ray.config.gradients import AdamMode
from rose_ray.config.model import LoraConfig, ModelConfig
from rose_ray.config.target import PairInput, TargetConfig
from rose_ray.data.conversation import Conversation, Message
from rose_ray.data.preferences import PreferencePair, check_pairs
from rose_ray.data.tokenize import Sample, Tokeniser
from rose_ray.distributed.engine import load_scoring_model
from rose_ray.errors import NumericsError, PairError
from rose_ray.kernels.correlation import spearman
from rose_ray.kernels.influence import checkpoint_weights
from rose_ray.kernels.projection import make_projection
from rose_ray.model.checkpoint import Checkpoint, OptimizerState
from rose_ray.model.layout import layout_of
from rose_ray.model.tokenizer import load_tokeniser
from rose_ray.schemas import FEATURE_REJECTED, TOKENS
from rose_ray.stages.bank import EncodedPair, encode_pairs, pair_gradients
from rose_ray.stages.directions import DirectionSettings
from rose_ray.stages.features import shard_features
from rose_ray.stages.score import ShardRows
from rose_ray.stores.features import StoredShard
from tests import oracles
from tests.equivalence.plain_training import PlainTraining
from tests.tiny import digest, score_rows

FLOAT32_ENTRY = 3e-7
"""Features, bank and scores are stored as float32 (6e-8); the model here is float64, so nothing else differs."""

FLOAT32_SCORE = 1e-6
"""Of scores, sums of cosines: float32 sums in another order, 8e-9 as found here."""

BFLOAT16_SCORE = 2e-3
"""The same with activations of 8 bits, where another order of a sum rounds otherwise: 1.4e-4 as found here."""

LEAST_SPEARMAN = 0.95
"""Of exact scores, spread by about 0.1, with those from 4096 dimensions: a cosine errs by 1 / sqrt(4096) = 0.016."""

LORA = LoraConfig(rank=4, alpha=8.0, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
RATES = (2e-3, 5e-4)
MAX_BATCH_TOKENS = 256


@pytest.fixture(scope="module")
def tokeniser(base_folder: str) -> Tokeniser:
    return load_tokeniser(ModelConfig(base=base_folder))


@pytest.fixture(scope="module")
def rows(tokeniser: Tokeniser, pool_rows: list[dict[str, Any]]) -> list[tuple[str, Sample]]:
    return [
        (
            digest(row["id"]),
            tokeniser.encode(Conversation(tuple(Message(t["role"], t["content"]) for t in row["messages"]))),
        )
        for row in pool_rows
    ]


def _pairs(pair_rows: list[dict[str, Any]]) -> list[PreferencePair]:
    return [
        PreferencePair(
            row["id"],
            row["topic"],
            (Message("user", row["prompt"]),),
            row["chosen"],
            row["rejected"],
            f"\n\nHuman: {row['prompt']}\n\nAssistant:",
            row["chosen"],
            row["rejected"],
        )
        for row in pair_rows
    ]


@pytest.fixture(scope="module")
def encoded(tokeniser: Tokeniser, pair_rows: list[dict[str, Any]]) -> list[EncodedPair]:
    return encode_pairs(_pairs(pair_rows), tokeniser, _target())


@pytest.fixture(scope="module")
def checkpoints(base_folder: str, rows: list[tuple[str, Sample]]) -> list[Checkpoint]:
    """Of a short training on the pool's first rows."""
    torch.manual_seed(0)
    training = PlainTraining(oracles.peft_model(base_folder, **oracles.lora_settings(LORA), dtype=torch.float32))
    results = []
    for epoch, rate in enumerate(RATES, start=1):
        for start in range(0, 12, 4):
            training.step([(s.input_ids, s.loss_mask) for _, s in rows[start : start + 4]], rate)
        adapter = {name: parameter.detach().clone() for name, parameter in training.parameters.items()}
        state = OptimizerState(training.num_updates, rate, 0.9, 0.999, 1e-8, 1.0, epoch)
        results.append(
            Checkpoint(
                f"checkpoint-{epoch}", adapter, training.moments("exp_avg"), training.moments("exp_avg_sq"), state
            )
        )
    return results


class Stages:
    """The stages on one base model, from samples and pairs to a score table."""

    def __init__(
        self,
        base: str,
        checkpoints: Sequence[Checkpoint],
        projection: tuple[Any, int, int],
        adam: AdamMode = "torch",
        dtype: str = "float64",
    ) -> None:
        config = ModelConfig(base=base, loader="plain", dtype="float32" if dtype == "float64" else dtype)  # type: ignore[arg-type]
        overriding = torch.float64 if dtype == "float64" else None
        self.model = load_scoring_model(config, LORA, device="cpu", dtype=overriding)
        self.layout = layout_of(self.model.module)
        self.checkpoints, self.adam = checkpoints, adam
        self.projection = make_projection(*projection, self.layout.num_parameters)

    def features(
        self, rows: Sequence[tuple[str, Sample]], max_batch_tokens: int = MAX_BATCH_TOKENS
    ) -> tuple[ShardRows, list[pa.Table]]:
        tokens = pa.Table.from_pylist([{"row_id": i, **sample.__dict__} for i, sample in rows], schema=TOKENS)
        settings = DirectionSettings(self.adam, "float32", max_batch_tokens)
        features = shard_features(
            self.model, tokens, self.checkpoints, self.layout, [[self.projection] * len(self.checkpoints)], settings
        )
        stored = StoredShard(features.tables[0], FEATURE_REJECTED.empty_table())
        ids, sources = pa.array([i for i, _ in rows]), pa.array(["s"] * len(rows))
        return ShardRows("shard", ids, sources, stored), features.tables[0]

    def banks(self, pairs: Sequence[EncodedPair]) -> list[pa.Table]:
        return [
            pair_gradients(
                self.model, pairs, checkpoint, self.layout, self.projection, max_batch_tokens=MAX_BATCH_TOKENS
            ).table()
            for checkpoint in self.checkpoints
        ]


@pytest.fixture(scope="module")
def stages(base_folder: str, checkpoints: list[Checkpoint]) -> Stages:
    return Stages(base_folder, checkpoints, ("none", 1, 0))


@pytest.fixture(scope="module")
def shard(stages: Stages, rows: list[tuple[str, Sample]]) -> ShardRows:
    return stages.features(rows)[0]


@pytest.fixture(scope="module")
def banks(stages: Stages, encoded: list[EncodedPair]) -> list[pa.Table]:
    return stages.banks(encoded)


def _target(**settings: Any) -> TargetConfig:
    return TargetConfig(name="t", pairs=[PairInput(files=["pairs.jsonl"])], **settings)


def _scores(shards: Sequence[ShardRows], banks: list[pa.Table], **settings: Any) -> dict[str, np.ndarray]:
    """Subtask scores and score of every row, by row id."""
    table = score_rows(shards, banks, RATES, _target(**settings)).table
    columns = [name for name in table.column_names if name.startswith("subtask_")]
    return {row["row_id"]: np.array([row[name] for name in (*columns, "score")]) for row in table.to_pylist()}


def _distance(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> float:
    assert one.keys() == other.keys()
    return max(float(np.abs(one[row_id] - other[row_id]).max()) for row_id in one)


def test_scores_are_those_of_the_slow_formula(shard: ShardRows, banks: list[pa.Table]) -> None:
    found = _scores([shard], banks)
    features = np.array([table["feature"].to_pylist() for table in shard.stored.tables])
    directions = np.array(
        [np.array(bank["gradient_l"].to_pylist()) - np.array(bank["gradient_w"].to_pylist()) for bank in banks]
    )
    weights = [rate / sum(RATES) for rate in RATES]
    subtasks, scores = oracles.scores(features, directions, weights, banks[0]["subtask"].to_pylist())
    expected = np.column_stack([subtasks, scores])
    np.testing.assert_allclose(np.stack(list(found.values())), expected, rtol=0, atol=FLOAT32_ENTRY)
    assert np.ptp(scores) > 0.05


def test_checkpoint_weights_sum_to_one() -> None:
    for rates in (RATES, [1e-9], [3, 1, 4, 1, 5], [1e-300, 1e300]):
        assert checkpoint_weights(rates).sum() == pytest.approx(1, abs=1e-15)


@pytest.mark.parametrize("objective", ["rose", "rose_simpo", "rose_balanced", "less"])
def test_neither_beta_nor_the_reference_matters_to_single_pairs(
    objective: str, shard: ShardRows, banks: list[pa.Table]
) -> None:
    expected = _scores([shard], banks, objective=objective)
    for beta in (1e-3, 1.0, 50.0):
        assert _distance(_scores([shard], banks, objective=objective, dpo_beta=beta), expected) == 0
    assert _distance(_scores([shard], _with_other_reference(banks), objective=objective), expected) == 0


def test_they_do_matter_where_pairs_are_added_up_before_they_are_normalised(
    shard: ShardRows, banks: list[pa.Table]
) -> None:
    expected = _scores([shard], banks, objective="dpo_weighted")
    assert _distance(_scores([shard], banks, objective="dpo_weighted", dpo_beta=1.0), expected) > 1e-3
    assert _distance(_scores([shard], _with_other_reference(banks), objective="dpo_weighted"), expected) > 1e-3


def _with_other_reference(banks: list[pa.Table]) -> list[pa.Table]:
    changed = []
    for bank in banks:
        for name in ("reference_logps_w", "reference_logps_l"):
            place = bank.schema.get_field_index(name)
            values = bank[name].to_numpy() * 0.7 + np.arange(bank.num_rows)
            bank = bank.set_column(place, bank.schema.field(name), pa.array(values))
        changed.append(bank)
    return changed


@pytest.mark.parametrize("objective", ["rose", "rose_simpo", "rose_balanced"])
def test_swapped_pairs_negate(
    objective: str, stages: Stages, shard: ShardRows, banks: list[pa.Table], encoded: list[EncodedPair]
) -> None:
    swapped = stages.banks([replace(pair, chosen=pair.rejected, rejected=pair.chosen) for pair in encoded])
    one, other = (_scores([shard], each, objective=objective, aggregation="mean") for each in (banks, swapped))
    assert _distance(one, {row_id: -values for row_id, values in other.items()}) < FLOAT32_ENTRY
    # with the best of the subtasks as score, what is negated is the worst
    best = _scores([shard], swapped, objective=objective)
    assert all(abs(best[i][-1] + one[i][:-1].min()) < FLOAT32_ENTRY for i in one)


def test_pairs_with_equal_sides_are_refused_wherever_they_are_seen(
    tokeniser: Tokeniser, pair_rows: list[dict[str, Any]], banks: list[pa.Table], shard: ShardRows
) -> None:
    good, bad = _pairs(pair_rows)[:2]
    bad = replace(bad, rejected=bad.chosen)
    with pytest.raises(PairError, match=f"1 of 2 pairs have equal sides: {bad.pair_id}"):
        check_pairs([good, bad], target="t")
    with pytest.raises(PairError, match=f"{bad.pair_id}: both sides are the same"):
        encode_pairs([good, bad], tokeniser, _target())
    same = []
    for bank in banks:
        for column, source in (("gradient_l", "gradient_w"), ("norm_l", "norm_w")):
            bank = bank.set_column(bank.schema.get_field_index(column), bank.schema.field(column), bank[source])
        squares = pa.array(bank["norm_w"].to_numpy() ** 2)
        same.append(bank.set_column(bank.schema.get_field_index("dot_wl"), bank.schema.field("dot_wl"), squares))
    with pytest.raises(NumericsError, match=r"the rose direction is zero within rounding in 6 of the bank's rows"):
        score_rows([shard], same, RATES, _target())


def test_sides_that_only_differ_beyond_the_limit_are_refused(base_folder: str) -> None:
    long = "water stone " * 20
    pair = PreferencePair("p", "t", (Message("user", "q"),), long + "yes", long + "no", "", "", "")
    with pytest.raises(PairError, match="p: both sides are the same 16 tokens"):
        encode_pairs([pair], load_tokeniser(ModelConfig(base=base_folder, max_tokens=16)), _target())


def test_equal_rows_get_equal_features_wherever_they_stand(stages: Stages, rows: list[tuple[str, Sample]]) -> None:
    doubled = rows + [(f"copy of {row_id}", sample) for row_id, sample in reversed(rows)]
    for max_batch_tokens in (64, 10**6):
        _, tables = stages.features(doubled, max_batch_tokens)
        for table in tables:
            vectors = dict(zip(table["row_id"].to_pylist(), table["feature"].to_pylist(), strict=True))
            norms = dict(zip(table["row_id"].to_pylist(), table["norm"].to_pylist(), strict=True))
            for row_id, _ in rows:
                np.testing.assert_allclose(vectors[f"copy of {row_id}"], vectors[row_id], rtol=0, atol=FLOAT32_ENTRY)
                assert norms[f"copy of {row_id}"] == pytest.approx(norms[row_id], rel=FLOAT32_ENTRY)


def test_pool_order_shards_and_batches_do_not_matter(
    stages: Stages, rows: list[tuple[str, Sample]], shard: ShardRows, banks: list[pa.Table]
) -> None:
    expected = _scores([shard], banks)
    shuffled = [rows[i] for i in np.random.default_rng(3).permutation(len(rows))]
    for size, max_batch_tokens in ((len(rows), 50), (7, 10**6), (5, 8)):
        parts = [stages.features(shuffled[i : i + size], max_batch_tokens)[0] for i in range(0, len(rows), size)]
        assert _distance(_scores(parts, banks), expected) < FLOAT32_ENTRY


@pytest.mark.parametrize(("dtype", "bound"), [("float32", FLOAT32_SCORE), ("bfloat16", BFLOAT16_SCORE)])
def test_nor_do_they_beyond_a_bound_in_the_types_that_jobs_run_in(
    dtype: str,
    bound: float,
    base_folder: str,
    checkpoints: list[Checkpoint],
    rows: list[tuple[str, Sample]],
    banks: list[pa.Table],
) -> None:
    stages = Stages(base_folder, checkpoints, ("none", 1, 0), dtype=dtype)
    expected = _scores([stages.features(rows)[0]], banks)
    shuffled = [rows[i] for i in np.random.default_rng(3).permutation(len(rows))]
    for size, max_batch_tokens in ((len(rows), 50), (5, 8)):
        parts = [stages.features(shuffled[i : i + size], max_batch_tokens)[0] for i in range(0, len(rows), size)]
        assert _distance(_scores(parts, banks), expected) < bound


@pytest.mark.parametrize("kind", ["sketch", "rademacher"])
def test_a_projection_ranks_as_none_does(
    kind: str,
    base_folder: str,
    checkpoints: list[Checkpoint],
    rows: list[tuple[str, Sample]],
    encoded: list[EncodedPair],
) -> None:
    tables = []
    for projection in (("none", 1, 0), (kind, 4096, 0)):
        stages = Stages(base_folder, checkpoints, projection, adam="sgd")
        tables.append(np.stack(list(_scores([stages.features(rows)[0]], stages.banks(encoded)).values())))
    for exact, projected in zip(tables[0].T, tables[1].T, strict=True):
        correlation = spearman(projected, exact)
        assert correlation is not None and correlation > LEAST_SPEARMAN


def test_projected_lengths_may_stand_for_exact_ones_without_a_projection(
    shard: ShardRows, banks: list[pa.Table]
) -> None:
    exact, projected = (_scores([shard], banks, normalize=how) for how in ("exact", "projected"))
    assert _distance(exact, projected) < FLOAT32_ENTRY


def test_scores_without_normalisation_scale_with_the_direction(shard: ShardRows, banks: list[pa.Table]) -> None:
    raw = _scores([shard], banks, normalize="none")
    tables = shard.stored.tables
    for number, row_id in enumerate(shard.row_ids.to_pylist()):
        total = 0.0
        for table, bank, rate in zip(tables, banks, RATES, strict=True):
            gamma = np.array(table["feature"][number].as_py()) * table["norm"][number].as_py()
            first = [v for v, name in enumerate(bank["subtask"].to_pylist()) if name == "first"]
            for v in first:
                difference = np.array(bank["gradient_l"][v].as_py()) - np.array(bank["gradient_w"][v].as_py())
                total += rate / sum(RATES) * float(gamma @ difference) / len(first)
        assert raw[row_id][0] == pytest.approx(total, rel=1e-5)
