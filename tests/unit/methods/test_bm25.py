"""BM25 against the library on the whole pool in memory, and against numbers worked out by hand."""

from __future__ import annotations

import pickle
import sys
from random import Random

import bm25s
import numpy as np
import pytest

from rose_ray.errors import ConfigError, ShapeError
from rose_ray.kernels.lexical import bm25_scores, inverse_document_frequencies
from rose_ray.methods.texts import pair_texts, row_texts
from tests.methods import make_method, make_pair, make_rows, score_parts, split
from tests.tiny import UNUSUAL, sentence


def a_pool(num_rows: int = 60) -> list[tuple[str, str]]:
    random = Random(0)
    texts = [(sentence(random, random.randint(2, 9)), sentence(random, random.randint(1, 30))) for _ in range(num_rows)]
    return [(f"{q} {number}", f"{a} {UNUSUAL[number % len(UNUSUAL)]}") for number, (q, a) in enumerate(texts)]


PAIRS = [
    make_pair("water water stone?", "river green", subtask="one", number=0),
    make_pair("Which coffee is the best coffee, Köln?", "winter", subtask="one", number=1),
    make_pair("nothing-of-this stands anywhere", "zebra", subtask="two", number=2),
]


@pytest.mark.parametrize("options", [{}, {"k1": 0.9, "b": 0.4, "stopwords": "none"}, {"target_text": "chosen"}])
def test_agrees_with_the_library_that_holds_the_pool_in_memory(options: dict) -> None:
    rows, method = make_rows(a_pool()), make_method("bm25", **options)
    ours = score_parts(method, split(rows, 7), PAIRS)
    stopwords = "english" if method.options.stopwords == "english" else []
    cut = {"stopwords": stopwords, "return_ids": False, "show_progress": False}
    library = bm25s.BM25(method="lucene", k1=method.options.k1, b=method.options.b, dtype="float64")
    library.index(bm25s.tokenize(row_texts(rows), **cut), show_progress=False)
    queries = bm25s.tokenize(pair_texts(PAIRS, method.options.target_text), **cut)
    known = [[word for word in query if word in library.vocab_dict] for query in queries]
    theirs = np.stack([library.get_scores(query) if query else np.zeros(len(rows)) for query in known], axis=1)
    # Both sum the same few float64 products, in another order.
    np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-12)
    assert (ours[:, 2] == 0).all() and (ours[:, 0] > 0).any()


def test_worked_by_hand() -> None:
    rows = make_rows([("apple", "apple pear"), ("pear", "plum")])
    # Rows of 3 and 2 words, 2.5 on average. apple is in 1 of 2 rows: idf ln(1 + 1.5 / 1.5) = ln 2.
    # pear is in both: ln(1 + 0.5 / 2.5) = ln 1.2. The query holds apple once and pear twice.
    method = make_method("bm25", k1=1.5, b=0.75)
    found = score_parts(method, [rows], [make_pair("apple pear", "pear")])
    long, short = 1.5 * (0.25 + 0.75 * 3 / 2.5), 1.5 * (0.25 + 0.75 * 2 / 2.5)
    first = np.log(2) * 2 / (2 + long) + 2 * np.log(1.2) * 1 / (1 + long)
    second = 2 * np.log(1.2) * 1 / (1 + short)
    np.testing.assert_allclose(found, [[first], [second]], rtol=1e-14)  # a few roundings of float64


def test_a_row_scores_the_same_wherever_it_lies() -> None:
    rows, method = make_rows(a_pool()), make_method("bm25")
    whole = score_parts(method, [rows], PAIRS)
    assert (score_parts(method, split(rows, 1), PAIRS) == whole).all()


def test_a_repeated_word_of_the_pairs_counts_twice_and_an_unknown_one_not_at_all() -> None:
    idf = inverse_document_frequencies(np.array([1, 3]), 10)
    counts, once = np.array([1, 2]), np.array([[1], [0]])
    score = bm25_scores(counts, idf, once, 4, 4.0, k1=1.5, b=0.75)
    assert bm25_scores(counts, idf, 2 * once, 4, 4.0, k1=1.5, b=0.75) == pytest.approx(2 * score)
    assert bm25_scores(counts[:0], idf[:0], once[:0], 4, 4.0, k1=1.5, b=0.75).tolist() == [0.0]
    with pytest.raises(ShapeError, match="1 counts, 2 idf"):
        bm25_scores(counts[:1], idf, once, 4, 4.0, k1=1.5, b=0.75)


def test_text_of_pairs_is_what_was_asked_for() -> None:
    pair = [make_pair("question", "answer", "bad")]
    assert [pair_texts(pair, which) for which in ("prompt_and_chosen", "prompt", "chosen")] == [
        ["question\nanswer"],
        ["question"],
        ["answer"],
    ]


def test_without_the_library_one_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    travelling = pickle.dumps(make_method("bm25"))
    monkeypatch.setitem(sys.modules, "bm25s", None)
    monkeypatch.delitem(sys.modules, "rose_ray.methods.bm25")
    told = r"method bm25 needs the package bm25s, and .+ cannot import it \(.+\): pip install bm25s on every machine"
    with pytest.raises(ConfigError, match=f"^target t: {told}"):
        make_method("bm25")
    on_a_worker = pickle.loads(travelling)  # without a check: what is lacking is said where the rows are read
    with pytest.raises(ConfigError, match=f"^{told}"):
        score_parts(on_a_worker, [make_rows(a_pool(2))], PAIRS)
