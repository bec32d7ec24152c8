"""Random rows, the control that every method has to beat: uniform, or sources in turn."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rose_ray.config.method import Needs, RandomOptions
from rose_ray.methods.interface import Arrays, Method, MethodModel, PoolRows, Scored, Target
from rose_ray.methods.seeded import row_uniforms, row_words


class RandomOrder(Method[RandomOptions]):
    """A random order of the rows, by row id and seed.

    With ``balance: source`` the first rows of all sources come first, then the second ones, and so on: each source
    gives as many rows as the others until it has no more. Which row is a source's first is random too.

    Memory with ``balance: source``: 8 bytes a row of the pool.
    """

    options_model = RandomOptions
    columns = "one"

    def __init__(self, options: RandomOptions) -> None:
        super().__init__(options)
        self.needs = Needs(pool_statistics=options.balance == "source")

    def survey(self, rows: PoolRows, target: Target) -> Arrays:
        """Return each source's random words, uint64, sorted."""
        words_N, sources_N = row_words(rows.row_ids, self.options.seed), np.array(rows.sources)
        return {source: np.sort(words_N[sources_N == source]) for source in dict.fromkeys(rows.sources)}

    def merge(self, parts: Sequence[Arrays]) -> Arrays:
        """Return the same of the whole pool."""
        names = dict.fromkeys(name for part in parts for name in part)
        return {name: np.sort(np.concatenate([part[name] for part in parts if name in part])) for name in names}

    def prepare(self, target: Target, statistics: Arrays, model: MethodModel | None) -> Arrays:
        """Hand the sorted words on."""
        return statistics

    def score(self, rows: PoolRows, state: Arrays, model: MethodModel | None) -> Scored:
        """Return uniform numbers of (0, 1), less the place, from 1, that a row has in its source where balanced."""
        scores_N = row_uniforms(rows.row_ids, self.options.seed)
        if self.options.balance == "source":
            words_N, sources_N = row_words(rows.row_ids, self.options.seed), np.array(rows.sources)
            for source in dict.fromkeys(rows.sources):
                own_N = sources_N == source
                scores_N[own_N] -= 1 + np.searchsorted(state[source], words_N[own_N])
        return Scored(scores_N[:, None])
