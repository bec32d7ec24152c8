"""The bank against autograd and hand arithmetic, and its directions against the gradient of the DPO loss itself."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from rose_ray.config.model import LoraConfig, ModelConfig
from rose_ray.config.target import PairInput, TargetConfig
from rose_ray.data.preferences import read_pairs
from rose_ray.distributed.engine import load_scoring_model
from rose_ray.filesystem import locate
from rose_ray.kernels.projection import make_projection
from rose_ray.model.checkpoint import Checkpoint
from rose_ray.model.layout import layout_of
from rose_ray.model.tokenizer import load_tokeniser
from rose_ray.stages.bank import EncodedPair, encode_pairs, pair_gradients
from rose_ray.stages.score import target_directions
from tests import oracles
from tests.tiny import write_jsonl

FLOAT64_RELATIVE = 1e-11
"""Log-probabilities, lengths and inner products are float64 throughout."""

FLOAT32_RELATIVE = 5e-7
"""Gradients are stored as float32 (6e-8); a sketch adds some of them in that type."""

PARALLEL = 1e-12
"""Lack of a cosine from 1: the square of what float32 storage (6e-8) turns a vector by."""

LORA = LoraConfig(rank=4, alpha=8.0, target_modules=["q_proj", "v_proj"])
BETA = 0.3


@pytest.fixture(scope="module")
def encoded(
    base_folder: str, pair_rows: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> list[EncodedPair]:
    file = write_jsonl(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", pair_rows)
    pairs = read_pairs([locate(str(file))], target="t", subtask_field="topic")
    return encode_pairs(pairs, load_tokeniser(ModelConfig(base=base_folder)), _target())


@pytest.fixture(scope="module")
def oracle_model(base_folder: str) -> torch.nn.Module:
    model = oracles.peft_model(base_folder, **oracles.lora_settings(LORA), dtype=torch.float64)
    oracles.set_adapter(model, oracles.random_adapter(model, seed=8))
    return model


@pytest.fixture(scope="module")
def sides(oracle_model: torch.nn.Module, encoded: list[EncodedPair]) -> list[list[tuple[float, torch.Tensor]]]:
    """Summed log-probability and its flat gradient, of the chosen and the rejected side of each pair."""
    results = []
    for pair in encoded:
        both = [
            oracles.gradient(oracle_model, (s.input_ids, s.loss_mask), "sum_logps")
            for s in (pair.chosen, pair.rejected)
        ]
        results.append([(logp.item(), oracles.flat(named)) for logp, named in both])
    return results


@pytest.fixture(scope="module")
def references(oracle_model: Any, encoded: list[EncodedPair]) -> np.ndarray:
    """Log-probabilities under the base model, [V, 2]."""
    with oracle_model.disable_adapter(), torch.no_grad():
        rows = [
            [oracles.sum_logps(oracle_model, (s.input_ids, s.loss_mask)).item() for s in (pair.chosen, pair.rejected)]
            for pair in encoded
        ]
    return np.array(rows)


def _target(**settings: Any) -> TargetConfig:
    return TargetConfig(name="t", pairs=[PairInput(files=["pairs.jsonl"])], dpo_beta=BETA, **settings)


def _bank(
    base: str,
    pairs: list[EncodedPair],
    oracle_model: torch.nn.Module,
    projection: tuple[Any, int, int] = ("none", 1, 0),
    max_batch_tokens: int = 120,
) -> pa.Table:
    model = load_scoring_model(
        ModelConfig(base=base, dtype="float32", loader="plain"), LORA, device="cpu", dtype=torch.float64
    )
    adapter = {name: parameter.detach().clone() for name, parameter in oracles.trainable(oracle_model).items()}
    layout = layout_of(model.module)
    return pair_gradients(
        model,
        pairs,
        Checkpoint("checkpoint-1", adapter, None, None, None),
        layout,
        make_projection(*projection, layout.num_parameters),
        max_batch_tokens=max_batch_tokens,
    ).table()


def _vectors(bank: pa.Table, side: str) -> np.ndarray:
    return np.array(bank[f"gradient_{side}"].to_pylist(), dtype=np.float64)


@pytest.mark.parametrize("projection", [("none", 1, 0), ("rademacher", 70, 3), ("sketch", 64, 5)])
def test_gradients_of_both_sides_are_those_of_autograd(
    projection: tuple[Any, int, int],
    base_folder: str,
    encoded: list[EncodedPair],
    oracle_model: torch.nn.Module,
    sides: Any,
) -> None:
    bank = _bank(base_folder, encoded, oracle_model, projection)
    matrix = oracles.projection_matrix(*projection, len(sides[0][0][1]))
    for place, side in enumerate("wl"):
        for found, pair in zip(_vectors(bank, side), sides, strict=True):
            expected = matrix @ pair[place][1].numpy()
            assert np.linalg.norm(found - expected) < FLOAT32_RELATIVE * np.linalg.norm(expected)


def test_numbers_beside_the_gradients(
    base_folder: str, encoded: list[EncodedPair], oracle_model: torch.nn.Module, sides: Any, references: np.ndarray
) -> None:
    bank = _bank(base_folder, encoded, oracle_model, ("sketch", 16, 0))
    expected = {
        "norm_w": [pair[0][1].norm().item() for pair in sides],
        "norm_l": [pair[1][1].norm().item() for pair in sides],
        "dot_wl": [(pair[0][1] @ pair[1][1]).item() for pair in sides],
        "logps_w": [pair[0][0] for pair in sides],
        "logps_l": [pair[1][0] for pair in sides],
        "reference_logps_w": references[:, 0],
        "reference_logps_l": references[:, 1],
    }
    for name, values in expected.items():
        np.testing.assert_allclose(bank[name].to_numpy(), values, rtol=FLOAT64_RELATIVE, err_msg=name)
    assert bank["pair_id"].to_pylist() == [pair.pair_id for pair in encoded]
    assert bank["subtask"].to_pylist() == ["first", "second"] * 3
    for side, samples in (("w", [p.chosen for p in encoded]), ("l", [p.rejected for p in encoded])):
        assert bank[f"num_tokens_{side}"].to_pylist() == [sum(s.loss_mask) for s in samples]
        assert bank[f"num_tokens_cut_{side}"].to_pylist() == [0] * len(encoded)


def test_batch_make_up_does_not_matter(
    base_folder: str, encoded: list[EncodedPair], oracle_model: torch.nn.Module
) -> None:
    banks = [_bank(base_folder, encoded, oracle_model, max_batch_tokens=bound) for bound in (8, 150, 10**6)]
    backwards = _bank(base_folder, encoded[::-1], oracle_model).take(list(range(len(encoded)))[::-1])
    for other in (*banks[1:], backwards):
        for side in "wl":
            expected = _vectors(banks[0], side)
            bound = FLOAT32_RELATIVE * np.linalg.norm(expected, axis=1).max()
            np.testing.assert_allclose(_vectors(other, side), expected, rtol=0, atol=bound)
        for name in ("norm_w", "norm_l", "dot_wl", "logps_w", "logps_l", "reference_logps_w"):
            np.testing.assert_allclose(other[name].to_numpy(), banks[0][name].to_numpy(), rtol=FLOAT64_RELATIVE)


def test_rose_directions_are_the_gradient_of_the_dpo_loss(
    base_folder: str, encoded: list[EncodedPair], oracle_model: Any, references: np.ndarray
) -> None:
    bank = _bank(base_folder, encoded, oracle_model)
    (unit,) = target_directions([bank], _target(objective="rose"))
    (raw,) = target_directions([bank], _target(objective="rose", normalize="none"))
    for number, pair in enumerate(encoded):
        margin, gradient = _dpo(oracle_model, pair, references[number])
        assert 1 - oracles.cosine(unit.vectors_UD[number], gradient) < PARALLEL
        assert np.linalg.norm(unit.vectors_UD[number]) == pytest.approx(1, rel=FLOAT32_RELATIVE)
        # beta, the reference and the sigmoid only scale the direction
        scale = BETA / (1 + math.exp(margin))
        np.testing.assert_allclose(
            scale * raw.vectors_UD[number], gradient, rtol=0, atol=FLOAT32_RELATIVE * float(gradient.norm())
        )


def test_the_weighted_objective_is_the_gradient_of_a_subtask_s_summed_dpo_loss(
    base_folder: str, encoded: list[EncodedPair], oracle_model: Any, references: np.ndarray
) -> None:
    bank = _bank(base_folder, encoded, oracle_model)
    (directions,) = target_directions([bank], _target(objective="dpo_weighted", normalize="none"))
    assert directions.subtasks == ("first", "second")
    for number, name in enumerate(directions.subtasks):
        members = [v for v, pair in enumerate(encoded) if pair.subtask == name]
        total = torch.stack([_dpo(oracle_model, encoded[v], references[v])[1] for v in members]).sum(0)
        bound = FLOAT32_RELATIVE * float(total.norm()) * len(members)
        np.testing.assert_allclose(directions.vectors_UD[number], total, rtol=0, atol=bound)


def test_swapped_sides_swap_the_columns_and_negate_the_direction(
    base_folder: str, encoded: list[EncodedPair], oracle_model: torch.nn.Module
) -> None:
    bank = _bank(base_folder, encoded, oracle_model)
    swapped_pairs = [EncodedPair(p.pair_id, p.subtask, p.rejected, p.chosen) for p in encoded]
    swapped = _bank(base_folder, swapped_pairs, oracle_model)
    for here, there in ("wl", "lw"):
        np.testing.assert_allclose(
            _vectors(swapped, here), _vectors(bank, there), rtol=0, atol=FLOAT32_RELATIVE * _vectors(bank, there).max()
        )
    for objective in ("rose", "rose_simpo", "rose_balanced"):
        (one,), (other,) = (target_directions([table], _target(objective=objective)) for table in (bank, swapped))
        np.testing.assert_allclose(other.vectors_UD, -one.vectors_UD, rtol=0, atol=FLOAT32_RELATIVE)


def _dpo(model: Any, pair: EncodedPair, reference: np.ndarray) -> tuple[float, torch.Tensor]:
    """Margin and gradient of one pair's DPO loss, by autograd through both sides at once."""
    logp_w, logp_l = (oracles.sum_logps(model, (s.input_ids, s.loss_mask)) for s in (pair.chosen, pair.rejected))
    margin = BETA * ((logp_w - reference[0]) - (logp_l - reference[1]))
    loss = -torch.log(torch.sigmoid(margin))
    parameters = oracles.trainable(model)
    grads = torch.autograd.grad(loss, list(parameters.values()))
    return margin.item(), oracles.flat(dict(zip(parameters, grads, strict=True)))
