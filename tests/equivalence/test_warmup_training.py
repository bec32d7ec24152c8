"""The warm-up is a plain AdamW loop: whoever runs it, on however many workers, with whatever ZeRO stage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from rose_ray.config.model import LoraConfig, ModelConfig
from rose_ray.config.warmup import WarmupConfig
from rose_ray.data.tokenize import Sample
from rose_ray.distributed.training import WarmupJob
from rose_ray.filesystem import locate
from rose_ray.model.base import attach_adapter, load_base
from rose_ray.model.checkpoint import Checkpoint, read_checkpoint
from rose_ray.model.layout import layout_of
from rose_ray.schemas import TOKENS
from rose_ray.stages.warmup import plan_training
from rose_ray.stores.workspace import Workspace
from tests import oracles
from tests.equivalence.plain_training import PlainTraining
from tests.equivalence.ranks import run_ranks
from tests.tiny import make_samples

pytestmark = pytest.mark.slow

LEARNING_RATE = 2e-3
NUM_EPOCHS = 2

STEPS_APART = 2e-4
"""Largest distance of an adapter weight, in units of the peak learning rate: about the most that a step of Adam moves
it. Gradients agree to float32 rounding; where they are small, Adam divides them by roots as small."""

MOMENTS_RELATIVE = 5e-6
"""Of the length of all moments of a kind: float32 gradients of batches added in another order, and of weights
that differ by the above."""

LOSS_RELATIVE = 1e-6
"""Mean loss of an epoch: float32 sums, and weights that differ by the above."""

LEAST_COSINE = 0.9
"""Of the way an adapter went with a bfloat16 base (8 bits) to that with a float32 base: a step of Adam has the size of
the learning rate however uncertain the sign of a small gradient is."""

LORA = LoraConfig(rank=4, alpha=8.0, dropout=0.0, target_modules=["q_proj", "v_proj", "down_proj"])
SAMPLES = make_samples((9, 31, 6, 17, 12, 25, 8, 14, 30, 5, 21, 11, 7), 330)
PROBE = list(range(40, 60))

VARIANTS: dict[str, dict[str, Any]] = {
    "zero 0": {"zero_stage": 0},
    "zero 2": {"zero_stage": 2},
    "zero 3": {"zero_stage": 3},
    "zero 0, small micro-batches": {"zero_stage": 0, "max_batch_tokens": 32},
    "zero 0, checkpointing": {"zero_stage": 0, "checkpointing": True},
}
HALF_PRECISION: dict[str, dict[str, Any]] = {
    "bfloat16, zero 0": {"zero_stage": 0, "dtype": "bfloat16"},
    "bfloat16, zero 2": {"zero_stage": 2, "dtype": "bfloat16"},
    "bfloat16, zero 3": {"zero_stage": 3, "dtype": "bfloat16"},
}
MOVED = "zero 0, after two workers under zero 3"
"""Goes on with one worker from what two left that shared the weights."""

ALL = {**VARIANTS, **HALF_PRECISION}

INTERRUPTED = {"dropout, zero 0": 0, "dropout, zero 2": 2, "dropout, zero 3": 3}
"""Trained with dropout twice: at a stretch; and by workers that vanish in the second epoch, and others after them."""

UPDATES_BEFORE, UPDATES_SAVED = 6, 5
"""Of the eight: those that the first workers take, and those that their last saved state knows of."""


class Runs:
    """The oracle's training, and the project's on one and on two workers."""

    def __init__(self, base: str, folder: Path) -> None:
        self.base, self.folder = base, folder
        self.workspace = Workspace.open(str(folder / "workspace"), create=True)
        rows = [{"row_id": f"row-{n}", **sample.__dict__} for n, sample in enumerate(SAMPLES)]
        self.samples_file = self.workspace.write_table("samples.parquet", pa.Table.from_pylist(rows, schema=TOKENS))
        pairs = {
            n: [(self._dropout(n, name, "whole"), self._dropout(n, name, "cut")) for name in INTERRUPTED]
            for n in (1, 2)
        }
        self.results = {
            num_workers: run_ranks(
                "warm_up",
                num_workers,
                folder / f"ranks-{num_workers}",
                jobs=[
                    *(self._job(num_workers, name) for name in ALL),
                    *([self._moved(1, 0)] if num_workers == 1 else []),
                ],
                probe=PROBE,
                interrupted=pairs[num_workers],
                num_updates=UPDATES_BEFORE,
                left=[self._moved(2, 3)] if num_workers == 2 else [],
            )
            for num_workers in (2, 1)
        }
        self.layout = layout_of(attach_adapter(load_base(ModelConfig(base=base)), LORA, dropout=0.0))

    def _job(self, num_workers: int, name: str) -> WarmupJob:
        variant = dict(ALL[name])
        model = ModelConfig(
            base=self.base,
            dtype=variant.pop("dtype", "float32"),
            gradient_checkpointing=variant.pop("checkpointing", False),
        )
        warmup = WarmupConfig(workers=num_workers, **{**_settings(), **variant})
        folder = f"{num_workers}-{name.replace(' ', '_')}"
        return WarmupJob(self.workspace, folder, self.samples_file, model, LORA, warmup, "cpu", 1)

    def _moved(self, num_workers: int, zero_stage: int) -> WarmupJob:
        warmup = WarmupConfig(workers=num_workers, zero_stage=zero_stage, save_steps=UPDATES_SAVED, **_settings())
        folder, model = f"1-{MOVED.replace(' ', '_')}", ModelConfig(base=self.base, dtype="float32")
        return WarmupJob(self.workspace, folder, self.samples_file, model, LORA, warmup, "cpu", 1)

    def _dropout(self, num_workers: int, name: str, kind: str) -> WarmupJob:
        warmup = WarmupConfig(
            workers=num_workers, zero_stage=INTERRUPTED[name], save_steps=UPDATES_SAVED, **_settings()
        )
        lora = LORA.model_copy(update={"dropout": 0.2})
        folder, model = f"{num_workers}-{kind}-{name.replace(' ', '_')}", ModelConfig(base=self.base, dtype="float32")
        return WarmupJob(self.workspace, folder, self.samples_file, model, lora, warmup, "cpu", 1)

    def checkpoint_folder(self, num_workers: int, name: str, epoch: int) -> Path:
        return self.folder / "workspace" / f"{num_workers}-{name.replace(' ', '_')}" / f"checkpoint-{epoch}"

    def checkpoint(self, num_workers: int, name: str, epoch: int) -> Checkpoint:
        return read_checkpoint(locate(str(self.checkpoint_folder(num_workers, name, epoch))), self.layout)


def _settings() -> dict[str, Any]:
    return {
        "epochs": NUM_EPOCHS,
        "learning_rate": LEARNING_RATE,
        "warmup_ratio": 0.3,
        "batch_size": 4,
        "max_batch_tokens": 128,
        "weight_decay": 0.1,
        "adam_beta1": 0.8,
        "adam_beta2": 0.95,
        "adam_eps": 1e-7,
        "max_grad_norm": 1.0,
        "seed": 5,
    }


@pytest.fixture(scope="module")
def runs(base_folder: str, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(base_folder, tmp_path_factory.mktemp("warmup"))


class Plain:
    """The same plan by a plain loop: adapter, moments and mean loss at the end of each epoch."""

    def __init__(self, base: str) -> None:
        settings = _settings()
        steps = plan_training(
            [f"row-{n}" for n in range(len(SAMPLES))],
            [len(sample.input_ids) for sample in SAMPLES],
            num_workers=1,
            **{key: settings[key] for key in ("epochs", "batch_size", "max_batch_tokens", "learning_rate", "seed")},
            warmup_ratio=settings["warmup_ratio"],
        )
        torch.manual_seed(settings["seed"])
        self.training = PlainTraining(
            oracles.peft_model(base, **oracles.lora_settings(LORA), dtype=torch.float32),
            settings["adam_beta1"],
            settings["adam_beta2"],
            settings["adam_eps"],
            settings["max_grad_norm"],
            settings["weight_decay"],
        )
        self.start = {name: p.detach().clone() for name, p in self.training.parameters.items()}
        self.epochs: list[tuple[oracles.Named, oracles.Named, oracles.Named, float, float]] = []
        for epoch in range(1, NUM_EPOCHS + 1):
            self.training.loss_sum = 0.0
            own = [step for step in steps if step.epoch == epoch]
            for step in own:
                rows = [row for micro_batch in step.micro_batches[0] for row in micro_batch.rows]
                assert len(rows) == step.num_samples
                self.training.step([_masked(SAMPLES[row]) for row in rows], step.learning_rate)
            adapter = {name: p.detach().clone() for name, p in self.training.parameters.items()}
            moments = (self.training.moments("exp_avg"), self.training.moments("exp_avg_sq"))
            rate = sum(step.learning_rate for step in own) / len(own)
            self.epochs.append((adapter, *moments, self.training.loss_sum / len(SAMPLES), rate))


@pytest.fixture(scope="module")
def plain(base_folder: str) -> Plain:
    return Plain(base_folder)


def _masked(sample: Sample) -> oracles.Masked:
    return sample.input_ids, sample.loss_mask


@pytest.mark.parametrize("num_workers", [1, 2])
@pytest.mark.parametrize("name", VARIANTS)
def test_it_is_a_plain_loop(name: str, num_workers: int, runs: Runs, plain: Plain) -> None:
    assert 0 < plain.training.num_clipped < plain.training.num_updates  # so both kinds of steps are compared
    reports = runs.results[num_workers][0][list(VARIANTS).index(name)]["epochs"]
    assert_plain(name, num_workers, reports, runs, plain)


def test_other_workers_under_another_stage_can_go_on(runs: Runs, plain: Plain) -> None:
    assert_plain(MOVED, 1, runs.results[1][0][len(ALL)]["epochs"], runs, plain)


def assert_plain(name: str, num_workers: int, reports: list[dict[str, Any]], runs: Runs, plain: Plain) -> None:
    for epoch, (adapter, exp_avg, exp_avg_sq, loss, rate) in enumerate(plain.epochs, start=1):
        found = runs.checkpoint(num_workers, name, epoch)
        assert found.exp_avg is not None and found.exp_avg_sq is not None
        distance = max(float((found.adapter[key] - adapter[key]).abs().max()) for key in adapter)
        assert distance < STEPS_APART * LEARNING_RATE
        for kind, expected in ((found.exp_avg, exp_avg), (found.exp_avg_sq, exp_avg_sq)):
            all_found, all_expected = oracles.flat(kind, adapter), oracles.flat(expected, adapter)
            assert (all_found - all_expected).norm() < MOMENTS_RELATIVE * all_expected.norm()
        report = reports[epoch - 1]
        assert report["loss"] == pytest.approx(loss, rel=LOSS_RELATIVE)
        assert report["mean_learning_rate"] == pytest.approx(rate, rel=1e-12)
        assert report["num_updates"] == epoch * 4


@pytest.mark.parametrize("num_workers", [1, 2])
@pytest.mark.parametrize("name", HALF_PRECISION)
def test_a_half_precision_base_trains_a_float32_adapter(name: str, num_workers: int, runs: Runs, plain: Plain) -> None:
    found = runs.checkpoint(num_workers, name, NUM_EPOCHS)
    assert found.exp_avg is not None and found.exp_avg_sq is not None
    for part in (found.adapter, found.exp_avg, found.exp_avg_sq):
        assert {tensor.dtype for tensor in part.values()} == {torch.float32}
    # weights that took steps far smaller than bfloat16 tells apart
    assert any(not torch.equal(tensor, tensor.bfloat16().float()) for tensor in found.adapter.values())
    first, last = plain.start, plain.epochs[-1][0]
    moved, expected = (oracles.flat(end, last) - oracles.flat(first, last) for end in (found.adapter, last))
    assert oracles.cosine(moved, expected) > LEAST_COSINE


@pytest.mark.parametrize("num_workers", [1, 2])
@pytest.mark.parametrize("name", INTERRUPTED)
def test_workers_that_go_on_after_others_end_with_equal_bytes(name: str, num_workers: int, runs: Runs) -> None:
    for epoch in range(1, NUM_EPOCHS + 1):
        whole, cut = (runs.checkpoint_folder(num_workers, f"{kind}-{name}", epoch) for kind in ("whole", "cut"))
        files = sorted(path.name for path in whole.iterdir())
        assert len(files) == 4 and files == sorted(path.name for path in cut.iterdir())
        assert [file for file in files if (whole / file).read_bytes() != (cut / file).read_bytes()] == []
    reports = runs.results[num_workers][0][list(INTERRUPTED).index(name) - len(INTERRUPTED)]
    assert reports["resumed_at"] == UPDATES_SAVED
    for whole_epoch, cut_epoch in zip(reports["whole"], reports["cut"], strict=True):
        without_files = [{k: v for k, v in entry.items() if k != "files"} for entry in (whole_epoch, cut_epoch)]
        assert without_files[0] == without_files[1]
    assert runs.checkpoint(num_workers, f"whole-{name}", 2).adapter.keys() == dict(runs.layout.shapes).keys()


@pytest.mark.parametrize("name", VARIANTS)
def test_ranks_agree_about_the_loss(name: str, runs: Runs) -> None:
    place = list(VARIANTS).index(name)
    losses = [[epoch["loss"] for epoch in result[place]["epochs"]] for result in runs.results[2]]
    assert losses[0] == losses[1]


def test_the_state_beside_a_checkpoint_is_that_of_the_optimizer(runs: Runs) -> None:
    for epoch in range(1, NUM_EPOCHS + 1):
        state = runs.checkpoint(2, "zero 2", epoch).state
        assert state is not None
        assert (state.num_updates, state.epoch) == (4 * epoch, epoch)
        assert (state.adam_beta1, state.adam_beta2, state.adam_eps, state.max_grad_norm) == (0.8, 0.95, 1e-7, 1.0)


@pytest.mark.parametrize("num_workers", [1, 2])
@pytest.mark.parametrize("name", VARIANTS)
def test_plain_peft_loads_the_adapter_and_gives_the_same_logits(name: str, num_workers: int, runs: Runs) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(runs.base, dtype=torch.float32)
    folder = runs.checkpoint_folder(num_workers, name, NUM_EPOCHS)
    model = PeftModel.from_pretrained(base, str(folder)).eval()
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([PROBE])).logits.numpy()
        untrained = model.get_base_model()
        with model.disable_adapter():
            without = untrained(input_ids=torch.tensor([PROBE])).logits.numpy()
    trained = runs.results[num_workers][0][list(VARIANTS).index(name)]["logits"]
    np.testing.assert_array_equal(logits, trained)
    assert np.abs(logits - without).max() > 0.01
