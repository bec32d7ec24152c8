"""Draws of pairs as sums of atoms, against directions made anew for each draw."""

from __future__ import annotations

from typing import Any, get_args

import numpy as np
import pytest

from rose_ray.errors import ConfigError, NumericsError
from rose_ray.kernels.aggregation import aggregate_subtasks
from rose_ray.kernels.objectives import Normalize, Objective, PairGradients, bank_directions
from rose_ray.kernels.pair_draws import PairAtoms, jaccard, two_subsets
from rose_ray.kernels.pair_terms import swapped

SUBTASKS = ["b", "a", "b", "b", "a", "c"]
WEIGHTS = np.array([0.75, 0.25])
DIM = 7

FLOAT64 = 1e-11
"""Sums of some ten products of numbers of about 10, in another order."""


def random_pairs(seed: int) -> PairGradients:
    random = np.random.default_rng(seed)
    size = len(SUBTASKS)
    w, l = random.normal(size=(2, size, DIM))  # noqa: E741
    return PairGradients(
        [f"p{n}" for n in range(size)],
        w,
        l,
        1.5 * np.linalg.norm(w, axis=1),  # not the projected lengths
        1.5 * np.linalg.norm(l, axis=1),
        2.0 * (w * l).sum(1),
        *random.integers(1, 20, size=(2, size)),
        *(-10 * random.random(size=(4, size))),
    )


def drawn(pairs: PairGradients, drawn_V: np.ndarray, flipped_V: np.ndarray) -> PairGradients:
    """The bank that a run would have had of the drawn pairs with their labels."""
    other = vars(swapped(pairs))
    columns = {}
    for name, value in vars(pairs).items():
        mixed = [other[name][v] if flipped_V[v] else value[v] for v in np.flatnonzero(drawn_V)]
        columns[name] = mixed if name == "pair_ids" else np.array(mixed)
    return PairGradients(**columns)


@pytest.mark.parametrize("objective", get_args(Objective))
@pytest.mark.parametrize("normalize", get_args(Normalize))
def test_a_draw_scores_as_a_bank_of_the_drawn_pairs(objective: Objective, normalize: Normalize) -> None:
    banks = [random_pairs(seed) for seed in (1, 2)]
    features = np.random.default_rng(3).normal(size=(2, 9, DIM))
    atoms = PairAtoms(objective, banks, WEIGHTS, SUBTASKS, dpo_beta=0.4, normalize=normalize)
    assert atoms.subtasks == ("b", "a", "c")
    influences_NK = atoms.influences(list(features))
    assert influences_NK.shape == (9, atoms.num_atoms)
    random = np.random.default_rng(4)
    for number in range(6):
        drawn_V, _ = two_subsets(SUBTASKS, range(len(SUBTASKS)), 1 + number % 3, random)
        flipped_V = random.random(len(SUBTASKS)) < 0.4 if number % 2 else np.zeros(len(SUBTASKS), bool)
        names = [name for name, taken in zip(SUBTASKS, drawn_V, strict=True) if taken]
        wanted_NT = np.zeros((9, 3))
        for weight, bank, features_ND in zip(WEIGHTS, banks, features, strict=True):
            own = bank_directions(
                objective, drawn(bank, drawn_V, flipped_V), dpo_beta=0.4, subtasks=names, normalize=normalize
            )
            wanted_NT += weight * aggregate_subtasks(features_ND @ own.vectors_UD.T, own.subtasks)
        order = [list(dict.fromkeys(names)).index(name) for name in atoms.subtasks]
        found_NT = influences_NK @ atoms.columns(drawn_V, flipped_V)
        np.testing.assert_allclose(found_NT, wanted_NT[:, order], atol=FLOAT64)


def test_a_draw_without_a_subtask_is_refused() -> None:
    atoms = PairAtoms("rose", [random_pairs(1)], np.ones(1), SUBTASKS, dpo_beta=0.1, normalize="exact")
    none_V = np.zeros(len(SUBTASKS), bool)
    drawn_V = none_V.copy()
    drawn_V[[0, 1]] = True
    with pytest.raises(NumericsError, match="leaves no pair of c"):
        atoms.columns(drawn_V, none_V)


def test_pairs_that_cancel_are_refused_under_weights() -> None:
    one = random_pairs(1)
    both: dict[str, Any] = {name: np.array([value[0]] * 2) for name, value in vars(one).items()}
    both |= {name: np.zeros(2) for name in ("logps_w_V", "logps_l_V", "ref_logps_w_V", "ref_logps_l_V")}
    atoms = PairAtoms("dpo_weighted", [PairGradients(**both)], np.ones(1), ["a", "a"], dpo_beta=0.1, normalize="exact")
    with pytest.raises(NumericsError, match="cancel each other"):
        atoms.columns(np.ones(2, bool), np.array([False, True]))


def test_subsets_take_so_many_of_every_subtask_and_share_none() -> None:
    random = np.random.default_rng(0)
    seen = set()
    for _ in range(60):
        first_V, second_V = two_subsets(SUBTASKS, range(len(SUBTASKS)), 1, random)
        assert not (first_V & second_V).any()
        assert [sum(first_V[[name == each for each in SUBTASKS]]) for name in "bac"] == [1, 1, 1]
        assert [sum(second_V[[name == each for each in SUBTASKS]]) for name in "bac"] == [1, 1, 0]
        seen.add(tuple(np.flatnonzero(first_V)))
    assert len(seen) == 6  # three of b times two of a
    assert two_subsets(SUBTASKS, range(len(SUBTASKS)), 9, random)[0].all()


def test_pairs_of_a_shot_are_drawn_together() -> None:
    random = np.random.default_rng(0)
    shots = ["x", "u", "y", "x", "u", "c"]  # x and y of b, u of a
    seen = set()
    for _ in range(30):
        first_V, second_V = two_subsets(SUBTASKS, shots, 1, random)
        seen.add((tuple(np.flatnonzero(first_V)), tuple(np.flatnonzero(second_V))))
    assert seen == {((0, 1, 3, 4, 5), (2,)), ((1, 2, 4, 5), (0, 3))}


def test_single_pairs_have_no_atoms_of_their_own_under_weights() -> None:
    atoms = PairAtoms("dpo_weighted", [random_pairs(1)], np.ones(1), SUBTASKS, dpo_beta=0.1, normalize="exact")
    with pytest.raises(ConfigError, match="single pairs have no scores"):
        atoms.signed_atoms(np.ones(len(SUBTASKS), bool), np.zeros(len(SUBTASKS), bool))


def test_jaccard_by_hand() -> None:
    assert jaccard(np.array([3, 1, 2]), np.array([2, 5])) == pytest.approx(1 / 4)
    assert jaccard(np.array([1]), np.array([1])) == 1.0 and jaccard(np.array([], int), np.array([], int)) == 1.0
