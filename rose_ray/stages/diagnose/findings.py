"""What `doctor` found, and how it is told."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Severity = Literal["error", "warning", "note"]

NUM_SHOWN = 8
"""Ids that a line names; the JSON has them all."""


@dataclass(frozen=True)
class Finding:
    """One thing that was found.

    Attributes:
        check: Name of the check, short and stable.
        severity: ``error``: a run refuses it, or it contradicts itself. ``warning``: it is likely to mislead the
            selection or a measurement. ``note``: worth knowing.
        message: What was found, in one line.
        advice: What to do, in one line.
        ids: Of the pairs, rows or subtasks meant, all of them, the worst first.
        numbers: What the message's figures are made of.
    """

    check: str
    severity: Severity
    message: str
    advice: str
    ids: tuple[str, ...] = ()
    numbers: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TargetReport:
    """What was found about one target.

    Attributes:
        target: Its name.
        subtasks: Pairs of each.
        bank: Folder of the bank that was read, None where there is none.
        findings: In the order of the checks.
        untold: What could not be looked at and why, a line each.
    """

    target: str
    subtasks: dict[str, int]
    bank: str | None
    findings: tuple[Finding, ...]
    untold: tuple[str, ...] = ()

    @property
    def is_healthy(self) -> bool:
        """Whether nothing was found but notes."""
        return all(finding.severity == "note" for finding in self.findings)

    def as_json(self) -> dict[str, Any]:
        """The same for a file."""
        return asdict(self)


def report_lines(report: TargetReport) -> Iterator[str]:
    """Tell a report to people."""
    num_pairs = sum(report.subtasks.values())
    shown = list(report.subtasks.items())[:NUM_SHOWN]
    subtasks = ", ".join(f"{name} {count}" for name, count in shown)
    more = f" and {len(report.subtasks) - len(shown)} more" if len(report.subtasks) > len(shown) else ""
    named = f" ({subtasks}{more})" if shown else ""
    yield f"target {report.target}: {num_pairs} pairs{named}, bank {report.bank or 'none'}"
    for finding in report.findings:
        ids = f": {listed(finding.ids)}" if finding.ids else ""
        yield f"  {finding.severity:<8} {finding.check}: {finding.message}{ids}"
        yield f"  {'':<8} {finding.advice}"
    for line in report.untold:
        yield f"  not told: {line}"
    if not report.findings:
        yield "  nothing found"


def listed(names: Sequence[str]) -> str:
    """The first few names, and how many more there are."""
    more = f" and {len(names) - NUM_SHOWN} more" if len(names) > NUM_SHOWN else ""
    return ", ".join(names[:NUM_SHOWN]) + more
