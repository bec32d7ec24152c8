"""Writes the whole demo: pool, pairs, held-out pairs, base model and configuration."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from random import Random

from rose_ray.demo.base_model import NUM_DRAFTS, draft_corpus, save_base, train_base, train_tokenizer
from rose_ray.demo.families import FAMILIES, OPPOSED_FAMILY, REWARDED_FAMILY, Exchange, how_to_prompt
from rose_ray.demo.matching import answer_lengths, drafts_of_length
from rose_ray.demo.vocabulary import Task, all_tasks

TARGET = "courteous"
SWAPPED_TARGET = "swapped"

ROWS_PER_FAMILY = 200
NUM_DUPLICATES = 12
SUBTASKS = ("kitchen", "workshop")
PAIRS_PER_SUBTASK = 10
HELD_OUT_PER_SUBTASK = 30

MALFORMED_LINES = (
    '{"id": "bad-1", "source": "facts", "messages": [{"role": "user", "content": "Describe the',
    '{"id": "bad-2", "source": "facts", "messages": [{"role": "user", "content": "Describe the lamp."}]}',
    '{"id": "bad-3", "source": "facts", "messages": [{"role": "user", "content": "Describe the pump."},'
    ' {"role": "assistant", "content": ""}]}',
)
"""Cut off in the middle; no answer; an empty answer."""


@dataclass(frozen=True)
class Pair:
    """A preference pair of the demo; both answers have the same number of tokens."""

    id: str
    subtask: str
    prompt: str
    chosen: str
    rejected: str


@dataclass(frozen=True)
class DemoPaths:
    """Where the parts of the demo lie. ``workspace`` is the job's; nothing is written there yet."""

    config: Path
    pool: Path
    pairs: Path
    swapped_pairs: Path
    held_out: Path
    base: Path
    workspace: Path


@dataclass(frozen=True)
class TaskSplit:
    """Tasks, parted so that no prompt of a pair is also in the pool, the corpus or the other pairs."""

    pool: list[Task]
    pairs: list[Task]
    held_out: list[Task]


def demo_paths(directory: Path) -> DemoPaths:
    """Return where a demo in ``directory`` keeps its parts, as absolute paths."""
    folder = directory.resolve()
    return DemoPaths(
        config=folder / "demo.yaml",
        pool=folder / "pool.jsonl",
        pairs=folder / "pairs.jsonl",
        swapped_pairs=folder / "pairs-swapped.jsonl",
        held_out=folder / "held-out.jsonl",
        base=folder / "base",
        workspace=folder / "workspace",
    )


def make_demo(directory: Path, seed: int = 0, *, num_drafts: int = NUM_DRAFTS) -> DemoPaths:
    """Write the demo into ``directory``, which is made where needed; an earlier demo's files are overwritten.

    The same seed gives the same files on the same machine. Most of the time, some ten seconds, goes into the base
    model.

    Args:
        directory: Where to write.
        seed: Decides everything that is drawn.
        num_drafts: Texts that the base model learns from. Fewer make a worse model sooner.
    """
    paths = demo_paths(directory)
    directory.mkdir(parents=True, exist_ok=True)
    split = split_tasks(seed)
    corpus = draft_corpus(seed, split.pool, num_drafts)
    tokenizer = train_tokenizer(corpus)

    def num_tokens(text: str) -> int:
        return len(tokenizer.encode(text, add_special_tokens=False))

    pairs = make_pairs(split.pairs, f"pairs {seed}", num_tokens)
    _write_lines(paths.pool, pool_lines(split.pool, seed, num_tokens))
    _write_lines(paths.pairs, map(pair_line, pairs))
    _write_lines(paths.swapped_pairs, (pair_line(swapped(pair)) for pair in pairs))
    _write_lines(paths.held_out, map(pair_line, make_pairs(split.held_out, f"held-out {seed}", num_tokens)))
    save_base(train_base(tokenizer, corpus, seed), tokenizer, paths.base)
    paths.config.write_text(demo_config(paths), encoding="utf-8")
    return paths


def split_tasks(seed: int) -> TaskSplit:
    """Part all tasks by chance into those of the pool, of the pairs and of the held-out pairs."""
    tasks = Random(f"tasks {seed}").sample(all_tasks(), len(all_tasks()))
    pairs: list[Task] = []
    held_out: list[Task] = []
    for room in SUBTASKS:
        of_room = [task for task in tasks if task.room == room]
        pairs += of_room[:PAIRS_PER_SUBTASK]
        held_out += of_room[PAIRS_PER_SUBTASK : PAIRS_PER_SUBTASK + HELD_OUT_PER_SUBTASK]
    reserved = {*pairs, *held_out}
    return TaskSplit([task for task in tasks if task not in reserved], pairs, held_out)


def pool_exchanges(tasks: list[Task], seed: int, num_tokens: Callable[[str], int]) -> list[tuple[str, Exchange]]:
    """Draw the pool's unique rows as (family, exchange), in mixed order.

    Every family has the same answer lengths.
    """
    rng = Random(f"pool {seed}")
    rows: list[tuple[str, Exchange]] = []
    taken: set[Exchange] = set()
    for name, family in FAMILIES.items():

        def draft(family: Callable[[Random, Task], Exchange] = family) -> Exchange:
            return family(rng, rng.choice(tasks))

        found = drafts_of_length(draft, answer_lengths(ROWS_PER_FAMILY), num_tokens, taken)
        rows += [(name, exchange) for exchange in found]
    rng.shuffle(rows)
    return rows


def pool_lines(tasks: list[Task], seed: int, num_tokens: Callable[[str], int]) -> list[str]:
    """Return the pool as JSON lines: unique rows, with copies of some under new ids and malformed lines strewn in."""
    rows = pool_exchanges(tasks, seed, num_tokens)
    lines = [_row_line(f"row-{i:04d}", family, exchange) for i, (family, exchange) in enumerate(rows)]
    rng = Random(f"extras {seed}")
    copies = [_row_line(f"copy-{i:02d}", *row) for i, row in enumerate(rng.sample(rows, NUM_DUPLICATES))]
    for line in [*copies, *MALFORMED_LINES]:
        lines.insert(rng.randrange(len(lines) + 1), line)
    return lines


def make_pairs(tasks: list[Task], seed: str, num_tokens: Callable[[str], int]) -> list[Pair]:
    """Draw one pair a task: a courteous answer in steps over a dismissive one, equally long."""
    rng = Random(seed)
    taken: set[Exchange] = set()

    def answer(family: str, task: Task, length: int) -> str:
        drafts = drafts_of_length(lambda: FAMILIES[family](rng, task), [length], num_tokens, taken)
        return drafts[0].answer

    return [
        Pair(
            id=f"pair-{i:02d}",
            subtask=task.room,
            prompt=how_to_prompt(rng, task),
            chosen=answer(REWARDED_FAMILY, task, length),
            rejected=answer(OPPOSED_FAMILY, task, length),
        )
        for i, (task, length) in enumerate(zip(tasks, answer_lengths(len(tasks)), strict=True))
    ]


def swapped(pair: Pair) -> Pair:
    """Return the pair with chosen and rejected in each other's place."""
    return Pair(f"{pair.id}-swapped", pair.subtask, pair.prompt, pair.rejected, pair.chosen)


def pair_line(pair: Pair) -> str:
    """Return the pair as one line of JSON."""
    return json.dumps(vars(pair))


def demo_config(paths: DemoPaths) -> str:
    """Return the YAML of the job, with absolute paths."""
    return _CONFIG.format(**{name: json.dumps(str(path)) for name, path in vars(paths).items()})


_CONFIG = """\
# The demo's job. The pairs prefer courteous answers in steps; `swapped` asks for the opposite.
workspace: {workspace}
model:
  base: {base}
  dtype: float32
  max_tokens: 128
lora:
  rank: 8
  alpha: 32
  dropout: 0.0
pool:
  inputs:
    - files: [{pool}]
      source_field: source
  shard_rows: 256
targets:
  - name: courteous
    pairs:
      - files: [{pairs}]
        subtask_field: subtask
    selection:
      fraction: 0.1
  - name: swapped
    pairs:
      - files: [{swapped_pairs}]
        subtask_field: subtask
    selection:
      fraction: 0.1
warmup:
  fraction: 0.1
  epochs: 4
  learning_rate: 2e-3
  batch_size: 8
gradients:
  projection:
    dim: 4096
  max_batch_tokens: 2048
ray:
  address: local
  actors: 1
  cpus_per_actor: 0.75
"""


def _row_line(row_id: str, source: str, exchange: Exchange) -> str:
    messages = [
        {"role": "user", "content": exchange.prompt},
        {"role": "assistant", "content": exchange.answer},
    ]
    return json.dumps({"id": row_id, "source": source, "messages": messages})


def _write_lines(path: Path, lines: Iterable[str]) -> None:
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
