"""Selections of rows unlike each other, against walking through all rows with all vectors at hand."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rose_ray.config import parse_config
from rose_ray.config.selection import SelectionConfig
from rose_ray.errors import ConfigError
from rose_ray.kernels import selection
from rose_ray.kernels.budget import Budget
from rose_ray.kernels.diversity import unit_vectors
from rose_ray.kernels.feature_matrix import FeatureMatrix
from rose_ray.kernels.quantization import quantize
from rose_ray.kernels.selection import ScoreColumns, choose_rows
from rose_ray.methods.registry import needs_of
from rose_ray.stages.clean import CleanGate
from rose_ray.stages.diversity import DiversityGate
from rose_ray.stages.gates import JoinedGate, Refused
from tests.distributed.tiny import tiny_content
from tests.oracles import greedy_diverse_rows, sign_cosine

NUM_ROWS = 80
BOUND = 0.7


class Store:
    """Vectors of rows, read in two parts; counts what is read."""

    def __init__(self, vectors: np.ndarray, without: tuple[int, ...] = ()) -> None:
        self.vectors, self.without = vectors, without
        self.read_at: list[int] = []

    def __call__(self, positions: np.ndarray) -> Iterator[tuple[np.ndarray, FeatureMatrix]]:
        assert (np.diff(positions) > 0).all()
        self.read_at += positions.tolist()
        have = np.array([place for place in positions.tolist() if place not in self.without], np.int64)
        for part in (have[::2], have[1::2]):
            yield part, self.matrix(self.vectors[part])

    def matrix(self, vectors_ND: np.ndarray) -> FeatureMatrix:
        return FeatureMatrix(vectors_ND.astype(np.float32), None, vectors_ND.shape[1])


class SignStore(Store):
    """Signs of the vectors' numbers but the last, which is kept exactly, as of deflated features."""

    def matrix(self, vectors_ND: np.ndarray) -> FeatureMatrix:
        codes_NC, scales_N = quantize(vectors_ND[:, :-1].astype(np.float32), "bit1")
        return FeatureMatrix(codes_NC, scales_N, vectors_ND.shape[1] - 1, vectors_ND[:, -1:].astype(np.float32))


def rows(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Vectors, many of them alike, not of length 1; and their scores."""
    random = np.random.default_rng(seed)
    centres = random.normal(size=(25, 5))
    vectors = centres[random.integers(0, 25, NUM_ROWS)] + 0.2 * random.normal(size=(NUM_ROWS, 5))
    return 3 * vectors, random.integers(-8, 9, (NUM_ROWS, 3)) / 4.0


def columns(scores: np.ndarray) -> ScoreColumns:
    return ScoreColumns(len(scores), scores.shape[1], lambda t: scores[:, t], lambda positions: positions.tolist())


@pytest.mark.parametrize("num_columns", [1, 3])
@pytest.mark.parametrize("margin", [1, 64])
def test_rows_are_chosen_while_they_are_unlike_the_chosen(
    monkeypatch: pytest.MonkeyPatch, num_columns: int, margin: int
) -> None:
    monkeypatch.setattr(selection, "_LEAST_LOOK", 2)  # so that rows are looked at in many steps,
    monkeypatch.setattr(selection, "_MARGIN", margin)  # and with a small margin choosing begins again
    num_refused = 0
    for seed in range(10):
        vectors, scores = rows(seed)
        units, scores = unit_vectors(vectors)[0], scores[:, :num_columns]
        orders = [sorted(range(NUM_ROWS), key=lambda row: (-scores[row, t], row)) for t in range(num_columns)]
        kept: list[int] = []
        refused: dict[int, int] = {}
        while len(kept) < 8:
            for row in orders[len(kept) % num_columns]:
                if row in kept or row in refused:
                    continue
                _, near = greedy_diverse_rows(units[[*kept, row]], BOUND)
                if not near:
                    kept.append(row)
                    break
                refused[row] = kept[near[len(kept)]]
        gate = DiversityGate(Store(vectors), BOUND)
        chosen = choose_rows(columns(scores), Budget(count=8), gate=JoinedGate([gate]))
        assert chosen.tolist() == kept
        assert gate.refused == {row: Refused("too_similar", match) for row, match in refused.items()}
        assert gate.num_refused == len(refused) and gate.num_known >= len(kept) + len(refused)
        num_refused += len(refused)
    assert num_refused > 20


def test_rows_without_a_vector_are_passed_over_and_named() -> None:
    vectors = np.eye(6)
    vectors[1] = 0.0
    gate = DiversityGate(Store(vectors, without=(3,)), BOUND)
    chosen = choose_rows(columns(np.arange(6.0)[:, None]), Budget(count=4), gate=JoinedGate([gate]))
    assert chosen.tolist() == [5, 4, 2, 0]
    assert gate.refused == {place: Refused("no_vector", "") for place in (1, 3)}


def test_of_signs_the_angle_is_compared_beside_the_shared_part() -> None:
    random = np.random.default_rng(4)
    centres = random.normal(size=(12, 400))
    vectors = centres[random.integers(0, 12, NUM_ROWS)] + 0.6 * random.normal(size=(NUM_ROWS, 400))
    vectors *= 0.6 / np.linalg.norm(vectors, axis=1, keepdims=True)
    vectors = np.column_stack([vectors, np.full(NUM_ROWS, 0.8)])  # unit vectors of which all share 0.64 of a square
    vectors[7, :-1] = 0.0  # nothing but the shared part, though of less than unit length: it has a direction
    scores = random.permutation(NUM_ROWS).astype(float)[:, None]
    order = np.argsort(-scores[:, 0]).tolist()

    def cosine(row: np.ndarray, other: np.ndarray) -> float:
        return sign_cosine(row[:-1], other[:-1], (np.float32(row[-1]), np.float32(other[-1])))

    kept, refused = greedy_diverse_rows([vectors[place] for place in order], 0.85, cosine)
    assert len(kept) > 10 and len(refused) > 20
    gate = DiversityGate(SignStore(vectors), 0.85)
    chosen = choose_rows(columns(scores), Budget(count=len(kept)), gate=JoinedGate([gate]))
    assert chosen.tolist() == [order[place] for place in kept]
    last = order.index(chosen[-1])
    told = {order[row]: Refused("too_similar", order[match]) for row, match in refused.items() if row < last}
    assert {place: gate.refused[place] for place in told} == told
    held = next(iter(gate._filter._chunks))
    assert held.dtype == np.uint64 and held.shape[1] == -(-400 // 64) + 1


def test_vectors_in_memory_are_no_more_than_the_budget_buys() -> None:
    random = np.random.default_rng(0)
    vectors, scores = random.normal(size=(4_000, 3)), random.normal(size=(4_000, 1))
    gate = DiversityGate(Store(vectors), 0.99)
    most = 0
    admits = gate.admits

    def counted(position: int) -> bool:
        nonlocal most
        filled = gate._filter
        most = max(most, len(filled._waiting) + len(filled._kept_labels))
        return admits(position)

    gate.admits = counted  # type: ignore[method-assign]
    choose_rows(columns(scores), Budget(count=100), gate=JoinedGate([gate]))
    assert gate.num_refused > 20 and most <= 100 + 256


def test_what_the_first_gate_refuses_the_second_does_not_hold() -> None:
    class Refusing(CleanGate):
        def __init__(self) -> None:
            super().__init__(lambda positions: [], None, None)

        def knows(self, position: int) -> bool:
            return True

        def admits(self, position: int) -> bool:
            if position % 2:
                self.refused[position] = Refused("near_duplicate", 0)
            return position % 2 == 0

    diverse = DiversityGate(Store(np.eye(8)), BOUND)
    gate = JoinedGate([Refusing(), diverse])
    chosen = choose_rows(columns(-np.arange(8.0)[:, None]), Budget(count=4), gate=gate)
    assert chosen.tolist() == [0, 2, 4, 6]
    assert sorted(gate.refused) == [1, 3, 5] and gate.num_refused == 3
    assert list(gate.counted.values()) == ["near_duplicates", "contaminated", "too_similar", "without_vector"]
    assert not any(place in diverse._filter for place in range(1, 6))


def job(**changes: Any) -> Any:
    content = tiny_content(Path("in"), "ws")
    control = {"name": "control", "method": "random", "selection": {"count": 4}}
    return parse_config({**content, "targets": [content["targets"][0], control], **changes})


def test_settings() -> None:
    assert job().row_states == [] and not needs_of(job(targets=[{"name": "c", "method": "random"}])).any_model
    diverse = {"selection": {"diversity": {"max_cosine": 0.9}}}
    alone = job(targets=[{"name": "c", "method": "random", **diverse}])
    assert alone.row_states == ["rds"] and needs_of(alone).any_model and not needs_of(alone).warmup
    by_gradients = {"selection": {"diversity": {"max_cosine": 0.9, "vectors": "gradients"}}}
    with pytest.raises(ConfigError, match=r"targets\.0\.selection\.diversity\.vectors: target c is scored by random"):
        job(targets=[{"name": "c", "method": "random", **by_gradients}])
    assert job(training_set=by_gradients).row_states == []
    with pytest.raises(ConfigError, match=r"training_set\.selection\.diversity\.vectors: target control"):
        job(training_set={"targets": ["control"], **by_gradients})
    for bound in (0, 1, 1.2):
        with pytest.raises(ConfigError, match="max_cosine"):
            job(training_set={"selection": {"diversity": {"max_cosine": bound}}})
    with pytest.raises(ConfigError, match="max_cosine"):
        job(training_set={"selection": {"diversity": {}}})
    assert "diversity" in SelectionConfig.model_validate(diverse["selection"]).identity()
