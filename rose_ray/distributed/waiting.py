"""What is said while nothing happens: a job that waits for a busy cluster looks like one that hangs."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import ray

from rose_ray.config.cluster import RayConfig
from rose_ray.distributed.progress import Progress

logger = logging.getLogger(__name__)

_SECONDS = 60.0


@contextmanager
def said_while_waiting(progress: Progress, settings: RayConfig, seconds: float = _SECONDS) -> Iterator[None]:
    """Log what the cluster has free, and what scoring actors need, whenever a stage has not gone on for so long.

    Args:
        progress: Of the stage.
        settings: Actors and resources.
        seconds: Between two looks.
    """
    finished = threading.Event()

    def watch() -> None:
        before = progress.done
        while not finished.wait(seconds):
            if progress.done == before:
                logger.info(f"{progress.stage}: nothing finished in {seconds:g} s; {_free()}; {_needs(settings)}")
            before = progress.done

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        finished.set()
        watcher.join()


def _needs(settings: RayConfig) -> str:
    ranks = settings.ranks_per_actor
    gpus = f" and {settings.gpus_per_actor * ranks:g} GPU" if settings.gpus_per_actor else ""
    each = f"each of {settings.actors} actors needs {settings.cpus_per_actor * ranks:g} CPU{gpus}"
    return f"{each}, a reading task {settings.cpus_per_task:g} CPU"


def _free() -> str:
    total, free = ray.cluster_resources(), ray.available_resources()
    kinds = [kind for kind in ("CPU", "GPU") if kind in total]
    return "free on the cluster: " + ", ".join(f"{free.get(kind, 0.0):g} of {total[kind]:g} {kind}" for kind in kinds)
