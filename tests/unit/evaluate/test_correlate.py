"""Correlations across models whose order is known."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from rose_ray.config.evaluation import EvaluationConfig, HeldOutConfig
from rose_ray.config.judge import JudgeConfig
from rose_ray.config.target import PairInput
from rose_ray.errors import StoreError
from rose_ray.evaluate.correlate import Association, association_lines, association_records, associations
from rose_ray.evaluate.index import Entry, Index
from rose_ray.kernels.association import kendall, partial_spearman
from rose_ray.kernels.correlation import spearman

CONFIG = EvaluationConfig(
    held_out=[HeldOutConfig(name="h", pairs=[PairInput(files=["-"])], dpo_beta=1.0)],
    judges=[JudgeConfig(name="j", kind="rouge_l")],
    intervals={"resamples": 100},  # type: ignore[arg-type]
)


def pair(chosen: float, rejected: float = -4.0) -> list[dict[str, Any]]:
    return [
        {"item_id": "a", "logp_chosen": chosen, "logp_rejected": rejected, "tokens_chosen": 2, "tokens_rejected": 2}
    ]


def found(
    models: list[tuple[float, float, str, float]], lengths: dict[str, float]
) -> dict[tuple[str, str], Association]:
    """Associations of models given by both log-probabilities, answer and win rate; two seeds a row of the table."""
    items: dict[str, list[dict[str, Any]]] = {"ref": pair(-4.0)}
    entries = []
    for number, (chosen, rejected, answer, rate) in enumerate(models):
        items |= {
            f"p{number}": pair(chosen, rejected),
            f"a{number}": [{"answer": answer}],
            f"v{number}": [{"score": rate}],
        }
        measures = {"pairs/h": f"p{number}", "answers/h": f"a{number}"}
        verdicts = {"j/h": f"v{number}"}
        entries.append(Entry("rose", float(number // 2 + 1), 9, number % 2, f"m{number}", measures, verdicts))
    entries.append(Entry("again", 1.0, 9, 0, "m0", {"pairs/h": "p0"}))  # shares a model, which counts once
    index = Index(entries, {"pairs/h": "ref"}, [0, 1], 99)
    made = associations(index, CONFIG, items.__getitem__, lengths)
    return {(each.loss, each.outcome): each for each in made}


MODELS = [(-3.0, -4.0, "aa", 0.2), (-2.5, -5.0, "a", 0.5), (-2.0, -4.5, "aaaa", 0.4)]
MODELS += [(-1.0, -6.0, "aaa", 0.9), (-1.5, -3.0, "aaaaaa", 0.1), (-0.5, -4.0, "aaaaa", 0.7)]


def test_they_are_those_of_the_columns() -> None:
    made = found(MODELS, {f"m{number}": float(number % 3) for number in range(6)})
    entropy = np.array([-chosen / 2 for chosen, *_ in MODELS])
    margin = np.array([(chosen + 4) - (rejected + 4) for chosen, rejected, *_ in MODELS])
    rate, length = np.array([m[3] for m in MODELS]), np.array([len(m[2]) for m in MODELS])
    first = made["ce_chosen", "margin"]
    assert (first.num_models, first.num_groups) == (6, 3)
    assert first.spearman is not None and first.spearman.value == spearman(entropy, margin)
    assert first.kendall is not None and first.kendall.value == kendall(entropy, margin)
    judged = made["ce_chosen", "win_rate j"]
    assert judged.spearman is not None and judged.spearman.value == spearman(entropy, rate)
    held = judged.partial["answer_length"]
    assert held is not None and held.value == partial_spearman(entropy, rate, length)
    assert "training_length" in judged.partial
    # with one pair the DPO loss falls as the margin rises
    falling = made["dpo_loss", "margin"].spearman
    assert falling is not None and falling.value == -1.0
    assert falling.high == pytest.approx(-1.0, abs=1e-12)  # rounding of a resample with ties


def test_told() -> None:
    made = list(found(MODELS, {}).values())
    lines = list(association_lines(made, 0.95))
    assert lines[0].startswith("h: rank correlation across models")
    (line,) = [line for line in lines if "dpo_loss" in line and "margin" in line]
    assert "Spearman -1.00 [-1.00, -1.00]" in line and "(6 models of 3 rows)" in line
    mechanical = "  dpo_loss is computed from each pair's margin"
    assert not any(line.startswith(mechanical) for line in lines)
    unjudged = [each for each in made if not each.outcome.startswith("win_rate")]
    assert list(association_lines(unjudged, 0.95))[-1].startswith(mechanical)
    assert association_records(made)[0]["loss"] == "ce_chosen" and "training_length" not in made[0].partial


def test_too_few_models() -> None:
    with pytest.raises(StoreError, match="3 models were measured on h, expected at least 4"):
        found(MODELS[:3], {})


def test_what_does_not_vary_is_undefined() -> None:
    made = found([(-3.0, -4.0, "a", 0.5)] * 4, {})
    assert made["ce_chosen", "margin"].spearman is None
    assert "undefined" in "\n".join(association_lines(list(made.values()), 0.95))
