"""`method` and `method_options` of a target: what is known, what fits, and what contradicts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rose_ray.config import parse_config
from rose_ray.errors import ConfigError
from rose_ray.methods.registry import method_of
from tests.distributed.tiny import tiny_content

RANDOM = {"name": "t", "method": "random"}
PAIRS = {"pairs": [{"files": ["pairs.jsonl"]}]}


def job(target: dict[str, Any], **top: Any) -> Any:
    return parse_config({**tiny_content(Path("in"), "ws"), "targets": [target], **top})


def test_less_is_the_objective_less() -> None:
    target = job({"name": "t", "method": "less", **PAIRS}).targets[0]
    assert (target.objective, target.uses_gradients) == ("less", True)
    assert job({"name": "t", "method": "less", "objective": "less", **PAIRS}).targets[0] == target


def test_gist_is_exact_and_looks_at_the_chosen_answers_by_default() -> None:
    config = job({"name": "t", "method": "gist", **PAIRS})
    (target,) = config.targets
    assert (target.objective, target.exact, config.is_exact(target)) == ("less", False, True)
    assert target.gist is not None and target.gist.rank is None
    ours = {"name": "t", "method": "gist", "objective": "rose", "method_options": {"rank": 3}, **PAIRS}
    (target,) = job(ours).targets
    assert target.objective == "rose" and target.gist is not None and target.gist.rank == 3
    with pytest.raises(
        ConfigError, match=r"gist compares rows with single pairs, which gradients\.exact_basis: subtasks"
    ):
        parse_config({**tiny_content(Path("in"), "ws"), "targets": [ours]}, ["gradients.exact_basis=subtasks"])


def test_pairs_take_turns_for_rds_plus_unless_told_otherwise() -> None:
    for selection, method in (
        ({}, "round_robin_pairs"),
        ({"selection": {"count": 3}}, "round_robin_pairs"),
        ({"selection": {"method": "top_k"}}, "top_k"),
    ):
        (target,) = job({"name": "t", "method": "rds_plus", **PAIRS, **selection}).targets
        assert target.selection.method == method
    (target,) = job({"name": "t", "method": "rds", **PAIRS}).targets
    assert target.selection.method == "top_k"


def test_a_method_without_scores_of_pairs_cannot_let_them_take_turns() -> None:
    for method, gives in (("dsir", "one a subtask"), ("loss_drop", "one")):
        target = {"name": "t", "method": method, **PAIRS, "selection": {"method": "round_robin_pairs"}}
        with pytest.raises(ConfigError, match=f"needs a score a pair, and method {method} gives {gives}:"):
            method_of(job(target).targets[0])


def test_a_dumped_job_can_be_read_again() -> None:
    for target in (
        {"name": "t", "method": "less", **PAIRS},
        {"name": "t", "method": "gist", "method_options": {"rank": 2}, **PAIRS},
        {"name": "t", "method": "rds_plus", **PAIRS},
        {**RANDOM, "method_options": {"seed": 3}},
    ):
        config = job(target)
        assert parse_config(config.model_dump(mode="json", exclude_none=True)) == config


def test_floats_may_be_written_as_yaml_reads_them() -> None:
    target = job({"name": "t", "method": "bm25", "method_options": {"k1": "12e-1", "b": 1}, **PAIRS}).targets[0]
    assert target.method_options == {"k1": "12e-1", "b": 1}


def test_own_paths_are_looked_up_later() -> None:
    config = job({"name": "t", "method": "my_package.scores:Best", "method_options": {"anything": 1}})
    assert [target.name for target in config.method_targets] == ["t"] and not config.gradient_targets


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("import not_there.below", "own_scores imports the package 'not_there', which is not installed here. Install"),
        ("import own_scores.below", "cannot import 'own_scores' .*add its folder to PYTHONPATH there"),
        ("from os import not_there", "cannot import 'own_scores' .*cannot import name 'not_there'"),
    ],
)
def test_what_an_own_method_lacks_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, message: str
) -> None:
    (tmp_path / "own_scores.py").write_text(f"{line}\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match=f"^target t: method own_scores:Best: {message}"):
        method_of(job({"name": "t", "method": "own_scores:Best"}).targets[0])


def test_a_preset_is_for_targets_of_gradients() -> None:
    config = parse_config(
        {**tiny_content(Path("in"), "ws"), "preset": "rose_official", "targets": [{"name": "g", **PAIRS}, RANDOM]}
    )
    assert [target.encoding for target in config.targets] == ["rose_official", "chat"]


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ({"name": "t", "method": "bm52", **PAIRS}, "targets.0.method: unknown method 'bm52'; did you mean 'bm25'?"),
        ({"name": "t", "method": "magic", **PAIRS}, "unknown method 'magic'; expected one of rose, less, gist, random"),
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
        ({"name": "t", "method": "rds_plus"}, "target t: method rds_plus needs preference pairs"),
        (
            {"name": "t", "method": "gist", "method_options": {"rank": 1}, **PAIRS},
            "method_options.rank: Input should be",
        ),
        ({"name": "t", "method": "gist", "method_options": {"k": 2}, **PAIRS}, "unknown key 'k'; gist has rank"),
        (
            {"name": "t", "method": "nuggets", "method_options": {"seed": 1}, **PAIRS},
            "method_options: seed: no meaning with anchors: target",
        ),
        (
            {"name": "t", "method": "nuggets", "method_options": {"anchors": "pool", "drawn_rows": 9}},
            "method_options: 100 anchors cannot be chosen of 9 drawn rows",
        ),
        ({"name": "t", "method": "deita"}, "trained scorers gave, and none are named"),
        (
            {"name": "t", "method": "deita", "method_options": {"complexity_field": "c", "scores_files": ["f"]}},
            "fields of the record and scores_files contradict each other",
        ),
    ],
)
def test_what_does_not_fit_is_refused(target: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        job(target)
    assert message in str(refused.value)
