"""What a selection method is: the one interface, for those that come with rose_ray and for a user's own.

A run tokenises the pool's rows with the base model's tokenizer, and whatever the method, the same rows are set aside.
Then, for each target::

    survey(rows of a shard, target)      on every shard, if the method needs the pool's statistics
    merge(what the surveys returned)     once
    prepare(target, statistics)          once: whatever scoring has to know
    score(rows of a shard, state)        on every shard

Methods are plain functions of what they are given: shards are scored on any machine, in any order, once, and what was
scored is found again by its key. So the same rows, target and options must give the same numbers, and a row's scores
must not depend on which rows stand beside it.

What travels and is kept (statistics, state) is a mapping of names to numpy arrays of numbers or booleans;
`pack_texts` makes one of texts.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from rose_ray.config.method import Needs
from rose_ray.config.strict import Strict
from rose_ray.data.conversation import Conversation, parse_conversation
from rose_ray.data.preferences import PreferencePair
from rose_ray.data.tokenize import Sample, Tokeniser
from rose_ray.kernels.aggregation import subtask_order

if TYPE_CHECKING:  # methods that look at text run in many processes, none of which should load torch
    from rose_ray.model.checkpoint import Checkpoint
    from rose_ray.model.scoring import ScoringModel

Arrays = Mapping[str, NDArray[Any]]
"""What a method hands on."""


def pack_texts(texts: Sequence[str]) -> NDArray[np.uint8]:
    """Return texts as one array, for `unpack_texts`."""
    return np.frombuffer(json.dumps(list(texts)).encode(), dtype=np.uint8).copy()


def unpack_texts(array: NDArray[np.uint8]) -> list[str]:
    """Return what `pack_texts` was given."""
    texts: list[str] = json.loads(array.tobytes())
    return texts


@dataclass(frozen=True)
class PoolRows:
    """The rows of one shard that are to be scored: unique, and of at least one token that carries loss.

    Attributes:
        row_ids: Digests of the conversations.
        sources: Sources.
        texts: Conversations as canonical JSON.
        records: The records' exact texts.
        num_tokens: int32 [N], tokens after cutting.
        num_labelled_tokens: int32 [N], those that carry loss.
    """

    row_ids: list[str]
    sources: list[str]
    texts: list[str]
    records: list[str]
    num_tokens: NDArray[np.int32]
    num_labelled_tokens: NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.row_ids)

    @cached_property
    def conversations(self) -> list[Conversation]:
        """Parsed when first asked for."""
        return [parse_conversation(text) for text in self.texts]

    def samples(self, tokeniser: Tokeniser) -> list[Sample]:
        """The rows' tokens, cut and masked as everywhere."""
        return [tokeniser.encode(conversation) for conversation in self.conversations]


@dataclass(frozen=True)
class Target:
    """What is to be helped.

    Attributes:
        name: Of the target, for messages: it must not change a score.
        pairs: Its pairs, in order; empty where the method does not need them.
    """

    name: str
    pairs: tuple[PreferencePair, ...]

    @property
    def subtasks(self) -> list[str]:
        """Names in order of first appearance; the target's own where there is no pair."""
        return list(subtask_order([pair.subtask for pair in self.pairs])) or [self.name]


@dataclass(frozen=True)
class MethodModel:
    """What a scoring actor has, for methods that need the base model or a device for models of their own.

    Attributes:
        load: Loads the base model; see ``scoring``.
        device: Where models go: ``cpu`` or ``cuda``.
        tokeniser: The base model's, with template and limit.
        checkpoints: Of the warm-up, in order of training; empty where the method does not need it. Copy one into the
            slot with ``scoring.load_adapter(checkpoint.adapter)``.
        max_batch_tokens: Bound on rows times length of a batch.
    """

    load: Callable[[], ScoringModel]
    device: str
    tokeniser: Tokeniser
    checkpoints: tuple[Checkpoint, ...]
    max_batch_tokens: int

    @cached_property
    def scoring(self) -> ScoringModel:
        """The base model with one empty adapter slot, loaded when first asked for.

        ``without_adapter()`` gives the untouched base.
        """
        return self.load()


@dataclass(frozen=True)
class Scored:
    """A shard's scores.

    Attributes:
        values: float64 [N, T] in the order of the rows given, a column a subtask of the target; [N, V], a column a
            pair, where ``Method.columns`` is ``pairs``; [N, 1] where it is ``one``. Higher is better. Rows that are
            rejected may hold anything.
        rejected: Rows that cannot be scored, by place: a short stable reason, and what was found and expected.
    """

    values: NDArray[np.float64]
    rejected: Mapping[int, tuple[str, str]] = field(default_factory=dict)


Options = TypeVar("Options", bound=Strict)


class Method(Generic[Options]):
    """One way to score rows for a target. Subclasses implement `score`, and what else they need.

    Attributes of the class:
        version: Raised whenever the same input would give other numbers: older scores are then not found.
        options_model: Strict pydantic model of what may stand in ``method_options``.
        survey_reads_pairs: Whether `survey` looks at the target's pairs; where not, targets share its results.
        columns: What the columns of `Scored.values` are. ``subtasks``; ``pairs``, of which the run takes the mean in
            each subtask, with columns of their own where pairs take turns at selection; or ``one``, for a method that
            knows no subtasks: its score table has one column, under the target's name. ``vector`` is what rose_ray
            itself compares rows by: numbers of a row's vector, of which there is no score table.
        needs: What the run has to provide. An instance may set ``columns`` and ``needs`` of its own in ``__init__``,
            where options decide.

    Args:
        options: Checked.
    """

    version: ClassVar[int] = 1
    options_model: ClassVar[type[Strict]]
    survey_reads_pairs: ClassVar[bool] = False
    columns: str = "subtasks"
    needs: Needs = Needs()

    def __init__(self, options: Options) -> None:
        self.options = options

    def content(self) -> Mapping[str, Any]:
        """What scores depend on besides options, rows and target, as JSON; digests of files, for instance.

        A run asks for it on a worker, since the driver may be a machine without the files; `validate` where it runs.
        """
        return {}

    def survey(self, rows: PoolRows, target: Target) -> Arrays:
        """Return a shard's part of the pool's statistics. Only where ``needs.pool_statistics``."""
        raise NotImplementedError

    def merge(self, parts: Sequence[Arrays]) -> Arrays:
        """Return the pool's statistics from those of its shards, in the pool's order; sums where not overridden."""
        return {name: np.sum([part[name] for part in parts], axis=0) for name in parts[0]}

    def prepare(self, target: Target, statistics: Arrays, model: MethodModel | None) -> Arrays:
        """Return what `score` has to know. Runs in a scoring actor where ``needs.any_model``, and has no model else."""
        return {}

    def score(self, rows: PoolRows, state: Arrays, model: MethodModel | None) -> Scored:
        """Score rows; ``model`` as in `prepare`."""
        raise NotImplementedError
