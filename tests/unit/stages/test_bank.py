"""Encoding pairs, and what the bank does besides gradients. The numbers: tests/equivalence."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from rose_ray.config.model import LoraConfig, ModelConfig
from rose_ray.config.target import PairInput, TargetConfig
from rose_ray.data.conversation import Message
from rose_ray.data.preferences import PreferencePair
from rose_ray.data.tokenize import Tokeniser
from rose_ray.errors import NonFiniteError, PairError
from rose_ray.kernels.projection import make_projection
from rose_ray.model.base import attach_adapter, load_base
from rose_ray.model.checkpoint import Checkpoint
from rose_ray.model.layout import layout_of
from rose_ray.model.scoring import ScoringModel
from rose_ray.model.tokenizer import load_tokeniser
from rose_ray.schemas import bank_schema
from rose_ray.stages.bank import encode_pairs, pair_gradients, reference_logps
from tests import oracles

LORA = LoraConfig(rank=2, alpha=4.0, target_modules=["q_proj", "v_proj"])
BETA = 0.1
HALF_SMALLEST = 2.0**-25
"""Half of float16's smallest number: what is smaller rounds to zero."""


def _pair(pair_id: str, chosen: str = "stone bread", rejected: str = "river", prompt: str = "water?") -> PreferencePair:
    raw_prompt = f"\n\nHuman: {prompt}\n\nAssistant:"
    return PreferencePair(
        pair_id, "t", (Message("user", prompt),), chosen, rejected, raw_prompt, f" {chosen}", f" {rejected}"
    )


def _target(**settings: Any) -> TargetConfig:
    return TargetConfig(name="hh", pairs=[PairInput(files=["pairs.jsonl"])], **settings)


@pytest.fixture(scope="module")
def tokeniser(base_folder: str) -> Tokeniser:
    return load_tokeniser(ModelConfig(base=base_folder, max_tokens=48))


@pytest.fixture(scope="module")
def model(base_folder: str) -> ScoringModel:
    base = load_base(ModelConfig(base=base_folder), dtype=torch.float64)
    return ScoringModel(attach_adapter(base, LORA, dropout=0), "cpu")


@pytest.fixture(scope="module")
def checkpoint(model: ScoringModel) -> Checkpoint:
    return Checkpoint("checkpoint-1", oracles.random_adapter(model.module, 3), None, None, None)


def _bank(model: ScoringModel, checkpoint: Checkpoint, pairs: Any, **settings: Any) -> pa.Table:
    layout = layout_of(model.module)
    projection = make_projection("none", 1, 0, layout.num_parameters)
    return pair_gradients(model, pairs, checkpoint, layout, projection, max_batch_tokens=100, **settings).table()


def test_both_sides_go_through_the_pool_s_template(tokeniser: Tokeniser) -> None:
    (pair,) = encode_pairs([_pair("p")], tokeniser, _target())
    assert (pair.pair_id, pair.subtask) == ("p", "t")
    for sample, answer in ((pair.chosen, "stone bread"), (pair.rejected, "river")):
        text = f"<|begin|><|user|>\nwater?<|end|>\n<|assistant|>\n{answer}<|end|>\n"
        assert tokeniser.tokenizer.decode(sample.input_ids) == text


def test_the_official_encoding_is_the_raw_transcript(tokeniser: Tokeniser) -> None:
    (pair,) = encode_pairs([_pair("p")], tokeniser, _target(encoding="rose_official"))
    text = "\n\nHuman: water?\n\nAssistant:<|end|> river<|end|>"
    assert tokeniser.tokenizer.decode(pair.rejected.input_ids) == text


def test_all_pairs_that_cannot_be_used_are_listed(tokeniser: Tokeniser) -> None:
    long = "stone " * 60
    pairs = [
        _pair("good"),
        _pair("long-prompt", prompt=long),
        _pair("equal", rejected="stone bread"),
        _pair("equal-once-cut", chosen=long + "a", rejected=long + "b"),
    ]
    with pytest.raises(PairError) as caught:
        encode_pairs(pairs, tokeniser, _target())
    lines = str(caught.value).splitlines()
    assert lines[0] == "target hh: 3 of 4 pairs cannot be used:"
    assert [line.split(":")[0].strip() for line in lines[1:4]] == ["long-prompt", "equal", "equal-once-cut"]
    assert "prompt_too_long" in lines[1] and "both sides are the same 48 tokens" in lines[3]
    assert lines[4] == "Remove them, or raise `model.max_tokens`."


def test_tokens_cut_are_counted_for_each_side(
    tokeniser: Tokeniser, model: ScoringModel, checkpoint: Checkpoint
) -> None:
    pairs = encode_pairs([_pair("p", chosen="stone " * 60)], tokeniser, _target())
    bank = _bank(model, checkpoint, pairs)
    assert bank.schema.equals(bank_schema(layout_of(model.module).num_parameters), check_metadata=True)
    assert (
        bank["num_tokens_cut_w"].to_pylist() == [pairs[0].chosen.num_tokens_cut] and pairs[0].chosen.num_tokens_cut > 0
    )
    assert bank["num_tokens_cut_l"].to_pylist() == [0]


def test_a_reference_computed_before_gives_the_same_bank(
    tokeniser: Tokeniser, model: ScoringModel, checkpoint: Checkpoint
) -> None:
    pairs = encode_pairs([_pair("p"), _pair("q", "green tea", "no")], tokeniser, _target())
    reference_V2 = reference_logps(model, pairs, max_batch_tokens=100)
    assert reference_V2.shape == (2, 2) and reference_V2.dtype == torch.float64
    assert _bank(model, checkpoint, pairs, reference_V2=reference_V2) == _bank(model, checkpoint, pairs)
    # the slot's adapter does not matter to the reference
    model.load_adapter(oracles.random_adapter(model.module, 9))
    assert torch.equal(reference_logps(model, pairs, max_batch_tokens=100), reference_V2)


def test_gradients_that_are_not_finite_are_refused_with_their_pairs(
    tokeniser: Tokeniser, model: ScoringModel, checkpoint: Checkpoint
) -> None:
    pairs = encode_pairs([_pair("p"), _pair("q", "green tea", "no")], tokeniser, _target())
    broken = {name: tensor * float("inf") for name, tensor in checkpoint.adapter.items()}
    with pytest.raises(NonFiniteError, match=r"checkpoint-1: NaN or infinite gradients for pairs \['p', 'q'\]"):
        _bank(model, replace(checkpoint, adapter=broken), pairs)


def test_half_precision_flushes_small_entries_of_the_loss_gradient(
    tokeniser: Tokeniser, model: ScoringModel, checkpoint: Checkpoint
) -> None:
    pairs = encode_pairs([_pair("p"), _pair("q", "green tea", "no")], tokeniser, _target())
    # small factors make small gradients: as after a real, short warm-up, many entries are below float16's reach
    small = replace(checkpoint, adapter={name: 1e-6 * tensor for name, tensor in checkpoint.adapter.items()})
    exact, rounded = _bank(model, small, pairs), _bank(model, small, pairs, half_precision_beta=BETA)
    for number in range(len(pairs)):
        row = {name: exact[name][number].as_py() for name in exact.column_names if "logps" in name}
        margin = BETA * (row["logps_w"] - row["reference_logps_w"] - row["logps_l"] + row["reference_logps_l"])
        scale = BETA / (1 + np.exp(margin))
        for side in "wl":
            wanted = np.array(exact[f"gradient_{side}"][number].as_py()) * scale
            expected = wanted.astype(np.float16).astype(np.float64) / scale
            found = np.array(rounded[f"gradient_{side}"][number].as_py())
            np.testing.assert_allclose(found, expected, rtol=1e-3, atol=2 * HALF_SMALLEST / scale)
            flushed = (np.abs(wanted) < 0.9 * HALF_SMALLEST) & (wanted != 0)
            assert flushed.sum() > 10 and (found[flushed] == 0).all()
            assert rounded[f"norm_{side}"][number].as_py() == pytest.approx(np.linalg.norm(found), rel=1e-6)
