"""Checkpoints that the trainers themselves wrote, imported: the optimizer's true state by name, to the last bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rose_ray.config.model import ModelConfig
from rose_ray.distributed.import_checkpoint import import_checkpoint
from rose_ray.errors import ModelError
from rose_ray.filesystem import locate
from rose_ray.model.base import load_base
from rose_ray.model.checkpoint import Checkpoint, read_checkpoint
from rose_ray.model.layout import layout_of
from tests import oracles
from tests.equivalence.ranks import run_ranks
from tests.tiny import make_samples, save_base, tiny_config

pytestmark = pytest.mark.slow

LORA: dict[str, Any] = {"rank": 3, "alpha": 6.0, "targets": ["q_proj", "o_proj", "up_proj"]}
"""q_proj and o_proj have equal shapes and stand in the model in another order than by name; with up_proj's 45 outputs,
rank 3 leaves an odd number of weights, which two ranks can share with padding only."""

BETAS, EPS = (0.8, 0.95), 1e-7


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> str:
    config = tiny_config("llama", len(tokenizer), intermediate_size=45)
    return save_base(tmp_path_factory.mktemp("uneven"), config, tokenizer)


def imported(source: Path, base: str, **options: Any) -> tuple[Checkpoint, list[str]]:
    """Import a checkpoint and read it as the job's own code does, against the model's layout."""
    out = source.with_name(f"{source.name}-imported")
    lines = import_checkpoint(str(source), str(out), **options)
    layout = layout_of(oracles.peft_model(base, **LORA, dtype=torch.float32))
    assert [path.name for path in source.parent.glob(f"{out.name}*")] == [out.name]  # nothing half written
    return read_checkpoint(locate(str(out)), layout), lines


def assert_same(found: Checkpoint, truth: dict[str, dict[str, Any]]) -> None:
    assert found.exp_avg is not None and found.exp_avg_sq is not None
    for part, key in ((found.adapter, "weight"), (found.exp_avg, "exp_avg"), (found.exp_avg_sq, "exp_avg_sq")):
        assert part.keys() == truth[key].keys()
        for name, tensor in part.items():
            assert tensor.dtype == torch.float32
            np.testing.assert_array_equal(tensor.numpy(), np.asarray(truth[key][name]), err_msg=f"{key} {name}")
    assert len({tensor.sum().item() for tensor in found.exp_avg_sq.values()}) == len(found.exp_avg_sq)  # all told apart


def true_state(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Any]]:
    named = oracles.trainable(model)
    moments = {key: {n: optimizer.state[p][key].numpy() for n, p in named.items()} for key in ("exp_avg", "exp_avg_sq")}
    return {"weight": {name: p.detach().numpy() for name, p in named.items()}, **moments}


@pytest.fixture(scope="module")
def trainer_run(base: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """transformers' own Trainer on five rows for two epochs; the folder of its last checkpoint, and itself."""
    from transformers import Trainer, TrainingArguments

    folder = tmp_path_factory.mktemp("trainer")
    model = oracles.peft_model(base, **LORA, dtype=torch.float32)
    rows = [{"input_ids": s.input_ids, "labels": s.input_ids} for s in make_samples((7, 7, 7, 7, 7), 330)]
    arguments = TrainingArguments(
        str(folder),
        num_train_epochs=2,
        per_device_train_batch_size=2,
        learning_rate=4e-3,
        adam_beta1=BETAS[0],
        adam_beta2=BETAS[1],
        adam_epsilon=EPS,
        weight_decay=0.1,
        logging_steps=1,
        save_strategy="epoch",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        seed=3,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=rows)  # type: ignore[arg-type]
    trainer.train()
    return folder / "checkpoint-6", trainer


def test_transformers_trainer(trainer_run: tuple[Path, Any], base: str) -> None:
    source, trainer = trainer_run
    assert not (source / "optimizer.bin").exists()
    found, lines = imported(source, base)
    assert_same(found, true_state(trainer.model, trainer.optimizer.optimizer))
    state = found.state
    assert state is not None and (state.num_updates, state.epoch, state.max_grad_norm) == (6, 2, None)
    assert (state.adam_beta1, state.adam_beta2, state.adam_eps) == (*BETAS, EPS)
    # linear from 4e-3 to 0 over six steps: the second epoch's are the last three of them
    assert state.mean_learning_rate == pytest.approx(4e-3 * (3 + 2 + 1) / 6 / 3, rel=1e-9)
    assert lines[0] == f"hf_trainer: {source / 'optimizer.pt'}"
    assert "after 6 updates" in lines[1] and "mean of 3 logged in epoch 2), betas 0.8 and 0.95" in lines[2]


def test_another_base_model_and_other_groups_are_refused(
    trainer_run: tuple[Path, Any], base_folder: str, tmp_path: Path
) -> None:
    source, _ = trainer_run
    with pytest.raises(
        ModelError, match=r"up_proj\.lora_B\.weight has shape \(45, 3\), the base model gives \(48, 3\)"
    ):
        import_checkpoint(str(source), str(tmp_path / "out"), **_with(base=base_folder))
    with pytest.raises(ModelError, match=r"--base"):
        import_checkpoint(str(source), str(tmp_path / "out"), **_with(base=str(tmp_path / "nowhere")))
    content = torch.load(source / "optimizer.pt", weights_only=True)
    first, *rest = content["param_groups"]
    halves = [{**first, "params": first["params"][::2]}, {**first, "params": first["params"][1::2]}, *rest]
    spoilt = _copied(source, tmp_path / "loraplus")
    torch.save({**content, "param_groups": halves}, spoilt / "optimizer.pt")
    with pytest.raises(
        ModelError, match=r"its groups hold \[6, 6\] parameters; of this adapter the Trainer makes \[12\]"
    ):
        import_checkpoint(str(spoilt), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def _with(**given: Any) -> dict[str, Any]:
    from rose_ray.distributed.import_checkpoint import Given

    return {"given": Given(**given)}


def _copied(source: Path, target: Path) -> Path:
    import shutil

    return shutil.copytree(source, target)


def test_the_layout_that_less_reads(base: str, tmp_path: Path) -> None:
    model = oracles.peft_model(base, **LORA, dtype=torch.float32)
    optimizer = torch.optim.AdamW(oracles.trainable(model).values(), lr=2e-3, betas=BETAS, eps=EPS)
    for sample in make_samples((9, 12, 6), 330):
        optimizer.zero_grad()
        oracles.mean_loss(model, (sample.input_ids, sample.loss_mask)).backward()
        optimizer.step()
    source = tmp_path / "checkpoint-3"
    model.save_pretrained(source)  # type: ignore[operator]
    (source / "adapter_model.safetensors").unlink()
    torch.save({name: p.detach() for name, p in oracles.trainable(model).items()}, source / "adapter_model.bin")
    wrapped = {
        name.replace(".layers.", "._fsdp_wrapped_module.layers."): optimizer.state[p]
        for name, p in model.named_parameters()
        if p.requires_grad
    }
    group = {key: value for key, value in optimizer.param_groups[0].items() if key != "params"}
    groups = [{**group, "params": list(wrapped)}]
    torch.save({"state": wrapped, "param_groups": groups}, source / "optimizer.bin")
    found, lines = imported(source, base)
    assert_same(found, true_state(model, optimizer))
    assert found.state is not None and found.state.mean_learning_rate == 2e-3 and lines[0].startswith("less: ")


# Beside bfloat16 weights stage 0 makes a step of nothing before the first one, and Adam counts it.
BFLOAT16 = {"bf16": {"enabled": True}}
CASES: dict[int, dict[str, dict[str, Any]]] = {
    1: {"0": {"gradient_clipping": 0.5}, "0 in bfloat16": BFLOAT16, "3": {}},
    2: {"1 in bfloat16": BFLOAT16, "2": {"gradient_clipping": 0.5}, "3": {}},
}


@pytest.fixture(scope="module")
def deepspeed_runs(base: str, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, str], tuple[Path, Any]]:
    """Folders that DeepSpeed's engines wrote, and what they held."""
    folder = tmp_path_factory.mktemp("deepspeed")
    runs = {}
    for num_ranks, cases in CASES.items():
        made = [
            (str(folder / f"{num_ranks}-{name}"), {"zero_optimization": {"stage": int(name[0])}, **settings})
            for name, settings in cases.items()
        ]
        truths = run_ranks("save_deepspeed", num_ranks, folder / f"ranks-{num_ranks}", base=base, lora=LORA, cases=made)
        for name, (where, _), truth in zip(cases, made, truths[0], strict=True):
            runs[num_ranks, name] = Path(where), truth
    return runs


@pytest.mark.parametrize(("num_ranks", "name"), [(ranks, name) for ranks, cases in CASES.items() for name in cases])
def test_deepspeed(num_ranks: int, name: str, deepspeed_runs: Any, base: str) -> None:
    source, truth = deepspeed_runs[num_ranks, name]
    found, lines = imported(source, base)
    assert_same(found, truth)
    state = found.state
    assert state is not None and ({state.num_updates}, state.mean_learning_rate, state.epoch) == (
        truth["step"],
        3e-3,
        None,
    )
    assert (state.adam_beta1, state.adam_beta2, state.adam_eps) == (*BETAS, EPS)
    assert state.max_grad_norm == CASES[num_ranks][name].get("gradient_clipping")
    assert lines[0].startswith(f"deepspeed: {source}/global_step3/")


def test_a_missing_shard_is_named(deepspeed_runs: Any, tmp_path: Path) -> None:
    from rose_ray.errors import StoreError

    source, _ = deepspeed_runs[2, "2"]
    partial = _copied(source, tmp_path / "partial")
    next((partial / "global_step3").glob("*rank_1_*optim_states.pt")).unlink()
    with pytest.raises(StoreError, match=r"1 of 2 \*_optim_states\.pt files"):
        import_checkpoint(str(partial), str(tmp_path / "out"))
    # the folder of the step itself, with the adapter's settings in the one above
    import_checkpoint(str(source / "global_step3"), str(tmp_path / "out"), kind="deepspeed")
    assert json.loads((tmp_path / "out" / "optimizer_state.json").read_text())["num_updates"] == 3


def test_a_trainer_s_folder_with_deepspeed_inside(deepspeed_runs: Any, base: str, tmp_path: Path) -> None:
    source, truth = deepspeed_runs[2, "2"]
    trainer = _copied(source, tmp_path / "checkpoint-3")
    logged = [{"epoch": 1.0, "learning_rate": 5e-4, "step": 3}]
    course = {"epoch": 1.0, "global_step": 3, "log_history": logged}
    (trainer / "trainer_state.json").write_text(json.dumps(course), encoding="utf-8")
    found, _ = imported(trainer, base)
    assert_same(found, truth)
    assert found.state is not None and (found.state.epoch, found.state.mean_learning_rate) == (1, 5e-4)
    (trainer / "trainer_state.json").write_text(json.dumps({**course, "global_step": 2}), encoding="utf-8")
    with pytest.raises(ModelError, match=r"took 3 steps, the trainer_state\.json beside it says 2"):
        import_checkpoint(str(trainer), str(tmp_path / "out"))


def test_models_that_tensor_parallelism_cut_are_refused(deepspeed_runs: Any, tmp_path: Path) -> None:
    cut = _copied(deepspeed_runs[2, "2"][0], tmp_path / "cut")
    (cut / "global_step3" / "mp_rank_01_model_states.pt").touch()
    with pytest.raises(ModelError, match=r"cut by tensor or pipeline parallelism"):
        import_checkpoint(str(cut), str(tmp_path / "out"))


def test_the_oracle_model_is_the_project_s(base: str) -> None:
    from rose_ray.config.model import LoraConfig
    from rose_ray.model.base import attach_adapter

    lora = LoraConfig(rank=3, alpha=6.0, dropout=0.0, target_modules=LORA["targets"])
    ours = layout_of(attach_adapter(load_base(ModelConfig(base=base)), lora, dropout=0.0))
    assert ours == layout_of(oracles.peft_model(base, **LORA, dtype=torch.float32))
