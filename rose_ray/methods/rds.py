"""``rds`` and ``rds_plus`` as methods: see `rose_ray.stages.rds`."""

from __future__ import annotations

from typing import ClassVar

from rose_ray.config.method import Needs, NoOptions
from rose_ray.kernels.pooling import Pooling
from rose_ray.methods.answers import chosen_answers
from rose_ray.methods.interface import Arrays, Method, MethodModel, PoolRows, Scored, Target
from rose_ray.stages.rds import embedding_cosines, query_embeddings


class RdsPlus(Method[NoOptions]):
    """Cosine of position-weighted mean hidden states."""

    options_model = NoOptions
    columns = "pairs"
    needs = Needs(pairs=True, model=True)
    pooling: ClassVar[Pooling] = "position_weighted"

    def prepare(self, target: Target, statistics: Arrays, model: MethodModel | None) -> Arrays:
        """Return the pairs' embeddings [V, H]."""
        assert model is not None
        queries_VH = query_embeddings(
            model.scoring,
            chosen_answers(target, model.tokeniser),
            [pair.pair_id for pair in target.pairs],
            self.pooling,
            max_batch_tokens=model.max_batch_tokens,
        )
        return {"queries": queries_VH}

    def score(self, rows: PoolRows, state: Arrays, model: MethodModel | None) -> Scored:
        """Return cosines [N, V]."""
        assert model is not None
        samples = rows.samples(model.tokeniser)
        found = embedding_cosines(
            model.scoring, samples, state["queries"], self.pooling, max_batch_tokens=model.max_batch_tokens
        )
        return Scored(found.values_NU, found.rejected)


class Rds(RdsPlus):
    """Cosine of the last tokens' hidden states."""

    pooling = "last_token"
