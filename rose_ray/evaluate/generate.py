"""Greedy answers of a model to prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from rose_ray.data.batches import length_batches
from rose_ray.data.tokenize import Tokeniser
from rose_ray.evaluate.fine_tune import evaluating
from rose_ray.model.generation import end_tokens

GENERATE_VERSION = 2
"""Raised whenever the same model and prompt would give another answer."""


def greedy_answers(
    model: Any, tokeniser: Tokeniser, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, max_batch_tokens: int
) -> list[str]:
    """Return the text the model finds likeliest, token by token, up to its end token.

    Args:
        model: A PEFT model; dropout is off here.
        tokeniser: Its tokenizer turns tokens into text; special tokens are left out.
        prompts: Token ids, from `Tokeniser.encode_prompt`.
        max_new_tokens: Longest answer.
        max_batch_tokens: Bound on rows times the longest prompt and answer.
    """
    tokenizer = tokeniser.tokenizer
    device, ends = next(model.parameters()).device, end_tokens(model, tokeniser)
    answers = [""] * len(prompts)
    lengths = [len(prompt) + max_new_tokens for prompt in prompts]
    with evaluating(model):
        for places in length_batches(lengths, max_batch_tokens):
            width = max(len(prompts[place]) for place in places)
            input_ids = torch.full((len(places), width), tokenizer.pad_token_id)
            mask = torch.zeros_like(input_ids)
            for row, place in enumerate(places):
                input_ids[row, width - len(prompts[place]) :] = torch.tensor(prompts[place])
                mask[row, width - len(prompts[place]) :] = 1
            made = model.generate(
                input_ids=input_ids.to(device),
                attention_mask=mask.to(device),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                # a base's own settings for sampling would only be warned of
                temperature=None,
                top_p=None,
                top_k=None,
                use_cache=True,
                pad_token_id=tokenizer.pad_token_id,
                eos_token_id=ends,
            )
            texts = tokenizer.batch_decode(made[:, width:], skip_special_tokens=True)
            for place, text in zip(places, texts, strict=True):
                answers[place] = text.strip()
    return answers
