"""What is trained, and what shares a model."""

from __future__ import annotations

from typing import Any

import pytest

from rose_ray.config.evaluation import EvaluationConfig, HeldOutConfig
from rose_ray.config.model import LoraConfig, ModelConfig
from rose_ray.config.target import PairInput
from rose_ray.data.conversation import Message
from rose_ray.data.preferences import PreferencePair
from rose_ray.errors import ConfigError
from rose_ray.evaluate.trials import (
    TrainingPlanner,
    budget_sizes,
    plan_trials,
    random_rows,
    row_set_digest,
    with_parents,
)
from rose_ray.model.describe import ModelIdentity
from rose_ray.model.layout import ParameterLayout

POPULATION = [f"{number:02d}" for number in range(20)]
PAIRS = [PreferencePair("p", "s", (Message("user", "Why?"),), "good", "bad", "Why?", "good", "bad")]


def config(**settings: Any) -> EvaluationConfig:
    held_out = HeldOutConfig(name="h", pairs=[PairInput(files=["-"])])
    return EvaluationConfig(held_out=[held_out], **{"budgets": [0.1, 1.0], "seeds": [0, 1], **settings})


def planner(evaluation: EvaluationConfig, **model: Any) -> TrainingPlanner:
    identity = ModelIdentity("base", "text", ParameterLayout((("w", (2, 3)),)), 0, 0)
    return TrainingPlanner(evaluation, ModelConfig(base="b", **model), LoraConfig(), identity)


def trials_of(evaluation: EvaluationConfig) -> list[Any]:
    sizes = budget_sizes(evaluation, 20, 20)
    chosen = {arm: {share: POPULATION[:size] for share, size in sizes.items()} for arm in ("rose", "less")}
    return plan_trials(planner(evaluation), chosen, POPULATION, {"rose": PAIRS, "less": PAIRS}, sizes)


def test_every_row_of_the_table() -> None:
    controls = ["dpo_shots", "sft_chosen", "select_then_dpo"]
    found = trials_of(config(controls=controls, control_budget=0.1))
    rows = list(dict.fromkeys((trial.arm, trial.budget, trial.num_rows) for trial in found))
    assert rows == [
        ("zero_shot", None, 0),
        ("random", 0.1, 2),
        ("random", 1.0, 20),
        ("rose", 0.1, 2),
        ("rose", 1.0, 20),
        ("less", 0.1, 2),
        ("less", 1.0, 20),
        ("full", 1.0, 20),
        ("dpo_shots:rose", None, 1),
        ("dpo_shots:less", None, 1),
        ("sft_chosen:rose", None, 1),
        ("sft_chosen:less", None, 1),
        ("select_then_dpo:rose", 0.1, 2),
        ("select_then_dpo:less", 0.1, 2),
    ]
    assert len(found) == 1 + 2 * (len(rows) - 1)


def test_equal_content_is_one_model() -> None:
    found = {(t.arm, t.budget, t.seed): t.training.key for t in trials_of(config())}
    whole = {found[arm, 1.0, 0] for arm in ("random", "rose", "less", "full")}
    assert len(whole) == 1 and found["full", 1.0, 1] not in whole
    assert found["rose", 0.1, 0] == found["less", 0.1, 0] != found["random", 0.1, 0]


def test_an_arm_that_scored_fewer_rows_moves_no_other() -> None:
    evaluation = config(budgets=[0.1, 0.5, 1.0])
    sizes = budget_sizes(evaluation, 20, 20)
    rose = {share: POPULATION[:size] for share, size in sizes.items()}
    strict = {share: POPULATION[:size][:6] for share, size in sizes.items()}
    alone = plan_trials(planner(evaluation), {"rose": rose}, POPULATION, {"rose": PAIRS}, sizes)
    pairs = {"rose": PAIRS, "strict": PAIRS}
    both = plan_trials(planner(evaluation), {"rose": rose, "strict": strict}, POPULATION, pairs, sizes)
    assert [trial for trial in both if trial.arm != "strict"] == alone
    rows = [(t.budget, t.num_rows, t.budget_rows) for t in both if t.arm == "strict" and t.seed == 0]
    assert rows == [(0.1, 2, 2), (0.5, 6, 10), (1.0, 6, 20)]


def test_a_training_that_goes_on_waits_for_its_parent() -> None:
    evaluation = config(controls=["select_then_dpo"], control_budget=0.1)
    first, second = with_parents(trials_of(evaluation), planner(evaluation))
    assert first[0].kind == "untrained" and {t.kind for t in second} == {"dpo_pairs"}
    assert {t.parent for t in second} <= {t.key for t in first}
    assert len({t.key for t in [*first, *second]}) == len(first) + len(second)


def test_what_a_model_depends_on() -> None:
    base = planner(config()).on_rows(["a", "b"], 0)
    assert planner(config()).on_rows(["b", "a"], 0).key == base.key
    longer = config(training={**config().training.model_dump(), "max_batch_tokens": 99})
    assert planner(longer).on_rows(["a", "b"], 0).key == base.key
    others = [
        planner(config()).on_rows(["a"], 0),
        planner(config()).on_rows(["a", "b"], 1),
        planner(config(), dtype="float32").on_rows(["a", "b"], 0),
        planner(config(training={**config().training.model_dump(), "epochs": 1})).on_rows(["a", "b"], 0),
        planner(config()).on_pairs("rose", PAIRS, 0, base),
        planner(config()).on_pairs("rose", PAIRS, 0, None),
        planner(config()).on_chosen("rose", PAIRS, 0),
        planner(config()).untrained(),
    ]
    assert len({each.key for each in [base, *others]}) == 9


def test_budgets_in_rows() -> None:
    assert budget_sizes(config(budgets=[0.29, 1.0, 0.001], counts=[7]), 100, 98) == {
        0.001: 1,
        0.07: 7,
        0.29: 29,
        1.0: 98,
    }
    with pytest.raises(ConfigError, match="budgets 21 are above the 20 rows that were scored, of a pool of 22"):
        budget_sizes(config(counts=[21]), 22, 20)
    with pytest.raises(ConfigError, match=r"0.99 \(99 rows\) are above the 50"):
        budget_sizes(config(budgets=[0.99]), 100, 50)


def test_random_rows_are_nested_and_seeded() -> None:
    small, large = random_rows(POPULATION, 3, 4), random_rows(POPULATION[::-1], 3, 9)
    assert large[:4] == small and random_rows(POPULATION, 4, 4) != small
    assert row_set_digest(small) == row_set_digest(small[::-1])
