"""What the selected data should help: an entry of the YAML's `targets`."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from rose_ray.config.method import BUILT_IN, GRADIENT_METHODS, check_method_name, parse_options
from rose_ray.config.model_methods import GistOptions
from rose_ray.config.selection import SelectionConfig
from rose_ray.config.strict import Name, Strict
from rose_ray.config.task import TaskInput

Objective = Literal["rose", "rose_simpo", "rose_balanced", "dpo_weighted", "less"]
Normalization = Literal["exact", "own", "projected", "none"]


class PairInput(Strict):
    """Preference pairs of a target."""

    files: list[str] = Field(min_length=1, description="Paths, URIs or patterns.")
    format: Literal["auto", "explicit", "implicit", "sharegpt", "rose_authors"] = Field(
        "auto",
        description="Shape of a record: with a prompt, with the prompt inside both answers, or the authors' files.",
    )
    task: TaskInput | None = Field(
        None, description="The files hold labelled rows of a task, from which pairs are made; docs/tasks.md."
    )
    subtask: Name | None = Field(None, description="Subtask of all pairs in these files.")
    subtask_field: str | None = Field(None, description="Key of the record that names its subtask.")
    subtask_blocks: int | None = Field(
        None, ge=1, description="The file holds this many subtasks, one equal block each."
    )

    @model_validator(mode="after")
    def _one_subtask(self) -> PairInput:
        given = [n for n in ("subtask", "subtask_field", "subtask_blocks") if getattr(self, n) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} contradict each other: set one of them")
        if self.task is not None and self.format != "auto":
            raise ValueError(f"format: {self.format} is for files of pairs and task for labelled rows: set one of them")
        if self.task is not None and self.subtask_blocks is not None:
            raise ValueError("subtask_blocks is for files of pairs; rows of a task name their subtask themselves")
        return self


class TargetConfig(Strict):
    """What the selected data should make the model better at."""

    name: Name = Field(description="Name of the target, used in paths.")
    method: str = Field(
        "rose", description="What scores the rows: rose, another of docs/methods.md, or your own package.module:Class."
    )
    method_options: dict[str, Any] = Field(default_factory=dict, description="What that method can be told.")
    pairs: list[PairInput] = Field(
        default_factory=list, description="Its preference pairs; a method that looks at no target needs none."
    )
    shots: int | None = Field(
        None,
        ge=1,
        description="Use the first so many pairs, or rows of a task, of every subtask; all where unset.",
    )
    objective: Objective = Field("rose", description="Which direction a pair stands for; docs/objectives.md.")
    dpo_beta: float = Field(0.1, gt=0, description="Beta of the DPO loss; matters in dpo_weighted and in reports.")
    normalize: Normalization = Field(
        "exact",
        description="Divide by the exact lengths, by those of what is a row's own (the moment term that all rows share "
        "left out), by the projected ones (as the released code), or not at all; docs/objectives.md.",
    )
    encoding: Literal["chat", "rose_official"] = Field(
        "chat", description="Pairs in the pool's chat template, or in the raw transcripts of the released code."
    )
    official_cut: Literal["keep_start", "keep_end"] = Field(
        "keep_start", description="Which end of a long prompt rose_official keeps; the authors use keep_end for hh."
    )
    aggregation: Literal["max", "mean"] = Field("max", description="From subtask scores to the score.")
    exact: bool = Field(
        False,
        description="Score by exact inner products, made in the same pass as the features, instead of by features.",
    )
    selection: SelectionConfig = Field(default_factory=SelectionConfig, description="How much is selected, and how.")

    @property
    def uses_gradients(self) -> bool:
        """Whether the pipeline of warm-up, bank and features scores it."""
        return self.method in GRADIENT_METHODS

    @field_validator("method")
    @classmethod
    def _known_method(cls, name: str) -> str:
        check_method_name(name)
        return name

    @model_validator(mode="before")
    @classmethod
    def _objective_of_less(cls, content: Any) -> Any:
        if isinstance(content, dict) and content.get("method") == "gist":
            return {"objective": "less", **content}  # the gradient of the chosen answers, as published
        if isinstance(content, dict) and content.get("method") == "less":
            if content.get("objective", "less") != "less":
                raise ValueError(
                    f"method: less is objective: less, which objective: {content['objective']} contradicts: "
                    "take one of them out"
                )
            return {**content, "objective": "less"}
        return content

    @model_validator(mode="before")
    @classmethod
    def _turns_of_rds_plus(cls, content: Any) -> Any:
        if not isinstance(content, dict) or content.get("method") != "rds_plus":
            return content
        selection = content.get("selection", {})
        if not isinstance(selection, dict):
            return content
        return {**content, "selection": {"method": "round_robin_pairs", **selection}}

    @model_validator(mode="after")
    def _method_fits(self) -> TargetConfig:
        built_in = BUILT_IN.get(self.method)
        if not self.pairs and (self.uses_gradients or (built_in is not None and built_in.needs.pairs)):
            raise ValueError(f"target {self.name}: method {self.method} needs preference pairs: set `pairs`")
        if self.uses_gradients:
            if self.method == "gist":
                parse_options("gist", GistOptions, self.method_options)
            elif self.method_options:
                raise ValueError(f"method_options: {self.method} has none; its settings are keys of the target itself")
            return self
        if built_in is not None:
            parse_options(self.method, built_in.options, self.method_options)
        fields = type(self).model_fields
        without_meaning = [
            name
            for name in ("objective", "dpo_beta", "normalize", "encoding", "exact")
            if getattr(self, name) != fields[name].default
        ]
        if without_meaning:
            raise ValueError(
                f"{' and '.join(without_meaning)}: no meaning with method: {self.method}, which takes no gradients "
                "of the loss: take them out"
            )
        return self

    @model_validator(mode="after")
    def _pairs_have_directions(self) -> TargetConfig:
        if self.objective == "dpo_weighted" and self.scores_pairs:
            raise ValueError(
                "selection.method: round_robin_pairs needs a score a pair, but objective: dpo_weighted makes one "
                "direction of a subtask's pairs: take round_robin, or another objective"
            )
        return self

    @property
    def scores_pairs(self) -> bool:
        """Whether the score table has a column for every pair."""
        return self.selection.method == "round_robin_pairs"

    @property
    def gist(self) -> GistOptions | None:
        """How rows are compared inside the span of the pairs' gradients; None with another method."""
        return GistOptions.model_validate(self.method_options) if self.method == "gist" else None

    @model_validator(mode="after")
    def _cut_fits_encoding(self) -> TargetConfig:
        if self.encoding != "rose_official" and self.official_cut != "keep_start":
            raise ValueError(
                f"official_cut: {self.official_cut} has no meaning with encoding: {self.encoding}, which cuts the "
                "right side: take it out, or set encoding: rose_official"
            )
        return self
