"""What is trained: arms, references and controls, at every budget and seed.

A *trial* is a row of the table at one seed. Its *training* says all that its model depends on; trials whose trainings
have one key share a model, as every arm does at the budget of the whole pool.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rose_ray.config.evaluation import EvaluationConfig, FineTuningConfig
from rose_ray.config.model import LoraConfig, ModelConfig
from rose_ray.config.selection import SelectionConfig
from rose_ray.data.preferences import PreferencePair
from rose_ray.errors import ConfigError
from rose_ray.evaluate.fine_tune import FINE_TUNE_VERSION
from rose_ray.kernels.budget import Budget, budget_count
from rose_ray.model.describe import ModelIdentity
from rose_ray.stages.bank import pairs_digest
from rose_ray.stages.warmup import seeded_order
from rose_ray.stores.manifest import artefact_key

MODELS_FOLDER = "evaluation/models"
ZERO_SHOT = "zero_shot"
RANDOM = "random"
FULL = "full"

TrainingKind = Literal["untrained", "sft_rows", "sft_pairs", "dpo_pairs"]


@dataclass(frozen=True)
class Training:
    """What makes one model.

    Attributes:
        kind: How it is trained, and on what.
        made_from: All that its weights depend on.
        rows: Digest of the row ids, for `sft_rows`.
        target: Whose pairs, for the kinds on pairs.
        seed: Of the training.
        parent: Key of the model that a DPO training starts from; None for the untrained one.
    """

    kind: TrainingKind
    made_from: dict[str, Any]
    rows: str | None = None
    target: str | None = None
    seed: int = 0
    parent: str | None = None

    @property
    def key(self) -> str:
        """Of the model."""
        return artefact_key(self.made_from)

    @property
    def folder(self) -> str:
        """Of the model's artefact."""
        return f"{MODELS_FOLDER}/{self.key}"


@dataclass(frozen=True)
class Trial:
    """One row of the table at one seed.

    Attributes:
        arm: A target's name, a reference, or ``CONTROL:TARGET``.
        budget: Share of the pool; None where there is none.
        num_rows: Rows, or pairs, trained on.
        seed: None for the untrained model.
        training: What makes its model.
        budget_rows: Of an arm, rows that the budget asks for: more than ``num_rows`` where the arm scored fewer.
    """

    arm: str
    budget: float | None
    num_rows: int
    seed: int | None
    training: Training
    budget_rows: int | None = None


class TrainingPlanner:
    """Says what trainings depend on.

    Args:
        evaluation: Settings of the trainings.
        model, lora: Of the model that is fine-tuned.
        identity: Of that model.
    """

    def __init__(
        self, evaluation: EvaluationConfig, model: ModelConfig, lora: LoraConfig, identity: ModelIdentity
    ) -> None:
        self.evaluation = evaluation
        self.common = {
            "stage": "evaluation_model",
            "version": FINE_TUNE_VERSION,
            "base": identity.base,
            "text": identity.text,
            "max_tokens": model.max_tokens,
            "dtype": model.dtype,
            "quantized": model.quantized,
        }
        self.lora = {"lora": lora.model_dump(mode="json"), "layout": identity.layout.digest}

    def untrained(self) -> Training:
        """The model as it comes."""
        return Training("untrained", self.common)

    def on_rows(self, row_ids: Sequence[str], seed: int) -> Training:
        """SFT on rows of the pool."""
        rows = row_set_digest(row_ids)
        made_from = {**self._trained("sft", self.evaluation.training, seed), "rows": rows}
        return Training("sft_rows", made_from, rows=rows, seed=seed)

    def on_chosen(self, target: str, pairs: Sequence[PreferencePair], seed: int) -> Training:
        """SFT on the chosen answers of a target's pairs."""
        made_from = {**self._trained("sft", self.evaluation.training, seed), "chosen": pairs_digest(pairs)}
        return Training("sft_pairs", made_from, target=target, seed=seed)

    def on_pairs(self, target: str, pairs: Sequence[PreferencePair], seed: int, after: Training | None) -> Training:
        """DPO on a target's pairs, from the untrained model or from another one."""
        parent = after.key if after else None
        made_from = {**self._trained("dpo", self.evaluation.dpo, seed), "pairs": pairs_digest(pairs), "parent": parent}
        return Training("dpo_pairs", made_from, target=target, seed=seed, parent=parent)

    def _trained(self, objective: str, settings: FineTuningConfig, seed: int) -> dict[str, Any]:
        # The bound of a batch moves nothing beyond rounding (and dropout masks).
        training = settings.model_dump(mode="json", exclude={"max_batch_tokens"})
        return {**self.common, **self.lora, "objective": objective, "training": training, "seed": seed}


def plan_trials(
    planner: TrainingPlanner,
    selections: Mapping[str, Mapping[float, Sequence[str]]],
    population: Sequence[str],
    pairs: Mapping[str, Sequence[PreferencePair]],
    sizes: Mapping[float, int],
) -> list[Trial]:
    """Return every trial that is configured, in the order of the table.

    Args:
        planner: From the same configuration.
        selections: Row ids by arm and budget.
        population: Row ids that random rows are drawn from, and the rows of ``full``: all that some arm scored.
        pairs: Of every arm's target.
        sizes: Rows of each budget.
    """
    config = planner.evaluation
    trials: list[Trial] = []
    if ZERO_SHOT in config.references:
        trials.append(Trial(ZERO_SHOT, None, 0, None, planner.untrained()))
    for seed in config.seeds if RANDOM in config.references else []:
        for budget, size in sizes.items():
            rows = random_rows(population, seed, size)
            trials.append(Trial(RANDOM, budget, size, seed, planner.on_rows(rows, seed)))
    for arm, chosen in selections.items():
        for budget, row_ids in chosen.items():
            for seed in config.seeds:
                training = planner.on_rows(row_ids, seed)
                trials.append(Trial(arm, budget, len(row_ids), seed, training, sizes[budget]))
    if FULL in config.references:
        size = len(population)
        trials += [Trial(FULL, 1.0, size, seed, planner.on_rows(population, seed)) for seed in config.seeds]
    return trials + [
        trial
        for control in config.controls
        for arm in selections
        if pairs[arm]  # a method that looks at no pair leaves nothing to train a control on
        for seed in config.seeds
        for trial in [_control(planner, control, arm, seed, selections[arm], pairs[arm])]
    ]


def random_rows(population: Sequence[str], seed: int, size: int) -> list[str]:
    """Return random rows of the population; those of a larger size hold those of a smaller one."""
    return seeded_order(population, f"evaluation-random-{seed}")[:size]


def _control(
    planner: TrainingPlanner,
    control: str,
    arm: str,
    seed: int,
    chosen: Mapping[float, Sequence[str]],
    pairs: Sequence[PreferencePair],
) -> Trial:
    name = f"{control}:{arm}"
    if control == "sft_chosen":
        return Trial(name, None, len(pairs), seed, planner.on_chosen(arm, pairs, seed))
    if control == "dpo_shots":
        return Trial(name, None, len(pairs), seed, planner.on_pairs(arm, pairs, seed, None))
    budget = planner.evaluation.control_budget
    first = planner.on_rows(chosen[budget], seed)
    return Trial(name, budget, len(chosen[budget]), seed, planner.on_pairs(arm, pairs, seed, first))


def with_parents(trials: Sequence[Trial], planner: TrainingPlanner) -> list[list[Training]]:
    """Return the trainings of trials once each, in waves: those of a wave need none but earlier waves.

    The untrained model is the reference of every reward, so it is always among the first.
    """
    unique = {training.key: training for training in [planner.untrained(), *(trial.training for trial in trials)]}
    first = [training for training in unique.values() if training.parent is None]
    second = [training for training in unique.values() if training.parent is not None]
    lacking = [training.parent for training in second if training.parent not in unique]
    assert not lacking, f"models {lacking} start a training and are no trial"  # control_budget is one of the budgets
    return [wave for wave in (first, second) if wave]


def budget_sizes(config: EvaluationConfig, num_pool_rows: int, num_scored: int) -> dict[float, int]:
    """Return the rows of every budget by its share of the pool, rising; the share of a count is its own.

    A share is rounded as in a selection; 1 stands for every scored row.

    Raises:
        ConfigError: A count, or a share of a pool with rejected rows, is above what was scored for any arm.
    """
    sizes = {share: num_scored if share == 1 else _rows(share, num_pool_rows) for share in config.budgets}
    above = [str(count) for count in config.counts if count > num_scored]
    above += [f"{share} ({size} rows)" for share, size in sizes.items() if size > num_scored]
    if above:
        raise ConfigError(
            f"evaluation: budgets {', '.join(above)} are above the {num_scored} rows that were scored, of a pool of "
            f"{num_pool_rows}. Lower `evaluation.counts` or `evaluation.budgets`."
        )
    sizes |= {count / num_pool_rows: count for count in config.counts}
    return dict(sorted(sizes.items()))


def selection_of_size(selection: SelectionConfig, size: int) -> SelectionConfig:
    """Return a target's selection with so many rows as its budget."""
    return selection.model_copy(update={"fraction": None, "tokens": None, "count": size})


def _rows(share: float, num_pool_rows: int) -> int:
    count = budget_count(Budget(fraction=share), num_pool_rows)
    assert count is not None
    return count


def row_set_digest(row_ids: Sequence[str]) -> str:
    """Return a digest of a set of row ids, whatever their order."""
    return hashlib.sha256("\n".join(sorted(row_ids)).encode()).hexdigest()[:16]
