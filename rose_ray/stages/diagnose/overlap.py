"""Passages that a target's pairs share with test texts, and the pool with either."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from rose_ray.data.conversation import parse_conversation
from rose_ray.data.preferences import PreferencePair
from rose_ray.data.records import RejectedRecord, iter_records
from rose_ray.data.text_overlap import PASSAGE_WORDS, Passages, strings_of
from rose_ray.errors import DataError
from rose_ray.filesystem import Location
from rose_ray.stages.diagnose.findings import Finding, Severity
from rose_ray.stages.pool import read_pool_entry, skipped_rows
from rose_ray.stores.manifest import Manifest
from rose_ray.stores.workspace import Workspace

PROMPT_KEYS = frozenset({"prompt", "question", "instruction", "input", "user.content"})
"""Texts of a test record that count as a whole, however short: an equal prompt is the same item, while an equal short
answer, such as "Yes.", says nothing."""

_NOT_TEXT = frozenset({"id", "source", "license", "ref", "dataset", "subtask", "task"})


@dataclass(frozen=True)
class EvaluationTexts:
    """What a target is measured on.

    Attributes:
        files: Names of the files.
        passages: Of their texts; owners are ``FILE row PLACE``.
        num_records: Records read.
    """

    files: tuple[str, ...]
    passages: Passages
    num_records: int


def read_evaluation_texts(locations: Sequence[Location]) -> EvaluationTexts:
    """Read the records of test files, of any keys: every text in them counts.

    Raises:
        DataError: A file cannot be read, or a row of it; the row is named.
    """
    passages, num_records = Passages(), 0
    for location in locations:
        for record in iter_records(location):
            if isinstance(record, RejectedRecord):
                raise DataError(f"{location.name} row {record.place}: {record.reason}: {record.detail} Mend the file.")
            num_records += 1
            for key, text in strings_of(record.value):
                if key not in _NOT_TEXT:
                    passages.add(f"{location.name} row {record.place}", text, whole=key in PROMPT_KEYS)
    return EvaluationTexts(tuple(location.name for location in locations), passages, num_records)


def pair_passages(pairs: Sequence[PreferencePair]) -> Passages:
    """Return the passages of a target's pairs: prompts, and both sides."""
    passages = Passages()
    for pair in pairs:
        for text, whole in _pair_texts(pair):
            passages.add(pair.pair_id, text, whole=whole)
    return passages


def _pair_texts(pair: PreferencePair) -> Iterator[tuple[str, bool]]:
    last = len(pair.prompt) - 1
    for number, message in enumerate(pair.prompt):
        if message.role in ("user", "assistant"):
            yield message.content, number == last
    yield pair.chosen, False
    yield pair.rejected, False


def pairs_in_tests(pairs: Sequence[PreferencePair], tests: EvaluationTexts) -> Iterator[Finding]:
    """Say which pairs share a passage with the test texts."""
    found: dict[str, list[str]] = {}
    for pair in pairs:
        owners: set[str] = set()
        for text, whole in _pair_texts(pair):
            owners |= tests.passages.owners_of(text, whole=whole)
        if owners:
            found[pair.pair_id] = sorted(owners)
    if found:
        message = f"{len(found)} of {len(pairs)} pairs share {PASSAGE_WORDS} words in a row with the test texts"
        advice = "Take them out of the pairs or of the test: what they steer to is measured on itself."
        yield Finding("test_overlap", "warning", message, advice, tuple(found), {"test_rows": found})


@dataclass
class PoolOverlap:
    """Rows of the pool that share a passage with something.

    Attributes:
        rows: Row id to the owners of the passages.
        sources: Such rows by source.
    """

    rows: dict[str, list[str]] = field(default_factory=dict)
    sources: Counter[str] = field(default_factory=Counter)


def pool_overlaps(workspace: Workspace, pool: Manifest, wanted: Sequence[Passages]) -> list[PoolOverlap]:
    """Look every row of the pool up in several sets of passages, shard by shard, in one reading.

    Raises:
        AlteredFileError: A shard differs from its record.
    """
    found = [PoolOverlap() for _ in wanted]
    skipped = skipped_rows(workspace, pool)
    columns = ["row_id", "source", "conversation"]
    for entry in pool.facts["shards"]:
        table = read_pool_entry(workspace, pool, entry, columns=columns, skipped=skipped)
        for row_id, source, text in zip(*(table[name].to_pylist() for name in columns), strict=True):
            messages = [m for m in parse_conversation(text).messages if m.role in ("user", "assistant")]
            for passages, overlap in zip(wanted, found, strict=True):
                owners: set[str] = set()
                for message in messages:
                    owners |= passages.owners_of(message.content, whole=message.role == "user")
                if owners:
                    overlap.rows[row_id] = sorted(owners)
                    overlap.sources[source] += 1
    return found


def pool_findings(pool: Manifest, with_pairs: PoolOverlap, with_tests: PoolOverlap | None) -> Iterator[Finding]:
    """Say which rows of the pool share a passage with the pairs, and with the test texts."""
    cases: list[tuple[str, PoolOverlap | None, str, Severity, str]] = [
        (
            "pool_pair_overlap",
            with_pairs,
            "the pairs",
            "note",
            "Look at them: they stand near the pairs by their text.",
        ),
        (
            "pool_test_overlap",
            with_tests,
            "the test texts",
            "warning",
            "Take them out of the pool: a model trained on them has seen the test.",
        ),
    ]
    for check, overlap, what, severity, advice in cases:
        if overlap is None or not overlap.rows:
            continue
        by_source = ", ".join(f"{name} {count:,}" for name, count in overlap.sources.most_common())
        message = (
            f"{len(overlap.rows):,} of {pool.counts['unique']:,} rows of the pool share {PASSAGE_WORDS} words in a row "
            f"with {what} ({by_source})"
        )
        numbers = {"sources": dict(overlap.sources), "owners": overlap.rows}
        yield Finding(check, severity, message, advice, tuple(overlap.rows), numbers)
