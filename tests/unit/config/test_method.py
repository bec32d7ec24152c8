"""`method` and `method_options` of a target: what is known, what fits, and what contradicts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rose_ray.config import parse_config
from rose_ray.errors import ConfigError
from tests.distributed.tiny import tiny_content

RANDOM = {"name": "t", "method": "random"}
PAIRS = {"pairs": [{"files": ["pairs.jsonl"]}]}


def job(target: dict[str, Any], **top: Any) -> Any:
    return parse_config({**tiny_content(Path("in"), "ws"), "targets": [target], **top})


def test_less_is_the_objective_less() -> None:
    target = job({"name": "t", "method": "less", **PAIRS}).targets[0]
    assert (target.objective, target.uses_gradients) == ("less", True)
    assert job({"name": "t", "method": "less", "objective": "less", **PAIRS}).targets[0] == target


def test_a_dumped_job_can_be_read_again() -> None:
    for target in ({"name": "t", "method": "less", **PAIRS}, {**RANDOM, "method_options": {"seed": 3}}):
        config = job(target)
        assert parse_config(config.model_dump(mode="json", exclude_none=True)) == config


def test_floats_may_be_written_as_yaml_reads_them() -> None:
    target = job({"name": "t", "method": "bm25", "method_options": {"k1": "12e-1", "b": 1}, **PAIRS}).targets[0]
    assert target.method_options == {"k1": "12e-1", "b": 1}


def test_own_paths_are_looked_up_later() -> None:
    config = job({"name": "t", "method": "my_package.scores:Best", "method_options": {"anything": 1}})
    assert [target.name for target in config.method_targets] == ["t"] and not config.gradient_targets


def test_a_preset_is_for_targets_of_gradients() -> None:
    config = parse_config(
        {**tiny_content(Path("in"), "ws"), "preset": "rose_official", "targets": [{"name": "g", **PAIRS}, RANDOM]}
    )
    assert [target.encoding for target in config.targets] == ["rose_official", "chat"]


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ({"name": "t", "method": "bm52", **PAIRS}, "targets.0.method: unknown method 'bm52'; did you mean 'bm25'?"),
        ({"name": "t", "method": "magic", **PAIRS}, "unknown method 'magic'; expected one of rose, less, random"),
        ({"name": "t", "method": "a.b", **PAIRS}, "or package.module:Class for one of your own"),
        ({"name": "t"}, "target t: method rose needs preference pairs: set `pairs`"),
        ({"name": "t", "method": "bm25"}, "target t: method bm25 needs preference pairs: set `pairs`"),
        ({"name": "t", "method": "less", "objective": "rose", **PAIRS}, "which objective: rose contradicts"),
        ({**RANDOM, "method_options": {"sed": 1}}, "method_options: unknown key 'sed'; did you mean 'seed'?"),
        ({**RANDOM, "method_options": {"xyz": 1}}, "unknown key 'xyz'; random has seed, balance"),
        (
            {**RANDOM, "method_options": {"seed": "1"}},
            "method_options.seed: Input should be a valid integer; found '1'",
        ),
        ({**RANDOM, "method_options": {"seed": -1}}, "method_options.seed: Input should be greater than or equal to 0"),
        ({"name": "t", "method_options": {"seed": 1}, **PAIRS}, "method_options: rose has none"),
        ({**RANDOM, "objective": "less"}, "objective: no meaning with method: random"),
        ({**RANDOM, "exact": True, "normalize": "none"}, "normalize and exact: no meaning with method: random"),
        ({"name": "t", "method": "deita"}, "trained scorers gave, and none are named"),
        (
            {"name": "t", "method": "deita", "method_options": {"complexity_field": "c", "scores_files": ["f"]}},
            "scores_files and fields of the record contradict each other",
        ),
    ],
)
def test_what_does_not_fit_is_refused(target: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        job(target)
    assert message in str(refused.value)
