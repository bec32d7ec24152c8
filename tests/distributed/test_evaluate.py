"""A whole evaluation on a tiny job: trained, measured, judged, found again, and told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rose_ray.config import JobConfig
from rose_ray.errors import ConfigError, ModelError, PairError, StoreError
from tests.distributed.conftest import FinishedJob
from tests.distributed.tiny import tiny_job
from tests.tiny import make_pair_rows, write_jsonl

pytestmark = [pytest.mark.ray, pytest.mark.slow]

EVALUATION = {
    "training": {"epochs": 1, "learning_rate": 1e-2, "batch_size": 8, "max_batch_tokens": 1024},
    "dpo": {"epochs": 1, "learning_rate": 1e-2, "batch_size": 4},
    "budgets": [0.1, 0.3, 1.0],
    "seeds": [0, 1],
    "controls": ["dpo_shots", "select_then_dpo"],
    "control_budget": 0.1,
    "arms": ["alpha"],
    "judges": [
        {"name": "overlap", "kind": "rouge_l"},
        {"name": "entropy", "kind": "cross_entropy"},
    ],
    "max_prompts": 4,
    "max_new_tokens": 4,
    "intervals": {"resamples": 50},
}


def evaluated_job(finished: FinishedJob, workspace: Path, **changes: Any) -> JobConfig:
    held_out = write_jsonl(finished.inputs / "held_out.jsonl", make_pair_rows(8, seed=31))
    questions = [
        {"id": str(i), "question": f"Number {i}?", "choices": ["water", "paper"], "answer": "A"} for i in range(3)
    ]
    block = {
        **EVALUATION,
        "held_out": [{"name": "unseen", "pairs": [{"files": [str(held_out)]}]}],
        "tasks": [
            {
                "name": "quiz",
                "kind": "multiple_choice",
                "files": [str(write_jsonl(finished.inputs / "quiz.jsonl", questions))],
            }
        ],
        **changes,
    }
    return tiny_job(finished.inputs, workspace, [f"evaluation={json.dumps(block)}"])


def test_a_whole_evaluation(finished: FinishedJob, copied: Path, caplog: pytest.LogCaptureFixture) -> None:
    from rose_ray.distributed.evaluate import report_lines, run_evaluation
    from rose_ray.stores.verify import verify
    from rose_ray.stores.workspace import Workspace

    config = evaluated_job(finished, copied)
    index, failed = run_evaluation(config)
    assert failed == []
    models = list((copied / "evaluation/models").iterdir())
    # random and alpha at two budgets, the whole pool, two controls, each at two seeds
    assert len(models) == 2 * (2 + 2 + 1 + 2)
    rows = {(entry.arm, entry.budget) for entry in index.entries}
    assert {("zero_shot", None), ("alpha", 0.1), ("full", 1.0), ("select_then_dpo:alpha", 0.1)} <= rows
    assert all(entry.measures and not entry.failure for entry in index.entries)

    text = "\n".join(report_lines(config))
    assert "unseen: 8 items" in text and "quiz: 3 items" in text and "unseen/overlap: 4 items" in text
    assert "judges overlap and entropy: Cohen's kappa" in text and "missing" not in text
    table = json.loads((copied / "evaluation/report/table.json").read_text())
    margins = {(n["arm"], n["budget"]): n["value"] for n in table if n["measure"] == "margin"}
    assert margins["zero_shot", None] == 0.0 and margins["alpha", 1.0] == margins["full", 1.0]
    assert margins["dpo_shots:alpha", None] != 0.0
    differences = {(n["arm"], n["budget"]): n["difference"] for n in table if n["measure"] == "margin"}
    assert differences["alpha", 0.1] == pytest.approx(margins["alpha", 0.1] - margins["random", 0.1])
    assert differences["full", 1.0] == 0.0 and differences["dpo_shots:alpha", None] is None
    assert "difference from random" in text
    assert (copied / "evaluation/report/unseen-margin.svg").exists()
    assert verify(Workspace.open(str(copied))).is_clean

    before = {path: path.stat().st_mtime_ns for path in (copied / "evaluation").rglob("manifest.json")}
    again, failed = run_evaluation(config)
    assert again == index and failed == []
    assert before == {path: path.stat().st_mtime_ns for path in (copied / "evaluation").rglob("manifest.json")}


def test_what_one_arm_rejects_changes_no_other(finished: FinishedJob, copied: Path) -> None:
    from rose_ray.distributed.evaluate import report_lines, run_evaluation

    changes = {"controls": [], "tasks": [], "judges": [], "budgets": [0.1, 0.9, 1.0], "seeds": [0]}
    job = evaluated_job(finished, copied, **changes)
    hard = {"name": "hard", "method": "ifd", "selection": {"count": 3}}
    targets = [*(target.model_dump() for target in job.targets), hard]
    content = {**job.model_dump(), "targets": targets}
    assert job.evaluation is not None
    alone, _ = run_evaluation(JobConfig.model_validate(content))
    both = job.evaluation.model_copy(update={"arms": ["alpha", "hard"]})
    config = JobConfig.model_validate({**content, "evaluation": both.model_dump()})
    together, failed = run_evaluation(config)
    assert failed == [] and [entry for entry in together.entries if entry.arm != "hard"] == alone.entries
    rows = {entry.budget: (entry.num_rows, entry.budget_rows) for entry in together.entries if entry.arm == "hard"}
    assert rows[0.1] == (7, 7)
    assert rows[0.9][0] == rows[1.0][0] < 63 == rows[0.9][1]
    assert f"hard at 90 %: {rows[1.0][0]} rows, all that it scored; 63 were asked for" in "\n".join(
        report_lines(config)
    )


def test_what_is_wrong_is_said_before_the_cluster_works(finished: FinishedJob, copied: Path) -> None:
    from rose_ray.distributed.evaluate import run_evaluation

    with pytest.raises(ConfigError, match="no `evaluation` block"):
        run_evaluation(finished.config)
    with pytest.raises(ConfigError, match=r"evaluation\.counts: 1000 are above the \d+ unique rows of the pool"):
        run_evaluation(evaluated_job(finished, copied, counts=[1000]))
    with pytest.raises(ModelError, match="no/such/model"):
        run_evaluation(evaluated_job(finished, copied, model={"base": "no/such/model"}))
    own = [{"name": "unseen", "pairs": [{"files": [str(finished.inputs / "pairs.jsonl")]}]}]
    with pytest.raises(ConfigError, match=r"pairs\.jsonl, and evaluation\.held_out\.0\.pairs\.0\.files names it"):
        run_evaluation(evaluated_job(finished, copied, held_out=own))
    pairs = [json.loads(line) for line in (finished.inputs / "pairs.jsonl").read_text().splitlines()]
    other = write_jsonl(finished.inputs / "other.jsonl", pairs[1:])
    asked = [{"name": "unseen", "pairs": [{"files": [str(other)]}]}]
    with pytest.raises(PairError, match=r"evaluation unseen: 5 of 5 items ask what a target's pairs ask"):
        run_evaluation(evaluated_job(finished, copied, held_out=asked))


def test_a_training_that_diverges_is_a_missing_seed(
    finished: FinishedJob, copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rose_ray.distributed.evaluate import report_lines, run_evaluation

    changes = {"controls": ["select_then_dpo"], "budgets": [0.1], "judges": [], "references": ["zero_shot"]}
    broken = {**EVALUATION["dpo"], "learning_rate": 1e37, "epochs": 2}  # type: ignore[dict-item]
    config = evaluated_job(finished, copied, dpo=broken, **changes)
    index, failed = run_evaluation(config)
    assert len(failed) == 2 and all("select_then_dpo:alpha" in line and "learning_rate" in line for line in failed)
    text = "\n".join(report_lines(config))
    assert "select_then_dpo:alpha at 10 %: 0 of 2 seeds measured" in text
    assert [entry.failure != "" for entry in index.entries] == [False, False, False, True, True]


def test_losses_are_correlated_and_scores_summed(finished: FinishedJob, copied: Path) -> None:
    from rose_ray.distributed.evaluate import correlate_lines, run_evaluation
    from rose_ray.distributed.lds import run_lds

    config = evaluated_job(finished, copied, controls=[], tasks=[], lds={"subsets": 4, "fraction": 0.2})
    with pytest.raises(StoreError, match="nothing was evaluated here"):
        correlate_lines(config)
    run_evaluation(config)
    text = "\n".join(correlate_lines(config))
    # the untrained model, random and selected rows at two budgets and two seeds, the whole pool at two
    assert "ce_chosen" in text and "win_rate overlap" in text and "(11 models of 6 rows)" in text
    lines = run_lds(config, "alpha")
    assert "4 random subsets of 14 rows" in lines[0] and "own pairs of alpha" in lines[1] and "unseen" in lines[2]
    content = json.loads((copied / "evaluation/report/lds-alpha.json").read_text())
    assert len(content["results"][0]["measured"]) == 4
    assert run_lds(config, "alpha") == lines
    with pytest.raises(ConfigError, match=r"no target 'gamma'; the configuration has \['alpha', 'beta'\]"):
        run_lds(config, "gamma")
    whole = evaluated_job(finished, copied, controls=[], tasks=[], lds={"subsets": 4, "fraction": 1.0})
    with pytest.raises(ConfigError, match="are the whole pool of"):
        run_lds(whole, "alpha")
