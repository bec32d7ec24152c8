"""Score tables to a training set: which rows, their original records, and a summary for people.

The JSONL holds each record's own text with one key added, ``rose_ray``, so nothing a trainer reads is changed.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from rose_ray.config.selection import SelectionConfig
from rose_ray.data.strict_json import without_key
from rose_ray.errors import AccountingError
from rose_ray.kernels.correlation import spearman
from rose_ray.kernels.selection import Budget, SourceRules, budget_count, round_robin, top_k
from rose_ray.schemas import SELECTED

SELECT_VERSION = 1
"""Raised whenever the same input would give another selection."""

RECORD_KEY = "rose_ray"
"""The key under which a selected record carries its row_id, score, place and source."""


@dataclass(frozen=True)
class Candidates:
    """The scored rows that a selection chooses from.

    Attributes:
        row_ids, sources: One a row.
        scores_N: The score a row is listed with.
        choices_NT: Scores whose columns take turns in a round robin.
        choice_names: Names of those columns.
        num_tokens_N: Tokens of each row.
        num_pool_rows: Unique rows of the pool, unscored ones included: what a fraction is taken of.
    """

    row_ids: list[str]
    sources: list[str]
    scores_N: np.ndarray
    choices_NT: np.ndarray
    choice_names: list[str]
    num_tokens_N: np.ndarray
    num_pool_rows: int


def target_candidates(scores: pa.Table, subtasks: Sequence[str], num_pool_rows: int) -> Candidates:
    """Return the rows of one target's score table; its subtasks take turns in a round robin."""
    return Candidates(
        row_ids=scores["row_id"].to_pylist(),
        sources=scores["source"].to_pylist(),
        scores_N=scores["score"].to_numpy().astype(np.float64),
        choices_NT=np.stack([scores[f"subtask_{name}"].to_numpy().astype(np.float64) for name in subtasks], axis=1),
        choice_names=list(subtasks),
        num_tokens_N=scores["num_tokens"].to_numpy(),
        num_pool_rows=num_pool_rows,
    )


def joint_candidates(targets: Mapping[str, pa.Table], num_pool_rows: int) -> Candidates:
    """Return the rows of several targets' score tables; the targets take turns, and a row's score is its best.

    Raises:
        AccountingError: The tables hold different rows.
    """
    tables = list(targets.values())
    row_ids = tables[0]["row_id"].to_pylist()
    for name, table in targets.items():
        if table["row_id"].to_pylist() != row_ids:
            raise AccountingError(f"the score table of {name} holds other rows than that of {next(iter(targets))}.")
    choices_NT = np.stack([table["score"].to_numpy().astype(np.float64) for table in tables], axis=1)
    return Candidates(
        row_ids,
        tables[0]["source"].to_pylist(),
        choices_NT.max(1),
        choices_NT,
        list(targets),
        tables[0]["num_tokens"].to_numpy(),
        num_pool_rows,
    )


def choose(candidates: Candidates, selection: SelectionConfig) -> np.ndarray:
    """Return the positions of the selected rows in order of choice.

    Raises:
        ConfigError: A source is unknown, or the budget exceeds what may be chosen from.
    """
    kind, amount = selection.budget
    budget = Budget(tokens=int(amount)) if kind == "tokens" else Budget(count=_num_rows(kind, amount, candidates))
    rules = SourceRules(
        include=selection.include_sources or (),
        exclude=selection.exclude_sources,
        max_share=selection.source_quotas,
    )
    common: dict[str, Any] = {"num_tokens_N": candidates.num_tokens_N, "sources": candidates.sources, "rules": rules}
    if selection.method == "round_robin":
        return round_robin(candidates.choices_NT, candidates.row_ids, budget, **common)
    return top_k(candidates.scores_N, candidates.row_ids, budget, **common)


def selected_rows(candidates: Candidates, positions: np.ndarray, records: Mapping[str, tuple[str, str]]) -> pa.Table:
    """Return the selection, schema ``SELECTED``, in order of choice.

    Args:
        candidates: What was chosen from.
        positions: From ``choose``.
        records: Conversation and record text by row_id, for the selected rows at least.
    """
    best_T = candidates.choices_NT[positions].argmax(1)
    rows = []
    for place, (position, best) in enumerate(zip(positions, best_T, strict=True), start=1):
        row_id = candidates.row_ids[position]
        conversation, record = records[row_id]
        rows.append(
            {
                "place": place,
                "row_id": row_id,
                "source": candidates.sources[position],
                "score": float(candidates.scores_N[position]),
                "best_for": candidates.choice_names[best],
                "num_tokens": int(candidates.num_tokens_N[position]),
                "conversation": conversation,
                "record": record,
            }
        )
    return pa.Table.from_pylist(rows, schema=SELECTED)


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
    candidates: Candidates, scores: Mapping[str, np.ndarray], positions: np.ndarray
) -> dict[str, Any]:
    """Return what a person wants to know of a selection.

    Args:
        candidates: What was chosen from.
        scores: Further columns by name (labelled tokens, gradient norm, ...), correlated with the score.
        positions: From ``choose``.

    Returns:
        Counts, shares by source, Spearman correlations (None where a column is constant), and warnings.
    """
    pool, chosen = Counter(candidates.sources), Counter(candidates.sources[i] for i in positions)
    values = candidates.scores_N[positions]
    not_positive = int((values <= 0).sum())
    warnings = []
    if not_positive:
        warnings.append(
            f"{not_positive} of {len(positions)} selected rows have scores that are not positive: to first order they "
            "lower the reward margin or leave it. Select less."
        )
    return {
        "num_selected": len(positions),
        "num_scored": len(candidates.row_ids),
        "num_tokens": int(candidates.num_tokens_N[positions].sum()),
        "sources": {
            source: {
                "pool": count,
                "pool_share": count / len(candidates.sources),
                "selected": chosen[source],
                "selected_share": chosen[source] / len(positions) if len(positions) else 0.0,
            }
            for source, count in pool.most_common()
        },
        "score": {"highest": float(values.max()), "lowest": float(values.min()), "mean": float(values.mean())},
        "spearman_of_score": {name: spearman(candidates.scores_N, column) for name, column in scores.items()},
        "warnings": warnings,
    }


def _num_rows(kind: str, amount: float, candidates: Candidates) -> int:
    if kind == "count":
        return int(amount)
    count = budget_count(Budget(fraction=amount), candidates.num_pool_rows)
    assert count is not None
    return count


def _one_line(record: str) -> str:
    # A record from a JSON array may span lines; JSON Lines allows one. Newlines inside strings are escaped already.
    return re.sub(r"[ \t]*[\r\n]+[ \t]*", " ", record)
