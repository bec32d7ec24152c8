"""Demonstrations before anchors, against one sequence at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rose_ray.config.model import LoraConfig, ModelConfig
from rose_ray.data.tokenize import Sample
from rose_ray.errors import ConfigError, DataError, ModelError
from rose_ray.model.base import attach_adapter, load_base
from rose_ray.model.scoring import ScoringModel
from rose_ray.stages import nuggets
from rose_ray.stages.nuggets import Anchors, demonstrated, demonstration_scores, pool_anchors, prepare_anchors
from tests import oracles
from tests.tiny import make_samples

LORA = LoraConfig(rank=2, alpha=4.0, target_modules=["q_proj"])
SAMPLES = make_samples((9, 14, 6, 20, 11), 330)
ANCHORS = make_samples((8, 11, 13), 330, seed=1)
NAMES = ["first", "second", "third"]
BOS = 1
FLOAT64 = 1e-12
"""Relative: sums of a dozen log-probabilities in another order."""
BATCHES = 1e-5
"""The stated bound in float32, relative: products of other shapes add up in another order, two layers deep."""


def _model(base: str, dtype: torch.dtype = torch.float64) -> ScoringModel:
    module = attach_adapter(load_base(ModelConfig(base=base), dtype=dtype), LORA, dropout=0)
    model = ScoringModel(module, "cpu")
    model.load_adapter(oracles.random_adapter(model.module, 3))  # must not show
    return model


def _anchors(model: ScoringModel, limit: int = 64, bound: int = 60) -> Anchors:
    return prepare_anchors(model, ANCHORS, NAMES, limit=limit, bos_token_id=BOS, max_batch_tokens=bound)


def test_a_demonstration_stands_before_an_anchor_without_a_second_beginning() -> None:
    row = Sample([1, 20, 21, 22], [False, True, True, True])
    anchor = Sample([1, 30, 31], [False, False, True])
    assert demonstrated(row, anchor, 10, BOS) == Sample([1, 20, 21, 22, 30, 31], [False] * 5 + [True])
    assert demonstrated(row, anchor, 10, None) == Sample([1, 20, 21, 22, 1, 30, 31], [False] * 6 + [True])
    cut = demonstrated(row, anchor, 4, BOS)
    assert cut == Sample([1, 20, 30, 31], [False] * 3 + [True], num_tokens_cut=2)


@pytest.mark.parametrize("limit", [64, 16])
def test_an_anchor_rises_where_its_answer_gets_likelier(
    base_folder: str, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = _model(base_folder)
    anchors = _anchors(model, limit)
    monkeypatch.setattr(nuggets, "_BLOCK_TOKENS", 2 * 3 * limit)  # two rows at once
    found = demonstration_scores(model, SAMPLES, anchors, max_batch_tokens=60)
    base = load_base(ModelConfig(base=base_folder), dtype=torch.float64)
    expected = np.zeros((len(SAMPLES), len(ANCHORS)))
    with torch.no_grad():
        for a, anchor in enumerate(ANCHORS):
            zero_shot = float(oracles.sum_logps(base, (anchor.input_ids, anchor.loss_mask)))
            assert anchors.zero_shot_A[a] == pytest.approx(zero_shot, rel=FLOAT64)
            for n, row in enumerate(SAMPLES):
                shown = row.input_ids[: limit - len(anchor.input_ids)]
                joined = [*shown, *anchor.input_ids]  # random anchors have no beginning token to take off
                labels = [False] * len(shown) + anchor.loss_mask
                assert BOS not in anchor.input_ids
                expected[n, a] = float(oracles.sum_logps(base, (joined, labels))) > zero_shot
    assert 0 < expected.mean() < 1, "the samples should have both kinds"
    np.testing.assert_array_equal(found.values_NU, expected)
    assert not found.rejected


def test_a_batch_of_one_is_a_batch_of_many(base_folder: str) -> None:
    model = _model(base_folder, torch.float32)
    found = [demonstration_scores(model, SAMPLES, _anchors(model, bound=b), max_batch_tokens=b) for b in (1, 70, 9999)]
    zero_shots = [_anchors(model, bound=b).zero_shot_A for b in (1, 70, 9999)]
    for scores, zero_shot_A in zip(found[1:], zero_shots[1:], strict=True):
        np.testing.assert_allclose(zero_shot_A, zero_shots[0], rtol=BATCHES)
        # No change of these random rows is so small that rounding could turn it.
        np.testing.assert_array_equal(scores.values_NU, found[0].values_NU)


def test_anchors_of_the_pool_are_different_rows_that_have_an_embedding(base_folder: str) -> None:
    model = _model(base_folder)
    chosen = pool_anchors(model, SAMPLES, 3, seed=0, max_batch_tokens=60)
    assert len(set(chosen)) == 3 and chosen == sorted(chosen) and set(chosen) <= set(range(5))
    assert chosen == pool_anchors(model, SAMPLES, 3, seed=0, max_batch_tokens=1000)
    with pytest.raises(ConfigError, match="9 clusters of 5 rows"):
        pool_anchors(model, SAMPLES, 9, seed=0, max_batch_tokens=60)


def test_a_row_that_fits_before_no_anchor_says_so(base_folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = _model(base_folder)
    anchors = _anchors(model)
    monkeypatch.setenv("ROSE_RAY_FAILPOINT", "out_of_memory:31")
    found = demonstration_scores(model, SAMPLES, anchors, max_batch_tokens=60)
    assert found.rejected.keys() == {3} and np.isnan(found.values_NU[3]).all()
    assert found.rejected[3][0] == "out_of_memory" and found.rejected[3][1].endswith("before anchor 3 of 3")
    assert np.isfinite(found.values_NU[[0, 1, 2, 4]]).all()


def test_anchors_that_cannot_be_used_are_named(base_folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = _model(base_folder)
    with pytest.raises(ModelError, match=r"2 of 3 anchors fill the 11 tokens .*\['second', 'third'\]"):
        _anchors(model, limit=11)
    with pytest.raises(DataError, match="no anchor"):
        prepare_anchors(model, [], [], limit=9, bos_token_id=BOS, max_batch_tokens=60)
    monkeypatch.setattr(model, "sample_values", lambda batch, reduction: torch.full((batch.num_samples,), torch.nan))
    with pytest.raises(DataError, match="first: non_finite_loss: nan under the model"):
        _anchors(model)
