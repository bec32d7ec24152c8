"""What keeps two runs apart."""

from __future__ import annotations

from pydantic import Field

from rose_ray.config.strict import Strict


class LeaseConfig(Strict):
    """What keeps two runs from writing to one workspace at the same time."""

    enabled: bool = Field(
        True, description="Hold the workspace while a run is at work; needs a local or shared folder, or S3 with boto3."
    )
    term_seconds: float = Field(
        60.0, gt=0, description="A run that was not heard of for so long, on another machine, is taken over from."
    )

    @property
    def term(self) -> float | None:
        """``term_seconds``, or None where no lease is held."""
        return self.term_seconds if self.enabled else None
