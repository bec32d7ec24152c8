"""What selections are worth, measured: the YAML's `evaluation`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from rose_ray.config.judge import JudgeConfig
from rose_ray.config.model import LoraConfig, ModelConfig
from rose_ray.config.strict import Fraction, Name, Strict
from rose_ray.config.target import PairInput

Reference = Literal["zero_shot", "random", "full"]
Control = Literal["dpo_shots", "sft_chosen", "select_then_dpo"]
Opponent = Literal["zero_shot", "random", "chosen"]


class FineTuningConfig(Strict):
    """How the target model is fine-tuned, the same for every training set. Defaults are the paper's."""

    epochs: int = Field(4, ge=1, description="Passes over the training set.")
    learning_rate: float = Field(2e-5, gt=0, description="Peak; rises linearly from 0, then falls linearly to 0.")
    warmup_ratio: float = Field(0.03, ge=0, lt=1, description="Share of the steps in which it rises.")
    batch_size: int = Field(128, ge=1, description="Samples of one optimizer step; pairs under DPO.")
    max_batch_tokens: int = Field(8192, ge=8, description="Bound on rows times length of what goes through at once.")
    weight_decay: float = Field(0.0, ge=0, description="Decoupled weight decay.")
    max_grad_norm: float = Field(1.0, gt=0, description="Gradients of a step are clipped to this length.")


class DpoConfig(FineTuningConfig):
    """How the controls are trained on pairs."""

    learning_rate: float = Field(5e-6, gt=0, description="Peak; rises linearly from 0, then falls linearly to 0.")
    batch_size: int = Field(8, ge=1, description="Pairs of one optimizer step.")
    dpo_beta: float = Field(0.1, gt=0, description="Beta of the DPO loss.")


class HeldOutConfig(Strict):
    """Pairs to measure on, none of which steered a selection."""

    name: Name = Field(description="Name in tables and paths.")
    pairs: list[PairInput] = Field(min_length=1, description="Files, as of a target.")
    max_pairs: int | None = Field(None, ge=1, description="Measure on so many, chosen by seed; all where unset.")
    dpo_beta: float = Field(0.1, gt=0, description="Beta of reward margin and DPO loss.")


class TaskConfig(Strict):
    """Questions with a known answer."""

    name: Name = Field(description="Name in tables and paths.")
    files: list[str] = Field(min_length=1, description="Of labelled rows; docs/evaluation.md has the layouts and keys.")
    kind: Literal["multiple_choice", "exact_match"] = Field(
        description="The option of highest log-probability, or the greedy answer compared with the known one."
    )
    options: Literal["letters", "texts"] = Field(
        "letters", description="What multiple_choice compares: the letters, the options listed, or their texts."
    )
    extract: Literal["text", "final", "last_number"] = Field(
        "final",
        description="What exact_match compares: what stands behind the last #### or 'answer is', else the whole "
        "(final); always the whole answer (text); or its last number (behind #### if there).",
    )
    splits: list[str] | None = Field(
        None,
        min_length=1,
        description="Take the records whose `split` is one of these; needed where they have several, and for dev and "
        "train. Few-shot files are refused.",
    )
    leave_out: list[str] = Field(
        default_factory=list, description="Ids of records not to measure on, for instance what a target asks too."
    )
    max_items: int | None = Field(None, ge=1, description="Measure on so many, chosen by seed; all where unset.")


class IntervalConfig(Strict):
    """How intervals are made."""

    resamples: int = Field(1000, ge=1, description="Bootstrap resamples of seeds and items.")
    level: float = Field(0.95, gt=0, lt=1, description="Share of them inside the interval.")
    seed: int = Field(0, ge=0, description="Of the resampling.")


class LdsConfig(Strict):
    """Trainings on random subsets, whose measured gains are set against the predicted ones."""

    subsets: int = Field(20, ge=3, description="Random subsets of the scored rows.")
    fraction: Fraction = Field(0.05, description="Share of the pool in each; all have one size.")
    seed: int = Field(0, description="Draws the subsets and starts the trainings.")


class EvaluationConfig(Strict):
    """What is trained, measured and judged by `rose-ray evaluate`."""

    model: ModelConfig | None = Field(None, description="The model that is fine-tuned; the selector's where unset.")
    lora: LoraConfig | None = Field(None, description="Its adapter; the selector's where unset.")
    training: FineTuningConfig = Field(default_factory=FineTuningConfig, description="Fine-tuning on rows.")
    dpo: DpoConfig = Field(default_factory=DpoConfig, description="Fine-tuning on pairs, in the controls.")
    arms: list[Name] | None = Field(None, min_length=1, description="Targets whose selections are tried; all if unset.")
    budgets: list[Fraction] = Field(
        default_factory=lambda: [0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0],
        description="Shares of the pool, rising; 1 stands for every scored row.",
    )
    counts: list[Annotated[int, Field(ge=1)]] = Field(default_factory=list, description="Further budgets, in rows.")
    seeds: list[Annotated[int, Field(ge=0)]] = Field(
        default_factory=lambda: [0, 1, 2], min_length=1, description="A training each: order of rows, adapter, dropout."
    )
    references: list[Reference] = Field(
        ["zero_shot", "random", "full"],
        description="Rows of the table beside the arms: untrained, random rows of each budget, the whole pool.",
    )
    controls: list[Control] = Field(
        default_factory=list,
        description="DPO on a target's own pairs, SFT on their chosen answers, DPO after SFT on the selection.",
    )
    control_budget: Fraction = Field(0.05, description="Budget of select_then_dpo; one of `budgets`.")
    held_out: list[HeldOutConfig] = Field(min_length=1, description="Pairs to measure on.")
    tasks: list[TaskConfig] = Field(default_factory=list, description="Questions with a known answer.")
    judges: list[JudgeConfig] = Field(default_factory=list, description="Who compares answers for the win rate.")
    opponent: Opponent = Field(
        "zero_shot",
        description="Whose answers they are compared with: the untrained model's, those after random rows of the same "
        "budget and seed, or the pairs' chosen ones.",
    )
    max_prompts: int = Field(100, ge=1, description="Prompts of each held-out set that are answered and judged.")
    max_new_tokens: int = Field(128, ge=1, description="Longest answer; decoding is greedy.")
    length_normalised_beta: float = Field(2.0, gt=0, description="Beta of the length-normalised loss.")
    intervals: IntervalConfig = Field(default_factory=IntervalConfig, description="Of every number.")
    lds: LdsConfig = Field(default_factory=LdsConfig, description="What `rose-ray lds` trains.")

    @model_validator(mode="after")
    def _parts_agree(self) -> EvaluationConfig:
        for what in ("budgets", "counts", "seeds"):
            values = list(getattr(self, what))
            if len(set(values)) != len(values):
                raise ValueError(f"{what}: {values} repeats a value")
        if not self.budgets and not self.counts:
            raise ValueError("budgets and counts are both empty: there is nothing to train on")
        names = [entry.name for entry in self.held_out] + [entry.name for entry in self.tasks]
        repeated = sorted({name for name in names if names.count(name) > 1})
        judges = [judge.name for judge in self.judges]
        repeated += sorted({name for name in judges if judges.count(name) > 1})
        if repeated:
            raise ValueError(f"held_out, tasks and judges: names must differ, found {repeated} more than once")
        if "select_then_dpo" in self.controls and self.control_budget not in self.budgets:
            raise ValueError(f"control_budget: {self.control_budget} is not among budgets {self.budgets}")
        if self.judges and self.opponent != "chosen" and self.opponent not in self.references:
            raise ValueError(f"opponent: {self.opponent} is not among references {self.references}, so never trained")
        for judge in self.judges:
            if self.opponent == "chosen" and judge.kind in ("cross_entropy", "rouge_l"):
                raise ValueError(f"judge {judge.name}: {judge.kind} looks at the chosen answers, which opponent names")
        return self
