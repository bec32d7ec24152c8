"""What `validate` asks of a target's pairs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rose_ray.config import parse_config
from rose_ray.distributed.validate import validate_job
from rose_ray.errors import ConfigError, PairError
from tests.tiny import make_pool_rows, write_jsonl
from tests.unit.stages.diagnose.stored_job import pair_record


def lines_of(folder: Path, base: str, *, prompt: str = "long " * 200, settings: Any = None, **target: Any) -> list[str]:
    pairs = write_jsonl(folder / "pairs.jsonl", [pair_record(0), pair_record(1, prompt=prompt)])
    pool = write_jsonl(folder / "pool.jsonl", make_pool_rows(2))
    config = {
        **(settings or {}),
        "workspace": str(folder / "workspace"),
        "model": {"base": base, "max_tokens": 64},
        "pool": {"inputs": [{"files": [str(pool)]}]},
        "targets": [{"name": "t", "pairs": [{"files": [str(pairs)]}], **target}],
    }
    return list(validate_job(parse_config(config)))


@pytest.mark.parametrize("method", ["bm25", "dsir"])
def test_pairs_that_no_run_tokenises_may_be_long(tmp_path: Path, base_folder: str, method: str) -> None:
    assert f"target t: method {method}, 2 pairs (t 2)" in lines_of(tmp_path, base_folder, method=method)


@pytest.mark.parametrize(
    ("selection", "clause"),
    [({}, " (selection.diversity, its filter, is not set)"), ({"diversity": {"max_cosine": 0.9}}, "")],
)
def test_deita_without_its_filter_is_said(
    tmp_path: Path, base_folder: str, selection: dict[str, Any], clause: str
) -> None:
    options = {"complexity_field": "c", "quality_field": "q"}
    deita = {"method": "deita", "method_options": options, "selection": selection}
    assert f"target t: method deita{clause}, 2 pairs (t 2)" in lines_of(tmp_path, base_folder, **deita)


@pytest.mark.parametrize("method", ["rose", "rds"])
def test_pairs_that_the_model_reads_must_fit(tmp_path: Path, base_folder: str, method: str) -> None:
    with pytest.raises(PairError, match="p1"):
        lines_of(tmp_path, base_folder, method=method)


@pytest.mark.parametrize(
    ("gradients", "told"),
    [
        ({}, "basis t: both sides of every pair, 4 rows, 16.0 KiB in an actor: within gradients.exact_basis_gib: 8"),
        ({"exact_basis_gib": 1e-6}, "basis t: one direction a subtask, 1 rows, "),
        ({"exact_basis": "subtasks"}, "basis t: one direction a subtask, 1 rows, "),
    ],
)
def test_what_an_exact_basis_will_keep_is_said(
    tmp_path: Path, base_folder: str, gradients: dict[str, Any], told: str
) -> None:
    settings = {"gradients": gradients, "lora": {"rank": 2, "target_modules": ["q_proj"]}}
    lines = lines_of(tmp_path, base_folder, prompt="Why?", settings=settings, exact=True)
    assert any(line.startswith(told) for line in lines)
    lines = lines_of(tmp_path, base_folder, prompt="Why?", settings=settings)
    assert not any(line.startswith("basis") for line in lines)


@pytest.mark.parametrize(
    ("projection", "is_told"), [({}, True), ({"dim": 16}, False), ({"kind": "none"}, False), ({"kind": "exact"}, False)]
)
def test_features_wider_than_the_adapter_are_said(
    tmp_path: Path, base_folder: str, projection: dict[str, Any], is_told: bool
) -> None:
    settings = {"gradients": {"projection": projection}, "lora": {"rank": 2, "target_modules": ["q_proj"]}}
    told = [line for line in lines_of(tmp_path, base_folder, prompt="Why?", settings=settings) if "kind: none" in line]
    assert bool(told) == is_told
    for line in told:
        assert line.startswith("gradients.projection.dim is 16,384, but the adapter has ")


def test_rows_are_not_compared_by_signs_of_nothing(tmp_path: Path, base_folder: str) -> None:
    def lines(selection: dict[str, Any], **gradients: Any) -> list[str]:
        settings = {"gradients": gradients, "lora": {"rank": 2, "target_modules": ["q_proj"]}}
        return lines_of(tmp_path, base_folder, prompt="Why?", settings=settings, selection=selection)

    by_gradients = {"diversity": {"max_cosine": 0.9, "vectors": "gradients"}}
    with pytest.raises(ConfigError, match=r"^t: selection.diversity cannot compare rows by gradients. gradients.proj"):
        lines(by_gradients)
    for gradients in ({"stored_dtype": "int8"}, {"projection": {"dim": 16}}, {"projection": {"kind": "none"}}):
        assert lines(by_gradients, **gradients)[-1] == "valid"
    assert lines({"diversity": {"max_cosine": 0.9}})[-1] == "valid"
