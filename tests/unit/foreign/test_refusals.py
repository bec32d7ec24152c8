"""What is not a checkpoint to import is refused with one message, and leaves nothing behind."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from typer.testing import CliRunner

from rose_ray.cli import app
from rose_ray.distributed.import_checkpoint import Given, import_checkpoint
from rose_ray.errors import ConfigError, ModelError, NonFiniteError, RoseError, StoreError
from rose_ray.foreign.history import read_history
from rose_ray.foreign.optimizer import AdamNumbers, layout_name

PREFIX = "base_model.model.model.layers.0.self_attn.q_proj"
SHAPES = {f"{PREFIX}.lora_A.weight": (2, 4), f"{PREFIX}.lora_B.weight": (3, 2)}
GROUP = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}


def entry(shape: tuple[int, ...], **changes: Any) -> dict[str, Any]:
    moments = {"exp_avg": torch.ones(shape), "exp_avg_sq": torch.ones(shape)}
    return {"step": torch.tensor(7.0), **moments, **changes}


def optimizer(**changes: Any) -> dict[str, Any]:
    """A state by name; ``changes`` are made to the entry of lora_A."""
    first, second = SHAPES
    state = {first: entry(SHAPES[first], **changes), second: entry(SHAPES[second])}
    return {"state": state, "param_groups": [{**GROUP, "params": list(state)}]}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A sound checkpoint in LESS's layout."""
    folder = tmp_path / "checkpoint-7"
    folder.mkdir()
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(settings), encoding="utf-8")
    weights = {name: torch.full(shape, 0.5) for name, shape in SHAPES.items()}
    safetensors.torch.save_file(weights, folder / "adapter_model.safetensors")
    torch.save(optimizer(), folder / "optimizer.bin")
    return folder


def refused(source: Path, error: type[RoseError], message: str, **options: Any) -> None:
    with pytest.raises(error, match=message):
        import_checkpoint(str(source), str(source.parent / "out"), **options)
    assert [path.name for path in source.parent.glob("out*")] == []


class Code:
    """Makes a folder when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "plain pickle"])
@pytest.mark.parametrize("name", ["optimizer.bin", "optimizer.pt", "adapter_model.bin"])
def test_code_is_refused_and_not_run(source: Path, name: str, zipped: bool) -> None:
    mark = source.parent / "mark"
    for old in ("optimizer.bin", "adapter_model.safetensors"):
        if name.split(".")[0].split("_")[0] == old.split(".")[0].split("_")[0]:
            (source / old).unlink()
    content = {**optimizer(), "more": Code(mark)}
    if zipped:
        torch.save(content, source / name)
    else:
        (source / name).write_bytes(pickle.dumps(Code(mark)))
    refused(source, StoreError, rf"{name}: (names posix\.mkdir; expected tensors|not a readable PyTorch file)")
    assert not mark.exists()
    if zipped:  # and it would have been run
        torch.load(source / name, weights_only=False)
        assert mark.exists()


def test_deepspeed_files_with_code_are_refused_and_not_run(source: Path) -> None:
    mark = source.parent / "mark"
    (source / "global_step7").mkdir()
    (source / "latest").write_text("global_step7", encoding="utf-8")
    torch.save({"module": {}, "optimizer": Code(mark)}, source / "global_step7" / "mp_rank_00_model_states.pt")
    refused(source, StoreError, r"mp_rank_00_model_states\.pt: names posix\.mkdir")
    assert not mark.exists()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"exp_avg": None}, ModelError, r"lora_A\.weight has no moments of Adam: .*found \['exp_avg', "),
        ({"exp_avg": torch.ones(5, 4)}, ModelError, r"exp_avg of .* has shape \(5, 4\), the adapter's is \(2, 4\)"),
        ({"exp_avg_sq": -torch.ones(2, 4)}, ModelError, r"exp_avg_sq of .* is negative"),
        ({"exp_avg": torch.full((2, 4), torch.nan)}, NonFiniteError, r"exp_avg of .* holds NaN"),
        ({"state1": torch.ones(8), "qmap1": torch.ones(256)}, ModelError, r"bitsandbytes .*rounded to 8 bits"),
        ({"max_exp_avg_sq": torch.ones(2, 4)}, ModelError, r"AMSGrad"),
        ({"step": torch.tensor(8.0)}, ModelError, r"one number of updates for all parameters, found \[7, 8\]"),
    ],
)  # fmt: skip
def test_states_that_are_not_adam_s(
    source: Path, changes: dict[str, Any], error: type[RoseError], message: str
) -> None:
    torch.save(optimizer(**changes), source / "optimizer.bin")
    refused(source, error, message)


def test_real_8_bit_and_unstepped_optimizers(source: Path) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    parameter = torch.nn.Parameter(torch.ones(64, 128))
    unstepped = torch.optim.AdamW([parameter])
    torch.save(unstepped.state_dict(), source / "optimizer.bin")
    refused(source, ModelError, r"holds no moments: it was saved before its first step")
    rounded = bitsandbytes.optim.AdamW8bit([parameter])
    rounded.init_state(rounded.param_groups[0], parameter, 0, 0)
    state = {name: dict(rounded.state[parameter]) for name in SHAPES}
    torch.save({"state": state, "param_groups": []}, source / "optimizer.bin")
    refused(source, ModelError, r"bitsandbytes optimizer \[.*'state1'")


def test_missing_files_are_named(source: Path) -> None:
    refused(source.parent / "nowhere", StoreError, r"nowhere: no such folder")
    refused(source, StoreError, r"no optimizer\.pt, so no moments", kind="hf_trainer")
    refused(source, StoreError, r"no DeepSpeed checkpoint", kind="deepspeed")
    (source / "latest").write_text("global_step9", encoding="utf-8")
    refused(source, StoreError, r"latest: names .*global_step9, which is not there")
    (source / "latest").unlink()
    (source / "adapter_model.safetensors").unlink()
    refused(source, StoreError, r"no adapter weights; expected adapter_model\.safetensors or adapter_model\.bin")
    (source / "adapter_config.json").unlink()
    refused(source, StoreError, r"no adapter_config\.json in .*--adapter")
    (source / "optimizer.bin").unlink()
    (source / "optimizer_0").mkdir()
    refused(source, StoreError, r"no optimizer\.pt or optimizer\.bin.*optimizer_0 is in shards.*FULL_STATE_DICT")


def test_adapters_that_do_not_fit(source: Path) -> None:
    config = source / "adapter_config.json"
    settings = json.loads(config.read_text(encoding="utf-8"))
    for change, message in (
        ({"r": 8}, r"lora_A\.weight has shape \(2, 4\), but adapter_config\.json says r: 8"),
        ({"use_dora": True}, r"peft_type 'LORA' with {'use_dora': True}; expected a plain LORA"),
        ({"peft_type": "LOHA"}, r"peft_type 'LOHA'"),
    ):
        config.write_text(json.dumps({**settings, **change}), encoding="utf-8")
        refused(source, ModelError, message)
    config.write_text("[]", encoding="utf-8")
    refused(source, StoreError, r"not the settings of a PEFT LoRA adapter")
    config.write_text(json.dumps(settings), encoding="utf-8")
    weights = {name.replace("q_proj", "k_proj"): torch.ones(shape) for name, shape in SHAPES.items()}
    safetensors.torch.save_file(weights, source / "adapter_model.safetensors")
    refused(source, ModelError, r"exp_avg belongs to another adapter: 2 parameters missing .*k_proj.*2 unknown")
    safetensors.torch.save_file({"lm_head.weight": torch.ones(2, 2)}, source / "adapter_model.safetensors")
    refused(source, ModelError, r"expected LoRA's lora_A and lora_B alone, found 1 others \['lm_head\.weight'\]")


def test_what_the_files_do_not_say_is_asked_for(source: Path) -> None:
    content = optimizer()
    content["param_groups"] = []
    torch.save(content, source / "optimizer.bin")
    refused(source, ModelError, r"does not say Adam's beta1\. Give it with --beta1")
    numbers = AdamNumbers(beta1=0.9, beta2=0.99, eps=1e-8)
    refused(source, ModelError, r"no learning rate above 0 is recorded.*--learning-rate", given=Given(numbers=numbers))
    whole = Given(numbers=AdamNumbers(1e-4, 0.9, 0.99, 1e-8))
    lines = import_checkpoint(str(source), str(source.parent / "out"), given=whole)
    assert lines[2] == "learning rate 0.0001 (given), betas 0.9 and 0.99, eps 1e-08"
    shutil.rmtree(source.parent / "out")
    torch.save(optimizer(), source / "optimizer.bin")
    refused(source, ConfigError, r"--beta2 0\.99, but .*optimizer\.bin says 0\.999", given=whole)
    content = optimizer()
    content["param_groups"] = [{**GROUP, "params": [name], "lr": 10.0**-n} for n, name in enumerate(SHAPES)]
    torch.save(content, source / "optimizer.bin")  # LoRA+: no one rate
    refused(source, ModelError, r"no learning rate above 0 is recorded")


def test_damaged_files(source: Path) -> None:
    (source / "optimizer.bin").write_bytes((source / "optimizer.bin").read_bytes()[:500])
    refused(source, StoreError, r"optimizer\.bin: not a readable PyTorch file")
    torch.save([1, 2], source / "optimizer.bin")
    refused(source, StoreError, r"expected an optimizer's state_dict\(\) with state and param_groups, found list")
    (source / "trainer_state.json").write_text('{"global_step": 3}', encoding="utf-8")
    torch.save(optimizer(), source / "optimizer.bin")
    refused(source, StoreError, r"trainer_state\.json: not the state of a Trainer")


def test_the_command_says_what_it_found_and_never_writes_over(source: Path) -> None:
    arguments = ["import-checkpoint", str(source), "--out", str(source.parent / "out")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.stderr
    first, second, third, fourth = result.stdout.splitlines()
    assert first == f"less: {source}/optimizer.bin"
    assert second == "2 parameters of 14 numbers, after 7 updates"
    assert third == "learning rate 0.001 (the optimizer's own), betas 0.9 and 0.999, eps 1e-08"
    assert fourth.startswith(f"wrote {source.parent}/out: name it in warmup.adapters, and 0.001 in")
    again = CliRunner().invoke(app, arguments)
    assert (
        again.exit_code == 1
        and again.stderr.splitlines()[-1].startswith("error: ")
        and "exists already" in again.stderr
    )


def test_names_and_epochs() -> None:
    assert layout_name(f"module._fsdp_wrapped_module.{PREFIX}.lora_A.default.weight") == f"{PREFIX}.lora_A.weight"
    assert layout_name(f"{PREFIX}.lora_B.weight") == f"{PREFIX}.lora_B.weight"


@pytest.mark.parametrize(
    ("epoch", "expected", "rate"),
    [(1.0, 1, 3e-4), (2.0, 2, 1.5e-4), (1.5, 2, 2e-4), (3.0, 3, 2.25e-4)],
)
def test_the_rate_is_the_mean_of_the_epoch_else_of_all(
    tmp_path: Path, epoch: float, expected: int, rate: float
) -> None:
    logged = [(0.5, 4e-4), (1.0, 2e-4), (1.5, 2e-4), (2.0, 1e-4)]
    lines = [{"epoch": e, "learning_rate": r, "step": round(2 * e)} for e, r in logged] + [{"epoch": 2.0, "step": 4}]
    content = {"epoch": epoch, "global_step": round(2 * epoch), "log_history": lines}
    (tmp_path / "trainer_state.json").write_text(json.dumps(content), encoding="utf-8")
    history = read_history(str(tmp_path))
    assert history is not None and history.epoch == expected
    assert history.mean_learning_rate == pytest.approx(rate, rel=1e-12)
