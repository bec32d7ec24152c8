"""Instruction-following difficulty, against one sequence at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rose_ray.config.model import LoraConfig, ModelConfig
from rose_ray.data.tokenize import Sample
from rose_ray.model.base import attach_adapter, load_base
from rose_ray.model.scoring import ScoringModel
from rose_ray.stages.ifd import answers_alone, ifd_scores
from tests import oracles
from tests.tiny import make_samples

LORA = LoraConfig(rank=2, alpha=4.0, target_modules=["q_proj"])
SAMPLES = make_samples((9, 24, 6, 20, 14, 17), 330)
BOS = 1
FLOAT64 = 1e-12
"""Relative: sums of a few dozen log-probabilities in another order."""
BATCHES = 1e-5
"""The stated bound in float32, relative: products of other shapes add up in another order, two layers deep."""


def _model(base: str, dtype: torch.dtype = torch.float64) -> ScoringModel:
    module = attach_adapter(load_base(ModelConfig(base=base), dtype=dtype), LORA, dropout=0)
    model = ScoringModel(module, "cpu")
    model.load_adapter(oracles.random_adapter(model.module, 3))  # must not show
    return model


def test_a_conversation_splits_into_its_answers() -> None:
    sample = Sample([1, 2, 30, 31, 4, 50], [False, False, True, True, False, True])
    given, alone = answers_alone(sample, BOS)
    assert given == sample
    assert alone == [Sample([1, 30, 31], [False, True, True]), Sample([1, 50], [False, True])]


def test_without_a_beginning_token_first_tokens_count_on_neither_side() -> None:
    sample = Sample([2, 30, 31, 4, 50], [False, True, True, False, True])
    given, alone = answers_alone(sample, None)
    assert given.loss_mask == [False, False, True, False, False]
    assert alone == [Sample([30, 31], [False, True])]


def _oracle(base: torch.nn.Module, sample: Sample, bos: int | None) -> float:
    """Walk through the tokens; an answer is what lies between tokens without loss."""
    labelled = [i for i in range(1, len(sample.input_ids)) if sample.loss_mask[i]]
    firsts = [i for i in labelled if i - 1 not in labelled]
    counted = [i for i in labelled if bos is not None or i not in firsts]
    logps = oracles.token_logps(base, sample.input_ids)
    given = -sum(float(logps[i]) for i in counted) / len(counted)  # type: ignore[arg-type]
    alone = 0.0
    for first in firsts:
        answer = []
        for i in range(first, len(sample.input_ids)):
            if i not in labelled:
                break
            answer.append(sample.input_ids[i])
        context = [] if bos is None else [bos]
        if len(context + answer) > 1:
            alone -= sum(float(p) for p in oracles.token_logps(base, context + answer)[1:])  # type: ignore[arg-type]
    return given / (alone / len(counted))


@pytest.mark.parametrize("bos", [BOS, None])
def test_ratios_are_those_of_one_sequence_at_a_time(base_folder: str, bos: int | None) -> None:
    found = ifd_scores(_model(base_folder), SAMPLES, bos, max_batch_tokens=60)
    base = load_base(ModelConfig(base=base_folder), dtype=torch.float64)
    with torch.no_grad():
        expected = [_oracle(base, sample, bos) for sample in SAMPLES]
    above = {place for place, ratio in enumerate(expected) if ratio > 1}
    assert 0 < len(above) < len(SAMPLES), "the samples should have both kinds"
    assert {place: reason for place, (reason, _) in found.rejected.items()} == dict.fromkeys(above, "ifd_above_one")
    for place, ratio in enumerate(expected):
        if place in above:
            assert np.isnan(found.values_NU[place, 0]) and f"{ratio:.6g}" in found.rejected[place][1]
        else:
            assert found.values_NU[place, 0] == pytest.approx(ratio, rel=FLOAT64)


def test_a_batch_of_one_is_a_batch_of_many(base_folder: str) -> None:
    model = _model(base_folder, torch.float32)
    found = [ifd_scores(model, SAMPLES, BOS, max_batch_tokens=bound) for bound in (1, 50, 1000)]
    for other in found[1:]:
        assert other.rejected.keys() == found[0].rejected.keys()
        np.testing.assert_allclose(other.values_NU, found[0].values_NU, rtol=BATCHES)


def test_an_answer_of_one_token_that_nothing_predicts_alone_is_rejected(base_folder: str) -> None:
    short = Sample([7, 8, 9], [False, False, True])
    model = _model(base_folder)
    found = ifd_scores(model, [short, SAMPLES[0]], None, max_batch_tokens=60)
    assert found.rejected[0][0] == "ifd_answer_too_short" and np.isnan(found.values_NU[0, 0])
    both = ifd_scores(model, [short], BOS, max_batch_tokens=60)
    assert "ifd_answer_too_short" not in {reason for reason, _ in both.rejected.values()}
    assert ifd_scores(model, [short], None, max_batch_tokens=60).rejected.keys() == {0}


def test_an_answer_that_costs_nothing_alone_has_no_ratio(base_folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = _model(base_folder)
    monkeypatch.setattr(model, "sample_values", lambda batch, reduction: torch.zeros(batch.num_samples))
    found = ifd_scores(model, SAMPLES[:2], BOS, max_batch_tokens=60)
    assert {reason for reason, _ in found.rejected.values()} == {"ifd_undefined"}
