"""The protocol as configurations: tasks times selectors, one pool, one evaluation a task.

Every target is one selector on one task, named ``TASK-SELECTOR``. Three tasks are preference benchmarks; the fourth is
a control whose answer is known: its pairs are held-out rows of one source of the pool, each against the answer of a row
of another source, so what should be selected is that source.

All configurations name one workspace, one pool and all targets, so the job runs once; each evaluates the targets of one
task on its own held-out pairs. On two cores, measuring every model on every task would take longer than training it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.evidence.pairs import CONTROL, TaskPairs, write_pairs
from rose_ray.config.model import ModelConfig
from rose_ray.model.tokenizer import load_tokeniser

MAX_TOKENS = 1024
"""Few pairs are longer, and they cost most."""

SELECTORS: Mapping[str, Mapping[str, Any]] = {
    "rose": {},
    "rose_exact": {"exact": True},
    "rose_own": {"normalize": "own"},
    "rose_raw": {"normalize": "none"},
    "rose_turns": {"selection": {"method": "round_robin_pairs"}},
    "rose_balanced": {"objective": "rose_balanced"},
    "rose_simpo": {"objective": "rose_simpo"},
    "less": {"method": "less"},
    "less_own": {"method": "less", "normalize": "own"},
    "less_turns": {"method": "less", "selection": {"method": "round_robin_pairs"}},
    "rds_plus": {"method": "rds_plus"},
    "rds_plus_mean": {"method": "rds_plus", "selection": {"method": "top_k"}},
    "bm25": {"method": "bm25"},
}
"""Beside them stand random rows, the evaluation's reference, drawn anew for every seed. ``turns``: pairs take turns, as
they do in RDS+; without, a row's score is the mean over pairs.
"""

MISDIRECTED = ("rose", "less")
"""Selectors whose selections for the other tasks are measured on the control too: what they gain there has nothing to
do with the pairs that they were made for."""


@dataclass(frozen=True)
class Scale:
    """How much is computed.

    Attributes:
        share: Of the pool.
        shots: Pairs of each subtask.
        held_out: Pairs measured on, of each held-out set.
        budgets: Shares of the pool selected.
        seeds: Trainings of each selection.
        epochs: Of the warm-up.
        adam: What a gradient becomes.
        draw: Chooses the rows of the sampled pool, those of the warm-up, and the pairs.
    """

    share: float = 0.11576
    shots: int = 10
    held_out: int = 60
    budgets: tuple[float, ...] = (0.01, 0.05)
    seeds: tuple[int, ...] = (0, 1, 2)
    epochs: int = 2
    adam: str = "torch"
    draw: int = 0


@dataclass(frozen=True)
class Protocol:
    """What is run.

    Attributes:
        configs: By task.
        left_out: Pairs passed over, by file; see `TaskPairs`.
    """

    configs: dict[str, dict[str, Any]]
    left_out: dict[str, int]


def protocol(
    data: Path, scratch: Path, scale: Scale, tasks: Sequence[str], selectors: Sequence[str], base: str, dtype: str
) -> Protocol:
    """Write pool and pairs, and return the configurations.

    Args:
        data: Shared folder with ``data/``.
        scratch: For the workspace and what is written for it.
        scale: How much.
        tasks: Of `benchmarks.evidence.pairs.TASKS`.
        selectors: Of `SELECTORS`.
        base: Folder of the base model: selector and target model.
        dtype: Of its weights.

    Raises:
        ConfigError: A file has too few pairs that can be used.
    """
    tokeniser = load_tokeniser(ModelConfig(base=base, max_tokens=MAX_TOKENS))
    pairs = write_pairs(data, scratch, tokeniser, tasks, scale.shots, scale.held_out, scale.draw)
    # Fifty times the defaults, which are for large models.
    rate, bound = {"learning_rate": 1e-3}, {"max_batch_tokens": 2048}
    job: dict[str, Any] = {
        "workspace": str(scratch / "workspace"),
        "model": {"base": base, "dtype": dtype, "max_tokens": MAX_TOKENS},
        "lora": {"rank": 32, "alpha": 128, "dropout": 0.0},
        "pool": {
            "inputs": [{"files": [str(pairs.pool)], "source_field": "source"}],
            "sample_fraction": scale.share,
            "sample_seed": scale.draw,
        },
        "targets": _targets(pairs, scale, tasks, selectors),
        "warmup": {"fraction": 0.2, "seed": scale.draw, "epochs": scale.epochs, "batch_size": 16, **rate, **bound},
        # The form in which all tables of docs/evidence.md were made.
        "gradients": {"adam": scale.adam, "projection": {"dim": 8192}, "stored_dtype": "int8", **bound},
        "ray": {"address": "local", "actors": 2, "cpus_per_actor": 0.75},
    }
    evaluation: dict[str, Any] = {
        # One epoch in small batches: as many steps as two in batches twice as large, at half the cost.
        "training": {"epochs": 1, "batch_size": 8, **rate, **bound},
        "dpo": {"learning_rate": 2.5e-4, **bound},
        "budgets": list(scale.budgets),
        "seeds": list(scale.seeds),
        "references": ["zero_shot", "random"],
        "controls": ["dpo_shots", "sft_chosen"],
    }
    configs = {}
    for task in tasks:
        arms = [arm_name(task, name, scale) for name in selectors]
        if task == CONTROL:
            wanted = [name for name in MISDIRECTED if name in selectors]
            arms += [arm_name(other, name, scale) for other in tasks for name in wanted if other != task]
        configs[task] = {**job, "evaluation": {**evaluation, "arms": arms, "held_out": pairs.held_out[task]}}
    return Protocol(configs, pairs.left_out)


def arm_name(task: str, selector: str, scale: Scale) -> str:
    """Return a target's name. Another Adam mode stands in it: workspaces keep the latest selection of a name."""
    return f"{task}-{selector}" + (f"-{scale.adam}" if scale.adam != "torch" else "")


def _targets(pairs: TaskPairs, scale: Scale, tasks: Sequence[str], selectors: Sequence[str]) -> list[dict[str, Any]]:
    return [
        {
            "name": arm_name(task, name, scale),
            "pairs": pairs.steering[task],
            **SELECTORS[name],
            "selection": {**SELECTORS[name].get("selection", {}), "fraction": max(scale.budgets)},
        }
        for task in tasks
        for name in selectors
    ]
