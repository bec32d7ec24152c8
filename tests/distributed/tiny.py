"""A whole job in small: pool, pairs, base model and configuration, written into a folder.

Every count that a test expects stands here, beside what makes it so.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

from rose_ray.config import JobConfig, parse_config
from tests.tiny import (
    byte_level_tokenizer,
    make_pair_rows,
    make_pool_rows,
    save_base,
    sentence,
    tiny_config,
    write_jsonl,
)

NUM_FIRST = 40
"""Unique rows of the first file of the pool."""

NUM_SECOND = 30
"""Unique rows that the second file adds, the overlong one and the twins included."""

NUM_SHARED = 6
"""Rows of the first file that stand in the second one as well."""

NUM_REPEATED = 2
"""Rows that stand in the first file twice."""

MALFORMED = {
    "not_json": b'{"id": "bad-1", "messages": [',
    "not_object": b'["a list"]',
    "invalid_utf8": b'{"id": "bad-3", "messages": "\xff\xfe"}',
    "no_assistant_turn": b'{"id": "bad-4", "messages": [{"role": "user", "content": "Hello?"}]}',
    "empty_answer": b'{"id": "bad-5", "messages": [{"role": "user", "content": "A"},'
    b' {"role": "assistant", "content": " "}]}',
}
"""Lines of the first file that are rejected, by reason."""

MAX_TOKENS = 96
SHARD_ROWS = 16
NUM_EPOCHS = 2
DIM = 64

NUM_UNIQUE = NUM_FIRST + NUM_SECOND
NUM_DUPLICATES = NUM_REPEATED + NUM_SHARED
NUM_READ = NUM_UNIQUE + NUM_DUPLICATES + len(MALFORMED)
NUM_SHARDS = -(-NUM_FIRST // SHARD_ROWS) + -(-(NUM_SHARED + NUM_SECOND) // SHARD_ROWS)
SUBTASKS = ("first", "second")


def write_inputs(folder: Path) -> None:
    """Write the base model, two pool files, and the pairs of two targets; one more of each for later."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = byte_level_tokenizer()
    save_base(folder / "base", tiny_config("llama", len(tokenizer)), tokenizer)
    write_first(folder / "m.jsonl")
    rows = make_pool_rows(NUM_FIRST)
    shared = [{**row, "id": f"copy-{number}", "note": "new"} for number, row in enumerate(rows[:NUM_SHARED])]
    added = [{**row, "id": f"second-{row['id']}"} for row in make_pool_rows(NUM_SECOND - 3, seed=7)]
    write_jsonl(folder / "n.jsonl", [*added[:8], *shared, overlong_row(), *twin_rows(), *added[8:]])
    write_jsonl(folder / "third.jsonl", third_rows())
    write_jsonl(folder / "pairs.jsonl", make_pair_rows(6))
    write_jsonl(folder / "other_pairs.jsonl", make_pair_rows(4, seed=5))
    write_jsonl(folder / "more_pairs.jsonl", make_pair_rows(3, seed=9))


def write_first(path: Path) -> None:
    """Write the pool's first file: unique rows, two of them twice, and lines that cannot be used."""
    lines = [json.dumps(row, ensure_ascii=False).encode() for row in make_pool_rows(NUM_FIRST)]
    lines[5:5] = MALFORMED.values()
    lines += lines[:NUM_REPEATED]
    path.write_bytes(b"".join(line + b"\n" for line in lines))


def third_rows() -> list[dict[str, Any]]:
    """Eight new rows, and three that the first file holds as well."""
    added = [{**row, "id": f"third-{row['id']}"} for row in make_pool_rows(8, seed=11)]
    return [*added[:4], *make_pool_rows(NUM_FIRST)[20:23], *added[4:]]


def overlong_row() -> dict[str, Any]:
    """A row whose answer begins beyond the token limit."""
    prompt = sentence(Random(3), 2 * MAX_TOKENS)
    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": "Yes."}]
    return {"id": "overlong", "source": "a", "messages": messages}


def twin_rows() -> list[dict[str, Any]]:
    """Two rows that are cut to the same tokens."""
    start = sentence(Random(4), 2 * MAX_TOKENS)
    answers = (f"{start} {ending}" for ending in ("left", "right"))
    return [
        {
            "id": f"twin-{number}",
            "source": "b",
            "messages": [{"role": "user", "content": "Twins?"}, {"role": "assistant", "content": answer}],
        }
        for number, answer in enumerate(answers)
    ]


def tiny_job(folder: Path, workspace: Path | str, overrides: Sequence[str] = ()) -> JobConfig:
    """Configuration of the job whose inputs `write_inputs` put into ``folder``.

    Args:
        folder: Of the inputs.
        workspace: Path of the workspace.
        overrides: As behind ``--set``.
    """
    return parse_config(tiny_content(folder, workspace), overrides)


def tiny_content(folder: Path, workspace: Path | str) -> dict[str, Any]:
    """The same as parsed YAML."""
    return {
        "workspace": str(workspace),
        "model": {"base": str(folder / "base"), "dtype": "float32", "max_tokens": MAX_TOKENS},
        "lora": {"rank": 4, "alpha": 8, "dropout": 0.05, "target_modules": ["q_proj", "v_proj"]},
        "pool": {"inputs": [{"files": [str(folder / "[mn].jsonl")]}], "shard_rows": SHARD_ROWS},
        "targets": [
            {
                "name": "alpha",
                "pairs": [{"files": [str(folder / "pairs.jsonl")], "subtask_field": "topic"}],
                "selection": {"count": 12},
            },
            {
                "name": "beta",
                "pairs": [{"files": [str(folder / "other_pairs.jsonl")]}],
                "objective": "rose_balanced",
                "selection": {"fraction": 0.1},
            },
        ],
        "warmup": {"fraction": 0.3, "epochs": NUM_EPOCHS, "learning_rate": 2e-3, "batch_size": 8},
        "gradients": {"projection": {"dim": DIM}, "max_batch_tokens": 512},
        "ray": {"address": "local", "actors": 1, "cpus_per_actor": 0.5},
    }


def third_target(folder: Path) -> dict[str, Any]:
    """A target that the job does not have yet."""
    return {"name": "gamma", "pairs": [{"files": [str(folder / "more_pairs.jsonl")]}], "objective": "less"}
