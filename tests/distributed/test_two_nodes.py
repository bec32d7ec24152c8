"""Two real nodes make the tables that one makes."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from tests.chaos.disturbed import finish, real_cluster, tables
from tests.distributed.conftest import FinishedJob, copy_up_to_warmup
from tests.distributed.tiny import tiny_content

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def test_an_actor_on_each_of_two_nodes_makes_the_tables_of_one(finished: FinishedJob, tmp_path: Path) -> None:
    workspace, config = tmp_path / "workspace", tmp_path / "job.yaml"
    copy_up_to_warmup(finished, workspace)
    content = tiny_content(finished.inputs, workspace)
    with real_cluster() as cluster:
        cluster.add_node(num_cpus=1)
        # Three quarters of a node's processor: no node has room for both.
        content["ray"] = {"address": cluster.address, "actors": 2, "cpus_per_actor": 0.75}
        config.write_text(yaml.safe_dump(content), encoding="utf-8")
        finish(config)
    assert tables(workspace) == tables(finished.workspace)
