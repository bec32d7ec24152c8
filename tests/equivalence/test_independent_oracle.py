"""A whole run on Ray against a second implementation that shares no code with it.

The oracle below takes the pool file, the pairs file, the base model and the checkpoints that the run left behind, and
computes the score table in plain loops with transformers, PEFT and autograd in float64. The project's own code comes
in below the line that says so.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch
from torch import Tensor

from tests.tiny import byte_level_tokenizer, make_pair_rows, make_pool_rows, save_base, tiny_config, write_jsonl

pytestmark = [pytest.mark.ray, pytest.mark.slow]

ROUNDING = 5e-5
"""On scores in [-1, 1], spread by 0.1. The run computes in float32 (6e-8), and Gamma magnifies a gradient's rounding
where the second moment is tiny."""

LEAST_SPEARMAN = 0.95
"""With the default sketch: signs of 16,384 numbers for some 28,672 parameters."""

NUM_ROWS = 60
SHOTS = 2
MAX_TOKENS = 48
DPO_BETA = 0.1


@dataclass(frozen=True)
class Files:
    """What the oracle reads."""

    base: str
    pool: Path
    pairs: Path
    checkpoints: list[Path]


def read_rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def oracle_row_id(messages: list[dict[str, str]]) -> str:
    content = {"messages": [{"content": turn["content"], "role": turn["role"]} for turn in messages]}
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":"), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def oracle_sample(tokenizer: Any, messages: list[dict[str, str]], *, last_only: bool) -> tuple[list[int], list[bool]]:
    """Ids and mask: every assistant turn (or the last) from behind its header to its end token; the right side cut."""

    def encode(turns: list[dict[str, str]], header: bool) -> list[int]:
        ids: list[int] = tokenizer.apply_chat_template(turns, add_generation_prompt=header, return_dict=False)
        return ids

    ids = encode(messages, header=False)
    mask = [False] * len(ids)
    turns = [i for i, turn in enumerate(messages) if turn["role"] == "assistant"]
    for turn in turns[-1:] if last_only else turns:
        place = len(encode(messages[:turn], header=True))
        while True:
            mask[place] = True
            if ids[place] == tokenizer.eos_token_id:
                break
            place += 1
    return ids[:MAX_TOKENS], mask[:MAX_TOKENS]


class OracleModel:
    """Base model and one checkpoint, float64, one sequence at a time."""

    def __init__(self, base: str, checkpoint: Path) -> None:
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
        self.model = PeftModel.from_pretrained(model, str(checkpoint), is_trainable=True).double().eval()
        self.parameters = {n.replace(".default", ""): p for n, p in self.model.named_parameters() if p.requires_grad}

    def logps(self, ids: list[int], mask: list[bool]) -> Tensor:
        distribution = self.model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        return torch.stack([distribution[i - 1, ids[i]] for i in range(1, len(ids)) if mask[i]])

    def gradient(self, value: Tensor) -> Tensor:
        grads = torch.autograd.grad(value, list(self.parameters.values()))
        return torch.cat([grad.flatten() for grad in grads])

    def dpo_gradient(self, chosen: tuple[list[int], list[bool]], rejected: tuple[list[int], list[bool]]) -> Tensor:
        with torch.no_grad(), self.model.disable_adapter():
            reference = self.logps(*chosen).sum() - self.logps(*rejected).sum()
        margin = self.logps(*chosen).sum() - self.logps(*rejected).sum() - reference
        return self.gradient(-torch.nn.functional.logsigmoid(DPO_BETA * margin))


class OracleAdam:
    """One checkpoint's moments, and the step it would take for one gradient."""

    def __init__(self, checkpoint: Path, names: list[str]) -> None:
        moments = safetensors.torch.load_file(checkpoint / "moments.safetensors")
        self.m, self.v = (
            torch.cat([moments[f"{kind}.{name}"].double().flatten() for name in names])
            for kind in ("exp_avg", "exp_avg_sq")
        )
        self.state = json.loads((checkpoint / "optimizer_state.json").read_text())

    def direction(self, g: Tensor) -> Tensor:
        beta1, beta2 = self.state["adam_beta1"], self.state["adam_beta2"]
        t = self.state["num_updates"] + 1
        m = (beta1 * self.m + (1 - beta1) * g) / (1 - beta1**t)
        v = (beta2 * self.v + (1 - beta2) * g * g) / (1 - beta2**t)
        return m / (v.sqrt() + self.state["adam_eps"])


def oracle_scores(files: Files) -> dict[str, dict[str, float]]:
    """The score table: row id -> subtask columns and score."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(files.base)
    rows = {oracle_row_id(row["messages"]): row["messages"] for row in read_rows(files.pool)}
    subtasks: dict[str, list[dict[str, Any]]] = {}
    for pair in read_rows(files.pairs):
        subtasks.setdefault(pair["topic"], []).append(pair)
    influences: dict[tuple[str, str, int], float] = {}
    rates = [json.loads((c / "optimizer_state.json").read_text())["mean_learning_rate"] for c in files.checkpoints]
    for checkpoint, rate in zip(files.checkpoints, rates, strict=True):
        model = OracleModel(files.base, checkpoint)
        adam = OracleAdam(checkpoint, list(model.parameters))
        directions = {}
        for name, pairs in subtasks.items():
            for shot, pair in enumerate(pairs[:SHOTS]):
                prompt = [{"role": "user", "content": pair["prompt"]}]
                sides = [
                    oracle_sample(tokenizer, [*prompt, {"role": "assistant", "content": pair[key]}], last_only=True)
                    for key in ("chosen", "rejected")
                ]
                directions[name, shot] = model.dpo_gradient(sides[0], sides[1])
        for row, messages in rows.items():
            ids, mask = oracle_sample(tokenizer, messages, last_only=False)
            if not any(mask[1:]):  # the prompt alone fills the limit: such a row has no score
                continue
            gamma = adam.direction(model.gradient(-model.logps(ids, mask).mean()))
            for (name, shot), direction in directions.items():
                cosine = float(gamma @ direction / (gamma.norm() * direction.norm()))
                key = (row, name, shot)
                influences[key] = influences.get(key, 0.0) + rate / sum(rates) * cosine
    table: dict[str, dict[str, float]] = {}
    for row in sorted({row for row, _, _ in influences}):
        columns = {
            f"subtask_{name}": sum(influences[row, name, shot] for shot in range(SHOTS)) / SHOTS for name in subtasks
        }
        table[row] = {**columns, "score": max(columns.values())}
    return table


# From here on: the run itself, by the project's own code.


@dataclass
class Runs:
    """Score tables of the run without and with a projection, and what the oracle needs."""

    files: Files
    exact: list[dict[str, Any]]
    sketched: list[dict[str, Any]]
    num_rejected: int
    num_cut: int


def _settings(folder: Path, base: str) -> dict[str, Any]:
    return {
        "workspace": str(folder / "workspace"),
        "model": {"base": base, "dtype": "float32", "max_tokens": MAX_TOKENS},
        "lora": {"rank": 32, "alpha": 64.0},
        "pool": {"inputs": [{"files": [str(folder / "pool.jsonl")]}], "shard_rows": 25},
        "targets": [
            {
                "name": "words",
                "shots": SHOTS,
                "pairs": [{"files": [str(folder / "pairs.jsonl")], "subtask_field": "topic"}],
                "dpo_beta": DPO_BETA,
            }
        ],
        "warmup": {"fraction": 0.8, "epochs": 2, "learning_rate": 5e-3, "batch_size": 8},
        "gradients": {"projection": {"kind": "none"}, "stored_dtype": "float32", "max_batch_tokens": 512},
        "ray": {"address": "local", "actors": 1, "cpus_per_actor": 1},
    }


@pytest.fixture(scope="module")
def runs(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    from rose_ray.config.load import parse_config
    from rose_ray.distributed.run import run_job

    folder = tmp_path_factory.mktemp("oracle")
    tokenizer = byte_level_tokenizer()
    base = save_base(folder / "base", tiny_config("llama", len(tokenizer), hidden_size=64), tokenizer)
    rows = make_pool_rows(NUM_ROWS - 2, seed=11)
    pool = write_jsonl(folder / "pool.jsonl", [*rows, *({**row, "id": f"again {row['id']}"} for row in rows[:2])])
    pairs = write_jsonl(folder / "pairs.jsonl", make_pair_rows(2 * SHOTS + 2, seed=12))
    config = parse_config(_settings(folder, base))
    exact = run_job(config)
    sketched = run_job(parse_config(_settings(folder, base), ["gradients.projection={}"]))
    assert exact.warmup is not None and sketched.warmup == exact.warmup
    workspace = folder / "workspace"
    checkpoints = [workspace / exact.warmup.folder / c["name"] for c in exact.warmup.facts["checkpoints"]]
    tables = [
        pq.read_table(workspace / run.scores["words"].folder / "scores.parquet").to_pylist()
        for run in (exact, sketched)
    ]
    num_rejected = exact.scores["words"].counts["rejected"]
    num_cut = sum(row["num_tokens"] == MAX_TOKENS for row in tables[0])
    yield Runs(Files(base, pool, pairs, checkpoints), *tables, num_rejected, num_cut)


@pytest.fixture(scope="module")
def expected(runs: Runs) -> dict[str, dict[str, float]]:
    return oracle_scores(runs.files)


def test_without_a_projection_the_score_table_is_the_oracle_s(
    runs: Runs, expected: dict[str, dict[str, float]]
) -> None:
    assert sorted(row["row_id"] for row in runs.exact) == sorted(expected)
    assert len(runs.exact) == NUM_ROWS - 2 - runs.num_rejected
    assert runs.num_rejected > 0 and runs.num_cut > 0
    for row in runs.exact:
        for column, value in expected[row["row_id"]].items():
            assert row[column] == pytest.approx(value, abs=ROUNDING), (row["row_id"], column)
    spread = np.ptp([columns["score"] for columns in expected.values()])
    assert spread > 1000 * ROUNDING


def test_ranks_are_the_oracle_s_where_scores_differ_by_more_than_rounding(
    runs: Runs, expected: dict[str, dict[str, float]]
) -> None:
    by_rank = [expected[row["row_id"]]["score"] for row in sorted(runs.exact, key=lambda row: row["rank"])]
    assert all(first > second - 2 * ROUNDING for first, second in itertools.pairwise(by_rank))


def test_with_the_default_sketch_it_ranks_alike(runs: Runs, expected: dict[str, dict[str, float]]) -> None:
    for column in ("subtask_first", "subtask_second", "score"):
        pairs = [(row[column], expected[row["row_id"]][column]) for row in runs.sketched]
        assert _spearman(*np.array(pairs).T) > LEAST_SPEARMAN, column


def _spearman(x: np.ndarray, y: np.ndarray) -> float:
    ranks = [np.argsort(np.argsort(values)) for values in (x, y)]
    return float(np.corrcoef(*ranks)[0, 1])
