"""Answers of a tiny model against decoding one token at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from rose_ray.config.model import ModelConfig
from rose_ray.config.target import TargetConfig
from rose_ray.data.conversation import Message
from rose_ray.errors import ConfigError, PairError, RowError
from rose_ray.model.base import load_base
from rose_ray.model.tokenizer import load_tokeniser
from rose_ray.stages.sample_answers import SamplingSettings, sample_answers, what_is_asked
from rose_ray.stages.target_pairs import target_questions
from tests.tiny import write_jsonl

QUESTIONS = {f"q{number}": (Message("user", f"{number} stone and water?"),) for number in range(4)}


@pytest.fixture(scope="module")
def loaded(base_folder: str) -> tuple[Any, Any]:
    config = ModelConfig(base=base_folder, dtype="float32", max_tokens=64)
    return load_base(config).eval(), load_tokeniser(config)


def test_greedy_answers_are_the_likeliest_tokens(loaded: tuple[Any, Any]) -> None:
    model, tokeniser = loaded
    found = dict(sample_answers(model, tokeniser, QUESTIONS, SamplingSettings(1, 0.0, 6)))
    ends = {tokeniser.tokenizer.convert_tokens_to_ids(token) for token in tokeniser.template.end_tokens}
    for row_id, turns in QUESTIONS.items():
        ids = tokeniser.tokenizer(tokeniser.template.prompt(turns), add_special_tokens=False)["input_ids"]
        start = len(ids)
        while len(ids) < start + 6:
            with torch.no_grad():
                ids = [*ids, int(model(torch.tensor([ids])).logits[0, -1].argmax())]
            if ids[-1] in ends:
                break
        assert found[row_id] == [tokeniser.tokenizer.decode(ids[start:], skip_special_tokens=True).strip()]


def test_draws_are_seeded_by_row(loaded: tuple[Any, Any]) -> None:
    model, tokeniser = loaded
    settings = SamplingSettings(3, 1.0, 8)
    state = torch.get_rng_state()
    found = dict(sample_answers(model, tokeniser, QUESTIONS, settings))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(len(answers) == 3 for answers in found.values())
    assert len({answer for answers in found.values() for answer in answers}) > 6
    alone = dict(sample_answers(model, tokeniser, {"q2": QUESTIONS["q2"]}, settings))
    assert alone["q2"] == found["q2"]
    other = dict(sample_answers(model, tokeniser, QUESTIONS, SamplingSettings(3, 1.0, 8, seed=1)))
    assert other != found


def test_a_question_without_room_for_an_answer(loaded: tuple[Any, Any]) -> None:
    model, tokeniser = loaded
    long = {"long": (Message("user", "stone " * 80),)}
    with pytest.raises(RowError, match=r"prompt_too_long: row long: the question has \d+ tokens, the limit is 64"):
        list(sample_answers(model, tokeniser, long, SamplingSettings()))


def test_questions_of_a_target(tmp_path: Path) -> None:
    rows = [{"id": "a", "question": "1 + 1?", "answer": "2"}, {"id": "b", "question": "2 + 2?", "answer": "4"}]
    file = str(write_jsonl(tmp_path / "g.jsonl", rows))
    entry = {"files": [file], "task": {"kind": "exact_answer", "instruction": "Add."}}
    target = TargetConfig.model_validate({"name": "t", "pairs": [entry]})
    assert {row_id: turns[0].content for row_id, turns in target_questions(target).items()} == {
        "a": "Add.\n\n1 + 1?",
        "b": "Add.\n\n2 + 2?",
    }
    with pytest.raises(PairError, match="the row id 'a' stands in two of its inputs"):
        target_questions(TargetConfig.model_validate({"name": "t", "pairs": [entry, entry]}))
    with pytest.raises(ConfigError, match="no input with task kind exact_answer"):
        target_questions(TargetConfig.model_validate({"name": "t", "pairs": [{"files": [file]}]}))


def test_what_is_asked_is_said_before() -> None:
    assert what_is_asked(1300, 8, None) == "samples: 1,300 questions, 8 answers each"
    text = what_is_asked(300, 8, 5)
    assert text.startswith("samples: 300 questions, 8 answers each. The target takes 5 of a subtask")
