"""The roll of actors that hold the model: how many were lost, and whether they only ever die.

Ray starts a dead actor again and gives it its work again, without end. An actor that finds too many starts since the
last finished piece of work ends the run instead.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from rose_ray.errors import ResourceError

MAX_BARREN_DEATHS = 3
"""Actors that may die one after the other without a piece of work finished in between."""

ENDLESS = -1
"""Ray's number of restarts and of repeated calls of an actor whose roll ends it instead."""


_ANSWER_SECONDS = 60.0
"""How long the roll may take to answer: its node may be gone, and with it whatever it noted."""


class _Roll:
    """A Ray actor that every actor at work reports to."""

    def __init__(self, num_actors: int) -> None:
        self.num_actors = num_actors
        self.starts: list[str] = []
        self.since_finished: list[str] = []
        self.num_apart = 0

    def enrol(self, who: str) -> list[str]:
        """Note a start; return those before it that must have died in vain, where they are too many."""
        self.starts.append(who)
        self.since_finished.append(who)
        barren = len(self.since_finished) - self.num_actors
        return self.since_finished[:-1] if barren > MAX_BARREN_DEATHS else []

    def finished(self) -> None:
        self.since_finished.clear()

    def came_apart(self) -> None:
        """Note that the ranks of a gang were lost, and others started."""
        self.num_apart += 1

    def losses(self) -> tuple[int, int]:
        """Return how many actors were lost, and how often a gang came apart."""
        return max(0, len(self.starts) - self.num_actors), self.num_apart


@contextmanager
def called_roll(num_actors: int, events: list[str], who: str = "scoring actors") -> Iterator[Any]:
    """Keep a roll on the driver's node while so many actors are at work.

    Args:
        num_actors: At work at once.
        events: Told in the end what was lost.
        who: They are, for people; in the plural.
    """
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    started: Any = ray.remote(num_cpus=0, max_restarts=ENDLESS, max_task_retries=ENDLESS)(_Roll)
    roll: Any = started.options(scheduling_strategy=here).remote(num_actors)
    try:
        yield roll
    finally:
        try:
            events += loss_lines(who, *ray.get(roll.losses.remote(), timeout=_ANSWER_SECONDS))
        except ray.exceptions.RayError as error:  # what ended the work, if anything did, matters more
            events.append(f"{who}: not known whether any were lost ({type(error).__name__})")
        finally:
            ray.kill(roll)


def loss_lines(who: str, num_lost: int, num_apart: int) -> list[str]:
    """Say what was lost, for the closing summary; nothing where nothing was."""
    lost = [f"{who} lost and replaced: {num_lost}"] if num_lost else []
    return lost + ([f"{who}: gangs that came apart and were started again: {num_apart}"] if num_apart else [])


class Enrolment:
    """An actor's place on a roll; it takes one when it is made.

    Args:
        roll: Where to report, if anywhere.
        who: Such actors are, for people; in the plural.
        work: A piece of their work.

    Attributes:
        refusal: What to end the run with at the first call, if others only died: what a constructor raises, Ray loses.
    """

    def __init__(self, roll: Any, who: str = "scoring actors", work: str = "a shard") -> None:
        self._roll = roll
        here = f"process {os.getpid()} on {socket.gethostname()}"
        died = [] if roll is None else ray.get(roll.enrol.remote(here))
        self.refusal = refusal(who, work, died) if died else None

    def check(self) -> None:
        """Refuse to work where others only died.

        Raises:
            ResourceError: They did.
        """
        if self.refusal is not None:
            raise self.refusal

    def finished(self) -> None:
        """Report a finished piece of work."""
        if self._roll is not None:
            self._roll.finished.remote()

    def came_apart(self) -> None:
        """Report that the ranks that share this actor's model were lost."""
        if self._roll is not None:
            ray.get(self._roll.came_apart.remote())


def refusal(who: str, work: str, died: Sequence[str]) -> ResourceError:
    """Return what ends a run whose actors only die; arguments as in `Enrolment`, and who died."""
    return ResourceError(
        f"{who} died again and again without finishing {work}; the last were {', '.join(died[-3:])}. Look into Ray's "
        "logs of these processes. Often memory of the machine is used up: lower gradients.max_batch_tokens, or let "
        "fewer actors share a machine. What was finished is kept."
    )
