"""The methods that a target can be selected by: what each is called, may be told, and needs.

``rose``, ``less`` and ``gist`` are the gradient pipeline. The others score rows by themselves, through
`rose_ray.methods.interface.Method`; so does a user's own, named ``package.module:Class``.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from pydantic import Field, ValidationError, field_validator, model_validator

from rose_ray.config.model_methods import LossDropOptions, NuggetsOptions
from rose_ray.config.numbers import with_floats
from rose_ray.config.strict import Strict

GRADIENT_METHODS = ("rose", "less", "gist")
"""Methods that are the pipeline of warm-up, bank and features itself; `gist` differs in its last step."""

_DOTTED = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


@dataclass(frozen=True)
class Needs:
    """What a method cannot do without.

    Attributes:
        pairs: The target's preference pairs; without them the target has one column, under its own name.
        pool_statistics: A first pass over the whole pool. A pool that grows has other statistics, so every row is
            scored again; without them only new files are.
        model: The base model, in scoring actors.
        adapter: The model's empty adapter slot, to train it; implies ``model``. What `lora` says then counts.
        warmup: The warm-up's checkpoints; implies ``model``.
        own_models: Models that the method loads by itself, in scoring actors; the base model only if asked for as well.
    """

    pairs: bool = False
    pool_statistics: bool = False
    model: bool = False
    adapter: bool = False
    warmup: bool = False
    own_models: bool = False

    @property
    def base_model(self) -> bool:
        """Whether the base model has to be loaded."""
        return self.model or self.adapter or self.warmup

    @property
    def any_model(self) -> bool:
        """Whether rows are scored in the actors that have the devices."""
        return self.base_model or self.own_models


class NoOptions(Strict):
    """A method that has nothing to set."""


class RandomOptions(Strict):
    """Of ``random``."""

    seed: int = Field(0, ge=0, description="Another seed, other rows.")
    balance: Literal["none", "source"] = Field(
        "none", description="Rows alike, or sources in turn, so that each gives as many rows as the smallest can."
    )


class LengthOptions(Strict):
    """Of ``length``."""

    unit: Literal["answer_tokens", "tokens", "characters"] = Field(
        "answer_tokens", description="Tokens that carry loss, or all, after cutting; or characters of all turns."
    )


class Bm25Options(Strict):
    """Of ``bm25``."""

    k1: float = Field(1.5, ge=0, description="How soon a word's repetitions stop to count.")
    b: float = Field(0.75, ge=0, le=1, description="How much long rows are held back.")
    target_text: Literal["prompt_and_chosen", "prompt", "chosen"] = Field(
        "prompt_and_chosen", description="What of a pair is the query."
    )
    stopwords: Literal["english", "none"] = Field("english", description="Words that do not count.")


class DsirOptions(Strict):
    """Of ``dsir``."""

    buckets: int = Field(10_000, ge=2, le=10_000_000, description="What n-grams are hashed into.")
    sampling: Literal["gumbel_top_k", "top_k"] = Field(
        "gumbel_top_k", description="Rows drawn by weight without replacement, or those of the highest weight."
    )
    seed: int = Field(0, ge=0, description="Of the draw.")
    smoothing: Literal["laplace", "epsilon"] = Field(
        "laplace",
        description="1 added to every count, which a few pairs need; or 1e-8 to every probability, as released.",
    )
    target_text: Literal["prompt_and_chosen", "prompt", "chosen"] = Field(
        "prompt_and_chosen", description="What of a pair is the target's text."
    )


class ScorerConfig(Strict):
    """A causal language model that was trained to answer with a number."""

    model: str = Field(min_length=1, description="Folder or Hugging Face name of model and tokenizer.")
    prompt: str = Field(
        description="The text that it was trained to continue with a number: {instruction} stands for a turn's "
        "question, {answer} for its answer. Nothing is added but what its tokenizer adds."
    )
    labels: list[str] = Field(
        default_factory=lambda: ["1", "2", "3", "4", "5", "6"],
        min_length=2,
        description="Numbers that it answers with, each one token; the score is their mean by probability.",
    )
    dtype: Literal["float32", "bfloat16"] = Field("bfloat16", description="Type of its weights.")

    @field_validator("labels")
    @classmethod
    def _distinct_numbers(cls, labels: list[str]) -> list[str]:
        for label in labels:
            try:
                finite = math.isfinite(float(label))
            except ValueError:
                finite = False
            if not finite:
                raise ValueError(f"expected numbers as text, such as '1', found {label!r}")
        if len(set(labels)) < len(labels):
            raise ValueError(f"expected each number once, found {labels}")
        return labels


class DeitaOptions(Strict):
    """Of ``deita``."""

    complexity_field: str | None = Field(
        None,
        min_length=1,
        description="Key of a record, dots for keys below, that holds its complexity: a number a turn.",
    )
    quality_field: str | None = Field(None, min_length=1, description="The same for its quality.")
    scores_files: list[str] | None = Field(
        None, min_length=1, description="Parquet files of row_id, complexity and quality, instead of keys of records."
    )
    complexity_scorer: ScorerConfig | None = Field(
        None, description="Model that gives a turn's complexity, run in the scoring actors; see docs/methods.md."
    )
    quality_scorer: ScorerConfig | None = Field(None, description="The same for its quality.")

    @model_validator(mode="after")
    def _has_scorers(self) -> DeitaOptions:
        named: dict[str, list[object]] = {
            "fields of the record": [self.complexity_field, self.quality_field],
            "scores_files": [self.scores_files],
            "scorers": [self.complexity_scorer, self.quality_scorer],
        }
        given = [name for name, values in named.items() if any(value is not None for value in values)]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} contradict each other: set one of them")
        if not given or None in named[given[0]]:
            raise ValueError(
                "deita multiplies a complexity by a quality that trained scorers gave, and none are named: set "
                "complexity_field and quality_field, or scores_files, or complexity_scorer and quality_scorer. It is "
                "not imitated without them"
            )
        self._check_prompts()
        return self

    def _check_prompts(self) -> None:
        wanted = {"complexity_scorer": ["{instruction}"], "quality_scorer": ["{instruction}", "{answer}"]}
        for key, places in wanted.items():
            scorer: ScorerConfig | None = getattr(self, key)
            lacking = [place for place in places if scorer is not None and place not in scorer.prompt]
            if lacking:
                raise ValueError(f"{key}.prompt: expected {' and '.join(places)} in it, lacks {' and '.join(lacking)}")


@dataclass(frozen=True)
class BuiltIn:
    """One method that comes with rose_ray.

    Attributes:
        path: ``package.module:Class``.
        options: What may stand in ``method_options``.
        needs: Known here so that the YAML is checked without loading the method.
    """

    path: str
    options: type[Strict]
    needs: Needs


BUILT_IN: Mapping[str, BuiltIn] = {
    "random": BuiltIn("rose_ray.methods.random_order:RandomOrder", RandomOptions, Needs()),
    "length": BuiltIn("rose_ray.methods.length:Length", LengthOptions, Needs()),
    "bm25": BuiltIn("rose_ray.methods.bm25:Bm25", Bm25Options, Needs(pairs=True, pool_statistics=True)),
    "deita": BuiltIn("rose_ray.methods.deita:Deita", DeitaOptions, Needs()),
    "dsir": BuiltIn("rose_ray.methods.dsir:Dsir", DsirOptions, Needs(pairs=True, pool_statistics=True)),
    "rds": BuiltIn("rose_ray.methods.rds:Rds", NoOptions, Needs(pairs=True, model=True)),
    "rds_plus": BuiltIn("rose_ray.methods.rds:RdsPlus", NoOptions, Needs(pairs=True, model=True)),
    "ifd": BuiltIn("rose_ray.methods.ifd:Ifd", NoOptions, Needs(model=True)),
    "loss_drop": BuiltIn("rose_ray.methods.loss_drop:LossDrop", LossDropOptions, Needs(pairs=True, adapter=True)),
    "nuggets": BuiltIn("rose_ray.methods.nuggets:Nuggets", NuggetsOptions, Needs(model=True)),
}

_Options = TypeVar("_Options", bound=Strict)


def check_method_name(name: str) -> None:
    """Refuse a name that stands for no method.

    Raises:
        ValueError: It is neither built in nor a path; the message has the near miss.
    """
    known = [*GRADIENT_METHODS, *BUILT_IN]
    if name in known or _DOTTED.fullmatch(name):
        return
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"expected one of {', '.join(known)}"
    raise ValueError(f"unknown method {name!r}; {hint}, or package.module:Class for one of your own")


def parse_options(method: str, options: type[_Options], given: Mapping[str, Any]) -> _Options:
    """Return a method's options, checked.

    Args:
        method: Name, for messages.
        options: Their model.
        given: What the YAML says.

    Raises:
        ValueError: An option is unknown, or its value does not fit; every problem is listed.
    """
    try:
        return options.model_validate(with_floats(dict(given), options))
    except ValidationError as error:
        raise ValueError("; ".join(_explain(method, options, problem) for problem in error.errors())) from error


def _explain(method: str, options: type[Strict], problem: Any) -> str:
    key = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        known = list(options.model_fields)
        near = difflib.get_close_matches(key, known, n=1)
        has = f"{method} has {', '.join(known)}" if known else f"{method} has no options"
        return f"method_options: unknown key {key!r}; " + (f"did you mean {near[0]!r}?" if near else has)
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "value_error":
        return f"method_options{f'.{key}' if key else ''}: {message}"
    return f"method_options.{key}: {message}; found {problem.get('input')!r}"
