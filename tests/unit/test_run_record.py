"""What a run leaves of itself, however it ends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rose_ray.config import parse_config
from rose_ray.distributed import run
from rose_ray.errors import ConfigError
from rose_ray.stores.runs import RUNNING, last_run
from rose_ray.stores.workspace import Workspace
from tests.distributed.tiny import tiny_content


def test_a_run_is_recorded_when_it_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    content = tiny_content(tmp_path, tmp_path / "workspace")
    found: list[Any] = []

    def interrupted(config: Any) -> None:
        found.append(last_run(Workspace.open(config.workspace)))
        raise ConfigError("stop")

    monkeypatch.setattr(run, "check_methods", interrupted)
    for override in ("lora.rank=4", "lora.rank=8"):
        with pytest.raises(ConfigError, match="stop"):
            run.run_job(parse_config(content, [override]))
        assert found[-1]["outcome"] == RUNNING and found[-1]["fencing_number"] == len(found)
        ended = last_run(Workspace.open(content["workspace"]))
        assert ended is not None and ended["outcome"] == "ConfigError: stop"
        assert ended["started_at"] == found[-1]["started_at"]
    assert len(Workspace.open(content["workspace"]).list_folder("runs")) == 2
    assert any(message.startswith("changed since the last run: lora.rank: 4 -> 8") for message in caplog.messages)


def test_what_a_killed_run_was_configured_with_is_compared_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    content = tiny_content(tmp_path, tmp_path / "workspace")

    def stopped(*arguments: Any) -> None:
        raise ConfigError("stop")

    monkeypatch.setattr(run, "check_methods", stopped)
    with monkeypatch.context() as killed, pytest.raises(ConfigError):
        killed.setattr(run, "_write_record", lambda *arguments: None)  # it does not get as far
        run.run_job(parse_config(content, ["lora.rank=4"]))
    with pytest.raises(ConfigError):
        run.run_job(parse_config(content, ["lora.rank=8"]))
    assert any(message.startswith("changed since the last run: lora.rank: 4 -> 8") for message in caplog.messages)
