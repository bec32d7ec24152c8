"""All checks of a target's pairs, as far as the workspace allows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from rose_ray.config.job import JobConfig
from rose_ray.config.target import TargetConfig
from rose_ray.data.contamination import KnownTestText
from rose_ray.data.preferences import PreferencePair
from rose_ray.errors import PairError
from rose_ray.stages.diagnose.findings import Finding, TargetReport
from rose_ray.stages.diagnose.overlap import (
    PoolOverlap,
    pair_texts,
    pairs_in_tests,
    pool_findings,
    pool_overlaps,
)
from rose_ray.stages.diagnose.pair_texts import TextLimits, text_findings
from rose_ray.stages.diagnose.pair_vectors import untold_by, vector_findings
from rose_ray.stages.diagnose.stored import StoredBank, find_bank
from rose_ray.stores.manifest import Manifest, find_manifest
from rose_ray.stores.runs import last_stage
from rose_ray.stores.workspace import Workspace

TOLD_BY_A_BANK = "lengths in tokens, the longer side's share, conflicting pairs, label margins"


def examine(
    workspace: Workspace | None,
    config: JobConfig,
    pairs: Mapping[str, Sequence[PreferencePair] | PairError],
    tests: KnownTestText | None,
    limits: TextLimits,
) -> Iterator[TargetReport]:
    """Yield a report for each target.

    Args:
        workspace: None where none was made yet.
        config: Its targets are looked at.
        pairs: Of each target, unchecked, or the error that reading them ended with.
        tests: Texts that the targets are measured on, where given.
        limits: From where on a check speaks.

    Raises:
        AlteredFileError: A file of the workspace differs from its record.
    """
    stage = last_stage(workspace, "ingest") if workspace else None
    pool = find_manifest(workspace, stage["folder"]) if workspace and stage else None
    readable = {name: each for name, each in pairs.items() if not isinstance(each, PairError)}
    overlaps: dict[str, PoolOverlap] = {}
    with_tests: PoolOverlap | None = None
    if workspace is not None and pool is not None:
        wanted = [pair_texts(each) for each in readable.values()]
        *found, last = pool_overlaps(workspace, pool, [*wanted, tests or KnownTestText()])
        overlaps = dict(zip(readable, found, strict=True))
        with_tests = last if tests else None
    for target in config.targets:
        own = pairs[target.name]
        if isinstance(own, PairError):
            finding = Finding("unreadable", "error", str(own), "Mend the files; nothing else was looked at.")
            yield TargetReport(target.name, {}, None, (finding,))
            continue
        bank = find_bank(workspace, config, target, own)
        yield TargetReport(
            target.name,
            dict(Counter(pair.subtask for pair in own)),
            None if isinstance(bank, str) else bank.manifest.folder,
            tuple(_findings(target, own, bank, pool, overlaps.get(target.name), tests, with_tests, limits)),
            tuple(_untold(target, bank, pool, tests)),
        )


def _findings(
    target: TargetConfig,
    pairs: Sequence[PreferencePair],
    bank: StoredBank | str,
    pool: Manifest | None,
    overlap: PoolOverlap | None,
    tests: KnownTestText | None,
    with_tests: PoolOverlap | None,
    limits: TextLimits,
) -> Iterator[Finding]:
    if not pairs and target.pairs:
        yield Finding("no_pairs", "error", "there are no pairs", "Check the target's files.")
    has_bank = isinstance(bank, StoredBank)
    # A bank knows lengths in tokens, which are what counts.
    yield from (each for each in text_findings(pairs, limits) if not (has_bank and each.check == "lengths"))
    if isinstance(bank, StoredBank):
        yield from vector_findings(bank, limits)
    if tests is not None:
        yield from pairs_in_tests(pairs, tests)
    if pool is not None and overlap is not None:
        yield from pool_findings(pool, overlap, with_tests)


def _untold(
    target: TargetConfig, bank: StoredBank | str, pool: Manifest | None, tests: KnownTestText | None
) -> Iterator[str]:
    if not target.pairs:
        yield f"anything about pairs: method {target.method} was given none"
    elif isinstance(bank, str):
        yield f"{TOLD_BY_A_BANK}: {bank}"
    else:
        yield from untold_by(bank)
    if pool is None:
        yield "overlap with the pool: none is ingested yet: `rose-ray ingest CONFIG`"
    if tests is None:
        yield "overlap with test texts: the configuration names none that can be read; name files with --test"
