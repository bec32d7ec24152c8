"""The warm-up training on Ray Train's workers, which outlives any of them."""

from __future__ import annotations

import logging
import tempfile
import uuid
from dataclasses import replace
from typing import Any

import torch

from rose_ray.distributed.progress import shown_progress
from rose_ray.distributed.resume import find_state
from rose_ray.distributed.session import root_cause
from rose_ray.distributed.training import WarmupJob, WarmupTrainer
from rose_ray.errors import RoseError

logger = logging.getLogger(__name__)

_TRAIN_FOLDER = "ray_train"
_TRAINING_FILE = "training.json"
"""What rank 0 knows of every checkpoint; Ray Train hands metrics back only with a checkpoint of its own."""


def run_warmup(
    job: WarmupJob, *, cpus_per_worker: float, gpus_per_worker: float, events: list[str] | None = None
) -> list[dict[str, Any]]:
    """Train on ``job.warmup.workers`` workers and return an entry per checkpoint.

    An unfinished training of the same artefact goes on where it last saved its state. A group that loses a worker or
    its node is started again, ``warmup.max_restarts`` times at most; errors of ours and of files would only come again.

    Args:
        job: What to train.
        cpus_per_worker, gpus_per_worker: Resources.
        events: Told of every restart, for the closing summary.

    Each entry holds ``name``, ``mean_learning_rate``, ``loss`` (mean over the epoch's samples, nats) and ``files``.

    Raises:
        NonFiniteError: The loss became NaN or infinite.
        AlteredFileError: The state of an unfinished training was altered.
    """
    resources = {"CPU": cpus_per_worker} | ({"GPU": gpus_per_worker} if gpus_per_worker else {})
    with shown_progress("warm-up", "samples") as board:
        for restart in range(1, job.warmup.max_restarts + 2):
            _say_place(job)
            try:
                _fit(replace(job, board=board), resources)
                break
            except Exception as error:
                cause = root_cause(error)
                # A lost connection is an error of the operating system too, and a sign of a lost worker.
                lasting = isinstance(cause, RoseError | OSError) and not isinstance(cause, ConnectionError)
                if lasting or restart > job.warmup.max_restarts:
                    raise cause from error
                times = f"restart {restart} of {job.warmup.max_restarts}"
                lost = f"warm-up: its workers were lost ({_who_failed(cause)}); {times}"
                logger.warning(lost)
                if events is not None:
                    events.append(lost)
    checkpoints: list[dict[str, Any]] = job.workspace.read_json(f"{job.folder}/{_TRAINING_FILE}")
    return checkpoints


def _say_place(job: WarmupJob) -> None:
    saved = find_state(job.workspace, job.folder, job.samples_file)
    if saved is not None:
        epochs = len(saved.epochs)
        logger.info(
            f"warm-up: going on after {saved.num_updates:,} updates, {epochs} of {job.warmup.epochs} epochs done"
        )


def _who_failed(error: BaseException) -> str:
    failures: dict[int, BaseException] = getattr(error, "worker_failures", {})
    return ", ".join(f"{rank}: {type(each).__name__}" for rank, each in failures.items()) or type(error).__name__


def _fit(job: WarmupJob, resources: dict[str, float]) -> None:
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    with tempfile.TemporaryDirectory(prefix="rose-ray-train-") as storage:
        trainer = TorchTrainer(
            train_worker,
            train_loop_config={"job": job},
            scaling_config=ScalingConfig(
                num_workers=job.warmup.workers, use_gpu=job.device == "cuda", resources_per_worker=resources
            ),
            # Ray Train cannot tell errors that come again from lost workers, so `run_warmup` starts the next group.
            run_config=RunConfig(
                name=f"warmup-{uuid.uuid4().hex[:8]}",
                failure_config=FailureConfig(max_failures=0),
                **_train_storage(job, storage),
            ),
        )
        try:
            trainer.fit()
        finally:
            job.workspace.delete_folder(f"{job.folder}/{_TRAIN_FOLDER}")


def _train_storage(job: WarmupJob, local: str) -> dict[str, Any]:
    # Ray Train keeps its own small state beside the run. Several nodes need a place that all of them see.
    import ray

    if len([node for node in ray.nodes() if node["Alive"]]) == 1:
        return {"storage_path": local}
    root = job.workspace.location(f"{job.folder}/{_TRAIN_FOLDER}")
    return {"storage_path": root.path, "storage_filesystem": root.filesystem}


def train_worker(config: dict[str, Any]) -> None:
    """What each Ray Train worker runs: what is left of the training, one report per epoch."""
    import ray.train.torch

    job: WarmupJob = config["job"]
    context = ray.train.get_context()
    torch.set_num_threads(job.threads)
    if job.device == "cuda":
        torch.cuda.set_device(ray.train.torch.get_device())  # workers of one node see all of its GPUs
    trainer = WarmupTrainer(job, rank=context.get_world_rank(), num_workers=context.get_world_size())
    while len(trainer.epochs) < job.warmup.epochs:
        entry = trainer.train_epoch()
        ray.train.report({"epoch": len(trainer.epochs), "loss": entry["loss"]})
    if context.get_world_rank() == 0:
        job.workspace.write_json(f"{job.folder}/{_TRAINING_FILE}", trainer.epochs)
