"""A base held in NF4 is a base whose linear weights are rounded to NF4: same gradients, same warm-up."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rose_ray.config.model import DeepSpeedConfig, LoraConfig, ModelConfig
from rose_ray.config.warmup import WarmupConfig
from rose_ray.distributed.engine import load_scoring_model
from rose_ray.distributed.training import WarmupJob
from rose_ray.filesystem import locate
from rose_ray.model.base import attach_adapter, load_base
from rose_ray.model.batch import pad_batch
from rose_ray.model.checkpoint import read_checkpoint
from rose_ray.model.layout import ParameterLayout, layout_of
from rose_ray.model.scoring import ScoringModel
from rose_ray.schemas import TOKENS
from rose_ray.stores.workspace import Workspace
from tests import oracles
from tests.equivalence.ranks import run_ranks
from tests.tiny import make_samples

FLOAT32 = 2e-5
"""Of a sample's gradient length: float32 rounding (6e-8) with sums of up to 40 tokens, and softmax over 330 logits."""

MOMENTS_FLOAT32 = 1e-3
"""The same for Adam's moments, after steps whose own rounding went into the gradients that follow."""

STEPS_APART = 0.01
"""Largest distance of an adapter weight, in units of the peak learning rate: Adam divides small gradients, which agree
to float32 rounding, by roots as small."""

BFLOAT16 = 0.1
"""Of a sample's gradient length, with a bfloat16 base (4e-3) through some twenty operations."""

LOSS_APART = 0.5
"""Of the unquantised loss, nats. Rounding moves a weight by up to 14 % of its block's largest, here with weights drawn
ten times as wide as usual, and losses near 7."""

CODES = (
    *(-1.0, -0.6961928, -0.52507305, -0.39491749, -0.28444138, -0.18477343, -0.09105004, 0.0),
    *(0.07958029, 0.16093020, 0.24611230, 0.33791524, 0.44070983, 0.56261700, 0.72295684, 1.0),
)
"""The 16 values of NF4: QLoRA (arXiv:2305.14314), appendix E."""

BLOCK = 64

LORA = LoraConfig(rank=4, alpha=8.0, dropout=0.0, target_modules=["q_proj", "v_proj", "o_proj", "up_proj"])
SAMPLES = make_samples((31, 6, 40, 17, 5, 24), 330)
BATCHES = [SAMPLES[:2], SAMPLES[2:3], SAMPLES[3:5], SAMPLES[5:]]
PROBE = list(range(40, 60))
NUM_WORKERS = 2


def nf4_rounded(weight: Tensor) -> Tensor:
    """Each block of 64 numbers, divided by its largest, at the nearest of the 16 values."""
    codes, flat = torch.tensor(CODES), weight.flatten()
    blocks = []
    for start in range(0, len(flat), BLOCK):
        block = flat[start : start + BLOCK]
        largest = block.abs().max()
        nearest = ((block / largest)[:, None] - codes).abs().argmin(1)
        blocks.append(codes[nearest] * largest)
    return torch.cat(blocks).reshape(weight.shape)


@pytest.fixture(scope="module")
def rounded_of(wide_base_of: Callable[[str], str], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Folder of a base whose linear layers, but for the head, are rounded to NF4 from a given type."""

    def make(architecture: str, dtype: torch.dtype = torch.float32) -> str:
        folder = Path(shutil.copytree(wide_base_of(architecture), tmp_path_factory.mktemp("rounded") / architecture))
        file = folder / "model.safetensors"
        weights = {
            name: nf4_rounded(tensor.to(dtype).float()) if name.endswith("_proj.weight") else tensor
            for name, tensor in load_file(file).items()
        }
        save_file(weights, file, metadata={"format": "pt"})
        return str(folder)

    return make


def _config(base: str, quantized: str = "nf4", **settings: Any) -> ModelConfig:
    return ModelConfig(base=base, quantized=quantized, **{"dtype": "float32", "loader": "plain", **settings})  # type: ignore[arg-type]


def _gradients(model: ScoringModel, adapter: oracles.Named) -> tuple[Tensor, Tensor, Tensor]:
    """Values, gradients [N, P], and values without the adapter, which are asked for first."""
    model.load_adapter(adapter)
    batch = pad_batch(SAMPLES)
    with torch.no_grad(), model.without_adapter():
        references = model.sample_values(batch, "sum_logps")
    kept, consume = oracles.collect(list(layout_of(model.module).offsets))
    values = model.backward_per_sample(batch, "mean_loss", consume)
    return values.double(), oracles.rows_of(kept), references.double()


def _one_by_one(base: str, adapter: oracles.Named) -> tuple[Tensor, Tensor, Tensor]:
    model = oracles.peft_model(base, **oracles.lora_settings(LORA), dtype=torch.float64)
    oracles.set_adapter(model, adapter)
    samples = [(s.input_ids, s.loss_mask) for s in SAMPLES]
    values, grads = zip(*(oracles.gradient(model, sample, "mean_loss") for sample in samples), strict=True)
    oracles.set_adapter(model, {name: torch.zeros_like(weight) for name, weight in adapter.items()})
    references = torch.stack([oracles.sum_logps(model, sample).detach() for sample in samples])
    return torch.stack(values), torch.stack([oracles.flat(named) for named in grads]), references


def _error(found: Tensor, expected: Tensor) -> float:
    return float(((found - expected).norm(dim=1) / expected.norm(dim=1)).max())


@pytest.fixture(scope="module")
def adapter(wide_base: str) -> oracles.Named:
    model = oracles.peft_model(wide_base, **oracles.lora_settings(LORA), dtype=torch.float64)
    return oracles.random_adapter(model, seed=3)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_gradients_are_those_of_the_rounded_base(
    architecture: str,
    checkpointing: bool,
    wide_base_of: Callable[[str], str],
    rounded_of: Callable[..., str],
    adapter: oracles.Named,
) -> None:
    base = wide_base_of(architecture)
    expected_values, expected, expected_references = _one_by_one(rounded_of(architecture), adapter)
    model = load_scoring_model(_config(base, gradient_checkpointing=checkpointing), LORA, device="cpu")
    values, grads, references = _gradients(model, adapter)
    torch.testing.assert_close(values, expected_values, rtol=FLOAT32, atol=0)
    torch.testing.assert_close(references, expected_references, rtol=FLOAT32, atol=0)
    assert _error(grads, expected) < FLOAT32
    whole = _one_by_one(base, adapter)[0]
    assert 0.01 < (values - whole).abs().max() < LOSS_APART


def test_gradients_are_those_of_autograd_on_the_same_model(wide_base: str, adapter: oracles.Named) -> None:
    model = load_scoring_model(_config(wide_base), LORA, device="cpu")
    values, grads, _ = _gradients(model, adapter)
    trained = attach_adapter(load_base(_config(wide_base)), LORA, dropout=0.0).eval()
    oracles.set_adapter(trained, adapter)
    pairs = [oracles.gradient(trained, (s.input_ids, s.loss_mask), "mean_loss") for s in SAMPLES]
    torch.testing.assert_close(values, torch.stack([value for value, _ in pairs]), rtol=FLOAT32, atol=0)
    assert _error(grads, torch.stack([oracles.flat(named) for _, named in pairs])) < FLOAT32


def test_a_bfloat16_base_computes_in_bfloat16(
    wide_base: str, rounded_of: Callable[..., str], adapter: oracles.Named
) -> None:
    model = load_scoring_model(_config(wide_base, dtype="bfloat16"), LORA, device="cpu")
    expected = _one_by_one(rounded_of("llama", torch.bfloat16), adapter)[1]
    assert _error(_gradients(model, adapter)[1], expected) < BFLOAT16
    layer: Any = model.module.get_submodule("base_model.model.model.layers.0.mlp.down_proj")
    assert layer.compute_dtype == torch.bfloat16


@pytest.mark.slow
def test_deepspeed_leaves_packed_weights_alone(
    wide_base: str, rounded_of: Callable[..., str], adapter: oracles.Named, tmp_path: Path
) -> None:
    held = {"loader": "deepspeed", "deepspeed": DeepSpeedConfig(zero_stage=0)}
    cases = [(_config(wide_base, **held), LORA, [adapter, adapter], torch.float32)]
    (results,) = run_ranks("scoring_gradients", 1, tmp_path, cases=cases, batches=BATCHES)
    merged = {
        key: torch.from_numpy(np.concatenate([results[0][key][n] for n in range(len(BATCHES))]))
        for key in ("values", "grads", "references")
    }
    values, grads, references = _one_by_one(rounded_of("llama"), adapter)
    torch.testing.assert_close(merged["values"].double(), values, rtol=FLOAT32, atol=0)
    torch.testing.assert_close(merged["references"].double(), references, rtol=FLOAT32, atol=0)
    assert _error(merged["grads"].double(), grads) < FLOAT32


@pytest.mark.slow
def test_the_warm_up_is_that_of_the_rounded_base(
    wide_base: str, rounded_of: Callable[..., str], tmp_path: Path
) -> None:
    import pyarrow as pa

    workspace = Workspace.open(str(tmp_path / "workspace"), create=True)
    rows = [{"row_id": f"row-{n}", **sample.__dict__} for n, sample in enumerate(SAMPLES)]
    samples_file = workspace.write_table("samples.parquet", pa.Table.from_pylist(rows, schema=TOKENS))
    rounded = rounded_of("llama")
    variants = {
        "rounded": (_config(rounded, "none"), 0),
        "zero 0": (_config(wide_base), 0),
        "zero 2": (_config(wide_base), 2),
        "zero 0, checkpointing": (_config(wide_base, gradient_checkpointing=True), 0),
    }
    settings: dict[str, Any] = {"epochs": 2, "learning_rate": 2e-3, "batch_size": 2, "max_batch_tokens": 64}
    jobs = [
        WarmupJob(
            workspace,
            name.replace(" ", "_"),
            samples_file,
            model,
            LORA,
            WarmupConfig(workers=NUM_WORKERS, zero_stage=stage, **settings),  # type: ignore[arg-type]
            "cpu",
            1,
        )
        for name, (model, stage) in variants.items()
    ]
    results = run_ranks("warm_up", NUM_WORKERS, tmp_path / "ranks", jobs=jobs, probe=PROBE)[0]
    layout = layout_of(attach_adapter(load_base(_config(rounded, "none"), device="meta"), LORA, dropout=0.0))
    expected, *found = [_trained(tmp_path, job, layout) for job in jobs]
    for parts, result in zip(found, results[1:], strict=True):
        distance = max(float((parts[0][key] - expected[0][key]).abs().max()) for key in layout.offsets)
        assert distance < STEPS_APART * settings["learning_rate"]
        for part, whole in zip(parts[1:], expected[1:], strict=True):
            one, other = oracles.flat(part, layout.offsets), oracles.flat(whole, layout.offsets)
            assert (one - other).norm() < MOMENTS_FLOAT32 * other.norm()
        losses, expected_losses = ([epoch["loss"] for epoch in r["epochs"]] for r in (result, results[0]))
        assert losses == pytest.approx(expected_losses, rel=FLOAT32)
        np.testing.assert_allclose(result["logits"], results[0]["logits"], rtol=0, atol=1e-3)


def _trained(folder: Path, job: WarmupJob, layout: ParameterLayout) -> list[oracles.Named]:
    """Adapter and moments of the last checkpoint."""
    checkpoint = read_checkpoint(locate(str(folder / "workspace" / job.folder / "checkpoint-2")), layout)
    assert checkpoint.exp_avg is not None and checkpoint.exp_avg_sq is not None
    return [checkpoint.adapter, checkpoint.exp_avg, checkpoint.exp_avg_sq]
