"""Instruction-following difficulty (Cherry LLM, arXiv:2308.12032): how little a prompt helps with its answer.

The score of a row is the mean cross-entropy of its answer given the prompt over that of the same tokens alone, under
the untouched base model. It knows no target. A ratio above 1 says that the prompt makes the answer harder, so prompt
and answer hardly belong together: such a row is rejected as ``ifd_above_one``, and no budget can reach it.

A conversation of several turns has several answers: each is put alone, and tokens of all count alike in both means.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rose_ray.data.tokenize import Sample
from rose_ray.kernels.loss_scores import ifd_ratio
from rose_ray.model.scoring import ScoringModel
from rose_ray.stages.forwards import Rejections, RowValues, joined_rejections, reject_where, sample_logps


def answers_alone(sample: Sample, bos_token_id: int | None) -> tuple[Sample, list[Sample]]:
    """Split a sample into what is compared: the answers in their context, and each alone.

    Args:
        sample: A row; stretches of tokens with loss are its answers.
        bos_token_id: What stands before an answer alone. None where the tokenizer has no such token: then nothing
            predicts an answer's first token there, and it counts on neither side.

    Returns:
        The sample, its mask narrowed where need be, and a sample for each answer that has a token to compare.
    """
    mask, alone = [False, *sample.loss_mask[1:]], []
    place = 1
    while place < len(mask):
        if not mask[place]:
            place += 1
            continue
        end = next((i for i in range(place, len(mask)) if not mask[i]), len(mask))
        tokens = sample.input_ids[place:end]
        if bos_token_id is None:
            mask[place] = False
        else:
            tokens = [bos_token_id, *tokens]
        if len(tokens) > 1:
            alone.append(Sample(tokens, [False] + [True] * (len(tokens) - 1)))
        place = end
    return Sample(sample.input_ids, mask, sample.num_tokens_cut), alone


def ifd_scores(
    model: ScoringModel, samples: Sequence[Sample], bos_token_id: int | None, *, max_batch_tokens: int
) -> RowValues:
    """Return each row's ratio [N, 1]; higher is harder, at most 1.

    Rejected: ``ifd_above_one``; ``ifd_answer_too_short`` (one token, and nothing that predicts it alone);
    ``ifd_undefined`` (the answer costs nothing alone); ``non_finite_loss``; ``out_of_memory``.

    Args:
        model: Base model with an adapter slot, which is left out.
        samples: Rows of the pool.
        bos_token_id: See `answers_alone`.
        max_batch_tokens: Bound on rows times longest row.
    """
    splits = [answers_alone(sample, bos_token_id) for sample in samples]
    usable = [place for place, (_, alone) in enumerate(splits) if alone]
    owners = [place for place in usable for _ in splits[place][1]]
    with model.without_adapter():
        given = sample_logps(model, [splits[p][0] for p in usable], "sum_logps", max_batch_tokens=max_batch_tokens)
        apart = sample_logps(
            model, [s for p in usable for s in splits[p][1]], "sum_logps", max_batch_tokens=max_batch_tokens
        )
    given_N, alone_N = np.full(len(samples), np.nan), np.zeros(len(samples))
    given_N[usable] = given.values_NU[: len(usable), 0]
    np.add.at(alone_N, owners, apart.values_NU[: len(owners), 0])
    short: Rejections = {
        place: ("ifd_answer_too_short", "one token, and no beginning token that could predict it alone")
        for place, (_, alone) in enumerate(splits)
        if not alone
    }
    rejected = joined_rejections(
        short,
        {usable[place]: why for place, why in given.rejected.items()},
        {owners[place]: why for place, why in apart.rejected.items()},
    )
    # Equally many tokens on both sides, so sums stand for means.
    ratios_N1 = ifd_ratio(given_N, alone_N)[:, None]
    ratios_N1[list(rejected)] = np.nan
    found = RowValues(ratios_N1, rejected)
    undefined = "the answer alone has a loss of 0, so the ratio is {value}"
    found = reject_where(found, ~np.isfinite(ratios_N1[:, 0]), "ifd_undefined", undefined)
    above = "the ratio is {value}, above 1: the prompt makes the answer harder"
    return reject_where(found, ratios_N1[:, 0] > 1, "ifd_above_one", above)
