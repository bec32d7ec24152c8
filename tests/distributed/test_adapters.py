"""The user's own adapters in place of a warm-up, and numbers that are not finite."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from rose_ray.cli import app
from rose_ray.distributed.run import run_job
from rose_ray.distributed.validate import validate_job
from rose_ray.errors import DataError, ModelError, NonFiniteError, StoreError
from rose_ray.model.checkpoint import ADAPTER_CONFIG_FILE, ADAPTER_FILE, MOMENTS_FILE, STATE_FILE
from tests.distributed.conftest import FinishedJob
from tests.distributed.reading import made_stages, manifests, read_file
from tests.distributed.tiny import NUM_EPOCHS, NUM_UNIQUE, overlong_row, tiny_content, tiny_job
from tests.tiny import byte_level_tokenizer, save_base, tiny_config, write_jsonl

UNLUCKY = "東"
"""No pair holds it; the broken base model gives NaN wherever it stands."""


@pytest.fixture(scope="module")
def adapters(finished: FinishedJob, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The finished job's adapters as a user would bring them: without moments."""
    warmup = finished.result.warmup
    assert warmup is not None
    folders = []
    for checkpoint in warmup.facts["checkpoints"]:
        folder = tmp_path_factory.mktemp("adapter")
        for name in (ADAPTER_FILE, ADAPTER_CONFIG_FILE):
            shutil.copy(finished.workspace / warmup.folder / checkpoint["name"] / name, folder)
        folders.append(str(folder))
    return folders


@pytest.fixture(scope="module")
def broken_base(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base model with NaN as the embedding of one token of the unlucky character, which no other text has."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("broken")
    tokenizer = AutoTokenizer.from_pretrained(inputs / "base")
    model = AutoModelForCausalLM.from_pretrained(inputs / "base", dtype=torch.float32)
    token = tokenizer(UNLUCKY, add_special_tokens=False)["input_ids"][0]
    with torch.no_grad():
        model.get_input_embeddings().weight[token] = float("nan")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def own(adapters: list[str], *more: str) -> list[str]:
    return [f"warmup={{adapters: {adapters}}}", "gradients.adam=sgd", *more]


@pytest.mark.ray
def test_own_adapters_and_rows_that_give_nan(
    finished: FinishedJob, copied: Path, adapters: list[str], broken_base: Path
) -> None:
    changes = own(adapters, "warmup.adapter_weights=[3, 1]", f"model.base={broken_base}")
    result = run_job(tiny_job(finished.inputs, copied, changes))
    assert "ingest" not in made_stages(result.stages)
    unlucky = {
        row["row_id"]
        for manifest in manifests(copied, "ingest")
        for name in manifest.files
        if "shard-" in name.path
        for row in read_file(copied, manifest, name.path.split("/")[-1]).to_pylist()
        if UNLUCKY in row["conversation"]
    }
    for scores in result.scores.values():
        rejected = read_file(copied, scores, "rejected.parquet").to_pylist()
        assert {row["row_id"] for row in rejected if row["reason"] == "non_finite_loss"} == unlucky != set()
        assert scores.facts["reject_reasons"] == {"non_finite_loss": len(unlucky), "prompt_too_long": 1}
        table = read_file(copied, scores, "scores.parquet")
        assert table.num_rows == NUM_UNIQUE - len(unlucky) - 1
        assert set(table["momentum_share"].to_pylist()) == {0.0}  # plain gradients have no momentum
    assert result.warmup is not None
    weights = [checkpoint["mean_learning_rate"] for checkpoint in result.warmup.facts["checkpoints"]]
    assert weights == [3.0, 1.0]
    assert result.warmup.counts == {"rows": 0, "trained": 0, "rejected": 0}


@pytest.mark.ray
def test_warmup_on_nan_ends_with_one_message(finished: FinishedJob, copied: Path, broken_base: Path) -> None:
    content = tiny_content(finished.inputs, copied)
    content["model"]["base"] = str(broken_base)
    content["warmup"] = {"fraction": 1.0, "epochs": 1, "batch_size": 8}
    config = copied.parent / "job.yaml"
    config.write_text(yaml.safe_dump(content), encoding="utf-8")
    result = CliRunner().invoke(app, ["warmup", str(config)])
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit)
    assert result.stderr.startswith("error: warm-up: the loss of step ") and result.stderr.count("\n") == 1


@pytest.mark.ray
def test_a_pool_without_one_usable_row(finished: FinishedJob, tmp_path: Path, ray_cluster: None) -> None:
    write_jsonl(tmp_path / "long.jsonl", [overlong_row()])
    changes = [f"pool.inputs.0.files=['{tmp_path}/long.jsonl']", "targets.0.selection={}", "warmup.fraction=1.0"]
    with pytest.raises(DataError, match=r"none of its 1 rows makes a sample.*prompt_too_long"):
        run_job(tiny_job(finished.inputs, tmp_path / "workspace", changes))


@pytest.mark.ray
def test_adapters_that_differ_in_scale_alone_are_two(
    finished: FinishedJob, copied: Path, adapters: list[str], tmp_path: Path
) -> None:
    scaled = shutil.copytree(adapters[0], tmp_path / "scaled")
    settings = json.loads((scaled / ADAPTER_CONFIG_FILE).read_text(encoding="utf-8"))
    (scaled / ADAPTER_CONFIG_FILE).write_text(json.dumps({**settings, "lora_alpha": 16}), encoding="utf-8")
    found = []
    for folder, alpha in ((adapters[0], 8), (str(scaled), 16)):
        config = tiny_job(finished.inputs, copied, own([folder], f"lora.alpha={alpha}"))
        warmup = run_job(config, stages=("ingest", "warmup")).warmup
        assert warmup is not None
        found.append(warmup.facts["checkpoints"][0]["adapter"])
    assert found[0] != found[1]


@pytest.mark.ray
def test_adapters_that_bring_their_moments_give_the_features_of_the_warmup_they_come_from(
    finished: FinishedJob, copied: Path
) -> None:
    folders = [_whole(finished, number) for number in range(NUM_EPOCHS)]
    rates = [json.loads((Path(folder) / STATE_FILE).read_text())["mean_learning_rate"] for folder in folders]
    folders[1] = _by_way_of_less(Path(folders[1]), copied.parent, rates[1])
    changes = own(folders, f"warmup.adapter_weights={rates}", "gradients.adam=torch")
    config = tiny_job(finished.inputs, copied, changes)
    assert f"adapter {folders[0]}: with Adam's moments after" in "\n".join(validate_job(config))
    result = run_job(config)
    assert {"warmup", "features"} <= set(made_stages(result.stages))
    for target, scores in result.scores.items():
        own_table = read_file(copied, scores, "scores.parquet")
        assert own_table.equals(read_file(finished.workspace, finished.result.scores[target], "scores.parquet"))
    assert result.warmup is not None
    names = {Path(record.path).name for record in result.warmup.files}
    assert names == {ADAPTER_FILE, ADAPTER_CONFIG_FILE, MOMENTS_FILE, STATE_FILE}


@pytest.mark.ray
class TestRefusedAdapters:
    """Said by ``validate``, and by ``run`` before anything is computed."""

    @pytest.mark.parametrize("mode", ["torch", "less_code", "v_only"])
    def test_without_moments_only_sgd_is_open(
        self, finished: FinishedJob, adapters: list[str], tmp_path: Path, mode: str
    ) -> None:
        mixed = [_whole(finished, 0), adapters[1]]
        config = tiny_job(finished.inputs, tmp_path / "workspace", own(mixed, f"gradients.adam={mode}"))
        message = rf"^{adapters[1]}: no moments\.safetensors, but gradients\.adam: {mode} needs"
        with pytest.raises(ModelError, match=message):
            list(validate_job(config))
        with pytest.raises(ModelError, match=message):
            run_job(config, stages=("ingest", "warmup"))

    def test_moments_without_their_numbers(self, finished: FinishedJob, tmp_path: Path) -> None:
        folder = shutil.copytree(_whole(finished, 0), tmp_path / "adapter")
        (folder / STATE_FILE).unlink()
        config = tiny_job(finished.inputs, tmp_path / "workspace", own([str(folder)]))
        with pytest.raises(StoreError, match=r"adapter/optimizer_state\.json: no such file, but moments"):
            list(validate_job(config))

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ("lora.rank=8", "r is 4, expected 8"),
            ("lora.alpha=16", "lora_alpha is 8"),
            ("lora.target_modules=[q_proj, k_proj]", "target_modules is"),
        ],
    )
    def test_other_lora_settings(
        self, finished: FinishedJob, adapters: list[str], tmp_path: Path, change: str, message: str
    ) -> None:
        config = tiny_job(finished.inputs, tmp_path / "workspace", own(adapters, change))
        with pytest.raises(ModelError, match=message):
            list(validate_job(config))

    def test_adapter_of_another_model(self, finished: FinishedJob, adapters: list[str], tmp_path: Path) -> None:
        tokenizer = byte_level_tokenizer()
        base = save_base(tmp_path / "wide", tiny_config("llama", len(tokenizer), hidden_size=48), tokenizer)
        config = tiny_job(finished.inputs, tmp_path / "workspace", own(adapters, f"model.base={base}"))
        with pytest.raises(ModelError, match=r"has shape .* this model needs"):
            run_job(config)
        assert not list((tmp_path / "workspace").glob("warmup/*/manifest.json"))

    def test_adapter_that_is_not_finite(self, finished: FinishedJob, adapters: list[str], tmp_path: Path) -> None:
        spoilt = _spoilt(Path(adapters[0]), tmp_path / "spoilt")
        config = tiny_job(finished.inputs, tmp_path / "workspace", own([adapters[1], spoilt]))
        with pytest.raises(NonFiniteError, match=r"spoilt: 1 parameters hold NaN"):
            list(validate_job(config))

    def test_folder_without_an_adapter(self, finished: FinishedJob, tmp_path: Path) -> None:
        config = tiny_job(finished.inputs, tmp_path / "workspace", own([str(tmp_path)]))
        with pytest.raises(StoreError, match=r"adapter_config\.json: no such file"):
            list(validate_job(config))


def _whole(finished: FinishedJob, number: int) -> str:
    """A checkpoint of the finished job, moments included."""
    warmup = finished.result.warmup
    assert warmup is not None
    return str(finished.workspace / warmup.folder / warmup.facts["checkpoints"][number]["name"])


def _by_way_of_less(source: Path, folder: Path, rate: float) -> str:
    """The same checkpoint, saved as the released code of LESS expects it and imported from there."""
    import safetensors.torch
    import torch

    from rose_ray.distributed.import_checkpoint import import_checkpoint

    saved, out = folder / "less-checkpoint", folder / "imported"
    saved.mkdir()
    shutil.copy(source / ADAPTER_CONFIG_FILE, saved)
    torch.save(safetensors.torch.load_file(source / ADAPTER_FILE), saved / "adapter_model.bin")
    moments = safetensors.torch.load_file(source / MOMENTS_FILE)
    numbers = json.loads((source / STATE_FILE).read_text(encoding="utf-8"))
    state: dict[str, dict[str, Any]] = {}
    for key, tensor in moments.items():
        kind, _, name = key.partition(".")
        wrapped = f"module.{name.removesuffix('.weight')}.default.weight"
        state.setdefault(wrapped, {"step": numbers["num_updates"]})[kind] = tensor
    betas = (numbers["adam_beta1"], numbers["adam_beta2"])
    group = {"lr": rate, "betas": betas, "eps": numbers["adam_eps"], "params": list(state)}
    torch.save({"state": state, "param_groups": [group]}, saved / "optimizer.bin")
    import_checkpoint(str(saved), str(out))
    return str(out)


def _spoilt(source: Path, folder: Path) -> str:
    import safetensors.torch

    shutil.copytree(source, folder)
    tensors: dict[str, Any] = safetensors.torch.load_file(folder / ADAPTER_FILE)
    next(iter(tensors.values()))[0, 0] = float("nan")
    safetensors.torch.save_file(tensors, folder / ADAPTER_FILE)
    return str(folder)
