"""The influence is what it claims to be: the reward margin gained per unit of step length.

Margin here: log p(chosen) - log p(rejected). A training step on a sample moves the adapter along minus Gamma. For each
sample, pair and checkpoint the margin is measured, by running the model, a little before and after the checkpoint on
that line; slope over the length of the pair's direction must be the influence that the stages computed from gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from rose_ray.config.model import LoraConfig, ModelConfig
from rose_ray.config.target import PairInput, TargetConfig
from rose_ray.data.conversation import Conversation, Message
from rose_ray.data.preferences import read_pairs
from rose_ray.data.tokenize import Sample
from rose_ray.distributed.engine import load_scoring_model
from rose_ray.filesystem import locate
from rose_ray.kernels.projection import make_projection
from rose_ray.model.batch import pad_batch
from rose_ray.model.checkpoint import read_checkpoint
from rose_ray.model.layout import layout_of
from rose_ray.model.scoring import ScoringModel
from rose_ray.model.tokenizer import load_tokeniser
from rose_ray.schemas import TOKENS
from rose_ray.stages.bank import EncodedPair, encode_pairs, pair_gradients
from rose_ray.stages.directions import DirectionSettings
from rose_ray.stages.features import shard_features
from rose_ray.stages.score import shard_influences, target_directions
from tests import oracles
from tests.equivalence.plain_training import PlainTraining
from tests.tiny import make_pool_rows, write_jsonl

NUM_SAMPLES = 64
NUM_PAIRS = 4
LEARNING_RATES = (2e-3, 1e-3)
"""Of the two epochs."""

STEP_LENGTH = 1e-4
"""Of the measured step, where the adapter's length is about 3. The central difference errs by its square; float64
rounding of margins of some 100 nats adds about 1e-10 to the slope."""

LEAST_PEARSON = 0.99999
"""Required is 0.99; what is left to rounding is far less."""

SLOPE_ERROR = 2e-6
"""On influences of at most 1: float32 storage of features and bank (6e-8 an entry), and the difference's error."""

LORA = LoraConfig(rank=4, alpha=8.0, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
TARGET = TargetConfig(name="t", pairs=[PairInput(files=["pairs.jsonl"])])


@dataclass
class Setting:
    """Everything that both sides of the comparison share."""

    model: ScoringModel
    samples: list[Sample]
    pairs: list[EncodedPair]
    folders: list[Path]
    base: str


@pytest.fixture(scope="module", autouse=True)
def _norms_in_float64() -> Iterator[None]:
    """Let the model's norms compute in its own type.

    The library's cast to float32 whatever the model's type, and that rounding, over so short a step, would be the
    larger part of the measured error.
    """

    def forward(norm: LlamaRMSNorm, hidden: torch.Tensor) -> torch.Tensor:
        return norm.weight * hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + norm.variance_epsilon)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LlamaRMSNorm, "forward", forward)
        yield


@pytest.fixture(scope="module")
def setting(base_folder: str, pair_rows: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Setting:
    folder = tmp_path_factory.mktemp("reward")
    config = ModelConfig(base=base_folder, dtype="float32", loader="plain")
    tokeniser = load_tokeniser(config)
    samples = [
        tokeniser.encode(Conversation(tuple(Message(turn["role"], turn["content"]) for turn in row["messages"])))
        for row in make_pool_rows(NUM_SAMPLES, seed=5)
    ]
    file = write_jsonl(folder / "pairs.jsonl", pair_rows[:NUM_PAIRS])
    pairs = encode_pairs(read_pairs([locate(str(file))], target="t"), tokeniser, TARGET)
    folders = _warm_up(base_folder, samples, folder)
    model = load_scoring_model(config, LORA, device="cpu", dtype=torch.float64)
    return Setting(model, samples, pairs, folders, base_folder)


def _warm_up(base: str, samples: list[Sample], folder: Path) -> list[Path]:
    """Two short epochs, so that weights and moments are those of a real optimizer."""
    torch.manual_seed(0)
    training = PlainTraining(oracles.peft_model(base, **oracles.lora_settings(LORA), dtype=torch.float32))
    folders = []
    for epoch, rate in enumerate(LEARNING_RATES, start=1):
        for start in range(0, 32, 8):
            training.step([(s.input_ids, s.loss_mask) for s in samples[start : start + 8]], rate)
        folders.append(folder / f"checkpoint-{epoch}")
        training.save(folders[-1], rate, epoch)
    return folders


def _influences(setting: Setting) -> np.ndarray:
    """What the stages compute: [C, N, V]."""
    layout = layout_of(setting.model.module)
    checkpoints = [read_checkpoint(locate(str(folder)), layout) for folder in setting.folders]
    projection = make_projection("none", 1, 0, layout.num_parameters)
    tokens = pa.Table.from_pylist(
        [{"row_id": str(n), **sample.__dict__} for n, sample in enumerate(setting.samples)], schema=TOKENS
    )
    settings = DirectionSettings("torch", "float32", max_batch_tokens=400)
    features = shard_features(setting.model, tokens, checkpoints, layout, [[projection] * len(checkpoints)], settings)
    banks = [
        pair_gradients(setting.model, setting.pairs, checkpoint, layout, projection, max_batch_tokens=400).table()
        for checkpoint in checkpoints
    ]
    return shard_influences(features.tables[0], target_directions(banks, TARGET), "exact")


def _margins_along(setting: Setting, step: torch.Tensor) -> Callable[[float], torch.Tensor]:
    """Margins of all pairs with the adapter moved by ``scale * step``; the adapter is where it was afterwards."""
    batch = pad_batch([side for pair in setting.pairs for side in (pair.chosen, pair.rejected)])
    origin = {name: weight.clone() for name, weight in setting.model.weights.items()}
    parts = torch.split(step, [weight.numel() for weight in origin.values()])
    steps = {name: part.view_as(origin[name]) for name, part in zip(origin, parts, strict=True)}

    def margins(scale: float) -> torch.Tensor:
        setting.model.load_adapter({name: weight + scale * steps[name] for name, weight in origin.items()})
        with torch.no_grad():
            logps = setting.model.sample_values(batch, "sum_logps")
        setting.model.load_adapter(origin)
        return logps[::2] - logps[1::2]

    return margins


def _measured(setting: Setting, number: int) -> tuple[np.ndarray, np.ndarray]:
    """At one checkpoint: slopes over the pairs' gradient lengths, and raw changes of a full Adam step, [N, V] each."""
    layout = layout_of(setting.model.module)
    checkpoint = read_checkpoint(locate(str(setting.folders[number])), layout)
    state = checkpoint.state
    assert state is not None and checkpoint.exp_avg is not None and checkpoint.exp_avg_sq is not None
    model = oracles.peft_model(setting.base, **oracles.lora_settings(LORA), dtype=torch.float64)
    oracles.set_adapter(model, checkpoint.adapter)
    setting.model.load_adapter(checkpoint.adapter)
    lengths = np.array([_direction_length(model, pair) for pair in setting.pairs])
    constants = {
        "num_updates": state.num_updates,
        "beta1": state.adam_beta1,
        "beta2": state.adam_beta2,
        "eps": state.adam_eps,
    }
    slopes, changes = [], []
    for sample in setting.samples:
        _, gradient = oracles.gradient(model, (sample.input_ids, sample.loss_mask), "mean_loss")
        # the optimizer's own step: minus Gamma, at learning rate 1
        moments = (oracles.flat(part, gradient) for part in (checkpoint.exp_avg, checkpoint.exp_avg_sq))
        step = oracles.adam_step(oracles.flat(gradient), *moments, **constants)
        margins = _margins_along(setting, step)
        scale = STEP_LENGTH / float(step.norm())
        slopes.append(((margins(scale) - margins(-scale)) / (2 * STEP_LENGTH)).numpy() / lengths)
        changes.append((margins(state.mean_learning_rate) - margins(0.0)).numpy())
    return np.stack(slopes), np.stack(changes)


def _direction_length(model: torch.nn.Module, pair: EncodedPair) -> float:
    both = [
        oracles.flat(oracles.gradient(model, (s.input_ids, s.loss_mask), "sum_logps")[1])
        for s in (pair.chosen, pair.rejected)
    ]
    return float((both[1] - both[0]).norm())


def _pearson(x: np.ndarray, y: np.ndarray) -> float:
    return float(np.corrcoef(x, y)[0, 1])


def test_influence_is_the_margin_gained_per_unit_of_step_length(
    setting: Setting, say_figure: Callable[[str], None]
) -> None:
    influences = _influences(setting)
    assert influences.shape == (len(LEARNING_RATES), NUM_SAMPLES, NUM_PAIRS)
    for number in range(len(LEARNING_RATES)):
        slopes, changes = _measured(setting, number)
        assert np.abs(influences[number] - slopes).max() < SLOPE_ERROR
        for pair in range(NUM_PAIRS):
            exact = _pearson(influences[number][:, pair], slopes[:, pair])
            full = _pearson(influences[number][:, pair], changes[:, pair])
            where = f"checkpoint {number + 1}, pair {pair}"
            say_figure(
                f"reward step, {where}: Pearson with the slope {exact:.8f}, with the change under a full Adam step "
                f"{full:.4f}; mean change {changes[:, pair].mean():+.4f} nats"
            )
            assert exact >= LEAST_PEARSON
            assert np.ptp(slopes[:, pair]) > 100 * SLOPE_ERROR
