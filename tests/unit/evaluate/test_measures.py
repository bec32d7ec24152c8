"""Measures by hand and against one sequence at a time."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rose_ray.config.evaluation import HeldOutConfig
from rose_ray.config.model import LoraConfig, ModelConfig
from rose_ray.config.target import PairInput
from rose_ray.data.preferences import read_pairs
from rose_ray.data.tokenize import Tokeniser
from rose_ray.errors import AccountingError, DataError, NonFiniteError
from rose_ray.evaluate.benchmarks import Benchmark, Question, answers_benchmark, held_out_benchmark
from rose_ray.evaluate.fine_tune import fresh_model, set_adapter
from rose_ray.evaluate.measures import is_correct, measure, pair_values, question_values
from rose_ray.filesystem import locate
from rose_ray.model.layout import adapter_parameters
from rose_ray.model.tokenizer import load_tokeniser
from tests.tiny import make_pair_rows, write_jsonl

FLOAT32_SUM = 1e-3  # sums of up to some 60 float32 log-probabilities of order 10
ROUNDING = 1e-12


@pytest.fixture(scope="module")
def model(base_folder: str) -> Any:
    settings = ModelConfig(base=base_folder, dtype="float32", max_tokens=96)
    return fresh_model(settings, LoraConfig(rank=2, alpha=4.0, dropout=0.2, target_modules=["q_proj"]), 0)


@pytest.fixture(scope="module")
def tokeniser(base_folder: str) -> Tokeniser:
    return load_tokeniser(ModelConfig(base=base_folder, dtype="float32", max_tokens=96))


def slow_logp(model: Any, tokeniser: Tokeniser, prompt: str, answer: str) -> tuple[float, int]:
    """Token after token of what the template writes behind the prompt, up to its end token."""
    from rose_ray.data.conversation import Message

    head = tokeniser.encode_prompt([Message("user", prompt)])
    ids = tokeniser.encode_answer([Message("user", prompt)], answer).input_ids
    end = ids.index(tokeniser.tokenizer.eos_token_id, len(head)) + 1
    assert ids[: len(head)] == head
    with torch.no_grad():
        table = model.eval()(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return sum(float(table[place - 1, ids[place]]) for place in range(len(head), end)), end - len(head)


@pytest.fixture
def held_out(tmp_path: Path) -> Benchmark:
    location = locate(str(write_jsonl(tmp_path / "p.jsonl", make_pair_rows(5))))
    pairs = read_pairs([location], target="h", subtask_field="topic")
    return held_out_benchmark(HeldOutConfig(name="h", pairs=[PairInput(files=["-"])]), pairs)


def test_pairs_hold_sums_and_tokens_of_both_sides(model: Any, tokeniser: Tokeniser, held_out: Benchmark) -> None:
    own = replace(held_out, name="own pairs of a target")  # no name for a path
    items = measure(model, tokeniser, own, max_batch_tokens=150)
    assert [item["item_id"] for item in items] == [pair.pair_id for pair in held_out.pairs]
    for item, pair in zip(items, held_out.pairs, strict=True):
        for side, answer in (("chosen", pair.chosen), ("rejected", pair.rejected)):
            logp, tokens = slow_logp(model, tokeniser, pair.prompt[0].content, answer)
            assert item[f"logp_{side}"] == pytest.approx(logp, abs=FLOAT32_SUM)
            assert item[f"tokens_{side}"] == tokens
        assert item["subtask"] == pair.subtask


def test_pair_values_by_hand() -> None:
    items = [
        {"item_id": "a", "logp_chosen": -8.0, "logp_rejected": -9.0, "tokens_chosen": 4, "tokens_rejected": 3},
        {"item_id": "b", "logp_chosen": -5.0, "logp_rejected": -2.0, "tokens_chosen": 5, "tokens_rejected": 2},
    ]
    reference = [
        {**items[0], "logp_chosen": -10.0, "logp_rejected": -8.0},
        {**items[1], "logp_chosen": -5.0, "logp_rejected": -2.0},
    ]
    values = pair_values(items, reference, dpo_beta=0.5, length_normalised_beta=2.0)
    # a: 0.5 ((-8 + 10) - (-9 + 8)) = 1.5; b: nothing moved
    assert values["margin"].tolist() == [1.5, 0.0]
    assert values["accuracy"].tolist() == [1.0, 0.5]
    assert values["dpo_loss"].tolist() == pytest.approx([math.log1p(math.exp(-1.5)), math.log(2)], abs=ROUNDING)
    assert values["ce_chosen"].tolist() == [2.0, 1.0]
    # a: 2 (-2 + 3) = 2; b: 2 (-1 + 1) = 0
    expected = [math.log1p(math.exp(-2.0)), math.log(2)]
    assert values["length_normalised_loss"].tolist() == pytest.approx(expected, abs=ROUNDING)
    assert values["length_difference"].tolist() == [1.0, 3.0]
    with pytest.raises(AccountingError):
        pair_values(items, reference[::-1], dpo_beta=0.5, length_normalised_beta=2.0)


def test_choices_by_log_probability(model: Any, tokeniser: Tokeniser) -> None:
    question = Question("q", "s", "Which?", ("water", "a green stone", "B"), gold=1)
    (item,) = measure(model, tokeniser, Benchmark("t", "multiple_choice", questions=(question,)), max_batch_tokens=64)
    slow = [slow_logp(model, tokeniser, "Which?", option)[0] for option in question.options]
    assert item["logps"] == pytest.approx(slow, abs=FLOAT32_SUM) and item["gold"] == 1
    items = [{"logps": logps, "gold": 1} for logps in ([-3, -1, -2], [-1, -2, -3], [-1, -1, -3])]
    assert question_values(items)["choice_accuracy"].tolist() == [1.0, 0.0, 0.5]


def test_questions_that_do_not_fit_are_listed(model: Any, tokeniser: Tokeniser) -> None:
    question = Question("long", "s", "water " * 200, ("A", "B"), gold=0)
    with pytest.raises(DataError, match=r"t: 1 of 1 questions cannot be asked: long: prompt_too_long"):
        measure(model, tokeniser, Benchmark("t", "multiple_choice", questions=(question,)), max_batch_tokens=64)


def test_answers(model: Any, tokeniser: Tokeniser, held_out: Benchmark) -> None:
    asked = answers_benchmark(held_out, 3, 4)
    items = measure(model, tokeniser, asked, max_batch_tokens=200)
    assert [item["item_id"] for item in items] == [pair.pair_id for pair in asked.pairs]
    known = items[0]["answer"]
    question = Question("q", "s", asked.pairs[0].prompt[0].content, answers=(known,))
    settings = (("extract", "text"), ("max_new_tokens", 4))
    exact = Benchmark("t", "exact_match", questions=(question,), settings=settings)
    (found,) = measure(model, tokeniser, exact, max_batch_tokens=200)
    assert found["answer"] == known and found["correct"]
    assert question_values([found, {**found, "correct": False}])["exact_match"].tolist() == [1.0, 0.0]


@pytest.mark.parametrize(
    ("answer", "known", "extract", "correct"),
    [
        ("The  Answer.", ["the answer"], "text", True),
        ("no", ["yes"], "text", False),
        ("(A)", ["a"], "text", True),
        (")", ["("], "text", False),
        ("Let us see. So the answer is (B).", ["(B)"], "final", True),
        ("(B)", ["They turn. So the answer is (B)."], "final", True),
        ("So the answer is (A), not (B).", ["(B)"], "final", False),
        ("The answer is valid. No: the answer is invalid.", ["invalid"], "final", True),
        ("2 + 3 = 5\n#### 1,250", ["so\n#### 1250.0"], "final", True),
        ("the False", ["False"], "final", True),
        ("", ["(B)"], "final", False),
        ("So the answer is (B).", ["(B)"], "text", False),
        ("so 1,250 it is", ["#### 1250"], "last_number", True),
        ("5 and 6 #### 5.0", ["2+3=5\n#### 5"], "last_number", True),
        ("none", ["#### 5"], "last_number", False),
        ("-3", ["3"], "last_number", False),
    ],
)
def test_exact_match(answer: str, known: list[str], extract: str, correct: bool) -> None:
    assert is_correct(answer, known, extract) is correct


def test_numbers_that_are_none_are_refused(base_folder: str, tokeniser: Tokeniser, held_out: Benchmark) -> None:
    settings = ModelConfig(base=base_folder, dtype="float32", max_tokens=96)
    broken = fresh_model(settings, LoraConfig(rank=2, alpha=4.0, target_modules=["q_proj"]), 0)
    weights = {name: torch.full_like(p, math.nan) for name, p in adapter_parameters(broken).items()}
    set_adapter(broken, weights)
    with pytest.raises(NonFiniteError, match="evaluation h: log-probabilities of 5 items"):
        measure(broken, tokeniser, held_out, max_batch_tokens=500)
