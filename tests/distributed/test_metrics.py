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

from rose_ray.distributed.metrics import COUNTERS, GAUGES, exported_names
from tests.distributed import tiny
from tests.distributed.conftest import FinishedJob

BOARD = Path(__file__).parents[2] / "cluster" / "grafana" / "rose-ray.json"
EXPORT_SECONDS = 60
"""Ray reports every few seconds."""


def scraped() -> dict[str, dict[str, float]]:
    """Return our samples: name to label to the sum over workers."""
    found: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for node in ray.nodes():
        url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
        with urllib.request.urlopen(url, timeout=10) as response:
            text = response.read().decode()
        for name, labels, value in re.findall(r"^(ray_rose_ray_\w+)\{(.*)\} (\S+)$", text, re.MULTILINE):
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
