"""``rds`` and ``rds_plus`` as methods: see `rose_ray.stages.rds`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from rose_ray.config.method import Needs, NoOptions
from rose_ray.kernels.pooling import Pooling
from rose_ray.methods.answers import chosen_answers
from rose_ray.methods.interface import Arrays, Method, MethodModel, PoolRows, Scored, Target
from rose_ray.stages.forwards import unit_embeddings
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


class RowStates(Method[NoOptions]):
    """The states themselves, of length 1: no score, but what `selection.diversity` compares rows by.

    Args:
        pooling: Which.
    """

    options_model = NoOptions
    columns = "vector"
    needs = Needs(model=True)

    def __init__(self, pooling: Pooling) -> None:
        super().__init__(NoOptions())
        self._pooling: Pooling = pooling

    def content(self) -> Mapping[str, Any]:
        """Which states."""
        return {"pooling": self._pooling}

    def score(self, rows: PoolRows, state: Arrays, model: MethodModel | None) -> Scored:
        """Return states [N, H]."""
        assert model is not None
        samples = rows.samples(model.tokeniser)
        with model.scoring.without_adapter():
            found = unit_embeddings(model.scoring, samples, self._pooling, max_batch_tokens=model.max_batch_tokens)
        return Scored(found.values_NU, found.rejected)


POOLING: Mapping[str, Pooling] = {"rds": Rds.pooling, "rds_plus": RdsPlus.pooling}
"""Pooling of the states by the method that compares them with pairs."""
