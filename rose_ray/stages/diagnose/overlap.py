"""Passages that a target's pairs share with test texts, and the pool with either."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from rose_ray.data.contamination import RUN_WORDS, KnownTestText
from rose_ray.data.conversation import Message, parse_conversation
from rose_ray.data.preferences import PreferencePair
from rose_ray.data.test_items import read_test_items
from rose_ray.filesystem import Location
from rose_ray.stages.diagnose.findings import Finding, Severity
from rose_ray.stages.pool import read_pool_entry, skipped_rows
from rose_ray.stores.manifest import Manifest
from rose_ray.stores.workspace import Workspace


def read_evaluation_texts(
    locations: Sequence[Location], *, fields: Sequence[str] | None = None, split: str | None = None
) -> KnownTestText:
    """Read what targets are measured on. Arguments and errors are those of `read_test_items`."""
    known = KnownTestText()
    for item in read_test_items(locations, fields=fields, split=split):
        known.add(item.name, item.prompt, item.others)
    return known


def pair_texts(pairs: Sequence[PreferencePair]) -> KnownTestText:
    """Return the texts of a target's pairs, prompts and both sides, by the pairs' ids."""
    known = KnownTestText()
    for pair in pairs:
        known.add(pair.pair_id, [turn.content for turn in pair.prompt], (pair.chosen, pair.rejected))
    return known


def pairs_in_tests(pairs: Sequence[PreferencePair], tests: KnownTestText) -> Iterator[Finding]:
    """Say which pairs share text with the test texts."""
    found: dict[str, list[str]] = {}
    for pair in pairs:
        sides = ([*pair.prompt, Message("assistant", side)] for side in (pair.chosen, pair.rejected))
        if items := set().union(*map(tests.find_all, sides)):
            found[pair.pair_id] = sorted(items)
    if found:
        message = f"{len(found)} of {len(pairs)} pairs share {RUN_WORDS} words in a row with the test texts"
        advice = "Take them out of the pairs or of the test: what they steer to is measured on itself."
        yield Finding("test_overlap", "warning", message, advice, tuple(found), {"test_rows": found})


@dataclass
class PoolOverlap:
    """Rows of the pool that hold some of several texts.

    Attributes:
        rows: Row id to the names of the texts' owners.
        sources: Such rows by source.
    """

    rows: dict[str, list[str]] = field(default_factory=dict)
    sources: Counter[str] = field(default_factory=Counter)


def pool_overlaps(workspace: Workspace, pool: Manifest, wanted: Sequence[KnownTestText]) -> list[PoolOverlap]:
    """Look every row of the pool up in several sets of texts, shard by shard, in one reading.

    Raises:
        AlteredFileError: A shard differs from its record.
    """
    found = [PoolOverlap() for _ in wanted]
    skipped = skipped_rows(workspace, pool)
    columns = ["row_id", "source", "conversation"]
    for entry in pool.facts["shards"]:
        table = read_pool_entry(workspace, pool, entry, columns=columns, skipped=skipped)
        for row_id, source, text in zip(*(table[name].to_pylist() for name in columns), strict=True):
            turns = parse_conversation(text).messages
            for known, overlap in zip(wanted, found, strict=True):
                if items := known.find_all(turns):
                    overlap.rows[row_id] = sorted(items)
                    overlap.sources[source] += 1
    return found


def pool_findings(pool: Manifest, with_pairs: PoolOverlap, with_tests: PoolOverlap | None) -> Iterator[Finding]:
    """Say which rows of the pool share text with the pairs, and with the test texts."""
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
            f"{len(overlap.rows):,} of {pool.counts['unique']:,} rows of the pool share {RUN_WORDS} words in a row "
            f"with {what} ({by_source})"
        )
        numbers = {"sources": dict(overlap.sources), "owners": overlap.rows}
        yield Finding(check, severity, message, advice, tuple(overlap.rows), numbers)
