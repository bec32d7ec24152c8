"""What a task of labelled rows may be set to."""

from __future__ import annotations

from typing import Any

import pytest

from rose_ray.config.load import parse_config
from rose_ray.config.task import TaskInput
from rose_ray.errors import ConfigError


def parse(task: dict[str, Any], **pair_input: Any) -> TaskInput:
    content = {
        "workspace": "w",
        "model": {"base": "b"},
        "pool": {"inputs": [{"files": ["p"]}]},
        "targets": [{"name": "t", "pairs": [{"files": ["f"], "task": task, **pair_input}]}],
    }
    parsed = parse_config(content).targets[0].pairs[0].task
    assert parsed is not None
    return parsed


def test_defaults_follow_the_kind() -> None:
    found = {kind: parse({"kind": kind}) for kind in ("multiple_choice", "exact_answer", "summarization")}
    assert {kind: (task.wrong_side, task.answer_form) for kind, task in found.items()} == {
        "multiple_choice": ("options", "letter"),
        "exact_answer": ("other_rows", "full"),
        "summarization": ("lead", "full"),
    }


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ({"kind": "multiple_choise"}, r"targets\.0\.pairs\.0\.task\.kind: .*did you mean 'multiple_choice'"),
        ({"kind": "exact_answer", "splitt": "dev"}, r"task\.splitt: unknown key .*did you mean 'split'"),
        ({}, r"task\.kind: required, but not set"),
        (
            {"kind": "exact_answer", "rejected": "lead"},
            "rejected: lead has no meaning .*expected other_rows or samples",
        ),
        (
            {"kind": "multiple_choice", "answer": "full"},
            "answer: full has no meaning .*letter or text or letter_and_text",
        ),
        ({"kind": "exact_answer", "rejected": "samples"}, "samples .files. and rejected: samples belong together"),
        ({"kind": "exact_answer", "samples": ["s"]}, "belong together"),
        ({"kind": "exact_answer", "rejected_per_row": 0}, r"task\.rejected_per_row: .*found 0"),
    ],
)
def test_settings_that_contradict(task: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(task)


@pytest.mark.parametrize("pair_input", [{"format": "explicit"}, {"subtask_blocks": 2}])
def test_keys_for_files_of_pairs_are_not_for_rows(pair_input: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="for files of pairs"):
        parse({"kind": "exact_answer"}, **pair_input)
