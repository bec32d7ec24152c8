"""What every Ray Data pipeline of a run is set up with."""

from __future__ import annotations

import logging

import ray

from rose_ray.config.cluster import RayConfig
from rose_ray.distributed.session import is_verbose


def set_up_ray_data(settings: RayConfig) -> None:
    """Let Ray Data be quiet, hand on errors as they are, and end a run that has stalled."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_no_progress_timeout_s = settings.stall_seconds
    context.verbose_progress = False
    context.raise_original_map_exception = True  # its own wrapper loses the cause
    if not is_verbose():
        # Ray Data sets its own level once it is imported. Its errors come back as exceptions; its log calls ours a bug.
        logging.getLogger("ray.data").setLevel(logging.CRITICAL)
