"""What is done with one shard, or once for a pool, so that a method can score it. Plain functions; Ray calls them.

Artefacts: ``lengths/KEY/SHARD`` (tokens of each row), ``surveys/KEY/SHARD`` (part of the pool's statistics),
``states/KEY`` (what scoring has to know), ``shard_scores/KEY/SHARD``.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rose_ray.data.tokenize import Tokeniser
from rose_ray.errors import AccountingError, NonFiniteError, ShapeError, StoreError
from rose_ray.methods.interface import Arrays, Method, MethodModel, PoolRows, Scored, Target
from rose_ray.schemas import FEATURE_REJECTED, LENGTHS, shard_scores_schema
from rose_ray.stages.pool import read_pool_shard
from rose_ray.stages.tokens import tokenize_shard
from rose_ray.stores import shards as store
from rose_ray.stores.manifest import Manifest, artefact_key, commit_artefact, find_manifest, read_manifest
from rose_ray.stores.workspace import Workspace

LENGTHS_VERSION = 1
"""Raised whenever the same rows would give other lengths."""

LENGTHS_FILE, REJECTED_FILE, SCORES_FILE = "lengths.parquet", "rejected.parquet", "scores.parquet"
PART_FILE, STATE_FILE = "part.safetensors", "state.safetensors"
STATES = "states"
_NUM_NAMED = 10


@dataclass(frozen=True)
class MethodRun:
    """One method for one target; travels by pickle.

    Attributes:
        method: With its options.
        target: What it is told of the target: pairs only where it needs them.
        content: What scores depend on besides the pool: method, options, target, tokens, model.
        lengths_key: Of the token counts, which say what rows there are.
        pool_key: Of the pool.
    """

    method: Method[Any]
    target: Target
    content: Mapping[str, Any] = field(repr=False)
    lengths_key: str
    pool_key: str

    @property
    def subtasks(self) -> list[str]:
        """Names of the score table's columns."""
        return [self.target.name] if self.method.columns == "one" else self.target.subtasks

    @property
    def num_columns(self) -> int:
        """Columns that the method has to give."""
        return len(self.target.pairs) if self.method.columns == "pairs" else len(self.subtasks)

    @property
    def survey_key(self) -> str:
        """Of the parts of the pool's statistics: they know neither the pool nor, mostly, the target."""
        left_out = () if self.method.survey_reads_pairs else ("target",)
        return artefact_key(
            {"stage": "survey", **{name: value for name, value in self.content.items() if name not in left_out}}
        )

    @property
    def state_content(self) -> dict[str, Any]:
        """What the state is made from; the pool is part of it where its statistics are."""
        pool = {"pool": self.pool_key} if self.method.needs.pool_statistics else {}
        return {"stage": "state", **self.content, **pool}

    @property
    def key(self) -> str:
        """Of the state, and of the scores that follow from it."""
        return artefact_key(self.state_content)

    @property
    def state_folder(self) -> str:
        """Where the state lies."""
        return f"{STATES}/{self.key}"


def method_content(
    method: Method[Any], name: str, target: Target, lengths: str, model: Mapping[str, Any]
) -> dict[str, Any]:
    """Return what a method's scores depend on besides the pool.

    Args:
        method: With its options.
        name: As configured.
        target: What it is told of the target.
        lengths: Key of the token counts.
        model: Identity of the model, as far as the method needs one.
    """
    pairs = hashlib.sha256(repr([asdict(pair) for pair in target.pairs]).encode()).hexdigest()
    return {
        "method": name,
        "version": method.version,
        "options": method.options.model_dump(mode="json"),
        "content": dict(method.content()),
        "columns": method.columns,
        "lengths": lengths,
        "target": pairs,
        **({"model": dict(model)} if model else {}),
    }


def lengths_key(text: str, max_tokens: int) -> str:
    """Return the key of the token counts of a tokenizer and template (their digest) under a limit."""
    return artefact_key({"stage": "lengths", "version": LENGTHS_VERSION, "text": text, "max_tokens": max_tokens})


def count_tokens(
    workspace: Workspace, pool: Manifest, shard: str, skipped: Sequence[str], key: str, tokeniser: Tokeniser
) -> Manifest:
    """Count the tokens of a shard's rows and commit them; rows that make no sample are rejected, as for features.

    Args:
        workspace: Holds the pool.
        pool, shard, skipped: Which rows: those of the shard without the skipped ones.
        key: From `lengths_key`.
        tokeniser: Of the base model.
    """
    started = time.monotonic()
    rows = read_pool_shard(workspace, pool, shard, columns=["row_id", "conversation"], skipped={shard: list(skipped)})
    tokens, rejected = tokenize_shard(rows, tokeniser)
    masks = tokens["loss_mask"].to_pylist()
    lengths = pa.Table.from_arrays(
        [
            tokens["row_id"],
            pc.list_value_length(tokens["input_ids"]).cast(pa.int32()),
            pa.chunked_array([pa.array([sum(mask[1:]) for mask in masks], pa.int32())]),
            tokens["num_tokens_cut"],
        ],
        schema=LENGTHS,
    )
    folder = f"{store.LENGTHS}/{key}/{shard}"
    files = [
        workspace.write_table(f"{folder}/{LENGTHS_FILE}", lengths),
        workspace.write_table(f"{folder}/{REJECTED_FILE}", rejected),
    ]
    counts = _counts(rows.num_rows, lengths.num_rows, rejected.num_rows)
    facts = {"num_tokens": int(pc.sum(lengths["num_tokens"]).as_py() or 0)}
    return store.commit_shard(
        workspace, store.LENGTHS, key, shard, files, counts, skipped, started=started, facts=facts
    )


def survey_shard(workspace: Workspace, pool: Manifest, shard: str, skipped: Sequence[str], run: MethodRun) -> Manifest:
    """Commit a shard's part of the pool's statistics."""
    started = time.monotonic()
    rows = pool_rows(workspace, pool, shard, skipped, run.lengths_key)
    target = run.target if run.method.survey_reads_pairs else Target(run.target.name, ())
    part = run.method.survey(rows, target) if len(rows) else {}
    folder = f"{store.SURVEYS}/{run.survey_key}/{shard}"
    files = [store.write_arrays(workspace, f"{folder}/{PART_FILE}", part)]
    counts = {"rows": len(rows)}
    return store.commit_shard(workspace, store.SURVEYS, run.survey_key, shard, files, counts, skipped, started=started)


def make_state(workspace: Workspace, pool: Manifest, run: MethodRun, model: MethodModel | None) -> Manifest:
    """Merge the surveys of a pool, let the method prepare, and commit its state.

    Raises:
        StoreError: A survey is missing.
    """
    started = time.monotonic()
    statistics: Arrays = {}
    if run.method.needs.pool_statistics:
        parts = [_read_part(workspace, entry["shard"], run) for entry in pool.facts["shards"]]
        statistics = run.method.merge([part for part in parts if part])
    state = run.method.prepare(run.target, statistics, model)
    files = [store.write_arrays(workspace, f"{run.state_folder}/{STATE_FILE}", state)]
    counts = {"pairs": len(run.target.pairs), "arrays": len(state)}
    return commit_artefact(
        workspace, "state", run.state_content, files, counts, {}, started=started, folder=run.state_folder
    )


def read_state(workspace: Workspace, run: MethodRun) -> Arrays:
    """Return what a method has prepared.

    Raises:
        StoreError: It has not.
    """
    return store.read_arrays(workspace, read_manifest(workspace, run.state_folder).file(STATE_FILE))


def score_shard(
    workspace: Workspace,
    pool: Manifest,
    shard: str,
    skipped: Sequence[str],
    run: MethodRun,
    state: Arrays,
    model: MethodModel | None,
) -> Manifest:
    """Score a shard's rows and commit the scores.

    Raises:
        ShapeError: The method gave other columns or rows than it should.
        NonFiniteError: A score is NaN or infinite.
        AccountingError: The method rejects a row that it was not given.
    """
    started = time.monotonic()
    rows = pool_rows(workspace, pool, shard, skipped, run.lengths_key)
    is_vector = run.method.columns == "vector"
    scored = run.method.score(rows, state, model) if len(rows) else Scored(np.zeros((0, run.num_columns)))
    width = scored.values.shape[1] if is_vector else run.num_columns
    _check(scored, rows, width, f"method {type(run.method).__name__}, shard {shard}")
    kept = [place for place in range(len(rows)) if place not in scored.rejected]
    number = pa.float32() if is_vector else pa.float64()
    values = np.ascontiguousarray(scored.values[kept], dtype=number.to_pandas_dtype())
    table = pa.Table.from_arrays(
        [
            pa.array([rows.row_ids[place] for place in kept], pa.string()),
            pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), width),
        ],
        schema=shard_scores_schema(width, number),
    )
    rejected = [
        {"row_id": rows.row_ids[place], "reason": reason, "detail": detail}
        for place, (reason, detail) in sorted(scored.rejected.items())
    ]
    folder = f"{store.SHARD_SCORES}/{run.key}/{shard}"
    files = [
        workspace.write_table(f"{folder}/{SCORES_FILE}", table),
        workspace.write_table(f"{folder}/{REJECTED_FILE}", pa.Table.from_pylist(rejected, schema=FEATURE_REJECTED)),
    ]
    counts = _counts(len(rows), len(kept), len(rejected))
    return store.commit_shard(workspace, store.SHARD_SCORES, run.key, shard, files, counts, skipped, started=started)


def pool_rows(workspace: Workspace, pool: Manifest, shard: str, skipped: Sequence[str], key: str) -> PoolRows:
    """Return the rows of a shard that have tokens, in the shard's order.

    Raises:
        StoreError: Their tokens were not counted.
    """
    columns = ["row_id", "source", "conversation", "record"]
    table = read_pool_shard(workspace, pool, shard, columns=columns, skipped={shard: list(skipped)})
    receipt = store.find_receipt(workspace, store.LENGTHS, key, shard, skipped)
    if receipt is None:
        raise StoreError(f"shard {shard}: its tokens were not counted. Run `rose-ray run` again.")
    record = receipt.file(LENGTHS_FILE)
    lengths = workspace.read_table(record.path, record)
    places = pc.index_in(table["row_id"], value_set=lengths["row_id"])
    table, lengths = table.filter(places.is_valid()), lengths.take(places.drop_null())
    row_ids, sources, texts, records = (table[name].to_pylist() for name in columns)
    num_tokens, num_labelled_tokens = (lengths[name].to_numpy() for name in ("num_tokens", "num_labelled_tokens"))
    return PoolRows(row_ids, sources, texts, records, num_tokens, num_labelled_tokens)


def _read_part(workspace: Workspace, shard: str, run: MethodRun) -> dict[str, Any]:
    receipt = find_manifest(workspace, f"{store.SURVEYS}/{run.survey_key}/{shard}")
    if receipt is None:
        raise StoreError(f"shard {shard}: its part of the pool's statistics is missing. Run `rose-ray run` again.")
    return store.read_arrays(workspace, receipt.file(PART_FILE))


def _counts(rows: int, scored: int, rejected: int) -> dict[str, int]:
    if rows != scored + rejected:
        raise AccountingError(f"{rows} rows in, {scored} out and {rejected} rejected. This is a bug; please report it.")
    return {"rows": rows, "scored": scored, "rejected": rejected}


def _check(scored: Scored, rows: PoolRows, width: int, where: str) -> None:
    if scored.values.shape != (len(rows), width):
        raise ShapeError(f"{where}: scores have shape {scored.values.shape}; expected {(len(rows), width)}.")
    strange = sorted(place for place in scored.rejected if not 0 <= place < len(rows))
    if strange:
        raise AccountingError(f"{where}: rejects rows {strange[:_NUM_NAMED]}, expected 0 to {len(rows) - 1}.")
    bad = [int(i) for i in np.flatnonzero(~np.isfinite(scored.values).all(axis=1)) if i not in scored.rejected]
    if bad:
        named = ", ".join(rows.row_ids[place] for place in bad[:_NUM_NAMED])
        raise NonFiniteError(
            f"{where}: {len(bad)} rows have scores that are not finite, first: {named}; expected numbers, or the rows "
            "in `Scored.rejected`."
        )
