"""Alignment of a target's direction with that of held-out pairs, from two stored banks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rose_ray.config.target import PairInput, TargetConfig
from rose_ray.errors import ConfigError, PairError, SpaceMismatchError
from rose_ray.stages.diagnose.alignment import alignment_lines, alignments, check_apart, held_out_target
from rose_ray.stages.diagnose.stored import StoredBank, needed_bank
from tests.unit.stages.diagnose.stored_job import SPACE, pair_record, stored_job


def bank_of(folder: Path, subtasks: str, directions_CVD: np.ndarray, **how: Any) -> StoredBank:
    folder.mkdir()
    job = stored_job(folder, [pair_record(n, name) for n, name in enumerate(subtasks)])
    job.add_bank(np.zeros_like(directions_CVD), directions_CVD, tokens=[(1, 1)] * len(subtasks), **how)
    job.finish()
    return needed_bank(job.workspace, job.config, job.config.targets[0], job.pairs)


def test_cosines_by_hand(tmp_path: Path) -> None:
    own = np.array([[[1, 0], [0, 1]], [[1, 0], [0, 1]]], dtype=float)
    held = np.array([[[1, 0], [0, 1], [0, 5]], [[-1, 0], [0, 1], [0, 1]]], dtype=float)
    report = alignments(
        bank_of(tmp_path / "own", "ab", own), bank_of(tmp_path / "held", "aac", held), num_resamples=200, seed=0
    )
    (found,) = report.subtasks
    assert (found.subtask, found.num_pairs, found.num_held_out) == ("a", 1, 2)
    first, second = found.checkpoints.values()
    assert first.value == pytest.approx(0.5**0.5) and second.value == pytest.approx(-(0.5**0.5))
    assert found.weighted.value == pytest.approx(0.75 * 0.5**0.5 - 0.25 * 0.5**0.5)
    # two draws out of two: both the first, one of each, both the second
    assert first.low == pytest.approx(0.0) and first.high == pytest.approx(1.0)
    assert found.halves == pytest.approx(0.0)  # the two vectors are orthogonal
    assert report.unmatched == ("b: no held-out pair", "c: held-out pairs alone")
    lines = list(alignment_lines(report))
    assert lines[1].startswith("  a  +0.354 [")
    assert lines[1].endswith("1 pairs, 2 held out; halves of the held-out pairs +0.000")
    assert lines[2].startswith("       checkpoint-1: +0.707 [+0.000, +1.000]")


def test_one_held_out_pair_has_no_interval(tmp_path: Path) -> None:
    own, held = np.ones((2, 1, 2)), np.ones((2, 1, 2))
    banks = bank_of(tmp_path / "own", "a", own), bank_of(tmp_path / "held", "a", held)
    (found,) = alignments(*banks, num_resamples=10, seed=0).subtasks
    assert found.weighted.low is None and found.halves is None
    assert found.weighted.value == pytest.approx(1.0)


def test_banks_of_different_spaces_are_refused(tmp_path: Path) -> None:
    one = bank_of(tmp_path / "one", "a", np.ones((2, 1, 2)))
    other = bank_of(tmp_path / "other", "a", np.ones((2, 1, 2)), space={**SPACE, "layout": "another"})
    with pytest.raises(SpaceMismatchError, match="different spaces"):
        alignments(one, other, num_resamples=10, seed=0)


def test_shared_pairs_are_refused(tmp_path: Path) -> None:
    job = stored_job(tmp_path, [pair_record(n) for n in range(3)])
    target, pairs = job.config.targets[0], job.pairs
    check_apart(target, pairs[:1], pairs[1:])
    with pytest.raises(PairError, match="1 of 2 held-out pairs are among its own: p0"):
        check_apart(target, pairs[:1], pairs[:2])
    renamed = replace(pairs[0], pair_id="other id")
    with pytest.raises(PairError, match="1 of 1 held-out pairs are among its own: other id"):
        check_apart(target, pairs[:1], [renamed])


def target_of(*inputs: PairInput, **settings: Any) -> TargetConfig:
    return TargetConfig(name="t", pairs=list(inputs), shots=2, **settings)


def test_held_out_files_are_read_as_the_targets_own(tmp_path: Path) -> None:
    config = stored_job(tmp_path, [pair_record(0)]).config
    plain = PairInput(files=["a.jsonl"], format="implicit", subtask_field="topic")
    found = held_out_target(config, target_of(plain, objective="less"), ["b.jsonl", "c=d.jsonl"], 7)
    assert (found.name, found.shots, found.objective) == ("t-held-out", 7, "less")
    assert found.pairs == [plain.model_copy(update={"files": [name]}) for name in ("b.jsonl", "c=d.jsonl")]


def test_held_out_files_of_named_subtasks(tmp_path: Path) -> None:
    config = stored_job(tmp_path, [pair_record(0)]).config
    inputs = [PairInput(files=["a"], subtask="one", format="implicit"), PairInput(files=["b"], subtask="two")]
    found = held_out_target(config, target_of(*inputs), ["two=x", "one=y"], None)
    assert [(entry.subtask, entry.files, entry.format) for entry in found.pairs] == [
        ("two", ["x"], "auto"),
        ("one", ["y"], "implicit"),
    ]
    with pytest.raises(ConfigError, match=r"'x' does not say which subtask .*SUBTASK=FILES with one of one, two"):
        held_out_target(config, target_of(*inputs), ["x"], None)


def test_targets_without_gradients_are_refused(tmp_path: Path) -> None:
    config = stored_job(tmp_path, [pair_record(0)]).config
    with pytest.raises(ConfigError, match="target t: method random takes no gradients, so it has no bank"):
        held_out_target(config, TargetConfig(name="t", method="random"), ["b"], None)


def test_exact_targets_are_refused(tmp_path: Path) -> None:
    config = stored_job(tmp_path, [pair_record(0)]).config
    with pytest.raises(ConfigError, match="basis of their own pairs"):
        held_out_target(config, target_of(PairInput(files=["a"]), exact=True), ["b"], None)
