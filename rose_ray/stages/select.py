"""Score tables to a training set: which rows, their original records, and a summary for people.

The JSONL holds each record's own text with one key added, ``rose_ray``, so nothing a trainer reads is changed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rose_ray.data.strict_json import without_key
from rose_ray.errors import AccountingError
from rose_ray.kernels.correlation import doubled_ranks, rank_correlation
from rose_ray.kernels.purse import Sources
from rose_ray.schemas import SELECTED
from rose_ray.stages.candidates import Candidates

SELECT_VERSION = 1
"""Raised whenever the same input would give another selection."""

RECORD_KEY = "rose_ray"
"""The key under which a selected record carries its row_id, score, place and source."""


CHOSEN_ONLY = "less"
"""The objective whose score is about the chosen answers alone, not about a margin."""


def chosen_rows(candidates: Candidates, positions: np.ndarray) -> pa.Table:
    """Return what the score tables know of the selected rows, in the pool's order.

    Args:
        candidates: What was chosen from.
        positions: From ``choose``.

    Returns:
        The columns of ``SELECTED`` but conversation and record, and ``shard``.
    """
    order = np.argsort(positions)
    ascending = positions[order]
    rows = candidates.scores.rows(ascending, ["row_id", "source", "num_tokens", "shard"])
    best_names = pa.array(list(candidates.choices), pa.string())
    best = pa.array(candidates.choice_at(ascending).argmax(axis=1))
    columns = {"place": order + 1, "score": candidates.score()[ascending], "best_for": best_names.take(best)}
    for name, column in columns.items():
        rows = rows.append_column(name, pa.array(column))
    return rows


def shards_of(chosen: pa.Table) -> Iterator[tuple[str, pa.Table]]:
    """Yield the selected rows of one shard after another, from what `chosen_rows` returned."""
    if chosen.num_rows == 0:
        return
    runs = pc.run_end_encode(chosen["shard"].combine_chunks())
    start = 0
    for shard, end in zip(runs.values.to_pylist(), runs.run_ends.to_pylist(), strict=True):
        yield shard, chosen.slice(start, end - start)
        start = end


def with_records(chosen: pa.Table, shard: pa.Table) -> pa.Table:
    """Return selected rows of one shard with their text, schema ``SELECTED``.

    Args:
        chosen: From `shards_of`.
        shard: Columns ``row_id``, ``conversation`` and ``record`` of the shard.

    Raises:
        AccountingError: The shard lacks a row.
    """
    return _joined(chosen, shard, ["conversation", "record"]).select(SELECTED.names).cast(SELECTED)


def with_conversations(rows: pa.Table, shard: pa.Table) -> pa.Table:
    """Return rows of one shard with their ``conversation``; arguments and errors are those of `with_records`."""
    return _joined(rows, shard, ["conversation"])


def _joined(rows: pa.Table, shard: pa.Table, columns: list[str]) -> pa.Table:
    places = pc.index_in(rows["row_id"], value_set=shard["row_id"])
    if places.null_count:
        raise AccountingError(
            f"shard {rows['shard'][0]}: {places.null_count} of {rows.num_rows} selected rows are not in it. "
            "The score table belongs to another pool; run again."
        )
    texts = shard.select(columns).take(places)
    for name in columns:
        rows = rows.append_column(name, texts[name])
    return rows


def training_jsonl(selected: pa.Table) -> bytes:
    """Return the selection as JSON lines: each record's own text, with ``rose_ray`` added as its last key.

    A key of that name that a record has already, for instance from an earlier selection, gives way.
    """
    lines = []
    columns = (selected[name].to_pylist() for name in ("record", "row_id", "score", "place", "source"))
    for record, row_id, score, place, source in zip(*columns, strict=True):
        added = {"row_id": row_id, "score": score, "place": place, "source": source}
        body = _one_line(without_key(record, RECORD_KEY)).rstrip()
        comma = "" if body[1:-1].strip() == "" else ", "
        lines.append(f"{body[:-1]}{comma}{json.dumps(RECORD_KEY)}: {json.dumps(added, ensure_ascii=False)}}}\n")
    return "".join(lines).encode()


def selection_summary(
    candidates: Candidates,
    columns: Mapping[str, Callable[[], np.ndarray]],
    positions: np.ndarray,
    *,
    objectives: Collection[str] = ("rose",),
) -> dict[str, Any]:
    """Return what a person wants to know of a selection.

    Args:
        candidates: What was chosen from.
        columns: Read further columns (labelled tokens, gradient norm, ...), which are correlated with the score.
        positions: From ``choose``.
        objectives: Of the targets; none where the sign of a score means nothing.

    Returns:
        Counts, shares by source, Spearman correlations (None where a column is constant), and warnings.
    """
    scores_N = candidates.score()
    values = scores_N[positions].astype(np.float64)
    not_positive = int((values <= 0).sum())
    warnings = []
    if not_positive and objectives:
        warnings.append(
            f"{not_positive} of {len(positions)} selected rows have scores that are not positive: to first order they "
            f"{_harm(set(objectives))}. Select less."
        )
    ranks_N = doubled_ranks(scores_N)
    num_rows = len(scores_N)
    del scores_N
    return {
        "num_selected": len(positions),
        "num_scored": num_rows,
        "num_tokens": int(candidates.scores.numbers("num_tokens")[positions].sum(dtype=np.int64)),
        "sources": _shares(candidates.scores.sources(), positions),
        "score": {"highest": float(values.max()), "lowest": float(values.min()), "mean": float(values.mean())},
        "spearman_of_score": {
            name: rank_correlation(ranks_N, doubled_ranks(column())) for name, column in columns.items()
        },
        "warnings": warnings,
    }


def _harm(objectives: set[str]) -> str:
    harms = ["lower the reward margin or leave it"] if objectives - {CHOSEN_ONLY} else []
    harms += ["do not lower the loss of the chosen answers"] if CHOSEN_ONLY in objectives else []
    return ", or ".join(harms)


def _shares(sources: Sources, positions: np.ndarray) -> dict[str, Any]:
    pool, selected = (
        np.bincount(codes, minlength=len(sources.names)).tolist()
        for codes in (sources.codes_N, sources.codes_N[positions])
    )
    return {
        sources.names[code]: {
            "pool": pool[code],
            "pool_share": pool[code] / len(sources.codes_N),
            "selected": selected[code],
            "selected_share": selected[code] / len(positions) if len(positions) else 0.0,
        }
        for code in sorted(range(len(pool)), key=lambda code: -pool[code])
    }


def _one_line(record: str) -> str:
    # A record from a JSON array may span lines; JSON Lines allows one. Newlines inside strings are escaped already.
    return re.sub(r"[ \t]*[\r\n]+[ \t]*", " ", record)
