"""The reward step: measured on a tiny model against its gradients, and the comparison by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from rose_ray.config.model import LoraConfig, ModelConfig
from rose_ray.config.target import PairInput, TargetConfig
from rose_ray.data.conversation import Conversation, Message
from rose_ray.data.preferences import read_pairs
from rose_ray.data.tokenize import Sample
from rose_ray.errors import ModelError
from rose_ray.filesystem import locate
from rose_ray.kernels.objectives import bank_directions
from rose_ray.kernels.projection import NoProjection
from rose_ray.model.base import attach_adapter, load_base
from rose_ray.model.checkpoint import Checkpoint, OptimizerState
from rose_ray.model.layout import ParameterLayout, layout_of
from rose_ray.model.scoring import ScoringModel
from rose_ray.model.tokenizer import load_tokeniser
from rose_ray.schemas import TOKENS
from rose_ray.stages.bank import EncodedPair, encode_pairs, pair_gradients
from rose_ray.stages.diagnose.reward_step import (
    MeasuredSteps,
    StepSettings,
    compare_steps,
    measured_steps,
    reward_step_lines,
)
from rose_ray.stages.diagnose.stored import StoredBank, needed_bank
from rose_ray.stages.directions import DirectionSettings
from rose_ray.stages.features import shard_features
from rose_ray.stages.stored_features import stored_features
from tests.tiny import make_pool_rows, write_jsonl
from tests.unit.stages.diagnose.stored_job import pair_record, stored_job

LORA = LoraConfig(rank=2, alpha=4.0, target_modules=["q_proj", "v_proj"])
SETTINGS = StepSettings("torch", 512, share=0.01)

SLOPE_ERROR = 2e-3
"""On cosines of at most 1: the central difference errs by the square of the step, 1e-4 of the adapter's length, times
the third derivative; the largest error seen is 2e-4."""

LOGP_ERROR = 6e-5
"""Two float32 sums of some 200 nats, each off by a unit or two of its last place, 1.5e-5."""


@pytest.fixture(scope="module")
def model(base_folder: str) -> ScoringModel:
    config = ModelConfig(base=base_folder, dtype="float32", loader="plain")
    return ScoringModel(attach_adapter(load_base(config, device="cpu"), LORA, dropout=0.0), "cpu")


@pytest.fixture(scope="module")
def layout(model: ScoringModel) -> ParameterLayout:
    return layout_of(model.module)


@pytest.fixture(scope="module")
def checkpoint(layout: ParameterLayout) -> Checkpoint:
    """Weights and moments drawn at random, of the sizes that a short training leaves."""
    random = torch.Generator().manual_seed(0)

    def draw(scale: float) -> dict[str, torch.Tensor]:
        return {name: scale * torch.randn(shape, generator=random) for name, shape in layout.shapes}

    squares = {name: 1e-4 + tensor.square() for name, tensor in draw(0.03).items()}
    return Checkpoint("checkpoint-1", draw(0.1), draw(0.01), squares, OptimizerState(9, 1e-4, 0.9, 0.999, 1e-8, 1.0, 1))


@pytest.fixture(scope="module")
def inputs(base_folder: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Sample], list[EncodedPair]]:
    tokeniser = load_tokeniser(ModelConfig(base=base_folder))
    samples = [
        tokeniser.encode(Conversation(tuple(Message(turn["role"], turn["content"]) for turn in row["messages"])))
        for row in make_pool_rows(4, seed=3)
    ]
    file = write_jsonl(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", [pair_record(n) for n in range(3)])
    pairs = read_pairs([locate(str(file))], target="t")
    return samples, encode_pairs(pairs, tokeniser, TargetConfig(name="t", pairs=[PairInput(files=["f"])]))


def test_measured_slopes_are_inner_products_of_gradients(
    model: ScoringModel, layout: ParameterLayout, checkpoint: Checkpoint, inputs: tuple[list[Sample], list[EncodedPair]]
) -> None:
    samples, pairs = inputs
    found = measured_steps(model, samples, pairs, checkpoint, layout, SETTINGS)
    projection = NoProjection(layout.num_parameters)
    tokens = pa.Table.from_pylist([{"row_id": str(n), **s.__dict__} for n, s in enumerate(samples)], schema=TOKENS)
    made = DirectionSettings("torch", "float32", 512)
    (tables,) = shard_features(model, tokens, [checkpoint], layout, [[projection]], made).tables
    numbers = pair_gradients(model, pairs, checkpoint, layout, projection, max_batch_tokens=512).numbers()
    own = bank_directions("rose", numbers, dpo_beta=0.1, subtasks=["s"] * 3)
    influences_NV = stored_features(tables[0]).restored().astype(float) @ own.vectors_UD.T
    slopes_NV = (found.slopes_NV2[..., 0] - found.slopes_NV2[..., 1]) / own.exact_norms_U
    np.testing.assert_allclose(found.norms_N, tables[0]["norm"].to_numpy(), rtol=1e-5)  # float32 sums
    assert np.abs(influences_NV).max() > 20 * SLOPE_ERROR
    np.testing.assert_allclose(slopes_NV, influences_NV, atol=SLOPE_ERROR)
    # the own step, 1e-4 times Gamma, is shorter than the short one: its change is nearly its length times the slope
    assert found.learning_rate is not None and found.changes_NV2 is not None
    lengths_N11 = (found.learning_rate * found.norms_N)[:, None, None]
    np.testing.assert_allclose(found.changes_NV2, lengths_N11 * found.slopes_NV2, atol=LOGP_ERROR)
    assert np.abs(found.changes_NV2).max() > 20 * LOGP_ERROR
    for name, tensor in checkpoint.adapter.items():
        assert torch.equal(model.weights[name].cpu(), tensor)


def test_an_adapter_without_an_optimizers_state_has_no_step_of_its_own(
    model: ScoringModel,
    layout: ParameterLayout,
    checkpoint: Checkpoint,
    inputs: tuple[list[Sample], list[EncodedPair]],
    tmp_path: Path,
) -> None:
    bare = Checkpoint("checkpoint-1", checkpoint.adapter, None, None, None)
    found = measured_steps(model, *inputs, bare, layout, StepSettings("sgd", 512))
    assert found.learning_rate is None and found.changes_NV2 is None
    assert np.abs(found.slopes_NV2).max() > 0
    bank = bank_of(tmp_path)
    measured = [MeasuredSteps(np.ones(1), np.array([[[1.0, 0.0]]]), None, None, 0.01)] * 2
    report = compare_steps(bank, [0], ["r"], [np.array([[0.5, 0.1]])] * 2, [np.ones(1)] * 2, measured, 0.01)
    assert report.checkpoints[0].own_step is None
    lines = list(reward_step_lines(report))
    assert lines[-2].startswith("  checkpoint-1: no step of its own, for the adapter came without a learning rate")


def test_an_adapter_of_zeros_is_refused(
    model: ScoringModel, layout: ParameterLayout, checkpoint: Checkpoint, inputs: tuple[list[Sample], list[EncodedPair]]
) -> None:
    zeros = {name: torch.zeros_like(tensor) for name, tensor in checkpoint.adapter.items()}
    empty = Checkpoint("checkpoint-1", zeros, None, None, None)
    with pytest.raises(ModelError, match="checkpoint-1: its weights are all zero"):
        measured_steps(model, *inputs, empty, layout, SETTINGS)


def bank_of(folder: Path, **target: Any) -> StoredBank:
    """Two pairs whose gradients are (0, 0) and (3, 0), (0, 2) and (0, 0)."""
    job = stored_job(folder, [pair_record(n) for n in range(2)], **target)
    w_VD, l_VD = np.array([[0, 0], [0, 2.0]]), np.array([[3.0, 0], [0, 0]])
    job.add_bank(np.stack([w_VD] * 2), np.stack([l_VD] * 2), tokens=[(1, 1), (4, 2)])
    job.finish()
    return needed_bank(job.workspace, job.config, job.config.targets[0], job.pairs)


def steps(slopes: list[list[list[float]]], rate: float = 0.1) -> MeasuredSteps:
    slopes_NV2 = np.array(slopes)
    return MeasuredSteps(np.array([2.0, 4.0]), slopes_NV2, slopes_NV2 * 0.5, rate, 0.01)


def test_comparison_by_hand(tmp_path: Path) -> None:
    bank = bank_of(tmp_path)
    features_ND = np.array([[0.5, -0.5], [1.0, 0.2]])  # on directions (1, 0) and (0, -1): influences
    # margins along the step: |d| = 3 and 2 times the influences, but for the last
    slopes = [[[1.5, 0.0], [0.5, -0.5]], [[1.0, -2.0], [0.0, 0.0]]]
    report = compare_steps(
        bank, [0, 1], ["r", "q"], [features_ND] * 2, [np.array([2.0, 5.0])] * 2, [steps(slopes)] * 2, 0.01
    )
    first = report.checkpoints[0]
    influences = [0.5, 0.5, 1.0, -0.2]
    assert first.slope.pearson == pytest.approx(np.corrcoef(influences, [0.5, 0.5, 1.0, 0.0])[0, 1])
    assert first.largest_error == pytest.approx(0.2) and first.slope.spearman == pytest.approx(1.0)
    foretold = 0.1 * np.array([2 * 3 * 0.5, 2 * 2 * 0.5, 5 * 3 * 1.0, 5 * 2 * -0.2])
    changes = 0.5 * np.array([1.5, 1.0, 3.0, 0.0])
    own = first.own_step
    assert own is not None
    assert own.step.pearson == pytest.approx(np.corrcoef(foretold, changes)[0, 1])
    assert own.margin == own.step
    straight = 0.1 * np.array([2 * 1.5, 2 * 1.0, 5 * 3.0, 0.0])
    assert own.linear.pearson == pytest.approx(np.corrcoef(straight, changes)[0, 1])
    assert own.mean_foretold == pytest.approx(foretold.mean()) and own.mean_change == pytest.approx(changes.mean())
    assert own.raised == 1.0
    assert report.norms_agree == pytest.approx(1 / 5) and report.pair_ids == ("p0", "p1")
    lines = list(reward_step_lines(report))
    assert lines[0] == "target t, objective rose: 2 rows x 2 pairs, short step 0.01 of the adapter's length"
    assert sum(line.lstrip().startswith("checkpoint-1") for line in lines) == 2


def test_what_the_objective_asks_for_is_measured(tmp_path: Path) -> None:
    bank = bank_of(tmp_path, objective="rose_simpo")
    # simpo's direction of pair 1 is -(0, 2) / 4, of length 1/2: a slope of 4 x 0.5 of log p(w) is one of 0.5 a token
    features_ND = np.array([[0.0, -1.0], [0.0, 0.5]])
    slopes = [[[2.0, 9.0]], [[-1.0, 0.0]]]
    found = compare_steps(bank, [1], ["r", "q"], [features_ND] * 2, [np.ones(2)] * 2, [steps(slopes)] * 2, 0.01)
    slope = (np.array([2.0, -1.0]) / 4 - np.array([9.0, 0.0]) / 2) / 0.5
    assert found.checkpoints[0].largest_error == pytest.approx(np.abs(np.array([1.0, -0.5]) - slope).max())
    own = found.checkpoints[0].own_step
    assert own is not None and own.margin.pearson == pytest.approx(-1.0)
