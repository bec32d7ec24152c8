"""The protocol as a configuration: tasks times selectors, one pool, one evaluation.

Every target is one selector on one task, named ``TASK-SELECTOR``. Three tasks are preference benchmarks; the fourth is
a control whose answer is known: its pairs are held-out rows of one source of the pool, each against the answer of a row
of another source, so what should be selected is that source.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

CONTROL_SOURCE = "gpteacher_codegen"
"""Code: no other source of the pool looks like it, and it is a twelfth of the rows."""

NUM_CONTROL_ROWS = 120
"""Rows of the source held back: the first are the task's pairs, the others are measured on."""

SELECTORS: Mapping[str, Mapping[str, Any]] = {
    "rose": {},
    "rose_balanced": {"objective": "rose_balanced"},
    "rose_simpo": {"objective": "rose_simpo"},
    "less": {"method": "less"},
    "rds_plus": {"method": "rds_plus"},
    "bm25": {"method": "bm25"},
    "random": {"method": "random"},
}

PREFERENCES: Mapping[str, Sequence[tuple[str, str]]] = {
    "hh": (("helpful", "hh_helpful"), ("harmless", "hh_harmless")),
    "se": (("se", "se"),),
    "shp": (("shp", "shp"),),
}
"""Subtasks of a task, each with the stem of its files."""


@dataclass(frozen=True)
class Scale:
    """How much is computed.

    Attributes:
        share: Of the pool.
        shots: Pairs of each subtask.
        held_out: Pairs measured on, of each held-out set.
        budgets: Shares of the pool selected.
        seeds: Trainings of each selection.
        epochs: Of the fine-tuning and of the warm-up.
    """

    share: float = 0.11576
    shots: int = 10
    held_out: int = 100
    budgets: tuple[float, ...] = (0.01, 0.05)
    seeds: tuple[int, ...] = (0, 1, 2)
    epochs: int = 2


def hold_back(pool: Path, folder: Path, scale: Scale) -> dict[str, Path]:
    """Write the pool without the control's rows, and the control's pairs.

    Args:
        pool: Gzipped JSONL of conversations with a source.
        folder: Where to.
        scale: Its shots are the steering pairs.

    Returns:
        Paths of ``pool``, ``control_val`` and ``control_test``.
    """
    with gzip.open(pool, "rt", encoding="utf-8") as file:
        lines = file.readlines()
    rows = [json.loads(line) for line in lines]
    random = Random(0)
    own = [place for place, row in enumerate(rows) if row["source"] == CONTROL_SOURCE and len(row["messages"]) == 2]
    held = sorted(random.sample(own, NUM_CONTROL_ROWS))
    others = [row["messages"][-1]["content"] for row in rows if row["source"] != CONTROL_SOURCE]
    pairs = []
    for place in held:
        row = rows[place]
        prompt, answer = row["messages"][0]["content"], row["messages"][1]["content"]
        # Of like length, so that length does not tell the sides apart.
        drawn = random.sample(others, 200)
        rejected = min(drawn, key=lambda other: abs(len(other) - len(answer)))
        pairs.append({"id": row["id"], "prompt": prompt, "chosen": answer, "rejected": rejected})
    folder.mkdir(parents=True, exist_ok=True)
    paths = {name: folder / f"{name}.jsonl" for name in ("pool", "control_val", "control_test")}
    left_out = set(held)
    paths["pool"].write_text("".join(line for place, line in enumerate(lines) if place not in left_out), "utf-8")
    for name, part in (("control_val", pairs[: 2 * scale.shots]), ("control_test", pairs[2 * scale.shots :])):
        paths[name].write_text("".join(json.dumps(pair) + "\n" for pair in part), "utf-8")
    return paths


def protocol(
    data: Path, scratch: Path, scale: Scale, tasks: Sequence[str], selectors: Sequence[str], base: str, dtype: str
) -> dict[str, Any]:
    """Return the configuration.

    Args:
        data: Shared folder with ``data/`` and ``models/``.
        scratch: For the workspace and what is written for it.
        scale: How much.
        tasks: Of `PREFERENCES`, and ``control``.
        selectors: Of `SELECTORS`.
        base: Folder of the base model: selector and target model.
        dtype: Of its weights while rows are scored.
    """
    made = hold_back(data / "data/pool/pool.jsonl.gz", scratch, scale)
    preferences = data / "data/preferences"
    steering = {
        task: [{"files": [str(preferences / f"{stem}_val.jsonl.gz")], "subtask": name} for name, stem in subtasks]
        for task, subtasks in PREFERENCES.items()
    } | {"control": [{"files": [str(made["control_val"])], "subtask": "control"}]}
    held_out = {stem: preferences / f"{stem}_test.jsonl.gz" for task in tasks for _, stem in PREFERENCES.get(task, ())}
    if "control" in tasks:
        held_out["control"] = made["control_test"]
    targets = []
    for task in tasks:
        for name in selectors:
            settings = SELECTORS[name]
            pairs = {} if settings.get("method") == "random" else {"pairs": steering[task], "shots": scale.shots}
            targets.append(
                {"name": f"{task}-{name}", **pairs, **settings, "selection": {"fraction": max(scale.budgets)}}
            )
    training = {
        "epochs": scale.epochs,
        "learning_rate": 1e-3,
        "batch_size": 16,
        "max_batch_tokens": 2048,
    }
    return {
        "workspace": str(scratch / "workspace"),
        "model": {"base": base, "dtype": dtype, "max_tokens": 1024},
        "lora": {"rank": 32, "alpha": 128, "dropout": 0.0},
        "pool": {
            "inputs": [{"files": [str(made["pool"])], "source_field": "source"}],
            "sample_fraction": scale.share,
        },
        "targets": targets,
        "warmup": {"fraction": 0.2, **training},
        "gradients": {"max_batch_tokens": 2048},
        "ray": {"address": "local", "actors": 2, "cpus_per_actor": 0.75},
        "evaluation": {
            "training": training,
            "budgets": list(scale.budgets),
            "seeds": list(scale.seeds),
            "references": ["zero_shot", "random"],
            "held_out": [
                {"name": name, "pairs": [{"files": [str(path)]}], "max_pairs": scale.held_out}
                for name, path in held_out.items()
            ],
        },
    }
