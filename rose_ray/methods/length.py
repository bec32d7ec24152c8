"""The longest rows, a control: a method that does no better has found nothing but length."""

from __future__ import annotations

import numpy as np

from rose_ray.config.method import LengthOptions
from rose_ray.methods.interface import Arrays, Method, MethodModel, PoolRows, Scored


class Length(Method[LengthOptions]):
    """Longest first. Rows of one length follow by their ids, so all that are cut at the limit do, counted in tokens."""

    options_model = LengthOptions
    columns = "one"

    def score(self, rows: PoolRows, state: Arrays, model: MethodModel | None) -> Scored:
        """Return each row's length."""
        unit = self.options.unit
        if unit == "characters":
            lengths_N = np.array([sum(len(m.content) for m in each.messages) for each in rows.conversations])
        else:
            lengths_N = rows.num_labelled_tokens if unit == "answer_tokens" else rows.num_tokens
        return Scored(lengths_N.astype(np.float64)[:, None])
