"""From gradient to feature: the YAML's `gradients`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from rose_ray.config.strict import Strict

AdamMode = Literal["torch", "less_code", "v_only", "sgd"]
StoredType = Literal["float32", "float16", "int8", "bit1"]


class ProjectionConfig(Strict):
    """What makes a feature of a direction."""

    kind: Literal["sketch", "rademacher", "factored", "none", "exact"] = Field(
        "sketch",
        description="sketch (fast), rademacher (dense, as the released code), factored (two-sided, per matrix), none "
        "(every parameter; small models), exact (inner products with the pairs themselves: a new target costs a pass).",
    )
    dim: int = Field(16384, ge=1, description="Width of a feature; ignored by none and exact.")
    seed: int = Field(0, ge=0, description="Seed of the projection.")
    deflate: bool = Field(
        True,
        description="Take the moment term that all directions share out before projecting and keep its inner product "
        "exactly: less noise for one number a row. Nothing to do for adam: sgd and v_only, nor for none and exact.",
    )


class GradientConfig(Strict):
    """From a sample's gradient to its feature."""

    adam: AdamMode = Field("torch", description="torch, less_code (the released formula), v_only, or sgd.")
    projection: ProjectionConfig = Field(default_factory=ProjectionConfig, description="Direction to feature.")
    exact_basis: Literal["auto", "pairs", "subtasks"] = Field(
        "auto",
        description="What exact targets keep of their pairs in an actor: both sides of each, or one direction a "
        "subtask: less memory, but then only this objective's scores are exact, no single pair's influence. auto keeps "
        "the pairs where they are within exact_basis_gib, and a run says which it took.",
    )
    exact_basis_gib: float = Field(
        8.0,
        gt=0,
        description="What exact_basis: auto compares with, in GiB, target by target: both sides of the pairs in "
        "float32 at all checkpoints, as an actor holds them. Ignored by pairs and subtasks.",
    )
    stored_dtype: Literal["auto", "float32", "float16", "int8", "bit1"] = Field(
        "auto",
        description="Type of a stored feature; docs/projections.md says what each costs in rank. auto: bit1, and "
        "float32 where nothing is projected (kind: none).",
    )
    max_batch_tokens: int | Literal["auto"] = Field(
        "auto",
        description="Bound on rows times length of a batch; auto measures what fits into memory. Changes scores by "
        "rounding only.",
    )
    packing: bool = Field(
        False, description="Lay rows end to end instead of padding them; for attention: flash_attention_2."
    )
    kernel: Literal["torch", "triton"] = Field(
        "torch", description="What makes features of gradients: torch's operators, or one fused Triton kernel (CUDA)."
    )

    @property
    def stored_type(self) -> StoredType:
        """What ``stored_dtype`` comes to."""
        if self.stored_dtype != "auto":
            return self.stored_dtype
        # Signs keep inner products of numbers that a projection has mixed, not of a matrix' own entries.
        return "float32" if self.projection.kind == "none" else "bit1"

    @field_validator("max_batch_tokens")
    @classmethod
    def _room_for_a_row(cls, value: int | str) -> int | str:
        if isinstance(value, int) and value < 8:
            raise ValueError("expected auto, or at least 8")
        return value

    @model_validator(mode="after")
    def _kernel_fits_projection(self) -> GradientConfig:
        if self.kernel == "triton" and self.projection.kind not in ("sketch", "exact"):
            raise ValueError(f"kernel: triton has no projection.kind {self.projection.kind}; set kernel: torch")
        return self
