"""Selections that a pool cannot give are refused before anything is computed; all others pass."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from rose_ray.config import parse_config
from rose_ray.errors import ConfigError
from rose_ray.kernels.budget import Budget, SourceRules
from rose_ray.kernels.selection import top_k
from rose_ray.stages.selection_check import check_selections

SOURCES = {"math": 6, "chat": 3, "code": 1}


def check(selection: dict[str, Any], training_set: dict[str, Any] | None = None) -> None:
    content: dict[str, Any] = {
        "workspace": "w",
        "model": {"base": "b", "max_tokens": 64},
        "pool": {"inputs": [{"files": ["p.jsonl"]}]},
        "targets": [{"name": "t", "pairs": [{"files": ["q.jsonl"]}], "selection": selection}],
    }
    if training_set is not None:
        content["training_set"] = {"selection": training_set}
    check_selections(parse_config(content), SOURCES)


@pytest.mark.parametrize(
    ("selection", "message"),
    [
        (
            {"include_sources": ["maths"]},
            r"targets\.0\.selection \(t\)\.include_sources: .*'maths'; did you mean 'math'",
        ),
        ({"exclude_sources": ["x"]}, r"exclude_sources: the pool has no source 'x'; it has \['chat', 'code', 'math'\]"),
        ({"source_quotas": {"Chat": 0.5}}, "source_quotas: the pool has no source 'Chat'; did you mean 'chat'"),
        ({"count": 11}, r"selection \(t\)\.count: 11 rows asked for, but at most 10 can be selected"),
        ({"count": 5, "include_sources": ["chat", "code"]}, "4 of them in allowed sources"),
        ({"fraction": 0.5, "exclude_sources": ["math"]}, r"\.fraction: 5 rows asked for, but at most 4"),
        ({"count": 9, "source_quotas": {"math": 0.5}}, "at most 8 can be selected"),
        (
            {"tokens": 641},
            r"\.tokens: 641 tokens asked for, but at most 640 can be selected: the pool has 10 unique rows, 10 of them "
            r"in allowed sources, none of more than model\.max_tokens: 64 tokens",
        ),
        ({"tokens": 257, "include_sources": ["chat", "code"]}, "at most 256 can be selected"),
        ({"tokens": 600, "source_quotas": {"math": 0.5}}, "at most 556 can be selected"),
    ],
)
def test_what_the_pool_cannot_give(selection: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check(selection)
    with pytest.raises(ConfigError, match=r"^training_set\.selection\."):
        check({}, selection)


@pytest.mark.parametrize("count", range(1, 11))
@pytest.mark.parametrize("share", [0.1, 0.25, 0.34, 0.5, 1.0])
def test_what_passes_can_be_selected_and_what_is_refused_cannot(count: int, share: float) -> None:
    sources = [name for name, num_rows in SOURCES.items() for _ in range(num_rows)]
    rules = SourceRules(max_share={"math": share})

    def refuses(call: Any) -> bool:
        try:
            call()
        except ConfigError:
            return True
        return False

    ids = [str(number) for number in range(10)]
    selected = refuses(lambda: top_k(np.arange(10.0), ids, Budget(count=count), sources=sources, rules=rules))
    assert refuses(lambda: check({"count": count, "source_quotas": {"math": share}})) == selected


@pytest.mark.parametrize(
    "selection", [{"tokens": 640}, {"tokens": 512, "source_quotas": {"math": 0.5}}, {"tokens": 1, "count": None}]
)
def test_tokens_that_rows_may_have_pass(selection: dict[str, Any]) -> None:
    check(selection)
