"""What the stages need of the cluster, checked before anything runs: a request that cannot be met would hang."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray
from ray.core.generated.common_pb2 import NodeDeathInfo  # type: ignore[attr-defined]

from rose_ray.config.cluster import RayConfig
from rose_ray.config.job import JobConfig
from rose_ray.config.method import Needs
from rose_ray.errors import ResourceError
from rose_ray.methods.registry import needs_of

logger = logging.getLogger(__name__)

_LOOK_SECONDS = 2.0
_SAY_SECONDS = 60.0


@dataclass(frozen=True)
class Node:
    """What one live node offers."""

    cpus: float
    gpus: float


def cluster_nodes() -> list[Node]:
    """Return the live nodes of the cluster that this process is connected to."""
    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return [Node(resources.get("CPU", 0.0), resources.get("GPU", 0.0)) for resources in alive]


@contextmanager
def granted_resources(config: JobConfig) -> Iterator[None]:
    """Make sure that the cluster has what the job needs.

    With ``ray.autoscale_seconds`` its autoscaler is asked first, and waited for; `release_resources` takes that back,
    at the latest when this ends.

    Raises:
        ResourceError: It has not.
    """
    if not config.ray.autoscale_seconds:
        check_resources(config, cluster_nodes())
        yield
        return
    from ray.autoscaler.sdk import request_resources

    settings = config.ray
    needs = needs_of(config)
    actor = {"CPU": settings.cpus_per_actor} | ({"GPU": settings.gpus_per_actor} if settings.gpus_per_actor else {})
    actors = settings.actors * settings.ranks_per_actor if needs.any_model else 0
    bundles = [actor] * max(actors, _num_workers(config, needs)) + [{"CPU": settings.cpus_per_task}]
    request_resources(bundles=bundles)
    try:
        _await_nodes(config)
        yield
    finally:
        release_resources(config)


def release_resources(config: JobConfig) -> bool:
    """Let the autoscaler take nodes away that are idle: nothing large is to come. Return whether there is one."""
    if not config.ray.autoscale_seconds:
        return False
    from ray.autoscaler.sdk import request_resources

    request_resources(bundles=[])
    return True


def _await_nodes(config: JobConfig) -> None:
    started = said = time.monotonic()
    while True:
        try:
            check_resources(config, cluster_nodes())
            return
        except ResourceError as error:
            now = time.monotonic()
            if now - started > config.ray.autoscale_seconds:
                raise ResourceError(
                    f"{error} No more came within the {config.ray.autoscale_seconds:g} s of ray.autoscale_seconds."
                ) from None
            if said in (started, now) or now - said > _SAY_SECONDS:
                logger.info(f"waiting for the autoscaler, {now - started:.0f} s so far: {error}")
                said = now
        time.sleep(_LOOK_SECONDS)


class NodeLosses:
    """Nodes that die during a run, ones that joined it later among them. Make one when the run begins.

    Attributes:
        idle_may_go: Set once the autoscaler was told that it may take idle nodes away: one that ends in good order is
            then no loss.
    """

    def __init__(self) -> None:
        self.idle_may_go = False
        self._known = {node["NodeID"] for node in ray.nodes() if not node["Alive"]}

    def lost(self) -> list[str]:
        """Return those that died since this was last asked, as people know them: address and start of Ray's id."""
        dead = [node for node in ray.nodes() if not node["Alive"] and node["NodeID"] not in self._known]
        self._known |= {node["NodeID"] for node in dead}
        return sorted(f"{n['NodeManagerAddress']} ({n['NodeID'][:8]})" for n in dead if not self._was_let_go(n))

    def _was_let_go(self, node: Mapping[str, Any]) -> bool:
        reason = node.get("DeathReason")
        if not self.idle_may_go:
            return bool(reason == NodeDeathInfo.AUTOSCALER_DRAIN_IDLE)
        return reason in (NodeDeathInfo.AUTOSCALER_DRAIN_IDLE, NodeDeathInfo.EXPECTED_TERMINATION)


def check_resources(config: JobConfig, nodes: list[Node]) -> None:
    """Refuse a configuration that the cluster cannot run.

    Scoring actors leave room for one reading task beside them: without it the readers starve and nothing moves.

    Raises:
        ResourceError: Too few CPUs or GPUs; the message says what is asked for and what there is.
    """
    settings = config.ray
    needs = needs_of(config)
    have = f"the cluster has {_nodes_text(nodes)}"
    largest = max((node.cpus for node in nodes), default=0.0)
    if settings.cpus_per_task > largest + 1e-9:
        raise ResourceError(
            f"ray.cpus_per_task: {settings.cpus_per_task:g} CPU fit no node; {have}, {largest:g} CPU the largest. "
            "Lower it (fractions are fine)."
        )
    if not needs.any_model:
        return
    slots = sum(_slots(node, settings.cpus_per_actor, settings.gpus_per_actor) for node in nodes)
    wanted_slots = settings.actors * settings.ranks_per_actor
    if slots < wanted_slots:
        raise ResourceError(
            f"ray.actors: {_actors_text(settings)} of {settings.cpus_per_actor:g} CPU and {settings.gpus_per_actor:g} "
            f"GPU do not fit; {have}, room for {slots}. Lower ray.actors or ray.cpus_per_actor, or add nodes."
        )
    wanted = wanted_slots * settings.cpus_per_actor + settings.cpus_per_task
    total = sum(node.cpus for node in nodes)
    if wanted > total + 1e-9 or not any(_fit_beside_reader(nodes, number, config) for number in range(len(nodes))):
        raise ResourceError(
            f"ray: {_actors_text(settings)} x {settings.cpus_per_actor:g} CPU leave no room for a reading task of "
            f"{settings.cpus_per_task:g} CPU; {have}. Lower ray.cpus_per_actor (fractions are fine) or ray.actors."
        )
    workers = _num_workers(config, needs)
    worker_slots = sum(_slots(node, settings.cpus_per_actor, settings.gpus_per_actor) for node in nodes)
    if worker_slots < workers:
        raise ResourceError(
            f"warmup.workers: {workers} workers of {settings.cpus_per_actor:g} CPU and {settings.gpus_per_actor:g} GPU "
            f"do not fit; {have}. Lower warmup.workers, or add nodes."
        )


def _num_workers(config: JobConfig, needs: Needs) -> int:
    return config.warmup.workers if needs.warmup and config.warmup.adapters is None else 0


def processes_at_once(config: JobConfig, nodes: list[Node]) -> int:
    """Return how many scoring actors, or ranks of them, the job would put on one node, the one with the most room."""
    settings = config.ray
    most = max((_slots(node, settings.cpus_per_actor, settings.gpus_per_actor) for node in nodes), default=1)
    return max(1, min(settings.actors * settings.ranks_per_actor, most))


def _fit_beside_reader(nodes: list[Node], number: int, config: JobConfig) -> bool:
    # A task runs on one node: room that is left in crumbs on several is none.
    settings = config.ray
    reader = nodes[number]
    if reader.cpus < settings.cpus_per_task - 1e-9:
        return False
    left = [*nodes[:number], Node(reader.cpus - settings.cpus_per_task, reader.gpus), *nodes[number + 1 :]]
    return sum(_slots(node, settings.cpus_per_actor, settings.gpus_per_actor) for node in left) >= (
        settings.actors * settings.ranks_per_actor
    )


def _actors_text(settings: RayConfig) -> str:
    ranks = settings.ranks_per_actor
    return f"{settings.actors} actors" if ranks == 1 else f"{settings.actors} actors x {ranks} ranks"


def _slots(node: Node, cpus: float, gpus: float) -> int:
    by_cpu = int(node.cpus / cpus + 1e-9)
    return min(by_cpu, int(node.gpus / gpus + 1e-9)) if gpus else by_cpu


def _nodes_text(nodes: list[Node]) -> str:
    cpus, gpus = sum(node.cpus for node in nodes), sum(node.gpus for node in nodes)
    return f"{len(nodes)} node(s), {cpus:g} CPU and {gpus:g} GPU in all"
