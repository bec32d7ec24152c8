"""What all models of the YAML share: no unknown keys, no lenient types, no changes."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", max_length=100)]
Fraction = Annotated[float, Field(gt=0, le=1)]


class Strict(BaseModel):
    """Every model of the YAML is one."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, validate_default=True, allow_inf_nan=False)
