"""Rows that a selection passes over for their text: near-duplicates of better rows, and rows that hold test text.

Texts are looked at in order of rank, as far as the budget reaches, and what is kept of one is a few hundred bytes.
Contamination is found first: a contaminated row is no reason to pass over another one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Any

import numpy as np

from rose_ray.config.cleaning import Decontaminate, NearDuplicates
from rose_ray.config.job import JobConfig
from rose_ray.config.selection import SelectionConfig
from rose_ray.data.contamination import KnownTestText
from rose_ray.data.conversation import parse_conversation
from rose_ray.data.near_duplicates import EqualWords, NearDuplicateFinder
from rose_ray.data.preferences import PreferencePair
from rose_ray.data.records import file_digest
from rose_ray.data.test_items import read_test_items
from rose_ray.filesystem import Location, expand
from rose_ray.kernels.ranking import Positions
from rose_ray.stages.gates import Refused, TellingGate
from rose_ray.stages.held_out import check_held_out

NEAR_DUPLICATE, CONTAMINATED = "near_duplicate", "contaminated"

ReadTexts = Callable[[Positions], Iterable[tuple[int, str]]]
"""Gives the conversations, as canonical JSON, of rows at positions that ascend, in any order."""


class CleanGate(TellingGate):
    """Lets rows through that are neither contaminated nor near-duplicates of rows that were chosen.

    Args:
        read: Reads rows' conversations.
        test_text: Text that must not be in a row; None for no check.
        finder: Finds near-duplicates; None for no check.
    """

    counted = MappingProxyType({NEAR_DUPLICATE: "near_duplicates", CONTAMINATED: "contaminated"})

    def __init__(self, read: ReadTexts, test_text: KnownTestText | None, finder: NearDuplicateFinder | None) -> None:
        self._read, self._test_text, self._finder = read, test_text, finder
        self._contaminated: dict[int, str] = {}
        self._signatures: dict[int, Any] = {}
        self.refused = {}

    def restart(self) -> None:
        """Forget what was taken and refused; what rows hold stays known."""
        self.refused = {}
        if self._finder is not None:
            self._finder.forget()

    def knows(self, position: int) -> bool:
        """Whether the row was looked at."""
        return position in self._signatures or position in self._contaminated

    def look(self, positions: Positions) -> None:
        """Read rows and keep what is compared of them."""
        for position, conversation in self._read(np.sort(positions)):
            turns = parse_conversation(conversation).messages
            found = None if self._test_text is None else self._test_text.find(turns)
            if found is not None:
                self._contaminated[position] = found
            else:
                text = "\n".join(turn.content for turn in turns)
                self._signatures[position] = None if self._finder is None else self._finder.signature(text)

    def admits(self, position: int) -> bool:
        """Whether the row is clean, and resembles no row that was taken."""
        if position in self._contaminated:
            self.refused[position] = Refused(CONTAMINATED, self._contaminated[position])
            return False
        kept = None if self._finder is None else self._finder.find(self._signatures[position])
        if kept is not None:
            self.refused[position] = Refused(NEAR_DUPLICATE, kept)
        return kept is None

    def take(self, position: int) -> None:
        """Learn that a row was chosen."""
        if self._finder is not None:
            self._finder.keep(position, self._signatures[position])

    @property
    def num_known(self) -> int:
        """Rows that were looked at."""
        return len(self._signatures) + len(self._contaminated)


@dataclass(frozen=True)
class ContaminationSources:
    """Where test text comes from.

    Attributes:
        files: Of ``decontaminate.files``, found by the driver: workers have other working directories.
        pairs: Of the targets selected for.
    """

    files: Sequence[Location] = ()
    pairs: Sequence[PreferencePair] = ()

    def identity(self) -> dict[str, Any]:
        """Return digests of all of it."""
        pairs = repr([asdict(pair) for pair in self.pairs]).encode()
        return {"files": [file_digest(file) for file in self.files], "pairs": hashlib.sha256(pairs).hexdigest()}


def contamination_sources(selection: SelectionConfig, pairs: Sequence[PreferencePair]) -> ContaminationSources | None:
    """Return the test text of a selection; None where it does not ask for any.

    Raises:
        DataError: A file is missing.
    """
    settings = selection.decontaminate
    if settings is None:
        return None
    return ContaminationSources(expand(settings.files), pairs if settings.target_pairs else ())


def clean_gate(selection: SelectionConfig, sources: ContaminationSources | None, read: ReadTexts) -> CleanGate | None:
    """Return the gate of a selection; None where it passes nothing over.

    Args:
        selection: Says what is passed over.
        sources: From `contamination_sources`.
        read: Reads rows' conversations.

    Raises:
        DataError: A file of test text cannot be read.
    """
    if selection.near_duplicates is None and selection.decontaminate is None:
        return None
    settings = selection.decontaminate
    test_text = None if settings is None or sources is None else _test_text(settings, sources)
    return CleanGate(read, test_text, _finder(selection.near_duplicates))


def _finder(settings: NearDuplicates | None) -> NearDuplicateFinder | None:
    if settings is None:
        return None
    if settings.method == "exact":
        return EqualWords()
    from rose_ray.data.min_hash import SimilarShingles  # brings SciPy along: for those that ask for it

    return SimilarShingles(settings.similarity, settings.shingle_words, settings.num_hashes)


def _test_text(settings: Decontaminate, sources: ContaminationSources) -> KnownTestText:
    known = KnownTestText(settings.words)
    for item in read_test_items(sources.files, fields=settings.fields, split=settings.split):
        known.add(item.name, item.prompt, item.others)
    for pair in sources.pairs:
        known.add(f"pair {pair.pair_id}", [turn.content for turn in pair.prompt], (pair.chosen, pair.rejected))
    return known


def check_test_text(config: JobConfig) -> None:
    """Refuse test text that cannot be read, or that a target's pairs come from, before anything is computed.

    Raises:
        ConfigError: A file is test text and holds pairs of a target selected for.
        DataError: A file cannot be read.
    """
    wanted: list[tuple[str, SelectionConfig, list[str]]] = [
        (f"targets.{number}.selection", target.selection, [target.name]) for number, target in enumerate(config.targets)
    ]
    if config.training_set is not None:
        names = config.training_set.targets or [target.name for target in config.targets]
        wanted.append(("training_set.selection", config.training_set.selection, names))
    for key, selection, names in wanted:
        settings = selection.decontaminate
        if settings is None or not settings.files:
            continue
        locations = expand(settings.files)
        splits = None if settings.split is None else [settings.split]
        for target in config.targets:
            if target.name in names:
                check_held_out(target, locations, key=f"{key}.decontaminate.files", splits=splits)
        for _ in read_test_items(locations, fields=settings.fields, split=settings.split):
            pass
