"""Table, curves and agreement of judges, from the index of an evaluation and the numbers it names."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache, partial
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from rose_ray.config.evaluation import EvaluationConfig
from rose_ray.evaluate.curves import curves_svg
from rose_ray.evaluate.index import Index
from rose_ray.evaluate.judging import VERDICTS_FOLDER, read_verdicts
from rose_ray.evaluate.measures import Item
from rose_ray.evaluate.results import Reader, resampling_of, table_numbers
from rose_ray.evaluate.table import budget_text, table_csv, table_json, table_lines
from rose_ray.evaluate.work import read_items
from rose_ray.kernels.association import cohen_kappa
from rose_ray.kernels.bootstrap import unit_estimate
from rose_ray.kernels.win_rate import outcome, position_bias
from rose_ray.stores.workspace import Workspace

REPORT_FOLDER = "evaluation/report"


def write_report(workspace: Workspace, index: Index, config: EvaluationConfig) -> list[str]:
    """Write ``table.txt``, ``table.csv``, ``table.json`` and curves into ``evaluation/report``; return the text.

    Args:
        workspace: Held by the caller.
        index: Of the evaluation.
        config: Its settings.

    Raises:
        StoreError: Numbers that the index names are missing or altered.
    """
    read = reader(workspace)
    numbers = table_numbers(index, config, read)
    lines = [*table_lines(numbers, config.intervals.level), *budget_lines(index), *judge_lines(index, config, read)]
    content = {"table.csv": table_csv(numbers), "table.json": table_json(numbers), "table.txt": "\n".join(lines) + "\n"}
    for benchmark, measure in dict.fromkeys((number.benchmark, number.measure) for number in numbers):
        svg = curves_svg(numbers, benchmark, measure)
        if svg:
            content[f"{benchmark.replace('/', '-')}-{measure}.svg"] = svg
    for name, text in content.items():
        workspace.write(f"{REPORT_FOLDER}/{name}", text.encode())
    return lines


def reader(workspace: Workspace) -> Reader:
    """Return what reads the items of a folder, each once."""

    @cache
    def read(folder: str) -> Sequence[Item]:
        return read_verdicts(workspace, folder) if folder.startswith(VERDICTS_FOLDER) else read_items(workspace, folder)

    return read


def budget_lines(index: Index) -> Iterator[str]:
    """Yield which arms scored fewer rows than a budget asks for: their row of the table is of all that they scored."""
    short = {
        (entry.arm, entry.budget): (entry.num_rows, entry.budget_rows)
        for entry in index.entries
        if entry.budget_rows is not None and entry.num_rows < entry.budget_rows
    }
    for (arm, budget), (found, wanted) in short.items():
        yield (
            f"{arm} at {budget_text(budget)}: {found:,} rows, all that it scored; {wanted:,} were asked for. The other "
            "rows of the pool were rejected for it."
        )


def judge_lines(index: Index, config: EvaluationConfig, read: Reader) -> Iterator[str]:
    """Yield how each judge follows the order shown, and how far every two judges agree beyond chance."""
    by_judge: dict[str, dict[tuple[str, str, str], Item]] = {}
    for entry in index.entries:
        for key, folder in entry.verdicts.items():
            judge, _, held_out = key.partition("/")
            own = by_judge.setdefault(judge, {})
            own |= {(entry.model, held_out, item["item_id"]): item for item in read(folder)}
    for judge, items in by_judge.items():
        usable = [item for item in items.values() if item["score"] is not None]
        orders = [item["ours_first"] for item in usable], [item["ours_second"] for item in usable]
        yield (
            f"judge {judge}: {len(items):,} comparisons, {len(items) - len(usable)} without a verdict; "
            f"{position_bias(*orders):.1%} follow the order shown"
        )
    resampling = resampling_of(config)
    for first, second in combinations(by_judge, 2):
        shared = [key for key in by_judge[first] if key in by_judge[second]]
        scores = [(by_judge[first][key]["score"], by_judge[second][key]["score"]) for key in shared]
        labels = [(outcome(a), outcome(b)) for a, b in scores if a is not None and b is not None]
        if not labels:
            yield f"judges {first} and {second}: no comparison in common"
            continue
        kappa = unit_estimate(len(labels), partial(_kappa, labels), resampling)
        text = "undefined: both always say the same" if kappa is None else f"{kappa.value:+.3f}"
        if kappa is not None and kappa.low is not None:
            text += f" [{kappa.low:+.3f}, {kappa.high:+.3f}]"
        yield f"judges {first} and {second}: Cohen's kappa {text} over {len(labels):,} comparisons"


def _kappa(labels: Sequence[tuple[str, str]], taken: NDArray[np.int64]) -> float | None:
    return cohen_kappa([labels[place][0] for place in taken], [labels[place][1] for place in taken])
