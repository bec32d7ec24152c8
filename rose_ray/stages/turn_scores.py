"""DEITA's numbers of each turn (Liu et al., arXiv:2312.15685), by the models that were trained to give them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rose_ray.data.conversation import Conversation
from rose_ray.model.number_scorer import NumberScorer
from rose_ray.stages.forwards import Rejections, RowValues, model_values, reject_where

Turn = tuple[str, str]
"""What was asked, and the answer."""


def turns_of(conversation: Conversation) -> list[Turn]:
    """Return a conversation's turns: each answer with what was said since the one before it, system message aside."""
    turns: list[Turn] = []
    asked: list[str] = []
    for message in conversation.messages:
        if message.role == "assistant":
            turns.append(("\n".join(asked), message.content))
            asked = []
        elif message.role != "system":
            asked.append(message.content)
    return turns


def turn_products(
    conversations: Sequence[Conversation],
    complexity: tuple[NumberScorer, str],
    quality: tuple[NumberScorer, str],
    *,
    max_batch_tokens: int,
) -> RowValues:
    """Return each row's sum over its turns of complexity times quality [N, 1].

    Rejected: ``scorer_prompt_too_long``; ``non_finite_score``; ``out_of_memory``.

    Args:
        conversations: Rows.
        complexity, quality: Scorers, each with the prompt that it was trained with.
        max_batch_tokens: Bound on prompts times longest prompt.
    """
    turns = [turns_of(conversation) for conversation in conversations]
    owners = [row for row, each in enumerate(turns) for _ in each]
    flat = [turn for each in turns for turn in each]
    rejected: Rejections = {}
    products = np.ones(len(flat))
    for scorer, prompt in (complexity, quality):
        samples = [scorer.encode(filled(prompt, turn)) for turn in flat]
        fitting = []
        for place, sample in enumerate(samples):
            size = len(sample.input_ids)
            if scorer.max_tokens is not None and size > scorer.max_tokens:
                detail = f"a turn's prompt has {size} tokens, its scorer takes {scorer.max_tokens}"
                rejected.setdefault(owners[place], ("scorer_prompt_too_long", detail))
            else:
                fitting.append(place)
        device = next(scorer.module.parameters()).device
        found = model_values(
            [samples[place] for place in fitting], scorer.numbers, device, max_batch_tokens=max_batch_tokens
        )
        for place, reason in found.rejected.items():
            rejected.setdefault(owners[fitting[place]], reason)
        products[fitting] *= found.values_NU[: len(fitting), 0]
    sums_N1 = np.zeros((len(conversations), 1))
    np.add.at(sums_N1[:, 0], owners, products)
    sums_N1[list(rejected)] = np.nan
    return reject_where(
        RowValues(sums_N1, rejected), ~np.isfinite(sums_N1[:, 0]), "non_finite_score", "a scorer gave {value}"
    )


def filled(prompt: str, turn: Turn) -> str:
    """Return a scorer's prompt about a turn. Texts may hold braces, and the names of the places themselves."""
    before, *parts = prompt.split("{instruction}")
    return turn[0].join(part.replace("{answer}", turn[1]) for part in (before, *parts))
