"""DEITA's score (Liu et al., arXiv:2312.15685): complexity times quality, summed over the turns of a conversation.

Both come from scorers that were trained for it. The user brings their numbers, or the models themselves, which then run
in the scoring actors; nothing here stands in for them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from rose_ray.config.method import DeitaOptions, Needs, ScorerConfig
from rose_ray.data.digests import row_id_words
from rose_ray.data.strict_json import parse_object
from rose_ray.errors import DataError, ModelError
from rose_ray.filesystem import Location, expand, read_bytes
from rose_ray.methods.interface import Arrays, Method, MethodModel, PoolRows, Scored, Target

if TYPE_CHECKING:  # where the numbers are given, nothing has to load torch
    from rose_ray.model.number_scorer import NumberScorer

_COLUMNS = ("complexity", "quality")

_Made = TypeVar("_Made")


class Deita(Method[DeitaOptions]):
    """Numbers from keys of the record, from Parquet files or from models; rows without are rejected, with a reason."""

    options_model = DeitaOptions
    columns = "one"

    def __init__(self, options: DeitaOptions) -> None:
        super().__init__(options)
        self._loaded: list[NumberScorer] | None = None
        if options.complexity_scorer is not None:
            self.needs = Needs(own_models=True)

    def content(self) -> Mapping[str, Any]:
        """Digests of the files, or of the models.

        Raises:
            ModelError: A scorer is not there, or cannot be one; the message names its key.
        """
        content: dict[str, Any] = {"files": [hashlib.sha256(read_bytes(file)).hexdigest() for file in self._files]}
        if self.options.complexity_scorer is not None:
            from rose_ray.model.number_scorer import scorer_digest

            content["scorers"] = self._of_each_scorer(scorer_digest)
        return content

    def prepare(self, target: Target, statistics: Arrays, model: MethodModel | None) -> Arrays:
        """Return the files' rows, sorted: words of their ids, uint64 [M, 2], and scores, float64 [M].

        Raises:
            DataError: A file is no such table, or a row stands in them twice.
        """
        if not self._files:
            return {}
        tables = [_read(file) for file in self._files]
        words_M2 = np.concatenate([words for words, _ in tables])
        order_M = np.lexsort((words_M2[:, 1], words_M2[:, 0]))
        words_M2, scores_M = words_M2[order_M], np.concatenate([scores for _, scores in tables])[order_M]
        twice = np.flatnonzero((words_M2[1:] == words_M2[:-1]).all(axis=1))
        if twice.size:
            names = ", ".join(file.name for file in self._files)
            raise DataError(
                f"{names}: {twice.size} rows stand twice, first: {_hex(words_M2[twice[0]])}. Keep one of each."
            )
        return {"words": words_M2, "scores": scores_M}

    def score(self, rows: PoolRows, state: Arrays, model: MethodModel | None) -> Scored:
        """Return the rows' sums of products."""
        if self.options.complexity_scorer is not None:
            assert model is not None
            return self._from_models(rows, model)
        values, rejected = np.zeros((len(rows), 1)), dict[int, tuple[str, str]]()
        found = self._from_files(rows, state) if self._files else self._from_records(rows)
        for place, value in enumerate(found):
            if isinstance(value, str):
                rejected[place] = ("no_scorer_value", value)
            else:
                values[place] = value
        return Scored(values, rejected)

    def _from_models(self, rows: PoolRows, model: MethodModel) -> Scored:
        from rose_ray.stages.turn_scores import turn_products

        complexity, quality = zip(self._scorers(model.device), [c.prompt for c in self._scorer_configs], strict=True)
        found = turn_products(rows.conversations, complexity, quality, max_batch_tokens=model.max_batch_tokens)
        return Scored(found.values_NU, found.rejected)

    @property
    def _scorer_configs(self) -> list[ScorerConfig]:
        complexity, quality = self.options.complexity_scorer, self.options.quality_scorer
        assert complexity is not None and quality is not None
        return [complexity, quality]

    def _scorers(self, device: str) -> list[NumberScorer]:
        # A method travels to its actor by pickle and loads its models there, once.
        if self._loaded is None:
            from rose_ray.model.number_scorer import NumberScorer

            self._loaded = self._of_each_scorer(lambda config: NumberScorer(config, device))
        return self._loaded

    def _of_each_scorer(self, made: Callable[[ScorerConfig], _Made]) -> list[_Made]:
        results = []
        for key, config in zip(("complexity_scorer", "quality_scorer"), self._scorer_configs, strict=True):
            try:
                results.append(made(config))
            except ModelError as error:
                raise ModelError(f"method deita: method_options.{key}: {error}") from error
        return results

    @cached_property
    def _files(self) -> list[Location]:
        return expand(self.options.scores_files) if self.options.scores_files else []

    def _from_records(self, rows: PoolRows) -> list[float | str]:
        assert self.options.complexity_field is not None and self.options.quality_field is not None
        keys = (self.options.complexity_field, self.options.quality_field)
        found: list[float | str] = []
        for text in rows.records:
            record = parse_object(text)
            values = [_turns(_below(record, key)) for key in keys]
            lacking = [key for key, value in zip(keys, values, strict=True) if value is None]
            if lacking:
                found.append(f"the record has no finite number, or list of them, at {' and '.join(lacking)}")
            elif len(values[0] or ()) != len(values[1] or ()):
                found.append(f"{len(values[0] or ())} turns at {keys[0]}, {len(values[1] or ())} at {keys[1]}")
            else:
                found.append(float(np.dot(values[0] or [], values[1] or [])))
        return found

    def _from_files(self, rows: PoolRows, state: Arrays) -> list[float | str]:
        words_N2, words_M2 = row_id_words(pa.array(rows.row_ids, pa.string())), state["words"]
        starts_N = np.searchsorted(words_M2[:, 0], words_N2[:, 0], side="left")
        found: list[float | str] = []
        for words, start in zip(words_N2, starts_N.tolist(), strict=True):
            place = start
            while place < len(words_M2) and words_M2[place, 0] == words[0] and words_M2[place, 1] != words[1]:
                place += 1
            if place < len(words_M2) and (words_M2[place] == words).all():
                found.append(float(state["scores"][place]))
            else:
                found.append("its row_id is in none of scores_files")
        return found


def _read(file: Location) -> tuple[NDArray[np.uint64], NDArray[np.float64]]:
    try:
        table = pq.read_table(pa.BufferReader(read_bytes(file)), columns=["row_id", *_COLUMNS])
        words_N2 = row_id_words(table["row_id"].cast(pa.string()))
    except (pa.ArrowException, OSError, ValueError, RuntimeError) as error:
        raise DataError(f"{file.name}: expected Parquet with row_id, complexity and quality: {error}") from error
    complexities, qualities = (map(_turns, table[name].to_pylist()) for name in _COLUMNS)
    scores = []
    for place, (complexity, quality) in enumerate(zip(complexities, qualities, strict=True), start=1):
        if complexity is None or quality is None or len(complexity) != len(quality):
            raise DataError(
                f"{file.name} row {place}: expected finite numbers in complexity and quality, or equally long lists of "
                "them, a number a turn. Mend the file, or take the row out."
            )
        scores.append(float(np.dot(complexity, quality)))
    return words_N2, np.array(scores, np.float64)


def _below(record: Any, key: str) -> Any:
    for part in key.split("."):
        record = record.get(part) if isinstance(record, dict) else None
    return record


def _turns(value: Any) -> list[float] | None:
    """Return a number a turn; None where there is anything else."""
    numbers = value if isinstance(value, list) else [value]
    good = all(isinstance(n, int | float) and not isinstance(n, bool) and np.isfinite(n) for n in numbers)
    return [float(n) for n in numbers] if numbers and good else None


def _hex(words: NDArray[np.uint64]) -> str:
    return "".join(f"{int(word):016x}" for word in words)
