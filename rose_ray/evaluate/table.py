"""The table of an evaluation, as text, CSV and JSON."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Sequence

from rose_ray.evaluate.measures import HIGHER_IS_BETTER
from rose_ray.evaluate.results import Number, number_record


def table_lines(numbers: Sequence[Number], level: float) -> Iterator[str]:
    """Yield the table as lines of text: a block a benchmark, a line a row, a column a measure.

    Args:
        numbers: From `table_numbers`.
        level: Of the intervals.
    """
    for benchmark in dict.fromkeys(number.benchmark for number in numbers):
        own = [number for number in numbers if number.benchmark == benchmark]
        measures = list(dict.fromkeys(number.measure for number in own))
        items = max(number.num_items for number in own)
        yield f"{benchmark}: {items:,} items; {level:.0%} intervals over seeds and items; * knee"
        head = [f"{measure} {'↑' if HIGHER_IS_BETTER[measure] else '↓'}" for measure in measures]
        rows = [["", "budget", "rows", *head]]
        notes: dict[str, None] = {}
        for arm, budget in dict.fromkeys((number.arm, number.budget) for number in own):
            line = [number for number in own if (number.arm, number.budget) == (arm, budget)]
            cells = {number.measure: _cell(number) for number in line}
            rows.append([arm, budget_text(budget), f"{line[0].num_rows:,}", *(cells.get(m, "") for m in measures)])
            notes |= dict.fromkeys(_notes(line[0]))
        widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
        for row in rows:
            yield "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        yield from (f"  {note}" for note in notes)
        yield ""


def budget_text(budget: float | None) -> str:
    """A share of the pool as people write it."""
    return "-" if budget is None else f"{100 * budget:.4g} %"


def _cell(number: Number) -> str:
    estimate = number.estimate
    if estimate is None:
        return "missing"
    interval = "" if estimate.low is None else f" [{estimate.low:.3f}, {estimate.high:.3f}]"
    return f"{estimate.value:.3f}{interval}{'*' if number.is_knee else ''}"


def _notes(number: Number) -> Iterator[str]:
    row = f"{number.arm} at {budget_text(number.budget)}"
    if number.missing:
        listed = ", ".join("untrained" if seed is None else str(seed) for seed in number.missing)
        total = len(number.seeds) + len(number.missing)
        yield f"{row}: {len(number.seeds)} of {total} seeds measured, without a number until all are: lacks {listed}"
    elif len(number.seeds) == 1 and number.seeds != [None]:
        yield f"{row}: one seed, so its intervals are over items alone"
    if number.num_unusable:
        yield f"{row}: {number.num_unusable} comparisons without a verdict are left out"


def table_json(numbers: Sequence[Number]) -> str:
    """Return the numbers as a JSON array of flat objects."""
    return json.dumps([number_record(number) for number in numbers], indent=1) + "\n"


def table_csv(numbers: Sequence[Number]) -> str:
    """Return the numbers as CSV; seeds are separated by spaces, what is missing is empty."""
    out = io.StringIO()
    records = [number_record(number) for number in numbers]
    writer = csv.DictWriter(out, fieldnames=list(records[0]) if records else [], lineterminator="\n")
    writer.writeheader()
    for record in records:
        seeds = {name: " ".join(map(str, record[name])) for name in ("seeds", "missing_seeds")}
        writer.writerow({**record, **seeds})
    return out.getvalue()
