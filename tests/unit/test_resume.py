"""The state of an unfinished training: whole or the one before, and never another training's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from rose_ray.config import parse_config
from rose_ray.distributed.resume import find_state, forget_state, read_tensors, save_state
from rose_ray.errors import AlteredFileError, ConfigError
from rose_ray.stores.workspace import FileRecord, Workspace

FOLDER = "warmup/abc"
SAMPLES = FileRecord("warmup/abc/samples.parquet", 3, "f" * 64)


def tensors(value: float) -> dict[str, dict[str, torch.Tensor]]:
    return {kind: {"a.b.weight": torch.full((2, 3), value)} for kind in ("adapter", "exp_avg", "exp_avg_sq")}


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace.open(str(tmp_path / "workspace"), create=True)


def save(workspace: Workspace, num_updates: int, epochs: list[dict[str, Any]] | None = None) -> None:
    save_state(workspace, FOLDER, SAMPLES, tensors(num_updates), num_updates, 0.1 + 0.2, epochs or [])


def test_the_newest_state_is_found_whole_and_alone(workspace: Workspace) -> None:
    assert find_state(workspace, FOLDER, SAMPLES) is None
    save(workspace, 3)
    checkpoint = workspace.write(f"{FOLDER}/checkpoint-1/adapter", b"1234")
    save(workspace, 7, [{"name": "checkpoint-1", "files": [checkpoint.__dict__]}])
    state = find_state(workspace, FOLDER, SAMPLES)
    assert state is not None and (state.num_updates, state.loss_sum) == (7, 0.1 + 0.2)
    assert state.epochs[0]["name"] == "checkpoint-1"
    found = read_tensors(workspace, state)
    for kind, named in tensors(7).items():
        assert found[kind].keys() == named.keys() and torch.equal(found[kind]["a.b.weight"], named["a.b.weight"])
    names = [path.rsplit("/", 1)[-1] for path in workspace.list_folder(f"{FOLDER}/resume")]
    assert names == ["latest.json", "update-7"]
    forget_state(workspace, FOLDER)
    assert find_state(workspace, FOLDER, SAMPLES) is None
    assert workspace.list_folder(FOLDER) == [f"{FOLDER}/checkpoint-1"]


def test_a_state_that_is_not_yet_pointed_to_counts_for_nothing(workspace: Workspace) -> None:
    save(workspace, 3)
    workspace.write(f"{FOLDER}/resume/update-4/state.safetensors", b"cut sh")
    state = find_state(workspace, FOLDER, SAMPLES)
    assert state is not None and state.num_updates == 3


def test_other_samples_start_anew(workspace: Workspace) -> None:
    save(workspace, 3)
    assert find_state(workspace, FOLDER, FileRecord(SAMPLES.path, 3, "e" * 64)) is None


def test_altered_states_are_refused(workspace: Workspace) -> None:
    checkpoint = workspace.write(f"{FOLDER}/checkpoint-1/adapter", b"1234")
    save(workspace, 3, [{"files": [checkpoint.__dict__]}])
    state = find_state(workspace, FOLDER, SAMPLES)
    assert state is not None
    workspace.write(state.file.path, bytes(state.file.num_bytes))
    with pytest.raises(AlteredFileError, match=r"state\.safetensors: .*differ from"):
        read_tensors(workspace, state)
    workspace.write(state.file.path, b"short")
    with pytest.raises(AlteredFileError, match=r"state\.safetensors: missing or cut short.*Delete warmup/abc"):
        find_state(workspace, FOLDER, SAMPLES)
    save(workspace, 3, [{"files": [checkpoint.__dict__]}])
    workspace.delete_folder(f"{FOLDER}/checkpoint-1")
    with pytest.raises(AlteredFileError, match=r"checkpoint-1/adapter: missing"):
        find_state(workspace, FOLDER, SAMPLES)
    workspace.write_json(f"{FOLDER}/resume/latest.json", {"num_updates": 3})
    with pytest.raises(AlteredFileError, match=r"latest\.json: not the place of a training"):
        find_state(workspace, FOLDER, SAMPLES)


def test_packed_weights_are_not_cut_up() -> None:
    content = {
        "workspace": "w",
        "model": {"base": "b", "quantized": "nf4"},
        "pool": {"inputs": [{"files": ["f"]}]},
        "targets": [{"name": "t", "pairs": [{"files": ["p"]}]}],
        "warmup": {"zero_stage": 3},
    }
    with pytest.raises(ConfigError, match=r"warmup\.zero_stage: 3 would partition the packed weights"):
        parse_config(content, [])
