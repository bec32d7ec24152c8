"""The ingest stage on Ray: a task per file, one more to settle duplicates among them."""

from __future__ import annotations

import time

import ray

from rose_ray.distributed.job import Job
from rose_ray.filesystem import expand
from rose_ray.stages.ingest import IngestSettings, PoolFile, ingest_file, ingest_made_from
from rose_ray.stages.pool import say_files, settle_pool
from rose_ray.stores.manifest import Manifest, artefact_key


def ingest(job: Job) -> Manifest:
    """Read every file of the pool, each in a task of its own, and settle duplicates among them."""
    started = time.monotonic()
    pool = job.config.pool
    files = [
        PoolFile(location, entry.format, entry.source, entry.source_field)
        for entry in pool.inputs
        for location in expand(entry.files)
    ]
    settings = IngestSettings(pool.shard_rows, pool.sample_fraction, pool.sample_seed)
    known = set(job.workspace.list_folder("pool"))
    # Files of the same bytes share an artefact; one task makes it, or two would write over each other.
    contents = ray.get([job.task(ingest_made_from, file, settings) for file in files])
    keys = [artefact_key(content) for content in contents]
    first = {key: file for key, file in reversed(list(zip(keys, files, strict=True)))}
    made = ray.get([job.task(ingest_file, job.workspace, file, settings) for file in first.values()])
    by_key = dict(zip(first, made, strict=True))
    manifests: list[Manifest] = [by_key[key] for key in keys]
    settled: Manifest = ray.get(job.task(settle_pool, job.workspace, manifests))
    say_files(job.workspace, settled, [file.location.name for file in files], manifests)  # tasks log where nobody looks
    job.result.pool = settled
    job.note("ingest", settled, started, reused=settled.folder in known)
    return settled
