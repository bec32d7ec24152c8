"""What is selected from: the YAML's `pool`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from rose_ray.config.strict import Fraction, Strict


class PoolInput(Strict):
    """Files of the pool that share a format."""

    files: list[str] = Field(
        min_length=1, description="Paths, URIs or patterns: JSONL, JSON, Parquet; .gz and .zst too."
    )
    format: Literal["auto", "messages", "prompt_completion", "alpaca", "sharegpt"] = Field(
        "auto", description="Shape of a record; auto looks at the first rows and says what it found."
    )
    source: str | None = Field(None, description="Source that all rows count under.")
    source_field: str | None = Field(None, description="Key of the record that names its source.")

    @model_validator(mode="after")
    def _one_source(self) -> PoolInput:
        if self.source is not None and self.source_field is not None:
            raise ValueError("source and source_field contradict each other: set one of them")
        return self


class PoolConfig(Strict):
    """What is selected from."""

    inputs: list[PoolInput] = Field(
        min_length=1, description="Where the rows are. Of equal rows the first input's counts."
    )
    shard_rows: int = Field(512, ge=1, description="Rows of a unit of work; part of every shard's identity.")
    sample_fraction: Fraction = Field(
        1.0, description="Take this share of the rows, chosen by their content; for trials."
    )
    sample_seed: int = Field(0, description="Which rows such a share holds.")
