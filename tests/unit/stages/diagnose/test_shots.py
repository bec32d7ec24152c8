"""`shots` on stored vectors: what it draws is what runs with those pairs would select."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rose_ray.data.preferences import shots_of_pairs
from rose_ray.errors import ConfigError, SpaceMismatchError, StoreError
from rose_ray.kernels.correlation import average_ranks
from rose_ray.stages.diagnose.pool_scores import PoolScores, stored_pool
from rose_ray.stages.diagnose.shots import (
    DrawSettings,
    ShotPoint,
    ShotsReport,
    Spread,
    shot_numbers,
    shots_lines,
    shots_report,
    stable_shots,
)
from rose_ray.stages.diagnose.stored import StoredBank, needed_bank, target_named
from tests.unit.stages.diagnose.stored_job import SPACE, StoredJob, pair_record, stored_job

DIM = 16
NUM_ROWS = 10


def unit(vectors: np.ndarray) -> np.ndarray:
    return np.asarray(vectors / np.linalg.norm(vectors, axis=-1, keepdims=True))


def finished(
    folder: Path,
    features_CND: np.ndarray,
    directions_VD: np.ndarray,
    subtasks: str,
    both: bool = False,
    **target: Any,
) -> tuple[StoredJob, StoredBank]:
    """A job whose pairs have these directions at both checkpoints, and whose pool has these features.

    ``both``: the chosen side's gradients are the directions' negative, not zero.
    """
    target.setdefault("selection", {"count": 3})
    job = stored_job(folder, [pair_record(n, name) for n, name in enumerate(subtasks)], **target)
    rejected_CVD = np.stack([directions_VD] * 2)
    job.add_bank(-rejected_CVD if both else np.zeros_like(rejected_CVD), rejected_CVD, tokens=[(1, 1)] * len(subtasks))
    pool = job.add_pool([{"prompt": f"q{n}", "completion": f"a{n}"} for n in range(features_CND.shape[1])])
    job.add_features(pool, features_CND)
    job.finish()
    return job, needed_bank(job.workspace, job.config, job.config.targets[0], job.pairs)


def report_of(
    job: StoredJob, bank: StoredBank, row_of: Mapping[str, str] | None = None, **settings: Any
) -> ShotsReport:
    with read_scores(job, bank) as scores:
        return shots_report(scores, shots_of_pairs(job.pairs, row_of or {}), DrawSettings(**settings))


def read_scores(job: StoredJob, bank: StoredBank) -> PoolScores:
    pool, key = stored_pool(job.workspace, bank)
    scores = PoolScores(bank.atoms(), bank.target, pool.counts["unique"])
    scores.read(job.workspace, pool, key, bank.checkpoints)
    return scores


@pytest.mark.parametrize("aggregation", ["max", "mean"])
@pytest.mark.parametrize("normalize", ["exact", "projected", "none"])
def test_scores_and_choice_are_those_of_plain_arithmetic(tmp_path: Path, aggregation: str, normalize: str) -> None:
    random = np.random.default_rng(0)
    features_CND = random.normal(size=(2, NUM_ROWS, DIM)).astype(np.float32)
    directions_VD = random.normal(size=(4, DIM)).astype(np.float32)
    job, bank = finished(tmp_path, features_CND, directions_VD, "abab", aggregation=aggregation, normalize=normalize)
    drawn_V = np.array([True, True, True, False])
    with read_scores(job, bank) as scores:
        found = scores.scored(drawn_V)
    own = features_CND.astype(float) if normalize != "projected" else unit(features_CND.astype(float))
    pairs = directions_VD.astype(float) if normalize == "none" else unit(directions_VD.astype(float))
    influences_NV = 0.75 * own[0] @ pairs.T + 0.25 * own[1] @ pairs.T
    subtasks_NT = np.stack([influences_NV[:, [0, 2]].mean(1), influences_NV[:, 1]], axis=1)
    wanted_N = subtasks_NT.max(1) if aggregation == "max" else subtasks_NT.mean(1)
    np.testing.assert_array_equal(found.ranks_N, 2 * average_ranks(wanted_N))
    assert found.chosen.tolist() == np.argsort(-wanted_N)[:3].tolist()


def test_subtasks_take_turns_where_the_selection_says_so(tmp_path: Path) -> None:
    features_ND = np.array([[0.9, 0.1], [0.8, 0.2], [0.7, 0.0], [0.0, 0.3]])
    settings = {"selection": {"count": 3, "method": "round_robin"}}
    job, bank = finished(tmp_path, np.stack([features_ND] * 2), np.eye(2), "ab", **settings)
    with read_scores(job, bank) as scores:
        assert scores.scored(np.ones(2, bool)).chosen.tolist() == [0, 3, 1]


def test_pairs_take_turns_with_their_labels_as_drawn(tmp_path: Path) -> None:
    features_ND = np.array([[0.9, 0.1], [0.8, 0.2], [0.7, 0.0], [-0.5, 0.3]])
    for objective in ("rose", "less"):
        settings = {"selection": {"count": 3, "method": "round_robin_pairs"}, "objective": objective}
        folder = tmp_path / objective
        folder.mkdir()
        job, bank = finished(folder, np.stack([features_ND] * 2), np.eye(2), "aa", both=True, **settings)
        with read_scores(job, bank) as scores:
            assert scores.scored(np.ones(2, bool)).chosen.tolist() == [0, 3, 1], objective
            assert scores.scored(np.array([False, True])).chosen.tolist() == [3, 1, 0], objective
            # the first pair turned round points against its first axis
            assert scores.scored(np.ones(2, bool), np.array([True, False])).chosen.tolist() == [3, 1, 2], objective


def test_equal_parts_stop_at_the_row_that_does_not_fit(tmp_path: Path) -> None:
    # a row has 5 tokens: of 25, one subtask may spend 13 and the other 12, two rows each
    features_ND = np.array([[0.9, 0.1], [0.8, 0.2], [0.7, 0.05], [0.0, 0.3], [0.6, 0.01]])
    found = {}
    for method in ("round_robin", "equal_parts", "top_k"):
        (folder := tmp_path / method).mkdir()
        settings = {"selection": {"tokens": 25, "method": method}}
        job, bank = finished(folder, np.stack([features_ND] * 2), np.eye(2), "ab", **settings)
        with read_scores(job, bank) as scores:
            found[method] = scores.scored(np.ones(2, bool)).chosen.tolist()
    assert found == {"round_robin": [0, 3, 1, 2, 4], "equal_parts": [0, 3, 1, 2], "top_k": [0, 1, 2, 4, 3]}


def test_pairs_of_a_row_are_drawn_left_out_and_flipped_together(tmp_path: Path) -> None:
    features_CND = unit(np.random.default_rng(1).normal(size=(2, NUM_ROWS, DIM)))
    directions_VD = np.random.default_rng(2).normal(size=(7, DIM))
    job, bank = finished(tmp_path, features_CND, directions_VD, "aaaaaaa")
    row_of = {f"p{place}": f"row{place // 2}" for place in range(6)}  # three rows of two pairs, and the pair p6
    report = report_of(job, bank, row_of, num_draws=200)
    assert report.subtasks == {"a": 4} and report.num_pairs == 7
    assert [point.num_shots for point in report.curve] == [1, 2, 3]
    assert {(each.name, each.num_pairs) for each in report.left_out} == {
        ("row0", 2),
        ("row1", 2),
        ("row2", 2),
        ("p6", 1),
    }
    with read_scores(job, bank) as scores:
        whole = scores.scored(np.ones(7, bool))
        drawn = [np.arange(7) // 2 == shot for shot in range(4)]
        alone = [scores.scored(each_V).agreement(whole) for each_V in drawn]
        without = {
            name: scores.scored(~each_V).agreement(whole)
            for name, each_V in zip(("row0", "row1", "row2", "p6"), drawn, strict=True)
        }
        turned = [scores.scored(np.ones(7, bool), each_V).agreement(whole) for each_V in drawn]
    assert {each.name: (each.jaccard, each.spearman) for each in report.left_out} == without
    # 200 draws of one of four shots show them all
    spread = report.curve[0].spearman
    assert spread is not None and min(rho for _, rho in alone) <= spread.low and spread.high <= max(r for _, r in alone)
    one = next(flip for flip in report.flips if flip.num_flipped == 1)
    assert one.share == 1 / 4 and one.spearman is not None
    assert min(rho for _, rho in turned) <= one.spearman.low
    lines = list(shots_lines(report))
    assert lines[0].startswith("target t: 7 pairs (4 shots: pairs of a labelled row stay together) in 1 subtasks")


def test_what_is_left_aside_is_said(tmp_path: Path) -> None:
    features_CND = unit(np.random.default_rng(1).normal(size=(2, NUM_ROWS, DIM)))
    selection = {"count": 3, "near_duplicates": {"method": "exact"}, "decontaminate": {}}
    selection["diversity"] = {"max_cosine": 0.9}
    job, bank = finished(tmp_path, features_CND, np.eye(DIM)[:2], "aa", selection=selection)
    report = report_of(job, bank, num_draws=2)
    assert report.not_applied == ("near_duplicates", "decontaminate", "diversity")
    assert list(shots_lines(report))[1].startswith(
        "selection.near_duplicates and selection.decontaminate and selection.diversity left aside"
    )


def test_scores_that_are_no_sums_are_refused(tmp_path: Path) -> None:
    features_CND = unit(np.random.default_rng(1).normal(size=(2, NUM_ROWS, DIM)))
    job, bank = finished(tmp_path, features_CND, np.eye(DIM)[:2], "aa", both=True, method="gist")
    with pytest.raises(ConfigError, match="target t: method gist compares rows inside the span of all pairs"):
        read_scores(job, bank)


def test_equal_pairs_agree_in_everything(tmp_path: Path) -> None:
    features_CND = unit(np.random.default_rng(1).normal(size=(2, NUM_ROWS, DIM)))
    job, bank = finished(tmp_path, features_CND, np.ones((6, DIM)), "aaabbb")
    report = report_of(job, bank, num_draws=4)
    ones = Spread(1.0, 1.0, 1.0)
    assert [point.num_shots for point in report.curve] == [1, 2]
    assert all(point.jaccard == ones and point.spearman == pytest.approx(ones) for point in report.curve)
    assert report.curve[0].apart_jaccard == ones and report.curve[1].apart_jaccard is None
    assert report.stable_shots == 1
    assert all(each.jaccard == 1.0 for each in report.left_out) and len(report.left_out) == 6
    assert report.flips[0].num_flipped == 0 and report.flips[0].jaccard == ones


def test_the_pair_that_matters_comes_first(tmp_path: Path) -> None:
    # three pairs point to rows 0 to 2, the fourth, four times, to rows 7 to 9
    features_ND = np.zeros((NUM_ROWS, 4))
    features_ND[:3, 0], features_ND[7:, 1] = (0.9, 0.8, 0.7), (0.6, 0.5, 0.4)
    directions_VD = np.eye(4)[[0, 0, 0, 1]] * np.array([1, 1, 1, 5])[:, None]
    job, bank = finished(tmp_path, np.stack([features_ND] * 2), directions_VD, "aaaa", normalize="none")
    report = report_of(job, bank, num_draws=30)
    first = report.left_out[0]
    # with all: (3 x first + 5 x second) / 4: rows 7, 0, then 8 (2.5) before 1 (2.4); without p3 rows 0, 1, 2
    assert first.name == "p3" and first.jaccard == pytest.approx(1 / 5)
    assert all(each.jaccard > first.jaccard for each in report.left_out[1:])
    # a single pair selects rows 0 to 2, or 7 to 9
    assert report.curve[0].jaccard.low == pytest.approx(1 / 5) and report.curve[0].jaccard.high == pytest.approx(2 / 4)
    assert report.stable_shots is None


def test_all_labels_flipped_turn_every_score(tmp_path: Path) -> None:
    features_CND = unit(np.random.default_rng(1).normal(size=(2, NUM_ROWS, DIM)))
    job, bank = finished(tmp_path, features_CND, np.random.default_rng(2).normal(size=(4, DIM)), "aaaa")
    with read_scores(job, bank) as scores:
        straight, turned = scores.scored(np.ones(4, bool)), scores.scored(np.ones(4, bool), np.ones(4, bool))
    assert straight.agreement(turned) == (0.0, pytest.approx(-1.0))


def test_the_same_seed_draws_the_same(tmp_path: Path) -> None:
    features_CND = unit(np.random.default_rng(1).normal(size=(2, NUM_ROWS, DIM)))
    job, bank = finished(tmp_path, features_CND, np.random.default_rng(2).normal(size=(5, DIM)), "aaaaa")
    assert report_of(job, bank, num_draws=5) == report_of(job, bank, num_draws=5)
    assert report_of(job, bank, num_draws=5) != report_of(job, bank, num_draws=5, seed=1)


def test_a_subtask_of_one_pair_is_said(tmp_path: Path) -> None:
    features_CND = unit(np.random.default_rng(1).normal(size=(2, NUM_ROWS, DIM)))
    job, bank = finished(tmp_path, features_CND, np.random.default_rng(2).normal(size=(3, DIM)), "aab")
    report = report_of(job, bank, num_draws=3)
    assert report.alone == ("p2",)
    assert {each.name for each in report.left_out} == {"p0", "p1"}
    assert report.curve[0].apart_jaccard is None
    lines = list(shots_lines(report))
    assert lines[0] == "target t: 3 pairs in 2 subtasks, 3 of 10 rows selected, objective rose"
    assert "not left out, since each is its subtask's only shot: p2" in lines


def point(number: int, low: float) -> ShotPoint:
    return ShotPoint(number, Spread(1.0, low, 1.0), None, None, None)


def test_stable_is_where_no_larger_number_falls_below() -> None:
    curve = [point(1, 0.9), point(2, 0.7), point(3, 0.8), point(4, 0.95)]
    assert stable_shots(curve, 0.8) == 3
    assert stable_shots(curve, 0.6) == 1 and stable_shots(curve, 0.96) is None and stable_shots([], 0.5) is None


def test_spreads_leave_out_what_is_undefined() -> None:
    assert Spread.of([0.0, 1.0, np.nan]) == Spread(0.5, pytest.approx(0.025), pytest.approx(0.975))
    assert Spread.of([np.nan]) is None


def test_shot_numbers_grow_and_stop() -> None:
    numbers = shot_numbers(100)
    assert numbers[:6] == [1, 2, 3, 4, 6, 9] and numbers[-1] < 100
    assert all(b <= 2 * a for a, b in pairwise(numbers)) and shot_numbers(1) == []


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    job = stored_job(tmp_path, [pair_record(n) for n in range(2)])
    target = job.config.targets[0]
    with pytest.raises(StoreError, match=r"no bank of t in .*: `rose-ray bank CONFIG` makes one"):
        needed_bank(job.workspace, job.config, target, job.pairs)
    job.add_bank(*np.ones((2, 2, 2, DIM)), tokens=[(1, 1)] * 2, space={**SPACE, "layout": "another"})
    pool = job.add_pool([{"prompt": "q", "completion": "a"}])
    job.finish()
    bank = needed_bank(job.workspace, job.config, target, job.pairs)
    with pytest.raises(StoreError, match=r"no features in .*rose-ray features CONFIG"):
        stored_pool(job.workspace, bank)
    job.add_features(pool, np.ones((2, 1, DIM)))
    job.finish()
    with pytest.raises(SpaceMismatchError, match="layout"):
        stored_pool(job.workspace, bank)
    with pytest.raises(ConfigError, match="no target is named 'u'; targets are t"):
        target_named(job.config, "u")


def test_a_basis_of_subtasks_has_no_vectors_of_pairs(tmp_path: Path) -> None:
    job = stored_job(tmp_path, [pair_record(n) for n in range(2)])
    job.add_bank(*np.ones((2, 2, 2, DIM)), tokens=[(1, 1)] * 2, space={**SPACE, "projection": "exact/v1/basis=0"})
    job.finish()
    with pytest.raises(StoreError, match="one direction a subtask"):
        needed_bank(job.workspace, job.config, job.config.targets[0], job.pairs)
