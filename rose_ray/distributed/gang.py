"""Several ranks that share one model, for a model larger than a device.

A coordinator is what Ray Data or the driver sees. It owns a placement group with one rank a bundle; the ranks hold the
model under ZeRO stage 3, each a part of every parameter, so every forward and backward pass of one is a pass of all:
they run equally many batches, in step. A rank that dies, or is silent for too long, takes the others with it: they are
started anew and the shard is computed again.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

import pyarrow as pa
import ray
from ray.exceptions import ActorDiedError, ActorUnavailableError, GetTimeoutError, RayTaskError
from ray.util.placement_group import PlacementGroup, get_placement_group, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from rose_ray.config.target import TargetConfig
from rose_ray.data.batches import DealtBatches, deal_batches
from rose_ray.data.preferences import PreferencePair
from rose_ray.distributed.actors import BankActor, ScoringActor, ScoringSpec, bank_enrolment
from rose_ray.distributed.engine import ProcessGroup, free_port, load_scoring_model
from rose_ray.distributed.roll import Enrolment
from rose_ray.distributed.session import root_cause
from rose_ray.distributed.spaces import SpaceSpec
from rose_ray.errors import ResourceError, RoseError
from rose_ray.model.scoring import ScoringModel
from rose_ray.stages.features import ShardFeatures, ShardParts, assemble, shard_parts
from rose_ray.stages.tokens import read_samples
from rose_ray.stores.workspace import FileRecord

logger = logging.getLogger(__name__)

MAX_RESTARTS = 3
"""A gang that comes apart so often over one piece of work does not come together by trying again."""

_DEATH_SECONDS = 10.0
"""How long after an error in a rank the death of another one may become known."""


class Rank(BankActor):
    """One of the processes that share a model."""

    in_step = True

    def __init__(self, spec: ScoringSpec, number: int) -> None:
        super().__init__(spec)
        self.number = number
        self.group = ProcessGroup()
        self.writes = number == 0

    def place(self) -> tuple[str, int]:
        """Return where the group of ranks could meet: this node, and a port that is free on it."""
        return ray.util.get_node_ip_address(), free_port()

    def join(self, address: str, port: int) -> None:
        """Load the model together with the other ranks."""
        self.group = ProcessGroup(self.number, self.spec.ranks, address, port)
        assert self.model

    @functools.cached_property
    def model(self) -> ScoringModel:
        """This rank's part of the model."""
        return load_scoring_model(self.spec.model, self.spec.lora, device=self.spec.device, group=self.group)

    def parts(self, tokens: pa.Table, dealt: DealtBatches, spaces: Sequence[SpaceSpec]) -> ShardParts:
        """Compute the numbers of this rank's samples."""
        settings, samples = self.direction_settings(), read_samples(tokens)
        maps = [self.projections(space) for space in spaces]
        return shard_parts(self.model, samples, self.checkpoints, self.spec.layout, maps, settings, dealt)


class Gang:
    """The ranks of one coordinator.

    Args:
        spec: ``ranks`` of them, with ``cpus`` and ``gpus`` each.
        enrolment: The coordinator's: told whenever the ranks are lost.

    Attributes:
        kind: What the ranks are.
        max_restarts: How often they are started again over one call.
    """

    kind: type[Rank] = Rank
    max_restarts = MAX_RESTARTS

    def __init__(self, spec: ScoringSpec, enrolment: Enrolment) -> None:
        self.spec = replace(spec, roll=None)  # the coordinator's place on the roll is theirs
        self.enrolment = enrolment
        self._ranks: list[Any] = []

    def call(self, method: str, arguments: Callable[[int], tuple[Any, ...]]) -> list[Any]:
        """Call a method of every rank and return what each gives.

        Args:
            method: Of `Rank`.
            arguments: For the rank of this number.

        Raises:
            RoseError: What a rank raised.
            ResourceError: The gang came apart again and again.
        """
        for attempt in range(self.max_restarts + 1):
            try:
                self._start()
                return self._together([getattr(r, method).remote(*arguments(n)) for n, r in enumerate(self._ranks)])
            except (ActorDiedError, ActorUnavailableError, GetTimeoutError) as error:
                self.stop()
                self.enrolment.came_apart()
                lost = str(error).split("\n", 1)[0]
                logger.warning(f"a gang of {self.spec.ranks} ranks came apart (time {attempt + 1}): {lost}")
        raise self._given_up(lost)

    def _given_up(self, lost: str) -> ResourceError:
        """Return what ends work over which the gang came apart for the last time, and how: ``lost``."""
        times = self.max_restarts + 1
        return ResourceError(
            f"a gang of {self.spec.ranks} ranks came apart {times} times over the same work; the last time: {lost}"
        )

    def _start(self) -> None:
        if self._ranks:
            return
        group = self._placement()
        options = {"num_cpus": self.spec.cpus, "num_gpus": self.spec.gpus}
        self._ranks = [
            ray.remote(self.kind)
            .options(**options, scheduling_strategy=PlacementGroupSchedulingStrategy(group, number))
            .remote(self.spec, number)
            for number in range(self.spec.ranks)
        ]
        address, port = ray.get(self._ranks[0].place.remote(), timeout=self.spec.stall_seconds)
        self._together([rank.join.remote(address, port) for rank in self._ranks])

    def _placement(self) -> PlacementGroup:
        # Named after the coordinator: one that is started anew finds the group that its predecessor left.
        name = f"{self.spec.gang}-{ray.get_runtime_context().get_actor_id()}"
        bundle = {"CPU": self.spec.cpus} | ({"GPU": self.spec.gpus} if self.spec.gpus else {})
        try:
            found: PlacementGroup = get_placement_group(name)
            return found
        except ValueError:
            group: PlacementGroup = placement_group([bundle] * self.spec.ranks, strategy="PACK", name=name)
        if not group.wait(self.spec.stall_seconds):
            raise ResourceError(
                f"no room for {self.spec.ranks} ranks of {bundle} within {self.spec.stall_seconds:g} s."
            )
        return group

    def _together(self, references: list[Any]) -> list[Any]:
        """Wait for all, and no longer once one has failed: the others wait for it in a collective."""
        waiting = list(references)
        while waiting:
            done, waiting = ray.wait(waiting, num_returns=1, timeout=self.spec.stall_seconds)
            if not done:
                raise GetTimeoutError(f"no rank ended within {self.spec.stall_seconds:g} s")
            try:
                ray.get(done)
            except RayTaskError as error:
                cause = root_cause(error)
                if not isinstance(cause, RoseError | OSError):
                    _raise_death(waiting)
                self.stop()
                raise (cause if isinstance(cause, RoseError | OSError) else error) from None
        return list(ray.get(references))

    def stop(self) -> None:
        """Kill all ranks; the next call starts others."""
        for rank in self._ranks:
            ray.kill(rank)
        self._ranks = []


def _raise_death(references: list[Any]) -> None:
    """Raise what Ray says of a rank that died: it breaks the collectives of the others, whose errors may come first."""
    done, _ = ray.wait(references, num_returns=len(references), timeout=_DEATH_SECONDS) if references else ([], [])
    for reference in done:
        with suppress(RayTaskError):
            ray.get(reference)


@contextmanager
def released_gangs(spec: ScoringSpec) -> Iterator[None]:
    """Remove the placement groups of the coordinators that have this specification, however they end.

    Ray keeps a group that an actor made until its job ends, so the driver removes them: what comes next in the job
    would wait for their resources.
    """
    try:
        yield
    finally:
        groups = ray.util.placement_group_table().values() if spec.ranks > 1 else []
        for group in groups:
            if group["name"].startswith(f"{spec.gang}-") and group["state"] != "REMOVED":
                remove_placement_group(get_placement_group(group["name"]))


class GangActor(ScoringActor):
    """A scoring actor whose model several ranks share; itself it holds none."""

    def __init__(self, spec: ScoringSpec) -> None:
        super().__init__(spec)
        self.gang = Gang(spec, self.enrolment)

    def prepare(self, spaces: Sequence[SpaceSpec]) -> None:
        """Nothing: the ranks load what they need."""

    def features(self, tokens: pa.Table, spaces: Sequence[SpaceSpec]) -> ShardFeatures:
        """Deal the shard's batches to the ranks and put together what they give."""
        names, dtype = self.spec.checkpoint_names(), self.settings.stored_dtype
        dealt = deal_batches(read_samples(tokens), self.settings.max_batch_tokens, self.spec.ranks)
        parts = self.gang.call(
            "parts", lambda rank: (tokens.take(pa.array(dealt[rank].samples, pa.int64())), dealt[rank], list(spaces))
        )
        places = [each.samples for each in dealt]
        return assemble(ShardParts.joined(parts, places, tokens.num_rows), tokens, names, dtype)


class GangBank:
    """A `BankActor` whose model several ranks share. All of them compute the same, in step; the first one's counts."""

    def __init__(self, spec: ScoringSpec) -> None:
        self.enrolment = bank_enrolment(spec)
        self.gang = Gang(spec, self.enrolment)

    def budget(self, spaces: Sequence[SpaceSpec]) -> int:
        """See `BankActor`; the least of all ranks."""
        self.enrolment.check()
        return int(min(self.gang.call("budget", lambda rank: (spaces,))))

    def bank(self, target: TargetConfig, pairs: Sequence[PreferencePair], space: SpaceSpec) -> list[pa.Table]:
        """See `BankActor`."""
        self.enrolment.check()
        tables: list[pa.Table] = self.gang.call("bank", lambda rank: (target, pairs, space))[0]
        self.enrolment.finished()
        return tables

    def basis(
        self, target: TargetConfig, pairs: Sequence[PreferencePair], folder: str, per_subtask: bool
    ) -> list[FileRecord]:
        """See `BankActor`; the first rank writes."""
        self.enrolment.check()
        records: list[FileRecord] = self.gang.call("basis", lambda rank: (target, pairs, folder, per_subtask))[0]
        self.enrolment.finished()
        return records
