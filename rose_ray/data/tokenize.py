"""Conversation to sample: token ids and the mask of tokens that carry loss.

A token carries loss when it reaches into a span that does. Too long a sample keeps its first ``max_tokens`` tokens:
the right side is cut, for pool rows and for both sides of a pair alike, and what was cut is counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rose_ray.data.chat import ChatTemplate, RenderedChat
from rose_ray.data.conversation import Conversation, Message
from rose_ray.errors import ModelError, RowError


@dataclass(frozen=True)
class Sample:
    """One tokenised sequence.

    Attributes:
        input_ids: Token ids, at most ``max_tokens``.
        loss_mask: True where the token carries loss; same length.
        num_tokens_cut: Tokens cut off at the limit.
    """

    input_ids: list[int]
    loss_mask: list[bool]
    num_tokens_cut: int = 0

    @property
    def num_labelled_tokens(self) -> int:
        """Tokens whose log-probability enters the loss. The first token of a sequence has none."""
        return sum(self.loss_mask[1:])


class Tokeniser:
    """Turns conversations into samples with one tokenizer and one chat template.

    Args:
        tokenizer: A fast Hugging Face tokenizer: character offsets are needed.
        template: How conversations become text.
        max_tokens: Longest sample, in tokens.

    Raises:
        ModelError: The tokenizer is not a fast one.
    """

    def __init__(self, tokenizer: Any, template: ChatTemplate, max_tokens: int) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise ModelError("the base model's tokenizer gives no character offsets; a fast tokenizer is needed.")
        self.tokenizer = tokenizer
        self.template = template
        self.max_tokens = max_tokens

    def encode(self, conversation: Conversation) -> Sample:
        """Return the sample of a pool row.

        Raises:
            RowError: ``prompt_too_long``, ``no_labelled_token``, or what the template raises.
        """
        return self._sample(self.template.render(conversation.messages, conversation.tools))

    def encode_answer(self, prompt: Sequence[Message], answer: str, tools: str | None = None) -> Sample:
        """Return the sample of one side of a pair: only ``answer`` and its end token carry loss."""
        messages = [*prompt, Message("assistant", answer)]
        return self._sample(self.template.render(messages, tools, last_only=True))

    def encode_prompt(self, prompt: Sequence[Message], tools: str | None = None) -> list[int]:
        """Return the token ids after which the model answers; of too long a prompt the last ``max_tokens``."""
        ids: list[int] = self.tokenizer(self.template.prompt(prompt, tools), add_special_tokens=False)["input_ids"]
        return ids[-self.max_tokens :]

    def _sample(self, chat: RenderedChat) -> Sample:
        encoding = self.tokenizer(chat.text, add_special_tokens=False, return_offsets_mapping=True)
        input_ids: list[int] = encoding["input_ids"]
        mask = _loss_mask(encoding["offset_mapping"], chat.spans)
        if not any(mask[1:]):
            raise RowError("no_labelled_token", "the answer tokenises to nothing; expected at least one token.")
        kept = Sample(input_ids[: self.max_tokens], mask[: self.max_tokens], max(0, len(input_ids) - self.max_tokens))
        if kept.num_labelled_tokens == 0:
            raise RowError(
                "prompt_too_long",
                f"the first answer token is number {mask.index(True) + 1}, the limit is {self.max_tokens} tokens. "
                "Raise `model.max_tokens`, or leave the row out.",
            )
        return kept


def _loss_mask(offsets: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]) -> list[bool]:
    # Some tokenizers leave a leading space out of a token's offsets and some do not, so a token that reaches into a
    # span counts, as in TRL: what differs from the prompt's own tokens is the answer's.
    mask = [False] * len(offsets)
    position = 0
    for start, end in spans:
        while position < len(offsets) and offsets[position][1] <= start:
            position += 1
        while position < len(offsets) and offsets[position][0] < end:
            mask[position] = True
            position += 1
    return mask
