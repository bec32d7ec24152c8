"""Where a generated answer ends."""

from __future__ import annotations

from typing import Any

from rose_ray.data.tokenize import Tokeniser


def end_tokens(model: Any, tokeniser: Tokeniser) -> list[int]:
    """Return the ids that end an answer, sorted: the template's, the tokenizer's, and the model's own.

    Chat models end a turn with a token that often only their generation settings name.
    """
    tokenizer = tokeniser.tokenizer
    own = model.generation_config.eos_token_id
    named = [tokenizer.convert_tokens_to_ids(token) for token in tokeniser.template.end_tokens if token]
    ends = [*(own if isinstance(own, list) else [own]), tokenizer.eos_token_id, *named]
    return sorted({token for token in ends if isinstance(token, int) and token >= 0})
