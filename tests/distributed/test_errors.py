"""Errors come back from Ray's workers as they were raised."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import ray

from rose_ray.distributed.roll import called_roll
from rose_ray.distributed.run import run_job
from rose_ray.distributed.session import CarriedError, carried_errors, check_submitted, root_cause
from rose_ray.errors import AlteredFileError, ConfigError, DataError, PairError, ResourceError, RoseError, RowError
from rose_ray.filesystem import locate, write_bytes
from tests.distributed.tiny import tiny_job, write_inputs

pytestmark = pytest.mark.ray

ERRORS = [PairError("pairs a, b: equal sides"), RowError("not_json", "line 3"), AlteredFileError("x: 3 bytes")]


def raise_error(error: Exception) -> None:
    raise error


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_from_a_task(ray_cluster: None, error: RoseError) -> None:
    with pytest.raises(type(error)) as raised:
        ray.get(ray.remote(num_cpus=0)(raise_error).remote(error))
    cause = root_cause(raised.value)
    assert type(cause) is type(error) and str(cause) == str(error)


def test_a_lost_roll_hides_no_error_and_fails_no_work(ray_cluster: None) -> None:
    events: list[str] = []
    with pytest.raises(DataError, match="a bad row"), called_roll(1, events) as roll:
        ray.kill(roll)
        raise DataError("a bad row")
    with called_roll(1, events, "bank workers") as roll:
        ray.kill(roll)
    who = ("scoring actors", "bank workers")
    assert events == [f"{each}: not known whether any were lost (ActorDiedError)" for each in who]


def test_a_system_error_keeps_its_file_name(ray_cluster: None) -> None:
    error = FileNotFoundError(2, "No such file or directory", "some/file")
    with pytest.raises(FileNotFoundError) as raised:
        ray.get(ray.remote(num_cpus=0)(raise_error).remote(error))
    cause = root_cause(raised.value)
    assert isinstance(cause, FileNotFoundError)
    assert (cause.strerror, cause.filename) == ("No such file or directory", "some/file")


def test_a_submission_that_sets_what_is_set_here(monkeypatch: pytest.MonkeyPatch) -> None:
    own = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    check_submitted(own)
    submitted = {"runtime_env": {"env_vars": {"OMP_NUM_THREADS": "1", "HF_HOME": "/models"}}}
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps(submitted))
    check_submitted({"MKL_NUM_THREADS": "1"})
    with pytest.raises(ConfigError, match=r"submitted with OMP_NUM_THREADS among .*Submit without them"):
        check_submitted(own)


def test_carried_by_hand() -> None:
    with pytest.raises(CarriedError) as raised, carried_errors():
        raise ERRORS[0]
    assert root_cause(raised.value) is ERRORS[0]
    with pytest.raises(ZeroDivisionError), carried_errors():
        1 / 0  # noqa: B018 - a slip of ours keeps its traceback


def test_what_was_dealt_with_is_no_cause() -> None:
    try:
        try:
            raise FileNotFoundError(2, "No such file or directory", "looked for")
        except FileNotFoundError:
            raise KeyError("the real mistake") from None
    except KeyError as error:
        assert root_cause(error) is error


def test_a_failed_write_says_where(tmp_path: Path) -> None:
    (tmp_path / "file").mkdir()
    with pytest.raises(OSError) as raised:
        write_bytes(locate(str(tmp_path / "file")), b"1")
    assert raised.value.filename == str(tmp_path / "file")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_nodes_that_do_not_come_are_waited_for_only_so_long(ray_cluster: None, tmp_path: Path) -> None:
    write_inputs(tmp_path)
    settings = ["ray.actors=50", "ray.autoscale_seconds=0.1"]
    config = tiny_job(tmp_path, tmp_path / "workspace", settings)
    message = r"50 actors of 0\.5 CPU.*do not fit.*No more came within the 0\.1 s of ray\.autoscale_seconds"
    with pytest.raises(ResourceError, match=message):
        run_job(config)
