"""One local Ray for all tests that need one: starting it, and what its workers import, is what costs."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.distributed.fork_server import fork_server

NUM_CPUS = 2
"""What the cluster has, whatever the machine has."""
_KEEP_IDLE_WORKERS = {"num_workers_soft_limit": 12, "idle_worker_killing_time_threshold_ms": 600_000}
"""Between two runs of a test session workers wait instead of ending: importing torch is most of a small run."""


@contextmanager
def local_ray() -> Iterator[None]:
    """Start Ray here, or use the one that is open; `run_job` uses it as it is."""
    import ray

    from rose_ray.config.cluster import RayConfig
    from rose_ray.distributed.session import worker_environment

    if ray.is_initialized():
        yield
        return
    environ = worker_environment(RayConfig())
    with tempfile.TemporaryDirectory() as folder, fork_server(Path(folder), environ) as worker_command:
        ray.init(
            num_cpus=NUM_CPUS,
            include_dashboard=True,
            logging_level="ERROR",
            log_to_driver=False,
            _system_config=_KEEP_IDLE_WORKERS,
            runtime_env={"env_vars": environ, "py_executable": worker_command},
        )
        try:
            yield
        finally:
            ray.shutdown()
