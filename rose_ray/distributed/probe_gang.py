"""The probe where ranks share a model: a gang as the stages start it, which is not started again."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

import pyarrow as pa

from rose_ray.config.target import TargetConfig
from rose_ray.data.preferences import PreferencePair
from rose_ray.distributed.actors import ScoringSpec
from rose_ray.distributed.engine import ProcessGroup
from rose_ray.distributed.gang import Gang, GangActor, Rank, released_gangs
from rose_ray.distributed.probe import ProbeActor, time_training
from rose_ray.distributed.roll import Enrolment
from rose_ray.distributed.training import WarmupJob
from rose_ray.errors import ResourceError
from rose_ray.stages.budget import MemoryNeed


class ProbeRank(ProbeActor, Rank):
    """One of the processes that share the probed model."""


class TrainingRank(Rank):
    """One of the workers of a warm-up whose base is in parts."""

    def join(self, address: str, port: int) -> None:
        """Take a place among the others; the trainer loads the model."""
        self.group = ProcessGroup(self.number, self.spec.ranks, address, port)

    def train(self, job: WarmupJob) -> float:
        """See `time_training`."""
        return time_training(job, self.group)


class ProbeRanks(Gang):
    """Ranks that are lost for good: what another start takes would count as what rows take."""

    kind: type[Rank] = ProbeRank
    max_restarts = 0

    def _given_up(self, lost: str) -> ResourceError:
        return ResourceError(
            f"plan: the probe's gang of {self.spec.ranks} ranks came apart: {lost} Look into Ray's logs of these "
            "processes. Often memory of the machine is used up: lower gradients.max_batch_tokens or "
            "warmup.max_batch_tokens, or let fewer ranks share a machine. --probe 0 foretells sizes and the least "
            "memory of a rank without starting any."
        )


class TrainingRanks(ProbeRanks):
    """The same for a warm-up."""

    kind = TrainingRank


class ProbeGang(GangActor):
    """A `ProbeActor` whose model several ranks share; itself it holds none."""

    def __init__(self, spec: ScoringSpec) -> None:
        super().__init__(spec)
        self.gang = ProbeRanks(spec, self.enrolment)

    def ready(self) -> bool:
        """Start the ranks, which load the model."""
        return all(self.gang.call("ready", lambda rank: ()))

    def need(self) -> MemoryNeed:
        """Return the most that batches take of any rank's device, and the least that there is."""
        needs: list[MemoryNeed] = self.gang.call("need", lambda rank: ())
        return MemoryNeed(
            needs[0].row_tokens,
            one_row=max(need.one_row for need in needs),
            per_row=max(need.per_row for need in needs),
            available=min(need.available for need in needs),
        )

    def host_memory(self) -> tuple[int, int]:
        """See `ProbeActor`; the most that any rank takes, and the least that any could."""
        own, available = zip(*self.gang.call("host_memory", lambda rank: ()), strict=True)
        return max(own), min(available)

    def score(self, tokens: pa.Table, max_batch_tokens: int) -> tuple[float, list[pa.Table]]:
        """See `ProbeActor`; dealing, and the way of the numbers from the ranks, are among the seconds."""
        self.settings = replace(self.settings, max_batch_tokens=max_batch_tokens)
        for part in (tokens.slice(0, 4), tokens):  # the first warms up
            start = time.monotonic()
            made = self.features(part, self.spec.spaces)
        return time.monotonic() - start, [tables[0] for tables in made.tables]

    def pairs(self, target: TargetConfig, pairs: Sequence[PreferencePair], num_checkpoints: int) -> float:
        """See `ProbeActor`; of the slowest rank, since all compute the same."""
        return float(max(self.gang.call("pairs", lambda rank: (target, pairs, num_checkpoints))))


def time_shared_training(job: WarmupJob, spec: ScoringSpec) -> float:
    """Return what `time_training` does, of the slowest of ``job.warmup.workers`` workers that share the base.

    Args:
        job: Under ZeRO stage 3.
        spec: For the resources of a worker.

    Raises:
        ResourceError: A worker died, or there is no room for them.
    """
    spec = replace(spec, ranks=job.warmup.workers)
    with released_gangs(spec):
        gang = TrainingRanks(spec, Enrolment(None))
        try:
            return float(max(gang.call("train", lambda rank: (job,))))
        finally:
            gang.stop()
