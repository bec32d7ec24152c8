"""Whoever holds the parameters, per-sample gradients are those of autograd: ZeRO 0 and 3, one and two ranks."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from rose_ray.config.model import DeepSpeedConfig, LoraConfig, ModelConfig
from tests import oracles
from tests.equivalence.ranks import run_ranks
from tests.tiny import make_samples, save_base, tiny_config

pytestmark = pytest.mark.slow

FLOAT64 = 1e-12
"""Of a sample's gradient length: DeepSpeed gathers the very same float64 weights, so only the order of sums differs."""

FLOAT32 = 2e-5
"""The same in float32 (6e-8), over sums of a few hundred products."""

BFLOAT16 = 0.1
"""The same with base and adapter in bfloat16 (4e-3 a rounding), through some twenty operations."""

BOUNDS = {torch.float64: FLOAT64, torch.float32: FLOAT32, torch.bfloat16: BFLOAT16}
ARCHITECTURES = ("llama", "qwen2", "mistral")
ALTERED = "granite"
"""Its logits are not what its head returns."""
LORA = LoraConfig(rank=4, alpha=8.0, target_modules=["q_proj", "v_proj", "down_proj"])
SAMPLES = make_samples((19, 6, 26, 11, 5, 14), 330)
BATCHES = [SAMPLES[:2], SAMPLES[2:3], SAMPLES[3:5], SAMPLES[5:]]

WIDE = {"hidden_size": 160, "intermediate_size": 640, "head_dim": 40}
"""Matrices of 100,000 entries and more: smaller ones DeepSpeed keeps whole on every rank under ZeRO 3."""

NUM_WIDE_MATRICES = 6
"""Gate, up and down projection of two layers."""

CASES: list[dict[str, Any]] = [
    *(
        {"architecture": architecture, "zero_stage": stage, "checkpointing": checkpointing}
        for architecture in ARCHITECTURES
        for stage in (0, 3)
        for checkpointing in (False, True)
    ),
    *({"architecture": ALTERED, "zero_stage": stage} for stage in (0, 3)),
    {"architecture": "llama", "zero_stage": 3, "offload": "cpu"},
    {"architecture": "llama", "zero_stage": 3, "offload": "cpu", "dtype": torch.float32},
    {"architecture": "llama", "zero_stage": 0, "dtype": torch.float32},
    *({"architecture": architecture, "zero_stage": 3, "dtype": torch.float32} for architecture in ARCHITECTURES),
    {"architecture": "llama", "zero_stage": 0, "dtype": torch.bfloat16},
    {"architecture": "llama", "zero_stage": 3, "dtype": torch.bfloat16},
]

"""What one rank runs."""

SHARED_CASES: list[dict[str, Any]] = [
    {"architecture": "llama", "zero_stage": 0},
    *({"architecture": architecture, "zero_stage": 3} for architecture in ARCHITECTURES),
    *({"architecture": architecture, "zero_stage": 3, "dtype": torch.float32} for architecture in ARCHITECTURES),
    {"architecture": ALTERED, "zero_stage": 3},
    {"architecture": "llama", "zero_stage": 3, "checkpointing": True},
    {"architecture": "llama", "zero_stage": 3, "dtype": torch.bfloat16},
]
"""What two ranks run together; every step of theirs waits for the other, so they are few."""


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("wide")
    return {
        name: save_base(folder / name, tiny_config(name, len(tokenizer), **WIDE), tokenizer)
        for name in (*ARCHITECTURES, ALTERED)
    }


@pytest.fixture(scope="module")
def expected(bases: dict[str, str]) -> dict[str, dict[str, Any]]:
    """By architecture: two adapters, the oracle's values and gradients under the second, and values without any."""
    results = {}
    for architecture, base in bases.items():
        model = oracles.peft_model(base, **oracles.lora_settings(LORA), dtype=torch.float64)
        adapters = [oracles.random_adapter(model, seed=seed, scale=0.1) for seed in (5, 6)]
        oracles.set_adapter(model, adapters[1])
        pairs = [oracles.gradient(model, (s.input_ids, s.loss_mask), "mean_loss") for s in SAMPLES]
        values, grads = zip(*pairs, strict=True)
        rows = torch.stack([oracles.flat(named) for named in grads]).numpy()
        oracles.set_adapter(model, {name: torch.zeros_like(weight) for name, weight in adapters[0].items()})
        references = [oracles.sum_logps(model, (s.input_ids, s.loss_mask)).item() for s in SAMPLES]
        results[architecture] = {
            "adapters": adapters,
            "values": torch.stack(values).numpy(),
            "grads": rows,
            "references": np.array(references),
        }
    return results


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_gradients_do_not_depend_on_who_holds_the_parameters(
    num_ranks: int, bases: dict[str, str], expected: dict[str, Any], tmp_path: Path
) -> None:
    own_cases = CASES if num_ranks == 1 else SHARED_CASES
    cases = [
        (
            _config(bases[case["architecture"]], case),
            LORA,
            expected[case["architecture"]]["adapters"],
            case.get("dtype"),
        )
        for case in own_cases
    ]
    by_rank = run_ranks("scoring_gradients", num_ranks, tmp_path, cases=cases, batches=BATCHES)
    for number, case in enumerate(own_cases):
        parts = [results[number] for results in by_rank]
        oracle = expected[case["architecture"]]
        bound = BOUNDS[case.get("dtype", torch.float64)]
        for key in ("values", "references"):
            np.testing.assert_allclose(_merged(parts, key), oracle[key], rtol=bound, err_msg=f"{key} of {case}")
        errors = np.linalg.norm(_merged(parts, "grads") - oracle["grads"], axis=1)
        assert (errors < bound * np.linalg.norm(oracle["grads"], axis=1)).all(), case
        assert [part["calls"] for part in parts] == num_ranks * [1 + case.get("checkpointing", False)], case
        for part in parts:  # that the large matrices are gathered on demand is what makes this a test of stage 3
            assert part["away"] >= NUM_WIDE_MATRICES if case["zero_stage"] == 3 else part["away"] == 0, case


def test_no_rank_ever_holds_a_whole_base_and_wrong_weights_are_found(bases: dict[str, str], tmp_path: Path) -> None:
    others = {}
    for name, change in (("altered", _alter_last), ("renamed", _rename_all)):
        others[name] = shutil.copytree(bases["llama"], tmp_path / name)
        path = others[name] / "model.safetensors"
        tensors = load_file(path)
        save_file(change(tensors), path, metadata={"format": "pt"})
    settings = {name: _config(str(folder), {"zero_stage": 3}) for name, folder in others.items()}
    own = _config(bases["llama"], {"zero_stage": 3})
    for found in run_ranks("load_in_parts", 2, tmp_path, model=own, others=list(settings.values())):
        assert found["held"] <= found["whole"] / 2 * 1.01  # halves of odd sizes are rounded up
        assert found["same_linear"]
        altered, renamed = found["said"]
        assert "loaded in parts, differs from" in altered and "model.safetensors" in altered
        assert "none of its" in renamed and "has the name of a parameter" in renamed


def _alter_last(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor + (name == "lm_head.weight") * 1e-3 for name, tensor in tensors.items()}


def _rename_all(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"other.{name}": tensor for name, tensor in tensors.items()}


def _config(base: str, case: dict[str, Any]) -> ModelConfig:
    return ModelConfig(
        base=base,
        dtype="bfloat16" if case.get("dtype") == torch.bfloat16 else "float32",
        gradient_checkpointing=case.get("checkpointing", False),
        deepspeed=DeepSpeedConfig(zero_stage=case["zero_stage"], offload_parameters=case.get("offload", "none")),
    )


def _merged(parts: list[dict[str, Any]], key: str) -> np.ndarray:
    """What the ranks found, in the order of the samples."""
    batches = {number: array for part in parts for number, array in part[key].items()}
    return np.concatenate([batches[number] for number in range(len(BATCHES))])
