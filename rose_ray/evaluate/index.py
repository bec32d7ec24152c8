"""The index of an evaluation: which trial has which numbers. Tables, correlations and curves are made from it alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from rose_ray.errors import AlteredFileError, StoreError
from rose_ray.evaluate.trials import Trial
from rose_ray.stores.workspace import Workspace

INDEX_FILE = "evaluation/index.json"


@dataclass(frozen=True)
class Entry:
    """One trial and where its numbers are.

    Attributes:
        arm, budget, num_rows, seed: As in `Trial`.
        model: Key of its model.
        measures: Folder of its numbers by ``KIND/NAME`` of the benchmark; empty where it failed or has not run.
        verdicts: Folder of the verdicts by ``JUDGE/HELD_OUT``.
        failure: Why it has no numbers; empty where nothing failed.
        budget_rows: As in `Trial`.
    """

    arm: str
    budget: float | None
    num_rows: int
    seed: int | None
    model: str
    measures: dict[str, str] = field(default_factory=dict)
    verdicts: dict[str, str] = field(default_factory=dict)
    failure: str = ""
    budget_rows: int | None = None


@dataclass(frozen=True)
class Index:
    """All trials of one configuration.

    Attributes:
        entries: In the order of the table.
        untrained: Folders of the untrained model's numbers by ``KIND/NAME``: the reference of every reward.
        seeds: Of every trained row.
        pool_rows: Rows that shares are taken of.
    """

    entries: list[Entry]
    untrained: dict[str, str]
    seeds: list[int]
    pool_rows: int


def make_index(
    trials: Sequence[Trial],
    measured: Mapping[str, Mapping[str, str]],
    failures: Mapping[str, str],
    *,
    untrained: str,
    seeds: Sequence[int],
    pool_rows: int,
) -> Index:
    """Put trials beside what came of them.

    Args:
        trials: In the order of the table.
        measured: Folders by key of the model; models that did not run are left out.
        failures: What went wrong, by key of the model.
        untrained: Key of the untrained model.
        seeds, pool_rows: As in `Index`.
    """
    entries = [
        Entry(
            trial.arm,
            trial.budget,
            trial.num_rows,
            trial.seed,
            trial.training.key,
            dict(measured.get(trial.training.key, {})),
            failure=failures.get(trial.training.key, ""),
            budget_rows=trial.budget_rows,
        )
        for trial in trials
    ]
    return Index(entries, dict(measured.get(untrained, {})), list(seeds), pool_rows)


def write_index(workspace: Workspace, index: Index) -> None:
    """Write the index in the place of an earlier one."""
    workspace.write_json(INDEX_FILE, asdict(index))


def read_index(workspace: Workspace) -> Index:
    """Return the index of the newest evaluation.

    Raises:
        StoreError: There is none.
        AlteredFileError: It cannot be understood.
    """
    if not workspace.exists(INDEX_FILE):
        raise StoreError(f"{workspace.root.name}: nothing was evaluated here. Run `rose-ray evaluate CONFIG` first.")
    content: dict[str, Any] = workspace.read_json(INDEX_FILE)
    try:
        return Index(**{**content, "entries": [Entry(**entry) for entry in content["entries"]]})
    except (KeyError, TypeError) as error:
        raise AlteredFileError(
            f"{workspace.root.name}/{INDEX_FILE}: not an index ({error}). Delete it and run `rose-ray evaluate` again."
        ) from error
