"""RDS and RDS+: how near a row's hidden states are to those of the target's answered prompts.

RDS+ (arXiv:2503.01807) pools every token with a weight that grows with its place; RDS takes the last token. Both see
prompt and answer in the chat template, under the untouched base model. At selection RDS+ lets the pairs take turns.

Shapes: N rows, V pairs, H hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from rose_ray.data.tokenize import Sample
from rose_ray.errors import PairError
from rose_ray.kernels.influence import influence
from rose_ray.kernels.pooling import Pooling
from rose_ray.model.scoring import ScoringModel
from rose_ray.stages.forwards import RowValues, unit_embeddings


def query_embeddings(
    model: ScoringModel, samples: Sequence[Sample], pair_ids: Sequence[str], pooling: Pooling, *, max_batch_tokens: int
) -> NDArray[np.float64]:
    """Embed the pairs: [V, H], float64, rows of length 1.

    Args:
        model: Base model with an adapter slot, which is left out.
        samples: Each pair's prompt with its chosen answer.
        pair_ids: Of the pairs, for messages.
        pooling: Which.
        max_batch_tokens: Bound on rows times longest row.

    Raises:
        PairError: A pair has no embedding; the message lists their ids and why.
    """
    with model.without_adapter():
        found = unit_embeddings(model, samples, pooling, max_batch_tokens=max_batch_tokens)
    if found.rejected:
        listed = [f"{pair_ids[place]}: {': '.join(why)}" for place, why in sorted(found.rejected.items())]
        raise PairError(f"{len(listed)} of {len(samples)} pairs have no embedding: {listed[:10]}. Remove them.")
    return found.values_NU


def embedding_cosines(
    model: ScoringModel,
    samples: Sequence[Sample],
    queries_VH: NDArray[np.float64],
    pooling: Pooling,
    *,
    max_batch_tokens: int,
) -> RowValues:
    """Return the cosine of every row with every pair, [N, V].

    Args:
        model: Base model with an adapter slot, which is left out.
        samples: Rows of the pool.
        queries_VH: From `query_embeddings`, same pooling.
        pooling: Which.
        max_batch_tokens: Bound on rows times longest row.
    """
    with model.without_adapter():
        found = unit_embeddings(model, samples, pooling, max_batch_tokens=max_batch_tokens)
    kept = [place for place in range(len(samples)) if place not in found.rejected]
    cosines_NV = np.full((len(samples), len(queries_VH)), np.nan)
    if kept:
        cosines_NV[kept] = influence(found.values_NU[kept], queries_VH)
    return RowValues(cosines_NV, found.rejected)
