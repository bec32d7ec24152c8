"""DSIR (Xie et al., arXiv:2302.03169): rows weighted by how much likelier their n-grams are in the target than in the
pool. No row is too short for it here: the released code's minimum is for web pages."""

from __future__ import annotations

import re

import numpy as np
from numpy.typing import NDArray

from rose_ray.config.method import DsirOptions, Needs
from rose_ray.errors import PairError
from rose_ray.kernels.lexical import log_importance, ngram_buckets
from rose_ray.methods.interface import Arrays, Method, MethodModel, PoolRows, Scored, Target
from rose_ray.methods.seeded import row_gumbels
from rose_ray.methods.texts import pair_texts, row_texts

_WORDS = re.compile(r"\w+|[^\w\s]+")


class Dsir(Method[DsirOptions]):
    """The log-weight of a row for each subtask: over its hashed uni- and bigrams, the sum of log p_target - log p_raw.

    With ``sampling: gumbel_top_k`` a row's own Gumbel number is added, equal for all subtasks, so that the best rows
    are a sample by weight.
    """

    options_model = DsirOptions
    needs = Needs(pairs=True, pool_statistics=True)

    def survey(self, rows: PoolRows, target: Target) -> Arrays:
        """Return the counts of the rows' n-grams by bucket."""
        return {"counts": self._counts(row_texts(rows))}

    def prepare(self, target: Target, statistics: Arrays, model: MethodModel | None) -> Arrays:
        """Return what an n-gram of each bucket is worth for each subtask: [T, B].

        Raises:
            PairError: A subtask's pairs have no word.
        """
        counts = []
        for subtask in target.subtasks:
            pairs = [pair for pair in target.pairs if pair.subtask == subtask]
            counts.append(self._counts(pair_texts(pairs, self.options.target_text)))
            if not counts[-1].any():
                raise PairError(f"target {target.name}: no word in the pairs of subtask {subtask!r}. Take it out.")
        return {"log_importance": log_importance(np.stack(counts), statistics["counts"], self.options.smoothing)}

    def score(self, rows: PoolRows, state: Arrays, model: MethodModel | None) -> Scored:
        """Return the log-weight of every row for every subtask."""
        worth_BT = state["log_importance"].T
        values = np.zeros((len(rows), worth_BT.shape[1]))
        for number, text in enumerate(row_texts(rows)):
            buckets = self._buckets(text)
            places = np.array(sorted(buckets), np.int64)
            counts_K = np.array([buckets[place] for place in places.tolist()], np.float64)
            values[number] = (counts_K[:, None] * worth_BT[places]).sum(axis=0)
        if self.options.sampling == "gumbel_top_k":
            values += row_gumbels(rows.row_ids, self.options.seed)[:, None]
        return Scored(values)

    def _counts(self, texts: list[str]) -> NDArray[np.int64]:
        counts_B = np.zeros(self.options.buckets, np.int64)
        for text in texts:
            for bucket, count in self._buckets(text).items():
                counts_B[bucket] += count
        return counts_B

    def _buckets(self, text: str) -> dict[int, int]:
        return ngram_buckets(_WORDS.findall(text.lower()), self.options.buckets)
