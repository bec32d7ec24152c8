"""The one ``ray.init``, and making sense of errors that come back through Ray."""

from __future__ import annotations

import json
import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import ray

from rose_ray.config.cluster import RayConfig
from rose_ray.errors import ConfigError, ResourceError, RoseError
from rose_ray.failpoints import failpoint_environment


def is_verbose() -> bool:
    """Whether Ray's own messages are wanted: ``--verbose`` sets our logger to DEBUG. Ray resets its own at import."""
    return logging.getLogger("rose_ray").isEnabledFor(logging.DEBUG)


@contextmanager
def ray_session(config: RayConfig) -> Iterator[None]:
    """Join the cluster that ``config.address`` names, or start one here; leave it as it was found.

    A session that is open already is used as it is.

    Raises:
        ResourceError: There is no cluster at that address.
        ConfigError: The job was submitted with variables that are set here.
    """
    if ray.is_initialized():
        yield
        return
    warnings.filterwarnings("ignore", category=FutureWarning, module="ray")
    verbose = is_verbose()
    if not verbose:
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # read when Ray's native part starts in this process
    address = None if config.address == "local" else config.address
    environment = worker_environment(config)
    check_submitted(environment)
    try:
        ray.init(
            address="local" if address is None else address,
            include_dashboard=True if address is None else None,  # Ray Train asks its state API
            logging_level=logging.INFO if verbose else logging.ERROR,
            log_to_driver=verbose,  # workers' lines are in Ray's logs; errors come back as exceptions
            runtime_env={"env_vars": environment},
        )
    except (ConnectionError, RuntimeError) as error:
        raise ResourceError(
            f"ray.address: no Ray cluster at {config.address!r} ({error}). "
            "Start one (`ray start --head`), or set ray.address to local."
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


def worker_environment(config: RayConfig) -> dict[str, str]:
    """Environment of every worker: thread counts are fixed, since they decide the last bits of a sum."""
    threads = str(config.threads_per_actor)
    return {
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "TOKENIZERS_PARALLELISM": "false",
        "DS_ACCELERATOR": "cuda" if config.gpus_per_actor else "cpu",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "PYTHONWARNINGS": os.environ.get("PYTHONWARNINGS", "ignore::FutureWarning"),
        **failpoint_environment(),
    }


def check_submitted(environment: Mapping[str, str]) -> None:
    """Refuse a job that was submitted with variables of the workers' own: Ray merges the two only where they differ.

    Raises:
        ConfigError: The variables are named.
    """
    submitted = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")).get("runtime_env") or {}
    clash = sorted(set(submitted.get("env_vars") or {}) & set(environment))
    if clash:
        raise ConfigError(
            f"the job was submitted with {', '.join(clash)} among the env_vars of its runtime environment. rose_ray "
            "sets these for its workers itself (threads: ray.threads_per_actor). Submit without them."
        )


class CarriedError(Exception):
    """Holds an error on its way through Ray Data, which adds advice of its own to the text of what passes."""

    cause: BaseException


@contextmanager
def carried_errors() -> Iterator[None]:
    """Around what Ray Data calls: errors of ours and of the operating system reach `root_cause` as they are."""
    try:
        yield
    except (RoseError, OSError) as error:
        carrier = CarriedError()
        carrier.cause = error
        raise carrier from error


def root_cause(error: BaseException) -> BaseException:
    """Return what lies under Ray's wrappers: an error of ours, else one of the operating system, else ``error``."""
    seen: set[int] = set()
    system_error: OSError | None = None
    waiting: list[BaseException] = [error]
    while waiting:
        current = waiting.pop()
        if id(current) in seen:
            continue
        seen.add(id(current))
        if isinstance(current, RoseError) and not _is_wrapper(current):
            return current
        # Only what a wrapper names as its cause: a context may hold errors that were dealt with.
        cause = getattr(current, "cause", None)
        system_error = cause if isinstance(cause, OSError) and not _is_wrapper(cause) else system_error
        failures = getattr(current, "worker_failures", None)
        nested = [cause, current.__cause__, current.__context__]
        nested += list(failures.values()) if isinstance(failures, dict) else []
        waiting += [each for each in nested if isinstance(each, BaseException)]
    return system_error or error


@contextmanager
def unwrapped_errors() -> Iterator[None]:
    """Around work on Ray: errors of ours and of the operating system come out of it as they are."""
    try:
        yield
    except BaseException as error:
        cause = root_cause(error)
        raise (cause if isinstance(cause, RoseError | OSError) else error) from None


def _is_wrapper(error: BaseException) -> bool:
    # Ray raises a class made of its own and the cause's, which holds a traceback in place of the message.
    return hasattr(error, "as_instanceof_cause")
