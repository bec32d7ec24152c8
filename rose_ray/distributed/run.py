"""The job: stages in order, each found in the workspace or computed on the cluster.

Every artefact has a key made from what goes into it, so finding one is all that "already done" means: a second run does
nothing, a new target computes its bank and scores, a changed setting computes beside what exists.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence

from rose_ray.config.changes import changed_keys, recomputed_stages
from rose_ray.config.job import JobConfig
from rose_ray.data.preferences import PreferencePair
from rose_ray.distributed.bank import ModelActor, batch_budget, make_banks, make_bases
from rose_ray.distributed.checkpoints import pin_warmup, warm_up
from rose_ray.distributed.features import make_features, missing_features
from rose_ray.distributed.ingest import ingest
from rose_ray.distributed.job import Job, RunResult
from rose_ray.distributed.methods import check_methods, make_row_states, score_by_methods
from rose_ray.distributed.reduce import make_scores, make_selections
from rose_ray.distributed.resources import NodeLosses, granted_resources, release_resources
from rose_ray.distributed.session import ray_session, root_cause
from rose_ray.distributed.spaces import check_sign_vectors
from rose_ray.errors import RoseError
from rose_ray.methods.registry import needs_of
from rose_ray.model.tokenizer import with_absolute_paths
from rose_ray.stages.clean import check_test_text
from rose_ray.stages.selection_check import check_selections
from rose_ray.stages.target_pairs import read_target_pairs
from rose_ray.stores.lease import abandoned_before, opened
from rose_ray.stores.leftovers import sweep_shared
from rose_ray.stores.manifest import Manifest
from rose_ray.stores.runs import RUNNING, last_run, write_run
from rose_ray.stores.workspace import Workspace

logger = logging.getLogger(__name__)

STAGES = ("ingest", "warmup", "bank", "features", "score", "select")


def run_job(
    config: JobConfig,
    *,
    stages: Collection[str] = STAGES,
    new_warmup: bool = False,
    check_pool: Callable[[Manifest], None] | None = None,
) -> RunResult:
    """Run a job, computing what the workspace does not hold yet.

    Args:
        config: The checked configuration. Relative paths start at the working directory.
        stages: Which of ``STAGES`` to run; what one of them needs must be among them.
        new_warmup: Choose the warm-up's rows from today's pool instead of keeping the pinned warm-up.
        check_pool: Raises where the caller cannot use this pool, before anything is computed from it.

    Raises:
        RoseError: Whatever is wrong with configuration, data, model, workspace or cluster.
        OSError: A file cannot be read or written, for instance because the disk is full.
    """
    with opened(config.workspace, config.lease.term, create=True) as workspace:
        return _run_held(workspace, config, stages, new_warmup, check_pool)


def _run_held(
    workspace: Workspace,
    config: JobConfig,
    stages: Collection[str],
    new_warmup: bool,
    check_pool: Callable[[Manifest], None] | None,
) -> RunResult:
    _say_changes(workspace, config)
    # Written now as well: of a run that is killed, the next one has to know the configuration.
    path = write_run(workspace, config.model_dump(mode="json"), [], RUNNING)
    job = Job(workspace, config.model_copy(update={"model": with_absolute_paths(config.model)}))
    if (before_us := abandoned_before(workspace)) is not None:
        job.result.events.append(f"lease taken over from a run that did not end: {before_us}")
    try:
        check_methods(job.config)
        sweep_shared(workspace)
        with ray_session(config.ray), granted_resources(config):
            losses = NodeLosses()
            try:
                _run(job, losses, stages, new_warmup, check_pool)
            finally:
                _tell_losses(job, losses)
    except BaseException as error:
        cause = root_cause(error)
        try:
            _write_record(job, config, f"{type(cause).__name__}: {cause}", path)
        except (OSError, RoseError) as failure:  # a full disk, for instance: what ended the run matters more
            logger.warning(f"the record of this run cannot be written: {failure}")
        raise (cause if isinstance(cause, RoseError | OSError) else error) from None
    _write_record(job, config, "finished", path)
    return job.result


def _write_record(job: Job, config: JobConfig, outcome: str, path: str) -> None:
    result = job.result
    write_run(job.workspace, config.model_dump(mode="json"), result.stages, outcome, result.events, path=path)


def _tell_losses(job: Job, losses: NodeLosses) -> None:
    job.result.events += [f"node lost: {node}" for node in losses.lost()]


def _say_changes(workspace: Workspace, config: JobConfig) -> None:
    previous = last_run(workspace)
    if previous is None:
        return
    for key, (old, new) in changed_keys(previous["config"], config.model_dump(mode="json")).items():
        stages = recomputed_stages(key)
        what = f"computes {', '.join(stages)} beside what exists" if stages else "computes nothing again"
        logger.info(f"changed since the last run: {key}: {old!r} -> {new!r}; {what}")


def _run(
    job: Job,
    losses: NodeLosses,
    stages: Collection[str],
    new_warmup: bool,
    check_pool: Callable[[Manifest], None] | None,
) -> None:
    job.check_offload()
    needs = needs_of(job.config)
    pool = ingest(job)
    if "warmup" not in stages:
        return
    check_selections(job.config, pool.facts["sources"])
    if check_pool is not None:
        check_pool(pool)
    # Read now what is needed later: a bad pair is said before GPUs are spent.
    pairs = {target.name: read_target_pairs(target) for target in job.config.targets}
    check_test_text(job.config)
    if job.config.gradient_targets:
        check_sign_vectors(job.config, job.identity.layout)
    warmup = warm_up(job, pool, new_warmup) if needs.warmup else None
    if warmup is not None and job.config.gradient_targets:
        _make_features(job, pool, warmup, pairs, stages)
    if "score" in stages:
        score_by_methods(job, pool, warmup, pairs, with_model=True)
    if "select" in stages:
        make_row_states(job, pool)
    _tell_losses(job, losses)  # before idle nodes may go, which is no loss
    losses.idle_may_go = release_resources(job.config)
    if "score" in stages:
        if warmup is not None:
            make_scores(job, pool, warmup)
        score_by_methods(job, pool, warmup, pairs, with_model=False)
    if warmup is not None and new_warmup:
        pin_warmup(job, pool, warmup)
    if "select" in stages:
        make_selections(job, pool, pairs)


def _make_features(
    job: Job,
    pool: Manifest,
    warmup: Manifest,
    pairs: Mapping[str, Sequence[PreferencePair]],
    stages: Collection[str],
) -> None:
    actor = ModelActor(job, warmup)
    try:
        if "bank" in stages or "features" in stages:
            make_bases(job, warmup, pairs, actor)
        if "bank" in stages:
            make_banks(job, warmup, pairs, actor)
        missing = missing_features(job, pool, warmup) if "features" in stages else {}
        budget = batch_budget(job, warmup, actor) if missing else 0
    finally:
        actor.stop()
    if "features" in stages:
        make_features(job, pool, warmup, missing, budget)
