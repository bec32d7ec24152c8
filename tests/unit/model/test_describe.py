"""What tells one model and one way of making tokens from another."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from rose_ray.config.model import LoraConfig, ModelConfig
from rose_ray.errors import ModelError
from rose_ray.model.base import attach_adapter, base_digest, load_base
from rose_ray.model.describe import describe_model
from rose_ray.model.layout import layout_of

LORA = LoraConfig(rank=2, alpha=4.0, target_modules=["q_proj"])


def test_identity_is_that_of_the_loaded_model(base_folder: str) -> None:
    config = ModelConfig(base=base_folder)
    identity = describe_model(config, LORA)
    assert identity.base == base_digest(base_folder)
    base = load_base(config)
    sizes = [parameter.nbytes for parameter in base.parameters()]
    assert (identity.base_bytes, identity.largest_bytes) == (sum(sizes), max(sizes))
    assert identity.layout == layout_of(attach_adapter(base, LORA, dropout=0.0))
    assert describe_model(config, LORA) == identity


def test_what_changes_tokens_or_loss_changes_the_text_digest(base_folder: str, tmp_path: Path) -> None:
    copied = shutil.copytree(base_folder, tmp_path / "base")
    config = ModelConfig(base=str(copied))
    variants = [
        config,
        config.model_copy(update={"template": "tulu"}),
        config.model_copy(update={"loss_on_turn_tail": True}),
    ]
    identities = [describe_model(variant, LORA) for variant in variants]
    file = Path(copied) / "tokenizer.json"
    file.write_text(
        file.read_text()
        .replace('"add_prefix_space":false', '"add_prefix_space":true')
        .replace('"add_prefix_space": false', '"add_prefix_space": true')
    )
    identities.append(describe_model(config, LORA))
    assert len({identity.text for identity in identities}) == 4
    assert len({identity.base for identity in identities}) == len({identity.layout for identity in identities}) == 1


def test_rank_and_targets_are_in_the_layout_not_in_the_base(base_folder: str) -> None:
    config = ModelConfig(base=base_folder)
    loras = [LORA, LORA.model_copy(update={"rank": 3}), LORA.model_copy(update={"target_modules": ["v_proj"]})]
    identities = [describe_model(config, lora) for lora in loras]
    assert len({identity.layout.digest for identity in identities}) == 3
    assert len({identity.base for identity in identities}) == 1


def test_a_lora_target_that_the_model_lacks_is_found_before_any_weights_are_read(base_folder: str) -> None:
    with pytest.raises(ModelError, match=r"no linear layer \['wq'\]"):
        describe_model(ModelConfig(base=base_folder), LORA.model_copy(update={"target_modules": ["wq"]}))


def test_a_model_that_cannot_recompute_is_refused_before_anything_runs(
    base_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ModelConfig(base=base_folder, gradient_checkpointing=True)
    describe_model(config, LORA)
    monkeypatch.setattr("transformers.modeling_layers.GradientCheckpointingLayer", type("Absent", (), {}))
    with pytest.raises(ModelError, match="no layer of this model recomputes on its own"):
        describe_model(config, LORA)
