"""``nuggets`` as a method: see `rose_ray.stages.nuggets`."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from rose_ray.config.method import Needs
from rose_ray.config.model_methods import NuggetsOptions
from rose_ray.data.conversation import parse_conversation
from rose_ray.data.tokenize import Sample
from rose_ray.methods.answers import beginning_token, chosen_answers, context_limit
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
from rose_ray.methods.seeded import row_words
from rose_ray.stages.nuggets import Anchors, demonstration_scores, pool_anchors, prepare_anchors


class Nuggets(Method[NuggetsOptions]):
    """Share of anchors whose answer gets likelier behind a row as a demonstration.

    Anchors are the target's pairs, a column each; or rows of the pool, which gives one column and looks at no target.
    A row that is an anchor itself is scored like any other: before itself it gives its own answer away.
    """

    options_model = NuggetsOptions
    version = 2

    def __init__(self, options: NuggetsOptions) -> None:
        super().__init__(options)
        pool = options.anchors == "pool"
        self.columns = "one" if pool else "pairs"
        self.needs = Needs(pairs=not pool, pool_statistics=pool, model=True)

    def survey(self, rows: PoolRows, target: Target) -> Arrays:
        """Return the rows of a shard that may be drawn: random words, uint64, and texts."""
        words_N = row_words(rows.row_ids, self.options.seed)
        drawn = np.argsort(words_N, kind="stable")[: self.options.drawn_rows]
        return {"words": words_N[drawn], "texts": pack_texts([rows.texts[place] for place in drawn.tolist()])}

    def merge(self, parts: Sequence[Arrays]) -> Arrays:
        """Return the rows that are drawn of the whole pool."""
        words = np.concatenate([part["words"] for part in parts])
        texts = [text for part in parts for text in unpack_texts(part["texts"])]
        drawn = np.argsort(words, kind="stable")[: self.options.drawn_rows]
        return {"words": words[drawn], "texts": pack_texts([texts[place] for place in drawn.tolist()])}

    def prepare(self, target: Target, statistics: Arrays, model: MethodModel | None) -> Arrays:
        """Return the anchors and the log-probabilities of their answers alone."""
        assert model is not None
        bound, limit = model.max_batch_tokens, context_limit(model)
        if self.options.anchors == "pool":
            texts = unpack_texts(statistics["texts"])
            encoded = (model.tokeniser.encode(parse_conversation(text)) for text in texts)
            # A row that fills the model leaves no room for a demonstration. Nobody chose it, so another one is taken.
            drawn = [sample for sample in encoded if len(sample.input_ids) < limit]
            places = pool_anchors(
                model.scoring, drawn, self.options.num_anchors, self.options.seed, max_batch_tokens=bound
            )
            samples, names = [drawn[place] for place in places], [f"drawn row {place + 1}" for place in places]
        else:
            samples, names = chosen_answers(target, model.tokeniser), [pair.pair_id for pair in target.pairs]
        anchors = prepare_anchors(
            model.scoring,
            samples,
            names,
            limit=limit,
            bos_token_id=beginning_token(model.tokeniser),
            max_batch_tokens=bound,
        )
        return {
            "ids": np.concatenate([np.array(sample.input_ids, dtype=np.int32) for sample in samples]),
            "labels": np.concatenate([np.array(sample.loss_mask, dtype=np.bool_) for sample in samples]),
            "ends": np.cumsum([len(sample.input_ids) for sample in samples]),
            "zero_shot": anchors.zero_shot_A,
        }

    def score(self, rows: PoolRows, state: Arrays, model: MethodModel | None) -> Scored:
        """Return 0 or 1 an anchor [N, V], or the share of the pool's anchors [N, 1]."""
        assert model is not None
        spans = pairwise([0, *state["ends"].tolist()])
        samples = [Sample(state["ids"][a:b].tolist(), state["labels"][a:b].tolist()) for a, b in spans]
        anchors = Anchors(samples, state["zero_shot"], context_limit(model), beginning_token(model.tokeniser))
        found = demonstration_scores(
            model.scoring, rows.samples(model.tokeniser), anchors, max_batch_tokens=model.max_batch_tokens
        )
        values = found.values_NU
        return Scored(values.mean(axis=1, keepdims=True) if self.columns == "one" else values, found.rejected)
