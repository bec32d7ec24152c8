"""What an item asks, however its prompt is written: a letter to answer with, an instruction above, options left out."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from rose_ray.data.tasks.rows import TaskRow


@dataclass(frozen=True)
class Asked:
    """What one item asks; runs of white space count as one space.

    Attributes:
        prompts: The prompt in every way in which it may be written.
        question: Without instruction and options.
        options: What may be answered, in any order; empty where nothing is listed apart from the question.
    """

    prompts: frozenset[str]
    question: str
    options: frozenset[str] = frozenset()


def asked_by_text(text: str) -> Asked:
    """Return what a prompt of unknown make asks."""
    return Asked(frozenset((_plain(text),)), _plain(text))


def asked_by_row(row: TaskRow, prompts: Iterable[str]) -> Asked:
    """Return what a labelled row asks, whose prompt is written in these ways."""
    return Asked(frozenset(map(_plain, prompts)), _plain(row.question), frozenset(map(_plain, row.options)))


class KnownQuestions:
    """Finds items that ask what a known one asks.

    Two do if a prompt is the same, or the question and the options: published sets have stems such as "Which is true?"
    in many rows. A question whose options are not known is compared without them.
    """

    def __init__(self) -> None:
        self._prompts: dict[str, str] = {}
        self._questions: dict[str, list[tuple[frozenset[str], str]]] = {}

    def add(self, asked: Asked, name: str) -> None:
        """Learn what ``name`` asks."""
        for prompt in asked.prompts:
            self._prompts.setdefault(prompt, name)
        self._questions.setdefault(asked.question, []).append((asked.options, name))

    def find(self, asked: Asked) -> str | None:
        """Return the name of a known item that asks the same; None if there is none."""
        for prompt in sorted(asked.prompts):
            if prompt in self._prompts:
                return self._prompts[prompt]
        for options, name in self._questions.get(asked.question, ()):
            if not options or not asked.options or options == asked.options:
                return name
        return None


def _plain(text: str) -> str:
    return " ".join(text.split())
