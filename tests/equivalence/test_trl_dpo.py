"""Log-probabilities, DPO loss and its gradient are TRL's: its DPO trainer on the same pairs and adapter."""

from __future__ import annotations

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
from rose_ray.kernels.losses import dpo_loss, dpo_margin, token_logps
from rose_ray.kernels.projection import make_projection
from rose_ray.model.checkpoint import Checkpoint
from rose_ray.model.layout import layout_of
from rose_ray.model.tokenizer import load_tokeniser
from rose_ray.stages.bank import EncodedPair, encode_pairs, pair_gradients
from rose_ray.stages.score import target_directions
from tests import oracles
from tests.tiny import write_jsonl

FLOAT32_SUM = 2e-6
"""TRL computes log-probabilities in float32: relative rounding (6e-8) of sums over up to 40 tokens."""

FLOAT32_MARGIN = 2e-5
"""Absolute, in nats: the margin is a difference of such sums (about 100 nats each), times beta."""

PARALLEL = 1e-9
"""Lack of a cosine from 1: gradients in float32 turn by some 1e-5."""

LORA = LoraConfig(rank=4, alpha=8.0, target_modules=["q_proj", "v_proj"])
BETA = 0.1
TARGET = TargetConfig(name="t", pairs=[PairInput(files=["pairs.jsonl"])], dpo_beta=BETA)


def _model_config(base: str) -> ModelConfig:
    # TRL lets everything behind the prompt carry loss, the newline after the end token included.
    return ModelConfig(base=base, dtype="float32", loader="plain", loss_on_turn_tail=True)


@pytest.fixture(scope="module")
def encoded(
    base_folder: str, pair_rows: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> list[EncodedPair]:
    file = write_jsonl(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", pair_rows)
    pairs = read_pairs([locate(str(file))], target="t")
    return encode_pairs(pairs, load_tokeniser(_model_config(base_folder)), TARGET)


@pytest.fixture(scope="module")
def adapter(base_folder: str) -> oracles.Named:
    model = oracles.peft_model(base_folder, **oracles.lora_settings(LORA), dtype=torch.float32)
    return oracles.random_adapter(model, seed=4)


@pytest.fixture(scope="module")
def bank(base_folder: str, encoded: list[EncodedPair], adapter: oracles.Named) -> pa.Table:
    model = load_scoring_model(_model_config(base_folder), LORA, device="cpu", dtype=torch.float64)
    layout = layout_of(model.module)
    projection = make_projection("none", 1, 0, layout.num_parameters)
    checkpoint = Checkpoint("checkpoint-1", adapter, None, None, None)
    return pair_gradients(model, encoded, checkpoint, layout, projection, max_batch_tokens=200).table()


@pytest.fixture(scope="module")
def trainer(
    base_folder: str,
    pair_rows: list[dict[str, Any]],
    adapter: oracles.Named,
    tmp_path_factory: pytest.TempPathFactory,
) -> Any:
    import datasets
    import peft
    import trl
    from transformers import AutoModelForCausalLM, AutoTokenizer

    def turn(role: str, content: str) -> list[dict[str, str]]:
        return [{"role": role, "content": content}]

    rows = [
        {
            "prompt": turn("user", row["prompt"]),
            "chosen": turn("assistant", row["chosen"]),
            "rejected": turn("assistant", row["rejected"]),
        }
        for row in pair_rows
    ]
    arguments = trl.DPOConfig(
        output_dir=str(tmp_path_factory.mktemp("trl")),
        use_cpu=True,
        bf16=False,
        report_to="none",
        beta=BETA,
        per_device_eval_batch_size=1,
        gradient_checkpointing=False,
        disable_tqdm=True,
    )
    trainer = trl.DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32),
        args=arguments,
        train_dataset=datasets.Dataset.from_list(rows),
        eval_dataset={str(number): datasets.Dataset.from_list([row]) for number, row in enumerate(rows)},
        processing_class=AutoTokenizer.from_pretrained(base_folder),
        peft_config=peft.LoraConfig(
            r=LORA.rank,
            lora_alpha=LORA.alpha,
            lora_dropout=0.0,
            target_modules=LORA.target_modules,
            task_type="CAUSAL_LM",
        ),
    )
    oracles.set_adapter(trainer.model, adapter)  # its reference is the base without the adapter
    return trainer


def test_the_same_tokens_carry_loss(trainer: Any, encoded: list[EncodedPair]) -> None:
    for row, pair in zip(trainer.train_dataset, encoded, strict=True):
        for key, side in (("chosen_ids", pair.chosen), ("rejected_ids", pair.rejected)):
            assert row["prompt_ids"] + row[key] == side.input_ids
            assert [False] * len(row["prompt_ids"]) + [True] * len(row[key]) == side.loss_mask


def test_logps_loss_and_margins(trainer: Any, bank: pa.Table, encoded: list[EncodedPair]) -> None:
    found = [torch.tensor(bank[name].to_pylist(), dtype=torch.float64) for name in ("logps_w", "logps_l")]
    reference = [
        torch.tensor(bank[f"reference_{name}"].to_pylist(), dtype=torch.float64) for name in ("logps_w", "logps_l")
    ]
    losses = dpo_loss(*found, *reference, BETA)
    margins = dpo_margin(*found, *reference, BETA)
    for number in range(len(encoded)):
        trainer.evaluate(trainer.eval_dataset[str(number)])
        logged = trainer.state.log_history[-1]
        assert found[0][number].item() == pytest.approx(logged["eval_logps/chosen"], rel=FLOAT32_SUM)
        assert found[1][number].item() == pytest.approx(logged["eval_logps/rejected"], rel=FLOAT32_SUM)
        margin, loss = logged["eval_rewards/margins"], logged["eval_loss"]
        assert margins[number].item() == pytest.approx(margin, abs=FLOAT32_MARGIN)
        assert losses[number].item() == pytest.approx(loss, abs=FLOAT32_MARGIN)
        assert abs(margin) > 100 * FLOAT32_MARGIN


def test_directions_are_the_gradient_of_its_loss(trainer: Any, bank: pa.Table, encoded: list[EncodedPair]) -> None:
    (directions,) = target_directions([bank], TARGET)
    trainer.model.eval()
    for number, row in enumerate(trainer.train_dataset):
        trainer.model.zero_grad()
        trainer.compute_loss(trainer.model, trainer.data_collator([row])).backward()
        gradient = oracles.flat({name: p.grad for name, p in oracles.trainable(trainer.model).items()})
        assert 1 - oracles.cosine(directions.vectors_UD[number], gradient) < PARALLEL


def test_token_log_probabilities_are_its_selective_log_softmax() -> None:
    from trl.trainer.utils import selective_log_softmax

    generator = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(3, 9, 50, generator=generator, dtype=torch.float64)
    ids = torch.randint(0, 50, (3, 9), generator=generator)
    found = token_logps(logits, ids)
    np.testing.assert_allclose(found, selective_log_softmax(logits[:, :-1], ids[:, 1:]), rtol=1e-12)
