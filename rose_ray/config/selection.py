"""The part of the YAML that says how much is selected, and how."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from rose_ray.config.cleaning import Decontaminate, Diversity, NearDuplicates
from rose_ray.config.strict import Fraction, Name, Strict


class SelectionConfig(Strict):
    """How many rows, and which of the best."""

    fraction: Fraction | None = Field(None, description="Share of the pool's unique rows.")
    count: int | None = Field(None, ge=1, description="Number of rows.")
    tokens: int | None = Field(None, ge=1, description="Number of tokens, all roles counted.")
    method: Literal["top_k", "round_robin", "round_robin_pairs", "equal_parts"] = Field(
        "top_k",
        description="top_k of the score; or each subtask, or each pair, in turn takes its best row left; or subtasks "
        "take turns until each has spent an equal part of the budget.",
    )
    include_sources: list[str] | None = Field(None, min_length=1, description="Choose from these sources only.")
    exclude_sources: list[str] = Field(default_factory=list, description="Choose nothing from these sources.")
    source_quotas: dict[str, Annotated[float, Field(gt=0, le=1)]] = Field(
        default_factory=dict, description="Largest share of the selection that a source may have."
    )
    near_duplicates: NearDuplicates | None = Field(
        None, description="Pass over rows that are nearly the same as a better one; docs/clean-selections.md."
    )
    decontaminate: Decontaminate | None = Field(
        None, description="Pass over rows that hold test text; docs/clean-selections.md."
    )
    diversity: Diversity | None = Field(
        None, description="Pass over rows whose vectors point where a better one's does; docs/clean-selections.md."
    )

    @model_validator(mode="after")
    def _one_budget(self) -> SelectionConfig:
        given = [n for n in ("fraction", "count", "tokens") if getattr(self, n) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} contradict each other: set one of fraction, count, tokens")
        both = sorted(set(self.include_sources or []) & set(self.exclude_sources))
        if both:
            raise ValueError(f"sources {both} are both included and excluded")
        return self

    def identity(self) -> dict[str, Any]:
        """Return what a selection depends on, besides files: settings, less those unset that pass rows over."""
        unset = {name for name in ("near_duplicates", "decontaminate", "diversity") if getattr(self, name) is None}
        return self.model_dump(mode="json", exclude=unset)

    @property
    def budget(self) -> tuple[Literal["fraction", "count", "tokens"], float]:
        """The budget that was set; 5 % of the pool where none was."""
        if self.count is not None:
            return "count", self.count
        if self.tokens is not None:
            return "tokens", self.tokens
        return "fraction", self.fraction if self.fraction is not None else 0.05


class JointSelectionConfig(SelectionConfig):
    """How much of the targets' best rows; the targets take turns unless said otherwise."""

    method: Literal["top_k", "round_robin", "equal_parts"] = Field(
        "round_robin",
        description="Each target in turn takes its best row left; or until each has spent an equal part of the "
        "budget; or top_k of the targets' combined scores.",
    )
    aggregation: Literal["max", "mean"] = Field("max", description="From targets' scores to the one of top_k.")


class TrainingSetConfig(Strict):
    """One training set made from several targets."""

    targets: list[Name] | None = Field(None, min_length=1, description="Targets that take part; all where unset.")
    selection: JointSelectionConfig = Field(
        default_factory=JointSelectionConfig, description="As for a target; targets take the place of subtasks."
    )
