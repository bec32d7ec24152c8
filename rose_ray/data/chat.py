"""Messages to text, with the spans of text that carry loss.

One rule holds for the pool and for the pairs: the content of every assistant turn and its end token carry loss, and
nothing else does. Spans are found by rendering the conversation up to each assistant turn, so any chat template that
only ever appends will do.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers.utils.chat_template_utils import render_jinja_template

from rose_ray.data.conversation import Message
from rose_ray.errors import RowError

_NO_CLOCK = "{% set strftime_now = clock_that_is_not_there %}"
"""Hides the clock from templates: a row's tokens must not depend on the day. Those that ask first write their default
date; those that do not are refused."""

_STAND_IN = "\u2063stand-in\u2063"
"""No template trims or escapes it, and no conversation holds it."""

TULU_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\n' + message['content'] | trim }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
"""The template of LESS's released code: role marks in plain text, an end token after assistant turns."""


@dataclass(frozen=True)
class RenderedChat:
    """A conversation as the model sees it.

    Attributes:
        text: The whole conversation, special tokens written out.
        spans: ``[start, end)`` in characters of each stretch that carries loss, in order.
    """

    text: str
    spans: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class ChatTemplate:
    """A Jinja chat template and the special tokens it may write.

    Attributes:
        source: Jinja text.
        bos_token: Text of the beginning token; empty where there is none.
        eos_token: Text of the end token; empty where there is none.
        end_tokens: Texts of all special tokens: the first one after an answer ends its span.
        loss_on_turn_tail: Let what follows the end token of a turn carry loss too, as LESS's code does.
    """

    source: str
    bos_token: str
    eos_token: str
    end_tokens: tuple[str, ...]
    loss_on_turn_tail: bool = False

    def render(self, messages: Sequence[Message], tools: str | None = None, *, last_only: bool = False) -> RenderedChat:
        """Render ``messages`` and find what carries loss.

        Args:
            messages: At least one turn by the assistant.
            tools: Tool descriptions as JSON text, handed to the template.
            last_only: Let only the last turn carry loss: the answer of a preference pair.

        Raises:
            RowError: ``template_failed`` (the template refuses the conversation), ``template_rewrites`` (it changes
                earlier turns or the answer itself, so spans are undefined).
        """
        full = self._text(messages, tools)
        turns = [i for i, message in enumerate(messages) if message.role == "assistant"]
        spans = []
        for turn in turns[-1:] if last_only else turns:
            upto = full if turn == len(messages) - 1 else self._text(messages[: turn + 1], tools)
            if not full.startswith(upto):
                raise RowError(
                    "template_rewrites",
                    f"the chat template renders turns 1-{turn + 1} differently once more turns follow. "
                    "Choose a template that only appends (`model.template`).",
                )
            spans.append(self._span(messages, turn, upto, tools))
        return RenderedChat(full, tuple(spans))

    def prompt(self, messages: Sequence[Message], tools: str | None = None) -> str:
        """Return the text that the model answers: the turns, and the header of its own.

        Raises:
            RowError: ``template_failed``.
        """
        return self._text(messages, tools, add_generation_prompt=True)

    def _span(self, messages: Sequence[Message], turn: int, upto: str, tools: str | None) -> tuple[int, int]:
        # A stand-in tells where the template puts an answer: the answer itself may occur in the header or the tail.
        stand_in = [*messages[:turn], Message("assistant", _STAND_IN)]
        header, found, tail = self._text(stand_in, tools).partition(_STAND_IN)
        start, end = len(header), len(upto) - len(tail)
        framed = found and upto.startswith(header) and upto.endswith(tail)
        if not framed or upto[start:end].strip() != messages[turn].content.strip():
            raise RowError(
                "template_rewrites",
                f"the chat template changes the answer of turn {turn + 1}, so its tokens cannot be told apart.",
            )
        ends = [tail.find(token) + len(token) for token in self.end_tokens if token in tail]
        # White space that the prompt does not bring belongs to the answer: the model has to write it.
        before = self._text(messages[:turn], tools, add_generation_prompt=True) if turn else ""
        prompted = _common_length(before, upto)
        if not upto[prompted:start].strip():
            start = min(start, prompted)
        return start, len(upto) if self.loss_on_turn_tail else end + min(ends, default=0)

    def _text(self, messages: Sequence[Message], tools: str | None, *, add_generation_prompt: bool = False) -> str:
        turns: list[dict[str, Any]] = [{"role": m.role, "content": m.content} for m in messages]
        try:
            rendered: Any = render_jinja_template(
                conversations=[turns],
                chat_template=_NO_CLOCK + self.source,
                tools=json.loads(tools) if tools else None,
                add_generation_prompt=add_generation_prompt,
                bos_token=self.bos_token,
                eos_token=self.eos_token,
            )
        except Exception as error:  # a template may raise anything: Jinja runs its author's code
            raise RowError("template_failed", f"the chat template refuses the conversation: {error}") from error
        text: str = rendered[0][0]
        return text


def _common_length(first: str, second: str) -> int:
    pairs = zip(first, second, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))
