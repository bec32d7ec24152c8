"""``ifd`` as a method: see `rose_ray.stages.ifd`."""

from __future__ import annotations

from rose_ray.config.method import Needs, NoOptions
from rose_ray.methods.answers import beginning_token
from rose_ray.methods.interface import Arrays, Method, MethodModel, PoolRows, Scored
from rose_ray.stages.ifd import ifd_scores


class Ifd(Method[NoOptions]):
    """Loss of the answer given the prompt over its loss alone, highest first; above 1 a row is rejected."""

    options_model = NoOptions
    columns = "one"
    needs = Needs(model=True)

    def score(self, rows: PoolRows, state: Arrays, model: MethodModel | None) -> Scored:
        """Return ratios [N, 1]."""
        assert model is not None
        samples = rows.samples(model.tokeniser)
        found = ifd_scores(
            model.scoring, samples, beginning_token(model.tokeniser), max_batch_tokens=model.max_batch_tokens
        )
        return Scored(found.values_NU, found.rejected)
