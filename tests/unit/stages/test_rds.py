"""Embeddings and their cosines, against transformers one sequence at a time; and forwards under a bound of memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rose_ray.config.model import LoraConfig, ModelConfig
from rose_ray.data.tokenize import Sample
from rose_ray.errors import ModelError, PairError
from rose_ray.kernels.pooling import Pooling
from rose_ray.model.base import attach_adapter, load_base
from rose_ray.model.batch import pad_batch
from rose_ray.model.hidden import pooled_states
from rose_ray.model.scoring import ScoringModel
from rose_ray.stages.forwards import sample_logps, unit_embeddings
from rose_ray.stages.rds import embedding_cosines, query_embeddings
from tests import oracles
from tests.tiny import ARCHITECTURES, make_samples

LORA = LoraConfig(rank=2, alpha=4.0, target_modules=["q_proj"])
SAMPLES = make_samples((9, 14, 6, 3, 14), 330)
QUERIES = make_samples((8, 11), 330, seed=1)
PAIR_IDS = ["pair-0", "pair-1"]
FLOAT64 = 1e-12
"""Cosines of 32 numbers made of two layers in float64."""
BATCHES = 1e-5
"""The stated bound in float32: matrix products of other shapes add up in another order, two layers deep."""


def _model(base: str, dtype: str = "float64") -> ScoringModel:
    module = attach_adapter(load_base(ModelConfig(base=base), dtype=getattr(torch, dtype)), LORA, dropout=0)
    model = ScoringModel(module, "cpu")
    model.load_adapter(oracles.random_adapter(model.module, 3))  # must not show: embeddings are the base's
    return model


def _oracle_embedding(base: Any, sample: Sample, pooling: Pooling) -> Tensor:
    states = base(input_ids=torch.tensor([sample.input_ids]), output_hidden_states=True).hidden_states[-1][0]
    if pooling == "last_token":
        return states[-1]
    size = len(sample.input_ids)
    total = size * (size + 1) / 2
    return sum((place + 1) / total * states[place] for place in range(size))  # type: ignore[return-value]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("pooling", ["position_weighted", "last_token"])
def test_cosines_are_those_of_the_base_model_s_last_states(base_of: Any, architecture: str, pooling: Pooling) -> None:
    model = _model(base_of(architecture))
    queries = query_embeddings(model, QUERIES, PAIR_IDS, pooling, max_batch_tokens=30)
    found = embedding_cosines(model, SAMPLES, queries, pooling, max_batch_tokens=30)
    base = load_base(ModelConfig(base=base_of(architecture)), dtype=torch.float64)
    with torch.no_grad():
        rows = [_oracle_embedding(base, sample, pooling) for sample in SAMPLES]
        targets = [_oracle_embedding(base, query, pooling) for query in QUERIES]
    expected = [[oracles.cosine(row, target) for target in targets] for row in rows]
    np.testing.assert_allclose(found.values_NU, expected, rtol=0, atol=FLOAT64)
    assert not found.rejected


def test_a_batch_of_one_is_a_batch_of_many(base_folder: str) -> None:
    model = _model(base_folder, "float32")
    found = []
    for bound in (1, 30, 1000):
        queries = query_embeddings(model, QUERIES, PAIR_IDS, "position_weighted", max_batch_tokens=bound)
        found.append(embedding_cosines(model, SAMPLES, queries, "position_weighted", max_batch_tokens=bound).values_NU)
    np.testing.assert_allclose(found[1], found[0], rtol=0, atol=BATCHES)
    np.testing.assert_allclose(found[2], found[0], rtol=0, atol=BATCHES)


def test_a_row_as_the_pair_has_cosine_one(base_folder: str) -> None:
    model = _model(base_folder)
    queries = query_embeddings(model, QUERIES, PAIR_IDS, "position_weighted", max_batch_tokens=30)
    found = embedding_cosines(model, [QUERIES[1]], queries, "position_weighted", max_batch_tokens=30)
    assert found.values_NU[0, 1] == pytest.approx(1, abs=FLOAT64) and found.values_NU[0, 0] < 0.999


def test_the_head_comes_back_and_makes_no_logits(base_folder: str) -> None:
    model = _model(base_folder)
    batch = pad_batch(SAMPLES)
    with torch.no_grad():
        before = model.sample_values(batch, "sum_logps")
        calls: list[int] = []
        head = model.module.get_output_embeddings()  # type: ignore[operator]
        hook = head.register_forward_hook(lambda module, inputs, output: calls.append(output.shape[-1]))
        pooled_states(model, batch, "last_token")
        hook.remove()
        assert calls == [1] and torch.equal(model.sample_values(batch, "sum_logps"), before)


def test_models_without_an_output_layer_are_refused(base_folder: str) -> None:
    model = _model(base_folder)
    model.module.get_base_model().get_output_embeddings = lambda: None  # type: ignore[operator, method-assign]
    with pytest.raises(ModelError, match="no output layer"):
        pooled_states(model, pad_batch(SAMPLES), "last_token")


def test_rows_that_do_not_fit_alone_are_rejected_and_others_keep_their_values(
    base_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = _model(base_folder)
    whole = sample_logps(model, SAMPLES, "mean_loss", max_batch_tokens=100)
    monkeypatch.setenv("ROSE_RAY_FAILPOINT", "out_of_memory:10")
    found = sample_logps(model, SAMPLES, "mean_loss", max_batch_tokens=100)
    assert {place: reason for place, (reason, _) in found.rejected.items()} == dict.fromkeys((1, 4), "out_of_memory")
    assert found.rejected[1][1].startswith("14 tokens alone: ")
    assert np.isnan(found.values_NU[[1, 4]]).all()
    np.testing.assert_allclose(found.values_NU[[0, 2, 3]], whole.values_NU[[0, 2, 3]], rtol=FLOAT64)


def test_nan_and_zero_states_have_reasons(base_folder: str) -> None:
    base = load_base(ModelConfig(base=base_folder, dtype="float32"))
    model = ScoringModel(attach_adapter(base, LORA, dropout=0), "cpu")
    poison = next(t for t in range(5, 330) if all(t not in sample.input_ids for sample in SAMPLES))
    with torch.no_grad():
        base.get_input_embeddings().weight[poison] = float("nan")  # type: ignore[operator]
    bad = Sample([7, poison, 8], [False, True, True])
    found = unit_embeddings(model, [SAMPLES[0], bad], "position_weighted", max_batch_tokens=100)
    assert {place: reason for place, (reason, _) in found.rejected.items()} == {1: "non_finite_embedding"}
    assert np.linalg.norm(found.values_NU[0]) == pytest.approx(1, abs=1e-6)  # float32
    losses = sample_logps(model, [SAMPLES[0], bad], "mean_loss", max_batch_tokens=100)
    assert losses.rejected == {1: ("non_finite_loss", "nan under the model")}
    with pytest.raises(PairError, match="bad-pair: non_finite_embedding"):
        query_embeddings(model, [bad], ["bad-pair"], "last_token", max_batch_tokens=100)
    with torch.no_grad():
        base.get_submodule("model.norm").weight.zero_()  # type: ignore[operator, union-attr]
    found = unit_embeddings(model, SAMPLES[:1], "position_weighted", max_batch_tokens=100)
    assert found.rejected == {0: ("zero_embedding", "all hidden states are zero")}
