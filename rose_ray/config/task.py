"""Labelled data of an ordinary task that preference pairs are made from: ``task`` of a target's ``pairs``."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from rose_ray.config.strict import Strict

TaskKind = Literal["multiple_choice", "exact_answer", "summarization"]
Rejected = Literal["options", "other_rows", "samples", "lead", "shuffled"]

_REJECTED: dict[str, tuple[Rejected, ...]] = {
    "multiple_choice": ("options",),
    "exact_answer": ("other_rows", "samples"),
    "summarization": ("lead", "shuffled", "other_rows"),
}
_ANSWERS: dict[str, tuple[str, ...]] = {
    "multiple_choice": ("letter", "text", "letter_and_text"),
    "exact_answer": ("full", "final"),
    "summarization": ("full",),
}


class TaskInput(Strict):
    """How labelled rows become pairs: the labelled answer against a wrong one."""

    kind: TaskKind = Field(
        description="A row is a question with options, a question with an answer, or a text and its summary."
    )
    split: str | None = Field(
        None, description="Take rows of this split only; must be set where the files hold several."
    )
    answer: Literal["letter", "text", "letter_and_text", "full", "final"] | None = Field(
        None,
        description="Of options: letter (default), text or letter_and_text. Of exact answers: full, with the worked "
        "solution (default), or final.",
    )
    rejected: Rejected | None = Field(
        None,
        description="The wrong side: the other options; an answer of other_rows (default of exact_answer) or wrong "
        "samples of a model; the document's lead (default of summarization) or the summary's sentences shuffled.",
    )
    rejected_per_row: int | None = Field(
        None, ge=1, description="Pairs of a row: all other options where unset, one elsewhere."
    )
    samples: list[str] | None = Field(
        None, min_length=1, description="Files with a model's answers, for rejected: samples; docs/tasks.md."
    )
    instruction: str | None = Field(
        None, min_length=1, description="Text above every question; {subtask} stands for the subtask's name."
    )
    document_field: str = Field("document", description="Key of the text to sum up.")
    summary_field: str = Field("summary", description="Key of its reference summary.")
    seed: int = Field(0, ge=0, description="Of what is drawn: which other row's answer, which order of sentences.")

    @model_validator(mode="after")
    def _parts_agree(self) -> TaskInput:
        if self.rejected is not None and self.rejected not in _REJECTED[self.kind]:
            raise ValueError(
                f"rejected: {self.rejected} has no meaning with kind: {self.kind}; expected "
                f"{' or '.join(_REJECTED[self.kind])}"
            )
        if self.answer is not None and self.answer not in _ANSWERS[self.kind]:
            raise ValueError(
                f"answer: {self.answer} has no meaning with kind: {self.kind}; expected "
                f"{' or '.join(_ANSWERS[self.kind])}"
            )
        if (self.rejected == "samples") != (self.samples is not None):
            raise ValueError("samples (files) and rejected: samples belong together: set both or neither")
        if self.kind != "exact_answer" and self.samples is not None:
            raise ValueError("samples are for kind: exact_answer, where an answer can be checked")
        return self

    @property
    def wrong_side(self) -> Rejected:
        """What was set for the rejected side, or the kind's default."""
        return self.rejected or _REJECTED[self.kind][0]

    @property
    def answer_form(self) -> str:
        """What was set for the form of an answer, or the kind's default."""
        return self.answer or _ANSWERS[self.kind][0]
