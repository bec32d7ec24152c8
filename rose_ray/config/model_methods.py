"""Options of the methods that score rows by forward passes of the base model."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from rose_ray.config.strict import Strict


class LossDropOptions(Strict):
    """Of ``loss_drop``: the short training on the target's chosen answers."""

    epochs: int = Field(10, ge=1, description="Passes over the chosen answers.")
    batch_size: int = Field(8, ge=1, description="Answers of one optimizer step.")
    learning_rate: float = Field(1e-4, gt=0, description="Peak; rises linearly from 0, then falls linearly to 0.")
    warmup_ratio: float = Field(0.03, ge=0, lt=1, description="Share of the steps in which it rises.")
    max_grad_norm: float = Field(1.0, gt=0, description="Gradients of a step are clipped to this length.")
    seed: int = Field(0, ge=0, description="Chooses the adapter's first values and the order.")


class NuggetsOptions(Strict):
    """Of ``nuggets``: what demonstrations are tried on."""

    anchors: Literal["target", "pool"] = Field(
        "target", description="The target's pairs with their chosen answers, or rows of the pool as in the original."
    )
    num_anchors: int = Field(100, ge=1, description="Rows of the pool that become anchors, by clusters.")
    drawn_rows: int = Field(1000, ge=1, description="Rows of the pool, drawn by seed, that are clustered.")
    seed: int = Field(0, ge=0, description="Chooses both.")

    @model_validator(mode="after")
    def _settings_fit(self) -> NuggetsOptions:
        fields = type(self).model_fields
        idle = [n for n in ("num_anchors", "drawn_rows", "seed") if getattr(self, n) != fields[n].default]
        if self.anchors == "target" and idle:
            raise ValueError(f"{', '.join(idle)}: no meaning with anchors: target, where pairs are the anchors")
        if self.num_anchors > self.drawn_rows:
            raise ValueError(f"{self.num_anchors} anchors cannot be chosen of {self.drawn_rows} drawn rows")
        return self


class GistOptions(Strict):
    """Of ``gist``."""

    rank: int | None = Field(None, ge=2, description="Dimensions of the subspace; all that the pairs span where unset.")
