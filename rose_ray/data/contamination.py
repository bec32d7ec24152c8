"""Text that is measured on, and rows that hold some of it.

A row is contaminated where one of its turns has ``num_words`` words in a row in common with a test text, or where a
whole test prompt of fewer words equals one of its user turns, or all before its last turn. Words are those of
`rose_ray.data.words`, so case, punctuation and spacing do not matter. Answers shorter than that say nothing: half of
all rows would hold a "yes".
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rose_ray.data.conversation import Message
from rose_ray.data.words import ngrams, words


class KnownTestText:
    """Test texts, by their runs of words. Some 200 bytes a word.

    Args:
        num_words: Length of a run.
    """

    def __init__(self, num_words: int) -> None:
        self.num_words = num_words
        self.names: list[str] = []
        self._runs: dict[str, int] = {}
        self._short: dict[str, int] = {}

    def add(self, name: str, prompt: Sequence[str], others: Iterable[str] = ()) -> None:
        """Learn a test item.

        Args:
            name: Of the item, for reports: its file and row.
            prompt: Turns of its prompt.
            others: Answers, options, passages: text that counts only where it is long.
        """
        number = len(self.names)
        self.names.append(name)
        turns = [words(turn) for turn in prompt]
        whole = [word for turn in turns for word in turn]
        if 0 < len(whole) < self.num_words:
            self._short.setdefault(" ".join(whole), number)
        for turn in [*turns, *map(words, others)]:
            for run in ngrams(turn, self.num_words):
                self._runs.setdefault(run, number)

    def find(self, turns: Sequence[Message]) -> str | None:
        """Return the name of a test item that a row holds text of; None where it holds none."""
        found = [words(turn.content) for turn in turns]
        prompts = [found[place] for place, turn in enumerate(turns) if turn.role == "user"]
        prompts.append([word for turn in found[:-1] for word in turn])
        for prompt in prompts:
            if len(prompt) < self.num_words and (number := self._short.get(" ".join(prompt))) is not None:
                return self.names[number]
        for turn_words in found:
            for run in ngrams(turn_words, self.num_words):
                if (number := self._runs.get(run)) is not None:
                    return self.names[number]
        return None
