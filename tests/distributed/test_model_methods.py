"""Methods that need the model, once through a whole job, beside a gradient target; variants of one: unit tests."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rose_ray.distributed.run import run_job
from rose_ray.stages.report import explain_lines
from tests.distributed import tiny
from tests.distributed.conftest import FinishedJob
from tests.distributed.reading import digests, opened, read_file

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def targets(inputs: Path) -> list[dict[str, Any]]:
    pairs = [{"files": [str(inputs / "pairs.jsonl")], "subtask_field": "topic"}]
    few = {"selection": {"count": 8}}
    return [
        tiny.tiny_content(inputs, "ws")["targets"][0],
        {"name": "span", "method": "gist", "pairs": pairs, **few},
        {"name": "weighted", "method": "rds_plus", "pairs": pairs, **few},
        {"name": "hard", "method": "ifd", **few},
        {"name": "drop", "method": "loss_drop", "method_options": {"epochs": 2}, "pairs": pairs, **few},
        {
            "name": "shown_pool",
            "method": "nuggets",
            "method_options": {"anchors": "pool", "num_anchors": 4, "drawn_rows": 20},
            **few,
        },
        {"name": "rated", "method": "deita", "method_options": scorers(inputs), **few},
    ]


def scorers(inputs: Path) -> dict[str, Any]:
    model = {"model": tiny.tiny_content(inputs, "ws")["model"]["base"], "dtype": "float32"}
    return {
        "complexity_scorer": {**model, "prompt": "{instruction}\nHow hard?"},
        "quality_scorer": {**model, "prompt": "{instruction}\n{answer}\nHow good?"},
    }


def test_each_runs_and_is_found_again(finished: FinishedJob, copied: Path) -> None:
    config = tiny.tiny_job(finished.inputs, copied, [f"targets={targets(finished.inputs)}"])
    result = run_job(config)
    assert {stage.stage: stage.reused for stage in result.stages}["score alpha"]
    pair_ids = [f"pair-{number}" for number in range(6)]
    for name, scores in result.scores.items():
        counts = scores.counts
        assert counts["unique"] == tiny.NUM_UNIQUE == counts["scored"] + counts["rejected"], name
        reasons = {"prompt_too_long": 1}
        if name == "hard":  # a random model: prompts help half of the answers
            reasons["ifd_above_one"] = counts["rejected"] - 1
            assert 8 <= counts["scored"] < tiny.NUM_UNIQUE - 1
        if name == "rated":  # two rows, with what the scorers ask, are longer than the tiny model was made for
            reasons["scorer_prompt_too_long"] = 2
        found = Counter(read_file(copied, scores, "rejected.parquet")["reason"].to_pylist())
        assert found == reasons, name
        assert counts["rejected"] == sum(reasons.values()), name
        assert result.selections[name].counts["selected"] == (12 if name == "alpha" else 8)
        table = read_file(copied, scores, "scores.parquet")
        with_pairs = [f"pair_{pair}" for pair in pair_ids] if name == "weighted" else []
        assert [column for column in table.column_names if column.startswith("pair_")] == with_pairs
        subtasks = tiny.SUBTASKS if name in ("alpha", "span", "weighted") else (name,)
        assert scores.facts["subtasks"] == list(subtasks)
        assert len(set(table["score"].to_pylist())) > 1, name
    rated = read_file(copied, result.scores["rated"], "scores.parquet")["score"].to_numpy()
    assert (rated >= 1).all() and (rated <= 2 * 36).all()  # at most two turns, numbers from 1 to 6
    span = read_file(copied, result.scores["span"], "scores.parquet")["score"].to_numpy()
    assert (np.abs(span) <= 1 + 1e-6).all()  # a mean of cosines, as float32
    assert read_file(copied, result.scores["hard"], "scores.parquet")["score"].to_numpy().max() <= 1
    row_id = read_file(copied, result.scores["hard"], "scores.parquet")["row_id"][0].as_py()
    text = "\n".join(explain_lines(opened(copied), config, row_id))
    assert "gist compares inside the span of the pairs" in text and "scored by loss_drop" in text
    before = digests(copied)
    assert all(stage.reused for stage in run_job(config).stages) and digests(copied) == before
