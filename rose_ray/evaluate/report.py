"""Table, curves and agreement of judges, from the index of an evaluation and the numbers it names."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache, partial
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from rose_ray.config.evaluation import EvaluationConfig
from rose_ray.config.target import TargetConfig
from rose_ray.evaluate.curves import curves_svg
from rose_ray.evaluate.index import Index
from rose_ray.evaluate.inputs import held_out_prompts
from rose_ray.evaluate.judging import VERDICTS_FOLDER, read_verdicts
from rose_ray.evaluate.measures import Item
from rose_ray.evaluate.results import Reader, resampling_of, table_numbers
from rose_ray.evaluate.table import budget_text, table_csv, table_json, table_lines
from rose_ray.evaluate.trials import FULL, RANDOM
from rose_ray.evaluate.work import read_items
from rose_ray.kernels.association import cohen_kappa
from rose_ray.kernels.bootstrap import Resampling, mean_estimate, unit_estimate
from rose_ray.kernels.win_rate import outcome, position_bias
from rose_ray.stores.workspace import Workspace

REPORT_FOLDER = "evaluation/report"
_Comparison = tuple[str, str, str]
"""Model, held-out set, item."""

_RULES = ("decontaminate", "near_duplicates", "diversity", "include_sources", "exclude_sources", "source_quotas")


def write_report(
    workspace: Workspace, index: Index, config: EvaluationConfig, targets: Sequence[TargetConfig]
) -> list[str]:
    """Write ``table.txt``, ``table.csv``, ``table.json`` and curves into ``evaluation/report``; return the text.

    Args:
        workspace: Held by the caller.
        index: Of the evaluation.
        config: Its settings.
        targets: Of the job, for the rules of their selections.

    Raises:
        StoreError: Numbers that the index names are missing or altered.
        DataError: The held-out files, read again for which pairs share a prompt, cannot be read or lack pairs.
    """
    read = reader(workspace)
    numbers = table_numbers(index, config, read, held_out_prompts(config))
    lines = [
        *table_lines(numbers, config.intervals.level),
        *rule_lines(index, targets),
        *budget_lines(index),
        *judge_lines(index, config, read),
    ]
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


def rule_lines(index: Index, targets: Sequence[TargetConfig]) -> Iterator[str]:
    """Yield which rules of the arms' selections the references' rows do not follow."""
    arms = {entry.arm for entry in index.entries}
    references = [name for name in (RANDOM, FULL) if name in arms]
    by_rule = {
        rule: [target.name for target in targets if target.name in arms and getattr(target.selection, rule)]
        for rule in _RULES
    }
    rules = "; ".join(f"{rule} ({', '.join(names)})" for rule, names in by_rule.items() if names)
    if references and rules:
        yield (
            f"{' and '.join(references)}: drawn without the rules of the arms' selections, so they may hold rows that "
            f"these pass over: {rules}"
        )


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
    """Yield how each judge follows the order shown, and how far every two judges agree beyond chance.

    With intervals over prompts.
    """
    by_judge: dict[str, dict[_Comparison, Item]] = {}
    for entry in index.entries:
        for key, folder in entry.verdicts.items():
            judge, _, held_out = key.partition("/")
            own = by_judge.setdefault(judge, {})
            own |= {(entry.model, held_out, item["item_id"]): item for item in read(folder)}
    resampling = resampling_of(config)
    for judge, items in by_judge.items():
        usable = {key: item for key, item in items.items() if item["score"] is not None}
        lacking = len(items) - len(usable)
        yield f"judge {judge}: {len(items):,} comparisons, {lacking} without a verdict{_order(usable, resampling)}"
    for first, second in combinations(by_judge, 2):
        yield f"judges {first} and {second}: {_agreement(by_judge[first], by_judge[second], resampling)}"


def _order(usable: Mapping[_Comparison, Item], resampling: Resampling) -> str:
    if not usable:
        return ""
    follow_N = np.array([position_bias([item["ours_first"]], [item["ours_second"]]) for item in usable.values()])
    places = {key: place for place, group in enumerate(_by_prompt(usable)) for key in group}
    found = mean_estimate(follow_N[None], resampling, np.array([places[key] for key in usable]))
    interval = "" if found.low is None else f" [{found.low:.1%}, {found.high:.1%}]"
    return f"; {found.value:.1%}{interval} follow the order shown"


def _agreement(first: Mapping[_Comparison, Item], second: Mapping[_Comparison, Item], resampling: Resampling) -> str:
    scores = {key: (first[key]["score"], second[key]["score"]) for key in first if key in second}
    labels = {key: (outcome(a), outcome(b)) for key, (a, b) in scores.items() if a is not None and b is not None}
    if not labels:
        return "no comparison in common"
    groups = [[labels[key] for key in group] for group in _by_prompt(labels)]
    kappa = unit_estimate(len(groups), partial(_kappa, groups), resampling)
    text = "undefined: both always say the same" if kappa is None else f"{kappa.value:+.3f}"
    if kappa is not None and kappa.low is not None:
        text += f" [{kappa.low:+.3f}, {kappa.high:+.3f}]"
    return f"Cohen's kappa {text} over {len(labels):,} comparisons"


def _by_prompt(comparisons: Iterable[_Comparison]) -> list[list[_Comparison]]:
    """Comparisons of one prompt, whatever model answered: they are no independent ones, and are resampled together."""
    groups: dict[tuple[str, str], list[_Comparison]] = {}
    for comparison in comparisons:
        groups.setdefault(comparison[1:], []).append(comparison)
    return list(groups.values())


def _kappa(groups: Sequence[Sequence[tuple[str, str]]], taken: NDArray[np.int64]) -> float | None:
    labels = [label for place in taken for label in groups[place]]
    return cohen_kappa([first for first, _ in labels], [second for _, second in labels])
