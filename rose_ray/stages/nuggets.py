"""Nuggets (arXiv:2312.10302): does a row, shown as a demonstration, make other answers likelier?

A row's score is the share of anchors whose answer's log-probability rises once the row stands before the anchor, under
the untouched base model. Anchors are rows of the pool in the original; with a target they are its pairs' prompts and
chosen answers. One forward a row and anchor: the dearest of the selectors.

Demonstration and anchor are joined as tokens, so an anchor's answer has the same tokens with and without one.

Shapes: N rows, A anchors, H hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rose_ray.data.tokenize import Sample
from rose_ray.errors import DataError, ModelError
from rose_ray.kernels.loss_scores import rises
from rose_ray.kernels.medoids import cluster_medoids
from rose_ray.model.scoring import ScoringModel
from rose_ray.stages.forwards import Rejections, RowValues, sample_logps, unit_embeddings

_BLOCK_TOKENS = 1 << 20
"""Tokens of joined sequences that are laid out at once."""


@dataclass(frozen=True)
class Anchors:
    """What demonstrations are tried on.

    Attributes:
        samples: Prompt and answer of each; the answer carries loss.
        zero_shot_A: Log-probability of each answer without a demonstration, summed, float64, nats.
        limit: Longest demonstration and anchor together, in tokens.
        bos_token_id: Taken off an anchor that follows a demonstration; None where there is none.
    """

    samples: list[Sample]
    zero_shot_A: NDArray[np.float64]
    limit: int
    bos_token_id: int | None


def prepare_anchors(
    model: ScoringModel,
    samples: Sequence[Sample],
    names: Sequence[str],
    *,
    limit: int,
    bos_token_id: int | None,
    max_batch_tokens: int,
) -> Anchors:
    """Score the anchors without a demonstration.

    Args:
        model: Base model with an adapter slot, which is left out.
        samples: Of the anchors.
        names: Of the anchors, for messages: pair or row ids.
        limit: Tokens of demonstration and anchor together, at most what the model was made for.
        bos_token_id: Of the tokenizer.
        max_batch_tokens: Bound on rows times longest row.

    Raises:
        ModelError: Anchors leave no room for a demonstration.
        DataError: Anchors have no finite log-probability, or there is none at all.
    """
    if not samples:
        raise DataError("no anchor to try demonstrations on; expected at least one")
    full = [n for n, sample in zip(names, samples, strict=True) if len(sample.input_ids) >= limit]
    if full:
        raise ModelError(
            f"{len(full)} of {len(samples)} anchors fill the {limit} tokens that they share with a demonstration: "
            f"{full[:10]}. Take these pairs out of the target, or lower model.max_tokens."
        )
    with model.without_adapter():
        found = sample_logps(model, samples, "sum_logps", max_batch_tokens=max_batch_tokens)
    if found.rejected:
        listed = [f"{names[place]}: {': '.join(why)}" for place, why in sorted(found.rejected.items())]
        raise DataError(f"{len(listed)} of {len(samples)} anchors cannot be used: {listed[:10]}. Leave them out.")
    return Anchors(list(samples), found.values_NU[:, 0], limit, bos_token_id)


def pool_anchors(
    model: ScoringModel, samples: Sequence[Sample], num_anchors: int, seed: int, *, max_batch_tokens: int
) -> list[int]:
    """Choose anchors from a sample of the pool: the rows nearest to the centres of k-means on RDS+ embeddings.

    Args:
        model: Base model with an adapter slot, which is left out.
        samples: Rows drawn from the pool by seed, in the order of their ids.
        num_anchors: How many.
        seed: Of k-means.
        max_batch_tokens: Bound on rows times longest row.

    Returns:
        Places of the anchors, ascending. Rows without an embedding are never chosen.

    Raises:
        ConfigError: Fewer rows than anchors have an embedding.
    """
    with model.without_adapter():
        found = unit_embeddings(model, samples, "position_weighted", max_batch_tokens=max_batch_tokens)
    kept = np.array([place for place in range(len(samples)) if place not in found.rejected], dtype=np.int64)
    chosen: list[int] = kept[cluster_medoids(found.values_NU[kept], num_anchors, seed)].tolist()
    return chosen


def demonstrated(demonstration: Sample, anchor: Sample, limit: int, bos_token_id: int | None) -> Sample:
    """Put a row before an anchor; only the anchor's answer carries loss.

    A row that is too long keeps its first tokens, as everywhere. The anchor is never cut.
    """
    drop = 1 if bos_token_id is not None and anchor.input_ids[0] == bos_token_id else 0
    tail = anchor.input_ids[drop:]
    head = demonstration.input_ids[: limit - len(tail)]
    mask = [False] * len(head) + [False] * (1 - drop) + list(anchor.loss_mask[1:])
    return Sample(head + tail, mask, len(demonstration.input_ids) - len(head))


def demonstration_scores(
    model: ScoringModel, samples: Sequence[Sample], anchors: Anchors, *, max_batch_tokens: int
) -> RowValues:
    """Return whether each anchor's answer gets likelier behind each row: [N, A] of 0 and 1; their mean is the score.

    Where a log-probability changes by less than float32 can tell (1e-5 of it), the answer may hang on the make-up of
    batches.

    Rejected: ``non_finite_loss``, ``out_of_memory``: with any anchor.

    Args:
        model: Base model with an adapter slot, which is left out.
        samples: Rows of the pool.
        anchors: From `prepare_anchors`.
        max_batch_tokens: Bound on rows times longest row.
    """
    num_anchors = len(anchors.samples)
    one_shot_NA = np.full((len(samples), num_anchors), np.nan)
    rejected: Rejections = {}
    rows_at_once = max(1, _BLOCK_TOKENS // (anchors.limit * num_anchors))
    with model.without_adapter():
        for start in range(0, len(samples), rows_at_once):
            block = samples[start : start + rows_at_once]
            tried = [
                demonstrated(row, a, anchors.limit, anchors.bos_token_id) for row in block for a in anchors.samples
            ]
            found = sample_logps(model, tried, "sum_logps", max_batch_tokens=max_batch_tokens)
            one_shot_NA[start : start + len(block)] = found.values_NU[:, 0].reshape(len(block), num_anchors)
            for place, (reason, detail) in sorted(found.rejected.items()):
                row, anchor = divmod(place, num_anchors)
                rejected.setdefault(start + row, (reason, f"{detail}, before anchor {anchor + 1} of {num_anchors}"))
    rise_NA = rises(one_shot_NA, anchors.zero_shot_A)
    rise_NA[list(rejected)] = np.nan
    return RowValues(rise_NA, rejected)
