"""docs/methods.md is what it says: its targets are valid, its table is complete, its example runs."""

from __future__ import annotations

import re
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import yaml

from rose_ray.config import parse_config
from rose_ray.config.method import BUILT_IN, GRADIENT_METHODS
from rose_ray.methods.registry import method_of
from tests.distributed.tiny import tiny_content
from tests.methods import make_rows, score_parts

TEXT = (Path(__file__).parents[2] / "docs" / "methods.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)


def targets() -> list[dict[str, Any]]:
    first, own = blocks("yaml")
    return [*yaml.safe_load(first)["targets"], *yaml.safe_load(own)]


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("word_lengths")
    exec(compile(blocks("python")[0], "docs/methods.md", "exec"), vars(module))
    monkeypatch.setitem(sys.modules, "word_lengths", module)


def test_targets_are_valid(example: None) -> None:
    config = parse_config({**tiny_content(Path("in"), "ws"), "targets": targets()})
    assert [type(method_of(target)).__name__ for target in config.method_targets] == [
        "Bm25",
        "RandomOrder",
        "ShortWords",
    ]


def test_every_method_and_option_stands_in_the_table() -> None:
    lines = [line.split("|")[1:-1] for line in TEXT.splitlines() if line.startswith("| `")]
    table = {name.strip(" `"): options.strip() for name, _, _, options in lines[1:]}  # behind its head
    assert set(table) == {*GRADIENT_METHODS, *BUILT_IN}
    for name, built_in in BUILT_IN.items():
        assert [option for option in table[name].split(", ") if option] == list(built_in.options.model_fields), name


def test_the_example_scores(example: None) -> None:
    config = parse_config({**tiny_content(Path("in"), "ws"), "targets": targets()})
    rows = make_rows([("one two", "three fours"), ("seven", "eleven")])
    assert score_parts(method_of(config.targets[-1]), [rows], [])[:, 0].tolist() == [0.5, 0.0]
