"""What a pair puts into its subtask's direction: against loops, and by hand."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest

from rose_ray.errors import NumericsError, ShapeError
from rose_ray.kernels.objectives import Objective, PairGradients, bank_directions
from rose_ray.kernels.pair_terms import chosen_shares, cosines_with_rest, pair_terms, swapped
from rose_ray.kernels.sign_test import sign_test

FLOAT64 = 1e-12
"""A handful of float64 operations on numbers of about 1."""

SUBTASKS = ["b", "a", "b", "b", "c"]


def random_pairs(num_pairs: int = 5, dim: int = 6, seed: int = 0) -> PairGradients:
    random = np.random.default_rng(seed)
    w, l = random.normal(size=(2, num_pairs, dim))  # noqa: E741
    tokens = random.integers(1, 20, size=(2, num_pairs))
    logps = -10 * random.random(size=(4, num_pairs))
    return PairGradients(
        [f"p{n}" for n in range(num_pairs)],
        w,
        l,
        np.linalg.norm(w, axis=1),
        np.linalg.norm(l, axis=1),
        (w * l).sum(1),
        *tokens,
        *logps,
    )


@pytest.mark.parametrize("objective", get_args(Objective))
@pytest.mark.parametrize("normalize", ["exact", "own", "projected", "none"])
def test_the_terms_of_a_subtask_add_up_to_its_direction(objective: Objective, normalize: str) -> None:
    pairs = random_pairs()
    terms_VD = pair_terms(objective, pairs, dpo_beta=0.3, normalize=normalize)
    found = bank_directions(objective, pairs, dpo_beta=0.3, subtasks=SUBTASKS, normalize=normalize)
    for name in ("a", "b", "c"):
        summed = terms_VD[[subtask == name for subtask in SUBTASKS]].sum(0)
        wanted = found.vectors_UD[[subtask == name for subtask in found.subtasks]].sum(0)
        np.testing.assert_allclose(summed / np.linalg.norm(summed), wanted / np.linalg.norm(wanted), atol=FLOAT64)


@pytest.mark.parametrize("objective", ["rose", "rose_simpo", "rose_balanced"])
def test_a_flipped_label_turns_the_direction_round(objective: Objective) -> None:
    pairs = random_pairs()
    one, other = (pair_terms(objective, each, dpo_beta=0.1, normalize="exact") for each in (pairs, swapped(pairs)))
    np.testing.assert_allclose(other, -one, atol=FLOAT64)


def test_swapping_twice_changes_nothing() -> None:
    pairs = random_pairs()
    for name, value in vars(swapped(swapped(pairs))).items():
        np.testing.assert_array_equal(value, getattr(pairs, name))


def one_pair(g_w: list[float], g_l: list[float], tokens: tuple[int, int] = (1, 1)) -> PairGradients:
    w, l = np.array([g_w]), np.array([g_l])  # noqa: E741
    norms = (np.linalg.norm(each, axis=1) for each in (w, l))
    return PairGradients(["p"], w, l, *norms, (w * l).sum(1), np.array([tokens[0]]), np.array([tokens[1]]))


def test_shares_by_hand() -> None:
    # orthogonal: 9 of 9 + 16
    assert chosen_shares("rose", one_pair([3, 0], [0, 4]))[0] == pytest.approx(9 / 25)
    # per token: (3/3)^2 of (3/3)^2 + (4/2)^2
    assert chosen_shares("rose_simpo", one_pair([3, 0], [0, 4], (3, 2)))[0] == pytest.approx(1 / 5)
    assert chosen_shares("rose_balanced", one_pair([3, 0], [0, 4]))[0] == pytest.approx(0.5)
    assert chosen_shares("less", one_pair([3, 0], [1, 4]))[0] == pytest.approx(1.0)
    # parallel, 1 and 2: d = 1, the chosen side takes from it: (1 - 2) / 1
    assert chosen_shares("rose", one_pair([1, 0], [2, 0]))[0] == pytest.approx(-1.0)


def test_a_pair_without_a_direction_is_named() -> None:
    with pytest.raises(NumericsError, match="the rose direction is zero in 1 pairs: p"):
        chosen_shares("rose", one_pair([1, 2], [1, 2]))


def test_cosines_with_the_rest_are_those_of_a_loop() -> None:
    terms_VD = np.random.default_rng(1).normal(size=(5, 4))
    found = cosines_with_rest(terms_VD, SUBTASKS)
    assert np.isnan(found[1]) and np.isnan(found[4])  # alone in their subtasks
    for number in (0, 2, 3):
        rest = sum(terms_VD[other] for other in (0, 2, 3) if other != number)
        wanted = terms_VD[number] @ rest / np.linalg.norm(terms_VD[number]) / np.linalg.norm(rest)
        assert found[number] == pytest.approx(wanted, abs=FLOAT64)


def test_nothing_to_compare_with_is_not_a_number() -> None:
    assert np.isnan(cosines_with_rest(np.array([[1.0, 0], [0, 0]]), ["a", "a"])).all()
    with pytest.raises(ShapeError, match="terms have shape"):
        cosines_with_rest(np.zeros((2, 3)), ["a"])


def test_sign_test_by_hand() -> None:
    assert sign_test(6, 2) == pytest.approx(2 * (28 + 8 + 1) / 256)
    assert sign_test(0, 5) == pytest.approx(2 / 32)
    assert sign_test(3, 3) == 1.0 and sign_test(0, 0) == 1.0
    with pytest.raises(NumericsError, match="-1"):
        sign_test(-1, 2)
