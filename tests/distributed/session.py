"""One local Ray for all tests that need one: starting it, and its workers' imports, is what costs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

NUM_CPUS = 2
"""What the cluster has, whatever the machine has."""


@contextmanager
def local_ray() -> Iterator[None]:
    """Start Ray here, or use the one that is open; `run_job` uses it as it is."""
    import ray

    from rose_ray.config.cluster import RayConfig
    from rose_ray.distributed.session import worker_environment

    if ray.is_initialized():
        yield
        return
    ray.init(
        num_cpus=NUM_CPUS,
        include_dashboard=True,
        logging_level="ERROR",
        log_to_driver=False,
        runtime_env={"env_vars": worker_environment(RayConfig())},
    )
    try:
        yield
    finally:
        ray.shutdown()
