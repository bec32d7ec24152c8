"""Preference pairs encoded as the authors' released code encodes them, slips included.

Raw transcripts instead of a chat template, no beginning token, the end token appended to the answers and to the
prompt, and a prompt cut to 256 tokens only where prompt and longer answer exceed the limit.
"""

from __future__ import annotations

from typing import Any, Literal

from rose_ray.data.preferences import PreferencePair
from rose_ray.data.tokenize import Sample
from rose_ray.errors import ModelError, PairError

MAX_PROMPT_TOKENS = 256
"""To this many tokens the released code cuts a prompt that does not fit."""


def encode_official_pair(
    pair: PreferencePair, tokenizer: Any, *, max_tokens: int, cut: Literal["keep_start", "keep_end"]
) -> tuple[Sample, Sample]:
    """Return the chosen and the rejected sample of a pair.

    Args:
        pair: Its raw transcript and raw answers are used.
        tokenizer: Of the base model.
        max_tokens: Longest sample.
        cut: Which end of a long prompt is kept. The authors keep the start for se and shp, the end for hh.

    Raises:
        PairError: No room is left for an answer.
        ModelError: The tokenizer has no end token.
    """
    end = tokenizer.eos_token_id
    if end is None:
        raise ModelError(
            "encoding: rose_official puts the end token behind prompts and answers, and the base model's tokenizer has "
            "none (eos_token). Give it one, or set encoding: chat."
        )
    prompt, chosen, rejected = (
        _with_end(tokenizer(text, add_special_tokens=False)["input_ids"], end)
        for text in (pair.raw_prompt, pair.raw_chosen, pair.raw_rejected)
    )
    num_prompt = len(prompt)
    longer = max(len(chosen), len(rejected))
    if len(prompt) + longer > max_tokens:
        prompt = prompt[:MAX_PROMPT_TOKENS] if cut == "keep_start" else prompt[-MAX_PROMPT_TOKENS:]
    room = max_tokens - MAX_PROMPT_TOKENS if len(prompt) + longer > max_tokens else longer
    if room < 1:
        raise PairError(
            f"pair {pair.pair_id}: model.max_tokens {max_tokens} leaves no room behind {len(prompt)} prompt tokens."
        )
    sides = []
    for answer in (chosen, rejected):
        kept = answer[:room]
        sides.append(
            Sample(
                prompt + kept,
                [False] * len(prompt) + [True] * len(kept),
                num_prompt - len(prompt) + len(answer) - len(kept),
            )
        )
    return sides[0], sides[1]


def _with_end(input_ids: list[int], end: int) -> list[int]:
    return input_ids if end in input_ids else [*input_ids, end]
