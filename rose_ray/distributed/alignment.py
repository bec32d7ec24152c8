"""A bank of held-out pairs, made as any target's bank is."""

from __future__ import annotations

from collections.abc import Sequence

from rose_ray.config.job import JobConfig
from rose_ray.config.target import TargetConfig
from rose_ray.data.preferences import PreferencePair
from rose_ray.distributed.run import run_job
from rose_ray.stages.diagnose.stored import StoredBank, find_bank, needed_bank
from rose_ray.stores.workspace import Workspace


def held_out_banks(
    config: JobConfig,
    targets: tuple[TargetConfig, TargetConfig],
    pairs: tuple[Sequence[PreferencePair], Sequence[PreferencePair]],
) -> tuple[StoredBank, StoredBank]:
    """Return the banks of a target and of its held-out pairs, computing what is missing, and what that needs.

    Args:
        config: Of the job.
        targets: The target, and the one whose pairs are held out.
        pairs: Theirs.

    Raises:
        RoseError: Whatever a run may raise.
    """
    workspace = Workspace.open(config.workspace, create=True)
    if any(isinstance(find_bank(workspace, config, *each), str) for each in zip(targets, pairs, strict=True)):
        job = config.model_copy(update={"targets": list(targets), "training_set": None})
        run_job(job, stages={"ingest", "warmup", "bank"})
    own, held_out = (needed_bank(workspace, config, *each) for each in zip(targets, pairs, strict=True))
    return own, held_out
