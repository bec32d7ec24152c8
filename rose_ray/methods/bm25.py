"""BM25: the pool's rows that share the most telling words with the target's pairs.

Words are those of the library bm25s, whose scores these are; its index holds a whole pool in memory, so here the pool's
statistics are summed over shards, for the words that the pairs have.
"""

from __future__ import annotations

import importlib
import platform
from collections import Counter
from typing import Any

import numpy as np

from rose_ray.config.method import Bm25Options, Needs
from rose_ray.errors import ConfigError
from rose_ray.kernels.lexical import bm25_scores, inverse_document_frequencies
from rose_ray.methods.interface import (
    Arrays,
    Method,
    MethodModel,
    PoolRows,
    Scored,
    Target,
    pack_texts,
    unpack_texts,
)
from rose_ray.methods.texts import pair_texts, row_texts


class Bm25(Method[Bm25Options]):
    """Pairs as queries, rows as documents: the mean score over a subtask's pairs."""

    options_model = Bm25Options
    needs = Needs(pairs=True, pool_statistics=True)
    survey_reads_pairs = True
    columns = "pairs"

    def __init__(self, options: Bm25Options) -> None:
        super().__init__(options)
        _library()  # said before anything is computed

    def survey(self, rows: PoolRows, target: Target) -> Arrays:
        """Return in how many rows each word of the pairs stands, how many rows there are, and their words in all."""
        place_of = {word: place for place, word in enumerate(self._vocabulary(target))}
        documents_with_Q = np.zeros(len(place_of), np.int64)
        words = self._words(row_texts(rows))
        for document in words:
            documents_with_Q[[place_of[word] for word in set(document) if word in place_of]] += 1
        num_words = np.array(sum(map(len, words)), np.int64)
        return {"with": documents_with_Q, "documents": np.array(len(words), np.int64), "words": num_words}

    def prepare(self, target: Target, statistics: Arrays, model: MethodModel | None) -> Arrays:
        """Return the words, their weights, and how often each pair has them."""
        vocabulary = self._vocabulary(target)
        place_of = {word: place for place, word in enumerate(vocabulary)}
        queries = self._words(pair_texts(target.pairs, self.options.target_text))
        counts_QV = np.zeros((len(vocabulary), len(queries)), np.int32)
        for number, query in enumerate(queries):
            for word, count in Counter(query).items():
                counts_QV[place_of[word], number] = count
        num_documents = int(statistics["documents"])
        return {
            "vocabulary": pack_texts(vocabulary),
            "idf": inverse_document_frequencies(statistics["with"], num_documents),
            "query_counts": counts_QV,
            # Where no row has a word there is nothing to divide by it.
            "mean_length": np.array(max(int(statistics["words"]), 1) / num_documents),
        }

    def score(self, rows: PoolRows, state: Arrays, model: MethodModel | None) -> Scored:
        """Return the score of every row for every pair; 0 where no word is shared."""
        place_of = {word: place for place, word in enumerate(unpack_texts(state["vocabulary"]))}
        idf_Q, counts_QV, mean_length = state["idf"], state["query_counts"], float(state["mean_length"])
        values = np.zeros((len(rows), counts_QV.shape[1]))
        for number, words in enumerate(self._words(row_texts(rows))):
            shared = Counter(place_of[word] for word in words if word in place_of)
            places = np.array(sorted(shared), np.int64)
            values[number] = bm25_scores(
                np.array([shared[place] for place in places.tolist()], np.int64),
                idf_Q[places],
                counts_QV[places],
                len(words),
                mean_length,
                k1=self.options.k1,
                b=self.options.b,
            )
        return Scored(values)

    def _vocabulary(self, target: Target) -> list[str]:
        queries = self._words(pair_texts(target.pairs, self.options.target_text))
        return sorted({word for query in queries for word in query})

    def _words(self, texts: list[str]) -> list[list[str]]:
        stopwords = "english" if self.options.stopwords == "english" else []
        words: list[list[str]] = _library().tokenize(texts, stopwords=stopwords, return_ids=False, show_progress=False)
        return words


def _library() -> Any:
    # Where this module itself imported it, a worker without it could not even unpickle the method.
    try:
        return importlib.import_module("bm25s")
    except ImportError as error:
        raise ConfigError(
            f"method bm25 needs the package bm25s, and {platform.node()} cannot import it ({error}): pip install bm25s "
            "on every machine of the cluster"
        ) from error
