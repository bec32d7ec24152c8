"""A method run on a small pool without Ray: the same functions, one shard after the other."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from rose_ray.config.method import BUILT_IN, parse_options
from rose_ray.config.target import PairInput, TargetConfig
from rose_ray.data.chat import TULU_TEMPLATE, ChatTemplate
from rose_ray.data.conversation import Conversation, Message, canonical_json, row_id
from rose_ray.data.preferences import PreferencePair
from rose_ray.data.tokenize import Tokeniser
from rose_ray.filesystem import locate
from rose_ray.methods import shards as steps
from rose_ray.methods.interface import Method, MethodModel, PoolRows, Target
from rose_ray.methods.registry import method_of
from rose_ray.methods.shards import MethodRun
from rose_ray.methods.table import make_table
from rose_ray.stages.ingest import IngestSettings, PoolFile, ingest_file
from rose_ray.stages.pool import settle_pool, skipped_rows
from rose_ray.stores.manifest import Manifest
from rose_ray.stores.workspace import Workspace


def make_pair(prompt: str, chosen: str, rejected: str = "no", subtask: str = "t", number: int = 0) -> PreferencePair:
    """A pair of one user turn."""
    return PreferencePair(
        f"{subtask}-{number}", subtask, (Message("user", prompt),), chosen, rejected, prompt, chosen, rejected
    )


def make_rows(
    texts: Sequence[tuple[str, str]],
    sources: Sequence[str] | None = None,
    records: Sequence[Mapping[str, Any]] | None = None,
) -> PoolRows:
    """Rows of one question and one answer each; tokens are words, those of the answer carry loss."""
    conversations = [Conversation((Message("user", q), Message("assistant", a))) for q, a in texts]
    return PoolRows(
        [row_id(each) for each in conversations],
        list(sources or ["s"] * len(texts)),
        [canonical_json(each) for each in conversations],
        [json.dumps(record) for record in (records or [{}] * len(texts))],
        np.array([len(q.split()) + len(a.split()) for q, a in texts], np.int32),
        np.array([len(a.split()) for _, a in texts], np.int32),
    )


def make_method(name: str, **options: Any) -> Method[Any]:
    """A built-in method with options."""
    target = TargetConfig(name="t", method=name, method_options=options, pairs=[PairInput(files=["f"])])
    assert parse_options(name, BUILT_IN[name].options, options)
    return method_of(target)


def score_parts(
    method: Method[Any], parts: Sequence[PoolRows], pairs: Sequence[PreferencePair], model: MethodModel | None = None
) -> np.ndarray:
    """All scores [N, columns] of a pool that lies in these parts."""
    target = Target("t", tuple(pairs))
    statistics = method.merge([method.survey(part, target) for part in parts]) if method.needs.pool_statistics else {}
    state = method.prepare(target, statistics, model)
    return np.concatenate([method.score(part, state, model).values for part in parts])


def split(rows: PoolRows, size: int) -> list[PoolRows]:
    """The same rows in parts."""
    columns = list(vars(rows).values())[:6]
    return [PoolRows(*(column[i : i + size] for column in columns)) for i in range(0, len(rows), size)]


def make_pool(workspace: Workspace, folder: Path, files: Mapping[str, Sequence[Mapping[str, Any]]]) -> Manifest:
    """Ingest files of records into shards of four rows."""
    manifests = []
    for name, rows in files.items():
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        manifests.append(ingest_file(workspace, PoolFile(locate(str(path))), IngestSettings(shard_rows=4)))
    return settle_pool(workspace, manifests)


def run_method(
    workspace: Workspace,
    pool: Manifest,
    target: TargetConfig,
    tokeniser: Tokeniser,
    pairs: Sequence[PreferencePair] = (),
) -> tuple[pa.Table, Manifest]:
    """Run a target's method over a pool; return the score table and its manifest. Finds nothing that is there."""
    method = method_of(target)
    told = Target(target.name, tuple(pairs) if method.needs.pairs else ())
    key = steps.lengths_key("text", tokeniser.max_tokens)
    run = MethodRun(method, told, steps.method_content(method, target.method, told, key, {}), key, pool.key)
    skipped = skipped_rows(workspace, pool)
    shards = [(entry["shard"], skipped.get(entry["shard"], [])) for entry in pool.facts["shards"]]
    for shard, left_out in shards:
        steps.count_tokens(workspace, pool, shard, left_out, key, tokeniser)
        if method.needs.pool_statistics:
            steps.survey_shard(workspace, pool, shard, left_out, run)
    steps.make_state(workspace, pool, run, None)
    state = steps.read_state(workspace, run)
    for shard, left_out in shards:
        steps.score_shard(workspace, pool, shard, left_out, run, state, None)
    made = make_table(workspace, pool, run, target, {})
    record = made.file("scores.parquet")
    return workspace.read_table(record.path, record), made


def tiny_tokeniser(tokenizer: Any, max_tokens: int = 96) -> Tokeniser:
    """A tokeniser with LESS's template."""
    special = tuple(tokenizer.all_special_tokens)
    return Tokeniser(tokenizer, ChatTemplate(TULU_TEMPLATE, "", tokenizer.eos_token, special), max_tokens)
