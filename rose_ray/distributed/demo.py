"""The demo: a generated job whose right answer is known, run as any other job is run."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterable
from pathlib import Path

import torch
import transformers
import typer

from rose_ray.config import JobConfig, load_config
from rose_ray.data.conversation import Message, parse_conversation
from rose_ray.data.tokenize import Sample
from rose_ray.demo.compare import Comparison, compare_selection
from rose_ray.demo.families import OPPOSED_FAMILY, REWARDED_FAMILY
from rose_ray.demo.make import SWAPPED_TARGET, TARGET, DemoPaths, make_demo
from rose_ray.distributed.job import RunResult
from rose_ray.distributed.run import run_job
from rose_ray.errors import StoreError
from rose_ray.model.tokenizer import load_tokeniser
from rose_ray.stages.pool import read_pool_shard, skipped_rows
from rose_ray.stages.report import result_lines
from rose_ray.stores.workspace import Workspace

logger = logging.getLogger(__name__)


def run_demo(directory: str, seed: int) -> None:
    """Generate the job, run it, and say what came out and whether it is right.

    Args:
        directory: Where everything is written; an earlier demo there is found and not done again.
        seed: Of the generated data and model.

    Raises:
        StoreError: The folder holds something else.
    """
    started = time.monotonic()
    folder = Path(directory)
    if folder.exists() and any(folder.iterdir()) and not (folder / "demo.yaml").exists():
        raise StoreError(f"{directory} is not empty and holds no demo. Name another folder: rose-ray demo FOLDER")
    logger.info(f"demo: generating a pool, preference pairs and a small base model in {directory}")
    paths = make_demo(folder, seed)
    logger.info(f"demo: generated in {time.monotonic() - started:.0f} s; the job is {paths.config}")
    config = load_config(str(paths.config))
    result = run_job(config)
    lines = [*result_lines(result.stages, result.selections), "", *_known_answer_lines(result)]
    _say(lines)
    comparing = time.monotonic()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)  # the models are too small to share
    logger.info("demo: fine-tuning the base on the selection and on as many random rows")
    _say([*_comparison_lines(_compare(config, paths, result, seed)), ""])
    seconds = f"{time.monotonic() - comparing:.0f} s to compare, {time.monotonic() - started:.0f} s in all"
    _say([f"{seconds}. Everything is in {paths.workspace}; try: rose-ray status {paths.config}"])


def _known_answer_lines(result: RunResult) -> Iterable[str]:
    def share(target: str, family: str, kind: str) -> float:
        value: float = result.selections[target].facts["summary"]["sources"][family][kind]
        return value

    pool = share(TARGET, REWARDED_FAMILY, "pool_share")
    asked, opposite = (share(target, REWARDED_FAMILY, "selected_share") for target in (TARGET, SWAPPED_TARGET))
    yield (
        f"known answer: the pairs reward the family {REWARDED_FAMILY!r} over {OPPOSED_FAMILY!r}. It is {pool:.0%} of "
        f"the pool and {asked:.0%} of the selection ({asked / pool:.1f} times as much);"
    )
    yield f"with the pairs swapped it is {opposite:.0%} of the selection ({opposite / pool:.1f} times)."


def _compare(config: JobConfig, paths: DemoPaths, result: RunResult, seed: int) -> Comparison:
    workspace = Workspace.open(config.workspace)
    tokeniser = load_tokeniser(config.model)
    assert result.pool is not None
    skipped = skipped_rows(workspace, result.pool)
    texts = [
        text
        for entry in result.pool.facts["shards"]
        for text in read_pool_shard(workspace, result.pool, entry["shard"], skipped=skipped)["conversation"].to_pylist()
    ]
    record = result.selections[TARGET].file("selected.parquet")
    selected = workspace.read_table(record.path, record)["conversation"].to_pylist()

    def samples(conversations: Iterable[str]) -> list[Sample]:
        return [tokeniser.encode(parse_conversation(text)) for text in conversations]

    held_out = []
    for line in paths.held_out.read_text(encoding="utf-8").splitlines():
        pair = json.loads(line)
        prompt = [Message("user", pair["prompt"])]
        held_out.append(
            (tokeniser.encode_answer(prompt, pair["chosen"]), tokeniser.encode_answer(prompt, pair["rejected"]))
        )
    return compare_selection(paths.base, samples(selected), samples(texts), held_out, seed=seed)


def _comparison_lines(comparison: Comparison) -> Iterable[str]:
    yield "reward margin on held-out pairs after fine-tuning the base on the same number of rows, nats:"
    rewards = [("selection", comparison.selected)]
    rewards += [(f"random draw {number}", draw) for number, draw in enumerate(comparison.random, start=1)]
    for name, reward in rewards:
        yield f"  {name:<14} {reward.margin:+8.3f}   {reward.accuracy:.0%} of pairs above 0"


def _say(lines: Iterable[str]) -> None:
    for line in lines:
        typer.echo(line)
