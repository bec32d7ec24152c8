"""A model's own answers to questions, so that wrong ones can stand against the labelled answer."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from rose_ray.data.conversation import Message
from rose_ray.data.tokenize import Tokeniser
from rose_ray.errors import RowError
from rose_ray.model.generation import end_tokens

SAMPLE_VERSION = 2
"""Raised whenever the same model would be asked otherwise."""


def what_is_asked(num_questions: int, num_samples: int, shots: int | None) -> str:
    """Say how much a model is asked, and why more than the target's ``shots``."""
    text = f"samples: {num_questions:,} questions, {num_samples} answers each"
    if shots is None:
        return text
    return (
        f"{text}. The target takes {shots} of a subtask, the first with a wrong answer; which these are is not known "
        "before. To ask fewer, let its files hold fewer rows."
    )


@dataclass(frozen=True)
class SamplingSettings:
    """How a model is asked.

    Attributes:
        num_samples: Answers to a question; one where ``temperature`` is 0.
        temperature: Of sampling from the whole distribution; 0 takes the likeliest token.
        max_new_tokens: Longest answer.
        seed: With the row's id it seeds the draws of that row, so a row's answers do not depend on other rows.
    """

    num_samples: int = 8
    temperature: float = 1.0
    max_new_tokens: int = 256
    seed: int = 0


def sample_answers(
    model: nn.Module,
    tokeniser: Tokeniser,
    questions: Mapping[str, Sequence[Message]],
    settings: SamplingSettings,
) -> Iterator[tuple[str, list[str]]]:
    """Yield each row's id and the model's answers, without outer white space and special tokens.

    The answers to a question are generated together. A question that leaves no room for an answer below
    ``tokeniser.max_tokens`` is refused. An answer that did not end in time is given as far as it came.

    Args:
        model: A Hugging Face causal language model, in evaluation mode.
        tokeniser: Its tokenizer and chat template.
        questions: Turns up to the answer, by row id.
        settings: How.

    Raises:
        RowError: ``prompt_too_long``, or what the template raises; the row is named.
    """
    tokenizer = tokeniser.tokenizer
    device, ends = next(model.parameters()).device, end_tokens(model, tokeniser)
    for row_id, turns in questions.items():
        text = tokeniser.template.prompt(turns)
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"].to(device)
        room = tokeniser.max_tokens - ids.shape[1]
        if room < 1:
            raise RowError(
                "prompt_too_long",
                f"row {row_id}: the question has {ids.shape[1]} tokens, the limit is {tokeniser.max_tokens}. "
                "Raise `model.max_tokens`, or leave the row out.",
            )
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.inference_mode():
            torch.manual_seed(_seed(settings.seed, row_id))
            generated = _generate(model, ids, min(room, settings.max_new_tokens), ends, settings)
        answers = tokenizer.batch_decode(generated[:, ids.shape[1] :], skip_special_tokens=True)
        yield row_id, [answer.strip() for answer in answers]


def _generate(
    model: Any, ids: torch.Tensor, max_new_tokens: int, ends: list[int], settings: SamplingSettings
) -> torch.Tensor:
    drawn: dict[str, Any] = {"do_sample": False}
    if settings.temperature > 0:
        # Of the whole distribution: a model's own settings may cut it (top_k, top_p).
        drawn = {
            "do_sample": True,
            "temperature": settings.temperature,
            "num_return_sequences": settings.num_samples,
            "top_k": 0,
            "top_p": 1.0,
        }
    found: torch.Tensor = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_new_tokens,
        eos_token_id=ends or None,
        pad_token_id=ends[0] if ends else 0,
        use_cache=True,
        **drawn,
    )
    return found


def _seed(seed: int, row_id: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}\0{row_id}".encode()).digest()[:7])
