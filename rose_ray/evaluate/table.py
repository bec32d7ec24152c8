"""The table of an evaluation, as text, CSV and JSON."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator, Sequence

from rose_ray.evaluate.gathered import CONTROLLED
from rose_ray.evaluate.measures import HIGHER_IS_BETTER
from rose_ray.evaluate.results import Number, number_record
from rose_ray.evaluate.trials import RANDOM
from rose_ray.kernels.bootstrap import Estimate


def table_lines(numbers: Sequence[Number], level: float) -> Iterator[str]:
    """Yield the table as lines of text: a block a benchmark, a line a row, a column a measure.

    Below each block stands by how much rows are above random rows of their budget, in what higher is better of.

    Args:
        numbers: From `table_numbers`.
        level: Of the intervals.
    """
    for benchmark in dict.fromkeys(number.benchmark for number in numbers):
        own = [number for number in numbers if number.benchmark == benchmark]
        most = max(own, key=lambda number: number.num_items)
        of = f" of {most.num_prompts:,} prompts" if most.num_prompts < most.num_items else ""
        yield f"{benchmark}: {most.num_items:,} items{of}; {level:.0%} intervals over seeds and items; * knee"
        yield from _block(own, _cell)
        yield from (f"  {note}" for note in dict.fromkeys(note for number in own for note in _notes(number)))
        budgets = {number.budget for number in own if number.arm == RANDOM}
        paired = [
            number
            for number in own
            if number.budget in budgets
            and number.arm != RANDOM
            and HIGHER_IS_BETTER[number.measure]
            and number.measure != CONTROLLED
        ]
        if paired:
            yield "  difference from random: same budget, seeds and items"
            yield from _block(paired, _difference_cell)
        yield ""


def _block(numbers: Sequence[Number], cell: Callable[[Number], str]) -> Iterator[str]:
    measures = list(dict.fromkeys(number.measure for number in numbers))
    head = [f"{measure} {'↑' if HIGHER_IS_BETTER[measure] else '↓'}" for measure in measures]
    rows = [["", "budget", "rows", *head]]
    for arm, budget in dict.fromkeys((number.arm, number.budget) for number in numbers):
        line = [number for number in numbers if (number.arm, number.budget) == (arm, budget)]
        cells = {number.measure: cell(number) for number in line}
        more = f" +{len(line[0].same_as)}" if line[0].same_as else ""
        first = [f"{arm}{more}", budget_text(budget), f"{line[0].num_rows:,}"]
        rows.append([*first, *(cells.get(measure, "") for measure in measures)])
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
    for row in rows:
        yield "  " + "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()


def budget_text(budget: float | None) -> str:
    """A share of the pool as people write it."""
    return "-" if budget is None else f"{100 * budget:.4g} %"


def _cell(number: Number) -> str:
    return _estimate_text(number.estimate) + ("*" if number.is_knee else "")


def _difference_cell(number: Number) -> str:
    return _estimate_text(number.difference, "+")


def _estimate_text(estimate: Estimate | None, sign: str = "") -> str:
    if estimate is None:
        return "missing"
    interval = "" if estimate.low is None else f" [{estimate.low:{sign}.3f}, {estimate.high:{sign}.3f}]"
    return f"{estimate.value:{sign}.3f}{interval}"


def _notes(number: Number) -> Iterator[str]:
    row = f"{number.arm} at {budget_text(number.budget)}"
    if number.same_as:
        yield f"{number.arm}: the same models as {', '.join(number.same_as)}"
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
    """Return the numbers as CSV; seeds and names are separated by spaces, what is missing is empty."""
    out = io.StringIO()
    records = [number_record(number) for number in numbers]
    writer = csv.DictWriter(out, fieldnames=list(records[0]) if records else [], lineterminator="\n")
    writer.writeheader()
    for record in records:
        lists = {name: " ".join(map(str, record[name])) for name in ("seeds", "missing_seeds", "same_as")}
        writer.writerow({**record, **lists})
    return out.getvalue()
