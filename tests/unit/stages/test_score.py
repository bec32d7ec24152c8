"""Features times bank: accounting, order, and the table. The numbers on real gradients: tests/equivalence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from rose_ray.config.target import PairInput, TargetConfig
from rose_ray.errors import (
    AccountingError,
    AlteredFileError,
    ConfigError,
    DataError,
    NonFiniteError,
    SpaceMismatchError,
)
from rose_ray.kernels.influence import influence
from rose_ray.schemas import FEATURE_REJECTED, bank_schema, features_schema, scores_schema
from rose_ray.stages.gist import SpanScorer
from rose_ray.stages.score import (
    ScorableRows,
    ShardRows,
    TargetScorer,
    check_same_space,
    scorable_rows,
    score_shards,
    target_directions,
)
from rose_ray.stages.score_table import ScoreTable
from rose_ray.stages.stored_features import normalized_features
from rose_ray.stores.features import StoredShard
from tests import oracles
from tests.tiny import digest, score_rows

DIM = 12
RATES = [3e-5, 1e-5]
SUBTASKS = ["b", "a", "b"]
FLOAT32 = 2e-7
"""Scores are stored as float32 numbers of at most 1 in size."""


def _features(row_ids: Sequence[str], seed: int, dtype: Any = np.float32) -> pa.Table:
    """Features of rows; the same row has the same feature wherever it stands."""
    vectors = [np.random.default_rng([seed, sum(map(ord, row_id))]).normal(size=DIM) for row_id in row_ids]
    unit = [vector / np.linalg.norm(vector) for vector in vectors]
    size = len(row_ids)
    columns = [
        pa.array(map(digest, row_ids), pa.string()),
        pa.FixedSizeListArray.from_arrays(pa.array(np.array(unit).astype(dtype).reshape(-1)), DIM),
        pa.array([float(seed)] * size),
        pa.array([0.5 * seed] * size, pa.float32()),
        pa.array([1.0] * size, pa.float32()),
        pa.array(range(1, size + 1), pa.int32()),
        pa.array(range(10, 10 + size), pa.int32()),
        pa.array([0] * size, pa.int32()),
    ]
    return pa.Table.from_arrays(columns, schema=features_schema(DIM, np.dtype(dtype).name))


def _bank(seed: int, subtasks: Sequence[str] = SUBTASKS) -> pa.Table:
    random = np.random.default_rng(100 + seed)
    w, l = (random.normal(size=(len(subtasks), DIM)).astype(np.float32) for _ in range(2))  # noqa: E741
    rows = [
        {
            "pair_id": f"p{v}",
            "subtask": subtask,
            "gradient_w": w[v],
            "gradient_l": l[v],
            "norm_w": float(np.linalg.norm(w[v].astype(float))),
            "norm_l": float(np.linalg.norm(l[v].astype(float))),
            "dot_wl": float(w[v].astype(float) @ l[v]),
            "num_tokens_w": 4,
            "num_tokens_l": 6,
            "num_tokens_cut_w": 0,
            "num_tokens_cut_l": 0,
            **dict.fromkeys(("logps_w", "logps_l", "reference_logps_w", "reference_logps_l"), -9.0),
        }
        for v, subtask in enumerate(subtasks)
    ]
    return pa.Table.from_pylist(rows, schema=bank_schema(DIM))


def _shard(
    name: str, wanted: Sequence[str], stored: Sequence[str] | None = None, rejected: Sequence[str] = ()
) -> ShardRows:
    ids = wanted if stored is None else stored
    reasons = [{"row_id": digest(name), "reason": "zero_direction", "detail": "d"} for name in rejected]
    shard = StoredShard(
        [_features(ids, seed) for seed in (1, 2)], pa.Table.from_pylist(reasons, schema=FEATURE_REJECTED)
    )
    sources = [f"source {row_id}" for row_id in wanted]
    return ShardRows(name, pa.array(map(digest, wanted), pa.string()), pa.array(sources, pa.string()), shard)


BANKS = [_bank(1), _bank(2)]


def _names(table: pa.Table) -> list[str]:
    return [bytes.fromhex(row_id).rstrip(b"\0").decode() for row_id in table["row_id"].to_pylist()]


def _target(**settings: Any) -> TargetConfig:
    return TargetConfig(name="t", pairs=[PairInput(files=["f"])], **settings)


def _scored(*shards: ShardRows, **settings: Any) -> pa.Table:
    return score_rows(shards, [_bank(1), _bank(2)], RATES, _target(**settings)).table


def test_scores_are_weighted_cosines_mean_over_shots_and_the_best_subtask() -> None:
    table = _scored(_shard("s0", ["u", "v"]), _shard("s1", ["w"]))
    assert table.schema.equals(scores_schema(["b", "a"]), check_metadata=True)
    features = [[_features(["u", "v", "w"], seed)["feature"].to_pylist()] for seed in (1, 2)]
    subtasks, scores = oracles.scores(np.array(features)[:, 0], np.array(_directions()), [0.75, 0.25], SUBTASKS)
    np.testing.assert_allclose(table["subtask_b"].to_numpy(), subtasks[:, 0], atol=FLOAT32)
    np.testing.assert_allclose(table["subtask_a"].to_numpy(), subtasks[:, 1], atol=FLOAT32)
    np.testing.assert_allclose(table["score"].to_numpy(), scores, atol=FLOAT32)
    assert table["rank"].to_pylist() == (1 + np.argsort(np.argsort(-scores))).tolist()
    mean = _scored(_shard("s0", ["u", "v"]), _shard("s1", ["w"]), aggregation="mean")
    np.testing.assert_allclose(mean["score"].to_numpy(), subtasks.mean(1), atol=FLOAT32)


def _directions() -> list[np.ndarray]:
    sides = [[np.array(bank[name].to_pylist()) for name in ("gradient_l", "gradient_w")] for bank in BANKS]
    return [rejected - chosen for rejected, chosen in sides]


def _span_scores(rows: ScorableRows, **settings: Any) -> pa.Table:
    scorer = SpanScorer(BANKS, RATES, _target(**settings))
    return scorer.score(rows, [influence(*each) for each in zip(rows.features, scorer.vectors, strict=True)])


def test_pairs_have_columns_where_they_are_to_take_turns() -> None:
    settings = {"selection": {"count": 1, "method": "round_robin_pairs"}}
    table = _scored(_shard("s0", ["u", "v"]), _shard("s1", ["w"]), **settings)
    assert table.schema.equals(scores_schema(["b", "a"], ["p0", "p1", "p2"]), check_metadata=True)
    features = [np.array(_features(["u", "v", "w"], seed)["feature"].to_pylist()) for seed in (1, 2)]
    for v in range(3):
        parts = [[oracles.cosine(f, g[v]) for f in x] for x, g in zip(features, _directions(), strict=True)]
        expected = 0.75 * np.array(parts[0]) + 0.25 * np.array(parts[1])
        np.testing.assert_allclose(table[f"pair_p{v}"].to_numpy(), expected, atol=FLOAT32)
    plain = _scored(_shard("s0", ["u", "v"]), _shard("s1", ["w"]))
    for name in plain.column_names:
        assert table[name].equals(plain[name])


def test_gist_compares_inside_the_span_of_the_pairs() -> None:
    settings: dict[str, Any] = {"selection": {"count": 1, "method": "round_robin_pairs"}}
    rows = scorable_rows(_shard("s0", ["u", "v", "w"]))
    table = _span_scores(rows, **settings)
    expected = np.zeros((3, 3))
    for weight, seed, directions in zip([0.75, 0.25], (1, 2), _directions(), strict=True):
        span, _ = np.linalg.qr(directions.T)
        features = np.array(_features(["u", "v", "w"], seed)["feature"].to_pylist())
        for n in range(3):
            inside = span @ (span.T @ features[n])
            expected[n] += [weight * oracles.cosine(inside, g) for g in directions]
    for v in range(3):
        np.testing.assert_allclose(table[f"pair_p{v}"].to_numpy(), expected[:, v], atol=FLOAT32)
    subtasks = np.stack([(expected[:, 0] + expected[:, 2]) / 2, expected[:, 1]], axis=1)
    np.testing.assert_allclose(table["subtask_b"].to_numpy(), subtasks[:, 0], atol=FLOAT32)
    np.testing.assert_allclose(table["score"].to_numpy(), subtasks.max(axis=1), atol=FLOAT32)
    without = _span_scores(rows)
    assert without.schema.equals(scores_schema(["b", "a"]), check_metadata=True)
    assert without["score"].equals(table["score"])


def test_gist_in_one_dimension_says_that_scores_would_be_signs() -> None:
    with pytest.raises(ConfigError, match=r"inside the span of 1 pairs, which has one dimension, .* is \+1 or -1"):
        SpanScorer([_bank(1, ["b"])], [1.0], _target())
    with pytest.raises(ConfigError, match="one dimension"):
        SpanScorer(BANKS, RATES, _target(), rank=1)
    with pytest.raises(ConfigError, match="4 dimensions, but 3 validation gradients span 3"):
        SpanScorer(BANKS, RATES, _target(), rank=4)


def test_the_other_columns_are_the_rows_own() -> None:
    table = _scored(_shard("s0", ["u", "v"]), _shard("s1", ["w"]))
    assert _names(table) == ["u", "v", "w"]
    assert table["source"].to_pylist() == ["source u", "source v", "source w"]
    assert table["shard"].to_pylist() == ["s0", "s0", "s1"]
    assert table["num_tokens"].to_pylist() == [10, 11, 10]
    assert table["num_labelled_tokens"].to_pylist() == [1, 2, 1]
    assert table["gradient_norm"].to_pylist() == [1.5] * 3 and table["momentum_share"].to_pylist() == [0.75] * 3


def test_rows_that_are_not_wanted_are_passed_over() -> None:
    whole = {row["row_id"]: row for row in _scored(_shard("s", ["u", "v", "w"])).to_pylist()}
    part = _scored(_shard("s", ["u", "w"], stored=["u", "v", "w"], rejected=[])).to_pylist()
    assert [row["row_id"] for row in part] == [digest("u"), digest("w")]
    assert all(row["score"] == whole[row["row_id"]]["score"] for row in part)
    assert sorted(row["rank"] for row in part) == [1, 2]


def test_rejected_rows_are_handed_on() -> None:
    shard = _shard("s", ["u", "v", "w"], stored=["u", "w"], rejected=["v", "not wanted"])
    result = score_rows([shard], [_bank(1), _bank(2)], RATES, _target())
    assert _names(result.table) == ["u", "w"] and result.subtasks == ["b", "a"]
    assert result.rejected.to_pylist() == [{"row_id": digest("v"), "reason": "zero_direction", "detail": "d"}]


def test_a_row_that_is_neither_scored_nor_rejected_stops_the_run() -> None:
    shard = _shard("s7", ["u", "v", "w"], stored=["u", "w"])
    with pytest.raises(AccountingError, match="shard s7: 3 rows wanted, 2 scored, 0 rejected"):
        _scored(shard)


def test_checkpoints_that_hold_different_rows_stop_the_run() -> None:
    shard = _shard("s7", ["u", "v"])
    tables = shard.stored.tables
    broken = StoredShard([tables[0], tables[1].take([1, 0])], FEATURE_REJECTED.empty_table())
    with pytest.raises(AlteredFileError, match="shard s7: its checkpoints hold different rows"):
        _scored(replace(shard, stored=broken))


def test_a_pool_of_which_nothing_can_be_scored_stops_the_run() -> None:
    with pytest.raises(DataError, match=r"none of 2 rows could be scored; first reason: .*zero_direction"):
        _scored(_shard("s", ["u", "v"], stored=[], rejected=["u", "v"]))


def test_equal_scores_are_ranked_by_row_id() -> None:
    # row ids that are anagrams have equal features here
    table = _scored(_shard("s", ["cab", "zz", "abc", "bca"]))
    by_rank = [name for name in _names(table.sort_by("rank")) if name != "zz"]
    assert len({row["score"] for row in table.to_pylist()}) == 2 and by_rank == ["abc", "bca", "cab"]


def test_a_score_that_is_not_finite_stops_the_run() -> None:
    shard = _shard("s7", ["u", "v"])
    zero = [_features(["u", "v"], seed) for seed in (1, 2)]
    place = zero[0].schema.get_field_index("feature")
    nothing = pa.FixedSizeListArray.from_arrays(pa.array(np.zeros(2 * DIM, np.float32)), DIM)
    zero[0] = zero[0].set_column(place, zero[0].schema.field("feature"), nothing)
    with pytest.raises(NonFiniteError, match=f"shard s7: 2 rows have scores that are not finite, first: {digest('u')}"):
        _scored(replace(shard, stored=replace(shard.stored, tables=zero)), normalize="projected")


def test_targets_scored_in_one_pass_are_those_scored_apart() -> None:
    shards = [_shard("s0", ["u", "v"]), _shard("s1", ["w", "x"], stored=["w"], rejected=["x"])]
    settings: list[dict[str, Any]] = [{}, {"aggregation": "mean"}, {"normalize": "none"}, {"objective": "dpo_weighted"}]
    scorers = [TargetScorer([_bank(1), _bank(2)], RATES, _target(**each)) for each in settings]
    tables = [ScoreTable(scorer.subtasks) for scorer in scorers]
    score_shards(shards, scorers, tables)
    for table, each in zip(tables, settings, strict=True):
        with table:
            table.settle()
            assert pa.concat_tables(table.scored()).equals(_scored(*shards, **each), check_metadata=True)
            assert (table.num_scored, table.num_rejected, table.reasons) == (3, 1, {"zero_direction": 1})


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_normalisation_of_stored_features(dtype: Any) -> None:
    table = _features(["u", "v"], 3, dtype)
    stored = np.array(table["feature"].to_pylist(), dtype=np.float32)
    assert np.array_equal(normalized_features(table, "exact").restored(), stored)
    np.testing.assert_allclose(normalized_features(table, "none").restored(), 3.0 * stored)
    np.testing.assert_allclose(np.linalg.norm(normalized_features(table, "projected").restored(), axis=1), 1, rtol=1e-6)


@pytest.mark.parametrize("objective", ["rose", "rose_simpo", "rose_balanced", "less"])
def test_own_parts_are_compared_beside_what_all_rows_share(objective: Any) -> None:
    # Nothing is projected here, so the last number of every vector is its part along a direction that rows share.
    table = _scored(_shard("s0", ["u", "v", "w"]), objective=objective, normalize="own", aggregation="mean")
    weights = np.array(RATES) / sum(RATES)
    expected = {}
    for row in ("u", "v", "w"):
        by_subtask: dict[str, list[float]] = {"a": [], "b": []}
        for pair, subtask in enumerate(SUBTASKS):
            cosines = []
            for seed in (1, 2):
                bank = _bank(seed).to_pylist()[pair]
                w, l = (np.array(bank[f"gradient_{side}"], float) for side in "wl")  # noqa: E741
                rejected = {
                    "rose": l,
                    "rose_simpo": l / 6 * 4,
                    "rose_balanced": l / np.linalg.norm(l) * np.linalg.norm(w),
                    "less": 0 * l,
                }[objective]
                x, d = np.array(_features([row], seed)["feature"][0].as_py())[:-1], (rejected - w)[:-1]
                cosines.append(x @ d / np.linalg.norm(x) / np.linalg.norm(d))
            by_subtask[subtask].append(float(weights @ cosines))
        expected[row] = np.mean([np.mean(each) for each in by_subtask.values()])
    found = dict(zip(_names(table), table["score"].to_pylist(), strict=True))
    assert found == pytest.approx(expected, abs=FLOAT32)


def test_a_row_that_has_nothing_of_its_own_scores_0() -> None:
    table = _features(["u", "v"], 1)
    unit = np.eye(DIM, dtype=np.float32)[-1]
    place = table.schema.get_field_index("feature")
    for own, expected in ((0.0, 0.0), (0.002, 0.0), (0.01, 1.0)):  # its length beside the shared part
        row = np.append(np.full(DIM - 1, own / np.sqrt(DIM - 1)), np.sqrt(1 - own**2)).astype(np.float32)
        column = pa.FixedSizeListArray.from_arrays(pa.array(np.concatenate([row, unit])), DIM)
        scaled = normalized_features(table.set_column(place, table.schema.field("feature"), column), "own").restored()
        # The shared part is kept in float32: what is left of it at 0.01 is known to 1e-3.
        assert np.linalg.norm(scaled[0, :-1]) == pytest.approx(expected, abs=2e-3) and not scaled[1].any()


def test_a_table_of_several_chunks_or_a_slice_is_read_right() -> None:
    whole = _features(["u", "v", "w"], 1)
    expected = normalized_features(whole, "exact").restored()
    chunked = pa.concat_tables([_features(["u"], 1), _features(["v", "w"], 1)])
    assert np.array_equal(normalized_features(chunked, "exact").restored(), expected)
    assert np.array_equal(normalized_features(whole.slice(1), "exact").restored(), expected[1:])
    assert np.array_equal(normalized_features(whole.take([2, 0]), "exact").restored(), expected[[2, 0]])


def test_a_subtask_s_weighted_pairs_become_one_column() -> None:
    (direction, _) = target_directions([_bank(1), _bank(2)], _target(objective="dpo_weighted"))
    assert direction.subtasks == ("b", "a") and direction.vectors_UD.shape == (2, DIM)
    table = _scored(_shard("s", ["u"]), objective="dpo_weighted")
    assert {"subtask_a", "subtask_b"} < set(table.column_names)


def test_vectors_of_different_spaces_are_not_multiplied() -> None:
    space = {"base": "b0", "adapters": ["a1", "a2"], "layout": "l", "projection": "sketch/v1/dim=8/seed=0"}
    check_same_space(space, dict(space))
    other = {**space, "projection": "sketch/v1/dim=8/seed=1", "adapters": ["a1"]}
    with pytest.raises(SpaceMismatchError) as caught:
        check_same_space(space, other)
    message = str(caught.value)
    assert "projection: features 'sketch/v1/dim=8/seed=0', bank 'sketch/v1/dim=8/seed=1'" in message
    assert "adapters: features ['a1', 'a2'], bank ['a1']" in message and "layout" not in message
    with pytest.raises(SpaceMismatchError, match="extra: features None, bank 1"):
        check_same_space(space, {**space, "extra": 1})
