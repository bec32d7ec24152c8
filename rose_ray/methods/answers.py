"""A target's prompts with their chosen answers, as the model sees them."""

from __future__ import annotations

from typing import Any

from rose_ray.data.tokenize import Sample, Tokeniser
from rose_ray.errors import PairError, RowError
from rose_ray.methods.interface import MethodModel, Target
from rose_ray.model.core import core_model


def chosen_answers(target: Target, tokeniser: Tokeniser) -> list[Sample]:
    """Tokenise the chosen side of every pair in the pool's chat template; only the answer carries loss.

    Raises:
        PairError: Some cannot be tokenised; all of them are listed.
    """
    samples, problems = [], []
    for pair in target.pairs:
        try:
            samples.append(tokeniser.encode_answer(pair.prompt, pair.chosen, pair.tools))
        except RowError as error:
            problems.append(f"{pair.pair_id}: {error}")
    if problems:
        raise PairError(
            f"target {target.name}: {len(problems)} of {len(target.pairs)} pairs cannot be used:\n  "
            + "\n  ".join(problems)
            + "\nRemove them, or raise `model.max_tokens`."
        )
    return samples


def beginning_token(tokeniser: Tokeniser) -> int | None:
    """Return the id of the token that begins a text, None where the tokenizer has none."""
    found: int | None = tokeniser.tokenizer.bos_token_id
    return found


def context_limit(model: MethodModel) -> int:
    """Return how many tokens two samples of full length may have together: what the model was made for at most."""
    config: Any = core_model(model.scoring.module).config
    wanted = 2 * model.tokeniser.max_tokens
    return min(wanted, getattr(config, "max_position_embeddings", wanted))
