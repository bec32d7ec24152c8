"""How many actors work, and whether they fit the cluster."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import ray

from rose_ray.distributed.actors import ScoringActor
from rose_ray.distributed.job import Job
from rose_ray.distributed.resources import Node, check_resources
from rose_ray.distributed.run import run_job
from rose_ray.distributed.tokens import tokenize_task
from rose_ray.errors import ResourceError
from rose_ray.stages.pool import skipped_rows
from tests.distributed.conftest import FinishedJob
from tests.distributed.reading import digests, made_stages, manifests, opened
from tests.distributed.session import NUM_CPUS
from tests.distributed.tiny import tiny_job


@pytest.mark.ray
def test_two_actors_make_the_bytes_of_one(finished: FinishedJob, copied: Path) -> None:
    pool, warmup = finished.result.pool, finished.result.warmup
    assert pool is not None and warmup is not None
    for stage in ("features", "scores"):
        shutil.rmtree(copied / stage)
    config = tiny_job(finished.inputs, copied)
    job = Job(opened(copied), config)
    (features,) = job.feature_sets(warmup).values()
    spec = job.spec(warmup, 512, [features.spec])
    skipped = skipped_rows(job.workspace, pool)
    actors = [job.actor(ScoringActor, spec) for _ in range(2)]
    done = []
    for number, entry in enumerate(pool.facts["shards"]):  # in turns, so that both have worked
        row = {"shard": entry["shard"], "skipped": skipped.get(entry["shard"], []), "spaces": [0]}
        tokens = tokenize_task(row, spec.workspace, spec.model, pool)
        batch = {key: np.array([value, None], dtype=object)[:1] for key, value in tokens.items()}
        done.append(actors[number % 2].__call__.remote(batch))
    ray.get(done)
    for actor in actors:
        ray.kill(actor)
    assert len({manifest.facts["pid"] for manifest in manifests(copied, "features")}) == 2
    result = run_job(config)
    assert made_stages(result.stages) == ["score alpha", "score beta"]
    for stage in ("features", "scores"):
        one, two = (
            {path: digest for path, digest in digests(workspace, stage).items() if path.endswith(".parquet")}
            for workspace in (finished.workspace, copied)
        )
        assert one == two and one


IMPOSSIBLE = {
    "ray.actors=64": "ray.actors: 64 actors .* the cluster has 1 node.*2 CPU and 0 GPU in all, room for 4",
    "ray.cpus_per_actor=8": "actors of 8 CPU .* room for 0",
    "ray.gpus_per_actor=1": "1 GPU do not fit",
    "ray.cpus_per_task=4": "ray.cpus_per_task: 4 CPU fit no node",
    "ray.cpus_per_actor=2": "no room for a reading task of 0.25 CPU",
    "warmup.workers=9": "warmup.workers: 9 workers",
}


@pytest.mark.ray
@pytest.mark.parametrize("override", IMPOSSIBLE)
def test_more_than_the_cluster_has_is_refused_at_once(
    ray_cluster: None, inputs: Path, tmp_path: Path, override: str
) -> None:
    with pytest.raises(ResourceError, match=IMPOSSIBLE[override]):
        run_job(tiny_job(inputs, tmp_path / "workspace", [override]))
    assert not (tmp_path / "workspace" / "ingest").exists()


@pytest.mark.parametrize(
    ("overrides", "nodes", "message"),
    [
        (["ray.actors=4", "ray.cpus_per_actor=3"], [Node(8, 0), Node(8, 0)], None),
        (["ray.actors=5", "ray.cpus_per_actor=3"], [Node(8, 0), Node(8, 0)], "room for 4"),  # no actor spans nodes
        (["ray.cpus_per_task=3"], [Node(NUM_CPUS, 0)] * 4, "fit no node"),  # nor does a task
        (["ray.actors=2", "ray.gpus_per_actor=0.5"], [Node(4, 1)], None),
        (["ray.actors=3", "ray.gpus_per_actor=0.5"], [Node(4, 1), Node(4, 0)], "room for 2"),
        (["ray.cpus_per_actor=1"], [], "0 node"),
        (["ray.actors=2", "ray.cpus_per_actor=0.8"], [Node(1, 0)] * 2, "no room for a reading task"),  # crumbs
        (["warmup={adapters: [a]}", "gradients.adam=sgd"], [Node(1, 0)], None),  # nothing is trained
    ],
)
def test_what_fits_which_nodes(overrides: list[str], nodes: list[Node], message: str | None) -> None:
    config = tiny_job(Path("unused"), "unused", overrides)
    if message is None:
        check_resources(config, nodes)
    else:
        with pytest.raises(ResourceError, match=message):
            check_resources(config, nodes)
