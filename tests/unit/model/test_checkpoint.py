"""Checkpoints on disk: written, read back, and refused where they belong elsewhere."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch

from rose_ray.errors import ModelError, StoreError
from rose_ray.filesystem import locate
from rose_ray.model.checkpoint import (
    ADAPTER_CONFIG_FILE,
    ADAPTER_FILE,
    MOMENTS_FILE,
    STATE_FILE,
    OptimizerState,
    adapter_digest,
    check_adapter_config,
    moments_bytes,
    read_checkpoint,
    state_json,
)
from rose_ray.model.layout import ParameterLayout

LAYOUT = ParameterLayout((("layer.lora_A.weight", (2, 3)), ("layer.lora_B.weight", (3, 2))))
STATE = OptimizerState(12, 1.5e-5, 0.9, 0.999, 1e-8, 1.0, 3)


def _tensors(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in LAYOUT.shapes}


def _folder(path: Path, *, moments: bool = True) -> Path:
    path.mkdir()
    safetensors.torch.save_file(_tensors(0), path / ADAPTER_FILE)
    if moments:
        (path / MOMENTS_FILE).write_bytes(moments_bytes(_tensors(1), _tensors(2)))
        (path / STATE_FILE).write_text(json.dumps(state_json(STATE)))
    return path


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    checkpoint = read_checkpoint(locate(str(_folder(tmp_path / "checkpoint-3"))), LAYOUT)
    assert checkpoint.name.endswith("checkpoint-3") and checkpoint.state == STATE
    assert checkpoint.exp_avg is not None and checkpoint.exp_avg_sq is not None
    for seed, found in enumerate((checkpoint.adapter, checkpoint.exp_avg, checkpoint.exp_avg_sq)):
        assert found.keys() == dict(LAYOUT.shapes).keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in _tensors(seed).items())


def test_moments_may_be_views_of_larger_tensors(tmp_path: Path) -> None:
    folder = _folder(tmp_path / "c")
    transposed = {name: torch.randn(shape[::-1]).T for name, shape in LAYOUT.shapes}
    (folder / MOMENTS_FILE).write_bytes(moments_bytes(transposed, transposed))
    found = read_checkpoint(locate(str(folder)), LAYOUT).exp_avg
    assert found is not None and all(torch.equal(found[name], tensor) for name, tensor in transposed.items())


def test_an_adapter_may_come_without_moments(tmp_path: Path) -> None:
    checkpoint = read_checkpoint(locate(str(_folder(tmp_path / "c", moments=False))), LAYOUT)
    assert (checkpoint.exp_avg, checkpoint.exp_avg_sq, checkpoint.state) == (None, None, None)


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    folder = _folder(tmp_path / "c")
    other = ParameterLayout((("layer.lora_A.weight", (4, 3)), ("layer.lora_B.weight", (3, 2))))
    with pytest.raises(ModelError, match=r"lora_A.weight has shape \(2, 3\), this model needs \(4, 3\)"):
        read_checkpoint(locate(str(folder)), other)
    (folder / MOMENTS_FILE).write_bytes(moments_bytes(_tensors(1), {"layer.lora_A.weight": torch.zeros(2, 3)}))
    with pytest.raises(ModelError, match=r"moments.safetensors \(second moments\) is not an adapter of this model"):
        read_checkpoint(locate(str(folder)), LAYOUT)


def test_missing_and_unreadable_files_are_named(tmp_path: Path) -> None:
    folder = _folder(tmp_path / "c")
    (folder / ADAPTER_FILE).write_bytes(b"not tensors")
    with pytest.raises(StoreError, match=r"adapter_model.safetensors: not a readable safetensors file"):
        read_checkpoint(locate(str(folder)), LAYOUT)
    (folder / ADAPTER_FILE).unlink()
    for read in (lambda where: read_checkpoint(where, LAYOUT), adapter_digest):
        with pytest.raises(StoreError, match=r"adapter_model.safetensors: no such file"):
            read(locate(str(folder)))


def test_the_digest_stands_for_weights_and_moments(tmp_path: Path) -> None:
    first, same, bare = (_folder(tmp_path / name, moments=name != "bare") for name in ("first", "same", "bare"))
    digests = [adapter_digest(locate(str(folder))) for folder in (first, same, bare)]
    assert digests[0] == digests[1] != digests[2]
    (same / MOMENTS_FILE).write_bytes(moments_bytes(_tensors(1), _tensors(7)))
    safetensors.torch.save_file(_tensors(9), bare / ADAPTER_FILE)
    changed = [adapter_digest(locate(str(folder))) for folder in (same, bare)]
    assert len({*digests, *changed}) == 4
    (first / STATE_FILE).write_text("{}")  # numbers that change no direction's space
    assert adapter_digest(locate(str(first))) == digests[0]


def test_moments_need_the_numbers_of_their_optimizer(tmp_path: Path) -> None:
    folder = _folder(tmp_path / "c")
    (folder / STATE_FILE).write_text('{"num_updates": 3}')
    with pytest.raises(StoreError, match=r"optimizer_state\.json: not the numbers of an optimizer"):
        read_checkpoint(locate(str(folder)), LAYOUT)
    (folder / STATE_FILE).unlink()
    with pytest.raises(StoreError, match=r"optimizer_state\.json: no such file, but moments\.safetensors beside it"):
        read_checkpoint(locate(str(folder)), LAYOUT)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"r": 4}, r"r is 4, expected 2"),
        ({"lora_alpha": 16}, r"lora_alpha is 16, expected 8.0"),
        ({"peft_type": "LOHA"}, r"peft_type is 'LOHA', expected 'LORA'"),
        ({"target_modules": ["q_proj"]}, r"target_modules is \['q_proj'\]"),
        ({"use_rslora": True}, r"use_rslora is True"),
        ({"rank_pattern": {"q_proj": 7}}, r"rank_pattern is"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save is"),
    ],
)
def test_adapters_with_other_settings_are_refused(change: dict[str, object], message: str, tmp_path: Path) -> None:
    settings: dict[str, object] = {"peft_type": "LORA", "r": 2, "lora_alpha": 8, "target_modules": ["v_proj", "q_proj"]}
    expected = {"rank": 2, "alpha": 8.0, "target_modules": ["q_proj", "v_proj"]}
    where = locate(str(tmp_path))
    with pytest.raises(StoreError, match=r"adapter_config.json: no such file"):
        check_adapter_config(where, **expected)  # type: ignore[arg-type]
    (tmp_path / ADAPTER_CONFIG_FILE).write_text(json.dumps(settings))
    check_adapter_config(where, **expected)  # type: ignore[arg-type]
    (tmp_path / ADAPTER_CONFIG_FILE).write_text(json.dumps({**settings, **change}))
    with pytest.raises(ModelError, match=message):
        check_adapter_config(where, **expected)  # type: ignore[arg-type]
