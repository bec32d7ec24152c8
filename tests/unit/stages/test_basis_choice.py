"""What an exact basis keeps is arithmetic on the configuration: every number here is worked out by hand."""

from __future__ import annotations

from typing import Any

import pytest

from rose_ray.config.gradients import GradientConfig
from rose_ray.config.target import TargetConfig
from rose_ray.data.preferences import PreferencePair
from rose_ray.stages.basis_choice import BasisChoice, choose_basis

PAIRS = [PreferencePair(f"p{n}", ("a", "b", "c")[n % 3], (), "yes", "no", "", "yes", "no") for n in range(8)]
SIZE, NUM_CHECKPOINTS = 1 << 20, 4
IN_PAIRS, IN_SUBTASKS = 16 * 16 * 2**20, 3 * 16 * 2**20
"""A row of 2**20 parameters takes 4 MiB, 16 MiB at four checkpoints; 16 sides of pairs, or 3 subtasks."""


def chosen(size: int = SIZE, target: dict[str, Any] | None = None, **settings: Any) -> BasisChoice:
    files = [{"files": ["pairs.jsonl"]}]
    parsed = TargetConfig.model_validate({"name": "t", "pairs": files, "exact": True, **(target or {})})
    return choose_basis(GradientConfig(**settings), parsed, PAIRS, num_parameters=size, num_checkpoints=NUM_CHECKPOINTS)


def test_pairs_are_kept_up_to_the_bound_and_no_further() -> None:
    kept = chosen(exact_basis_gib=0.25)
    assert (kept.keeps, kept.num_rows, kept.num_bytes) == ("pairs", 16, IN_PAIRS) and not kept.per_subtask
    assert kept.num_bytes == 2**28
    given_up = chosen(exact_basis_gib=0.2499)
    assert (given_up.keeps, given_up.num_rows, given_up.num_bytes) == ("subtasks", 3, IN_SUBTASKS)
    assert given_up.per_subtask


def test_the_default_takes_what_the_authors_adapter_needs_of_two_pairs_and_no_more() -> None:
    rank_128 = 109_051_904  # LoRA of rank 128 on q, k, v and o of Llama-3.1-8B: 1.6 GiB a row at four checkpoints
    assert chosen(rank_128).keeps == "subtasks"
    settings: dict[str, Any] = {"num_parameters": rank_128, "num_checkpoints": NUM_CHECKPOINTS}
    target = TargetConfig.model_validate({"name": "t", "pairs": [{"files": ["p"]}]})
    assert choose_basis(GradientConfig(), target, PAIRS[:2], **settings).keeps == "pairs"
    assert choose_basis(GradientConfig(), target, PAIRS[:3], **settings).keeps == "subtasks"


@pytest.mark.parametrize("keeps", ["pairs", "subtasks"])
def test_what_is_configured_is_taken_whatever_the_bound(keeps: str) -> None:
    for gib in (1e-6, 1e6):
        found = chosen(exact_basis=keeps, exact_basis_gib=gib)
        assert found.keeps == keeps and found.reason == f"gradients.exact_basis: {keeps}"


@pytest.mark.parametrize(
    ("target", "needing"),
    [
        ({"method": "gist"}, "method: gist"),
        ({"selection": {"method": "round_robin_pairs"}}, "selection.method: round_robin_pairs"),
    ],
)
def test_a_target_that_needs_single_pairs_keeps_them_beyond_the_bound(target: dict[str, Any], needing: str) -> None:
    found = chosen(target=target, exact_basis_gib=0.1)
    assert found.keeps == "pairs" and found.num_bytes == IN_PAIRS
    assert found.reason == f"{needing} needs single pairs, though they take more than gradients.exact_basis_gib: 0.1"
    assert chosen(target=target, exact_basis_gib=1).reason == "within gradients.exact_basis_gib: 1"


def test_no_more_directions_than_parameters() -> None:
    assert chosen(10).num_rows == 10 and chosen(10).num_bytes == 4 * 10 * 10 * NUM_CHECKPOINTS


def test_the_line_says_what_why_and_what_is_lost() -> None:
    assert chosen().line() == (
        "basis t: both sides of every pair, 16 rows, 256.0 MiB in an actor: within gradients.exact_basis_gib: 8"
    )
    line = chosen(32 * SIZE, exact_basis_gib=4).line()
    assert line == (
        "basis t: one direction a subtask, 3 rows, 1.5 GiB in an actor: both sides of every pair would take 8.0 GiB, "
        "more than gradients.exact_basis_gib: 4; lost: explain shows subtasks and no pairs; shots and reward-step are "
        "refused; doctor leaves out conflicting_pairs; another objective, normalize or dpo_beta takes another pass "
        "over pairs and pool"
    )
    facts = chosen(exact_basis_gib=0.1).facts()
    assert facts["keeps"] == "subtasks" and facts["actor_bytes"] == IN_SUBTASKS and len(facts["lost"]) == 4
    assert chosen().facts()["lost"] == []
