"""What the selected data should help: an entry of the YAML's `targets`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from rose_ray.config.selection import SelectionConfig
from rose_ray.config.strict import Name, Strict
from rose_ray.config.task import TaskInput

Objective = Literal["rose", "rose_simpo", "rose_balanced", "dpo_weighted", "less"]
Normalization = Literal["exact", "projected", "none"]


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
    pairs: list[PairInput] = Field(min_length=1, description="Its preference pairs.")
    shots: int | None = Field(
        None,
        ge=1,
        description="Use the first so many pairs, or rows of a task, of every subtask; all where unset.",
    )
    objective: Objective = Field("rose", description="Which direction a pair stands for; docs/objectives.md.")
    dpo_beta: float = Field(0.1, gt=0, description="Beta of the DPO loss; matters in dpo_weighted and in reports.")
    normalize: Normalization = Field(
        "exact", description="Divide by the exact lengths, by the projected ones (as the released code), or not at all."
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

    @model_validator(mode="after")
    def _cut_fits_encoding(self) -> TargetConfig:
        if self.encoding != "rose_official" and self.official_cut != "keep_start":
            raise ValueError(
                f"official_cut: {self.official_cut} has no meaning with encoding: {self.encoding}, which cuts the "
                "right side: take it out, or set encoding: rose_official"
            )
        return self
