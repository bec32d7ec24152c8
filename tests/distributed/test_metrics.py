"""What Prometheus sees of a run, read from the node's own exporter."""

from __future__ import annotations

import json
import re
import time
import urllib.request
from collections import defaultdict
from pathlib import Path

import pytest
import ray

from rose_ray.distributed.metrics import COUNTERS, GAUGES, count_shard, exported_names
from tests.distributed import tiny
from tests.distributed.conftest import FinishedJob

BOARD = Path(__file__).parents[2] / "cluster" / "grafana" / "rose-ray.json"
EXPORT_SECONDS = 60
"""Ray reports every few seconds."""


def scraped(worker: str = "") -> dict[str, dict[str, float]]:
    """Return our samples, of all workers or of one: name to label to the sum over workers."""
    found: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for node in ray.nodes():
        url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
        with urllib.request.urlopen(url, timeout=10) as response:
            text = response.read().decode()
        for name, labels, value in re.findall(r"^(ray_rose_ray_\w+)\{(.*)\} (\S+)$", text, re.MULTILINE):
            if worker and f'WorkerId="{worker}"' not in labels:
                continue
            own = re.search(r'(?:outcome|phase|stage)="([^"]*)"', labels)
            found[name][own[1] if own else ""] += float(value)
    return found


@pytest.mark.ray
def test_counters_are_those_of_the_run(finished: FinishedJob) -> None:
    scored = sum(stage.counts["scored"] for stage in finished.result.stages if stage.stage == "features")
    deadline = time.monotonic() + EXPORT_SECONDS
    while (found := scraped())["ray_rose_ray_rows_total"].get("scored", 0) < scored:
        assert time.monotonic() < deadline, dict(found)
        time.sleep(1)
    # Other tests of the session may have scored rows of their own, so these are bounds.
    assert set(found) <= set(exported_names())
    assert found["ray_rose_ray_rows_total"]["rejected"] >= 1
    assert found["ray_rose_ray_gradient_passes_total"][""] >= scored * tiny.NUM_EPOCHS
    assert found["ray_rose_ray_tokens_total"][""] >= scored
    assert {"tokenise", "load", "compute", "write", "idle"} <= set(found["ray_rose_ray_phase_seconds_total"])
    assert {"ingest", "warmup", "bank", "features", "score", "select"} <= set(found["ray_rose_ray_stage_seconds"])


@pytest.mark.ray
def test_a_shard_s_counts_are_exported_to_the_unit(ray_cluster: None) -> None:
    counts = {"rows": 30, "scored": 27, "rejected": 3}
    facts = {"num_tokens": 1000, "num_halvings": 2, "load_seconds": 0.25, "compute_seconds": 1.5}
    expected = {
        ("ray_rose_ray_rows_total", "scored"): 54,
        ("ray_rose_ray_rows_total", "rejected"): 6,
        ("ray_rose_ray_tokens_total", ""): 2000,
        ("ray_rose_ray_gradient_passes_total", ""): 54 * 4,
        ("ray_rose_ray_batch_halvings_total", ""): 4,
        ("ray_rose_ray_phase_seconds_total", "load"): 0.5,
        ("ray_rose_ray_phase_seconds_total", "compute"): 3.0,
        ("ray_rose_ray_phase_seconds_total", "write"): 1.0,
    }

    # An environment of its own makes it a process of its own, which counts nothing else.
    @ray.remote(num_cpus=0.25, runtime_env={"env_vars": {"ROSE_RAY_TEST": "metrics"}})
    def count_two() -> str:
        for _ in range(2):
            count_shard(counts, facts, 4, 0.5)
        return str(ray.get_runtime_context().get_worker_id())

    worker = ray.get(count_two.remote())
    deadline = time.monotonic() + EXPORT_SECONDS
    while len(found := scraped(worker)) < len(COUNTERS) and time.monotonic() < deadline:
        time.sleep(1)
    assert {(name, own): value for name, values in found.items() for own, value in values.items()} == expected


def test_the_board_asks_for_names_that_are_exported() -> None:
    board = json.loads(BOARD.read_text())
    asked = set(re.findall(r"ray_rose_ray_\w+", BOARD.read_text()))
    assert asked == set(exported_names())
    assert len(exported_names()) == len(COUNTERS) + len(GAUGES)
    ids = [panel["id"] for panel in board["panels"]]
    assert len(ids) == len(set(ids))
    known = {label for _, labels in (*COUNTERS.values(), *GAUGES.values()) for label in labels}
    used = set(re.findall(r"(\w+)(?:!=|=)\\\"", BOARD.read_text())) - {"JobId"}
    assert used <= known
