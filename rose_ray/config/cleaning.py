"""What is passed over while selecting: near-duplicates of better rows, rows like them, and rows that hold test text."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from rose_ray.config.strict import Strict


class NearDuplicates(Strict):
    """Of rows that are nearly the same, the better-scored one is selected."""

    method: Literal["exact", "minhash"] = Field(
        "minhash", description="exact: equal words in equal order; minhash: Jaccard similarity of runs of words."
    )
    threshold: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None, description="Similarity from which a row counts as a near-duplicate, for minhash; 0.8 where unset."
    )
    shingle_words: int = Field(5, ge=1, le=50, description="Words of a run, for minhash.")
    num_hashes: int = Field(128, ge=16, le=1024, description="Hash functions of minhash: more are more exact.")

    @model_validator(mode="after")
    def _threshold_fits_method(self) -> NearDuplicates:
        if self.method == "exact" and self.threshold is not None:
            raise ValueError("threshold has no meaning with method: exact: take it out, or set method: minhash")
        return self

    @property
    def similarity(self) -> float:
        """The threshold that was set, or the default."""
        return 0.8 if self.threshold is None else self.threshold


RowVectors = Literal["rds", "rds_plus", "gradients"]
"""What rows are compared by."""


class Diversity(Strict):
    """A row is selected only while it is unlike every row selected before it."""

    max_cosine: Annotated[float, Field(gt=0, lt=1)] = Field(
        description="Largest cosine that a row's vector may have with that of a row selected before it; DEITA took 0.9."
    )
    vectors: RowVectors = Field(
        "rds",
        description="States of the base model, a forward pass for every row of the pool: of the last token (rds) or "
        "the weighted mean of all (rds_plus). Or gradients: a gradient target's features at its last checkpoint.",
    )


class Decontaminate(Strict):
    """Rows that share text with what is measured on are not selected."""

    files: list[str] = Field(
        default_factory=list, description="Files of test text: tasks, pairs, conversations, or plain text, one a line."
    )
    fields: list[str] | None = Field(
        None, min_length=1, description="Keys of these files' records that hold test text; known ones where unset."
    )
    split: str | None = Field(None, description="Take rows of this split of the files only.")
    target_pairs: bool = Field(True, description="The target's own pairs are test text too.")
    words: int = Field(
        13,
        ge=3,
        le=100,
        description="So many words in a row in common are contamination; shorter prompts must be equal.",
    )

    @model_validator(mode="after")
    def _something_to_compare(self) -> Decontaminate:
        if not self.files and not self.target_pairs:
            raise ValueError("neither files nor target_pairs: there is no test text to compare with")
        if not self.files and (self.fields or self.split):
            raise ValueError("fields and split are about files, and there are none")
        return self
