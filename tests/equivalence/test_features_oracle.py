"""The whole path of a sample, against one row at a time: autograd, Adam's formula, an explicit projection matrix."""

from __future__ import annotations

from typing import Any, get_args

import numpy as np
import pyarrow as pa
import pytest
import torch

from rose_ray.config.gradients import AdamMode
from rose_ray.config.model import LoraConfig, ModelConfig
from rose_ray.data.conversation import Conversation, Message, canonical_json
from rose_ray.distributed.engine import load_scoring_model
from rose_ray.kernels.deflated import DeflatedProjection
from rose_ray.kernels.projection import make_projection
from rose_ray.model.checkpoint import Checkpoint, OptimizerState
from rose_ray.model.layout import layout_of
from rose_ray.model.tokenizer import load_tokeniser
from rose_ray.stages.directions import DirectionSettings
from rose_ray.stages.features import shard_features
from rose_ray.stages.tokens import read_samples, tokenize_shard
from tests import oracles
from tests.unit.kernels.projection_oracles import slow_factored

FLOAT32_ENTRY = 3e-7
"""Features are stored as float32 entries of at most 1 in size: half a unit in the last place is 6e-8; float32 sums of
a projected entry add a few of them."""

FLOAT64_RELATIVE = 1e-9
"""Lengths are float64 throughout. Entries with a tiny second moment magnify the gradient's rounding in Gamma."""

FLOAT32_RELATIVE = 2e-7
"""Losses and momentum shares are stored as float32: 6e-8 of rounding."""

FLOAT16_ENTRY = 5e-4
"""Half a unit in the last place of a float16 number of at most 1."""

BFLOAT16_DIRECTION = 0.25
"""Of a unit direction, all of the model in bfloat16: 2**-9 a rounding, some twenty in a row, so 0.03 without Adam; made
moments with tiny entries magnify single numbers (0.14 at most here)."""

BFLOAT16_COSINE = 0.1
"""Of two such directions' product and of lengths: errors hardly point along another direction (0.06 at most here)."""

LORA = LoraConfig(rank=4, alpha=8.0, target_modules=["q_proj", "v_proj"])
STATES = [
    OptimizerState(7, 1e-3, 0.9, 0.999, 1e-8, 1.0, 1),
    OptimizerState(14, 5e-4, 0.85, 0.98, 1e-6, 1.0, 2),
]
PROJECTIONS: list[tuple[Any, int, int]] = [("none", 1, 0), ("rademacher", 70, 3), ("sketch", 64, 5)]


@pytest.fixture(scope="module")
def oracle_model(base_folder: str) -> torch.nn.Module:
    return oracles.peft_model(base_folder, **oracles.lora_settings(LORA), dtype=torch.float64)


@pytest.fixture(scope="module")
def checkpoints(oracle_model: torch.nn.Module) -> list[Checkpoint]:
    return [
        Checkpoint(f"checkpoint-{seed}", oracles.random_adapter(oracle_model, seed), *moments, state)
        for seed, state in enumerate(STATES, start=1)
        for moments in [oracles.random_moments(oracle_model, 10 + seed)]
    ]


@pytest.fixture(scope="module")
def tokens(base_folder: str, pool_rows: list[dict[str, Any]]) -> pa.Table:
    conversations = [
        canonical_json(Conversation(tuple(Message(turn["role"], turn["content"]) for turn in row["messages"])))
        for row in pool_rows
    ]
    shard = pa.table({"row_id": [row["id"] for row in pool_rows], "conversation": conversations})
    samples, rejected = tokenize_shard(shard, load_tokeniser(ModelConfig(base=base_folder)))
    assert rejected.num_rows == 0
    return samples


@pytest.fixture(scope="module")
def gradients(
    oracle_model: torch.nn.Module, checkpoints: list[Checkpoint], tokens: pa.Table
) -> list[list[tuple[float, torch.Tensor]]]:
    """Loss and flat gradient of every row at every checkpoint."""
    results = []
    for checkpoint in checkpoints:
        oracles.set_adapter(oracle_model, checkpoint.adapter)
        rows = [oracles.gradient(oracle_model, (s.input_ids, s.loss_mask), "mean_loss") for s in read_samples(tokens)]
        results.append([(loss.item(), oracles.flat(named)) for loss, named in rows])
    return results


def _features(
    base: str,
    tokens: pa.Table,
    checkpoints: list[Checkpoint],
    mode: AdamMode,
    projection: tuple[Any, int, int],
    *,
    deflated: bool = False,
    bfloat16: bool = False,
) -> list[pa.Table]:
    settings = ModelConfig(base=base, dtype="bfloat16" if bfloat16 else "float32", loader="plain")
    model = load_scoring_model(settings, LORA, device="cpu", dtype=None if bfloat16 else torch.float64)
    layout = layout_of(model.module)
    shapes = [(shape[0], shape[1]) for _, shape in layout.shapes]
    one: Any = make_projection(*projection, layout.num_parameters, shapes=shapes)
    each = [DeflatedProjection(one, _moments(c)[0]) if deflated else one for c in checkpoints]
    directions = DirectionSettings(mode, "float32", max_batch_tokens=200)
    features = shard_features(model, tokens, checkpoints, layout, [each], directions)
    assert features.rejected.num_rows == 0
    return features.tables[0]


def _matrix(table: pa.Table) -> np.ndarray:
    columns = [name for name in ("feature", "exact") if name in table.column_names]
    return np.hstack([np.array(table[name].to_pylist(), dtype=np.float64) for name in columns])


@pytest.mark.parametrize("mode", get_args(AdamMode))
def test_features_are_those_of_the_slow_path(
    mode: AdamMode, base_folder: str, tokens: pa.Table, checkpoints: list[Checkpoint], gradients: Any
) -> None:
    matrices = [oracles.projection_matrix(*projection, len(gradients[0][0][1])) for projection in PROJECTIONS]
    directions = [
        [_direction(mode, gradient, checkpoint) for _, gradient in rows]
        for checkpoint, rows in zip(checkpoints, gradients, strict=True)
    ]
    for projection, matrix in zip(PROJECTIONS, matrices, strict=True):
        tables = _features(base_folder, tokens, checkpoints, mode, projection)
        for table, rows, gammas, checkpoint in zip(tables, gradients, directions, checkpoints, strict=True):
            assert table["row_id"].to_pylist() == tokens["row_id"].to_pylist()
            norms = np.array([gamma.norm().item() for gamma in gammas])
            np.testing.assert_allclose(table["norm"].to_numpy(), norms, rtol=FLOAT64_RELATIVE)
            expected = np.stack([matrix @ (gamma / gamma.norm()).numpy() for gamma in gammas])
            np.testing.assert_allclose(_matrix(table), expected, rtol=0, atol=FLOAT32_ENTRY)
            losses = np.array([loss for loss, _ in rows])
            np.testing.assert_allclose(table["loss"].to_numpy(), losses, rtol=FLOAT32_RELATIVE)
            shares = [_share(mode, gradient, checkpoint) for _, gradient in rows]
            np.testing.assert_allclose(table["momentum_share"].to_numpy(), shares, rtol=FLOAT32_RELATIVE)


@pytest.mark.parametrize("kind", ["sketch", "factored"])
@pytest.mark.parametrize("deflated", [False, True])
def test_features_of_the_default_projection_and_of_the_factored_one(
    kind: Any,
    deflated: bool,
    base_folder: str,
    oracle_model: torch.nn.Module,
    tokens: pa.Table,
    checkpoints: list[Checkpoint],
    gradients: Any,
) -> None:
    shapes = [(shape[0], shape[1]) for _, shape in layout_of(oracle_model).shapes]
    dim, seed, num_parameters = 60, 5, len(gradients[0][0][1])
    if kind == "factored":
        matrix = slow_factored(dim, seed, shapes).numpy()
    else:
        matrix = oracles.projection_matrix(kind, dim, seed, num_parameters)
    tables = _features(base_folder, tokens, checkpoints, "torch", (kind, dim, seed), deflated=deflated)
    for table, rows, checkpoint in zip(tables, gradients, checkpoints, strict=True):
        own = matrix
        if deflated:
            common = _moments(checkpoint)[0].double().numpy()
            unit = common / np.linalg.norm(common)
            own = np.vstack([matrix - np.outer(matrix @ unit, unit), unit])
        gammas = [_direction("torch", gradient, checkpoint) for _, gradient in rows]
        expected = np.stack([own @ (gamma / gamma.norm()).numpy() for gamma in gammas])
        np.testing.assert_allclose(_matrix(table), expected, rtol=0, atol=FLOAT32_ENTRY)


@pytest.mark.parametrize("mode", ["torch", "sgd"])
def test_a_bfloat16_model_keeps_directions_and_cosines(
    mode: AdamMode, base_folder: str, tokens: pa.Table, checkpoints: list[Checkpoint], gradients: Any
) -> None:
    tables = _features(base_folder, tokens, checkpoints, mode, ("none", 1, 0), bfloat16=True)
    for table, rows, checkpoint in zip(tables, gradients, checkpoints, strict=True):
        gammas = [_direction(mode, gradient, checkpoint) for _, gradient in rows]
        expected = np.stack([(gamma / gamma.norm()).numpy() for gamma in gammas])
        found = _matrix(table)
        assert np.linalg.norm(found - expected, axis=1).max() < BFLOAT16_DIRECTION
        assert np.abs(found @ found.T - expected @ expected.T).max() < BFLOAT16_COSINE
        np.testing.assert_allclose(table["norm"].to_numpy(), [gamma.norm() for gamma in gammas], rtol=BFLOAT16_COSINE)


def test_torch_mode_is_the_step_of_the_real_optimizer(
    base_folder: str, tokens: pa.Table, checkpoints: list[Checkpoint], gradients: Any
) -> None:
    tables = _features(base_folder, tokens, checkpoints, "torch", ("none", 1, 0))
    for table, rows, checkpoint in zip(tables, gradients, checkpoints, strict=True):
        vectors = _matrix(table) * table["norm"].to_numpy()[:, None]
        for vector, (_, gradient) in zip(vectors, rows, strict=True):
            step = -oracles.adam_step(gradient, *_moments(checkpoint), **_constants(checkpoint)).numpy()
            np.testing.assert_allclose(vector, step, rtol=0, atol=FLOAT32_ENTRY * np.linalg.norm(step))


def test_token_counts_and_half_precision_storage(
    base_folder: str, tokens: pa.Table, checkpoints: list[Checkpoint]
) -> None:
    model = load_scoring_model(
        ModelConfig(base=base_folder, dtype="float32", loader="plain"), LORA, device="cpu", dtype=torch.float64
    )
    layout = layout_of(model.module)
    projection = make_projection("sketch", 64, 5, layout.num_parameters)
    tables = [
        shard_features(
            model,
            tokens,
            checkpoints,
            layout,
            [[projection] * len(checkpoints)],
            DirectionSettings("torch", stored, 200),
        ).tables[0][0]
        for stored in ("float32", "float16")
    ]
    assert tables[1].schema.field("feature").type == pa.list_(pa.float16(), 64)
    np.testing.assert_allclose(_matrix(tables[1]), _matrix(tables[0]), rtol=0, atol=FLOAT16_ENTRY)
    for table in tables:
        samples = read_samples(tokens)
        assert table["num_tokens"].to_pylist() == [len(s.input_ids) for s in samples]
        assert table["num_labelled_tokens"].to_pylist() == [sum(s.loss_mask) for s in samples]


def _moments(checkpoint: Checkpoint) -> tuple[torch.Tensor, torch.Tensor]:
    assert checkpoint.exp_avg is not None and checkpoint.exp_avg_sq is not None
    return oracles.flat(checkpoint.exp_avg), oracles.flat(checkpoint.exp_avg_sq)


def _constants(checkpoint: Checkpoint) -> dict[str, Any]:
    state = checkpoint.state
    assert state is not None
    return {
        "num_updates": state.num_updates,
        "beta1": state.adam_beta1,
        "beta2": state.adam_beta2,
        "eps": state.adam_eps,
    }


def _direction(mode: str, gradient: torch.Tensor, checkpoint: Checkpoint) -> torch.Tensor:
    return oracles.adam_direction(mode, gradient, *_moments(checkpoint), **_constants(checkpoint))


def _share(mode: str, gradient: torch.Tensor, checkpoint: Checkpoint) -> float:
    if mode in ("sgd", "v_only"):
        return 0.0
    beta1 = 0.9 if mode == "less_code" else _constants(checkpoint)["beta1"]
    return oracles.momentum_share(gradient, _moments(checkpoint)[0], beta1)
