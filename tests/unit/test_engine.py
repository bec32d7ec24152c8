"""What the library refuses, and that it gives the model back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rose_ray import AdamMoments, AdamState, GradientEngine
from rose_ray.errors import ConfigError, DataError, ModelError, NonFiniteError, NumericsError, ShapeError
from rose_ray.kernels.projection import make_projection

STATE = AdamState(num_updates=1, adam_beta1=0.9, adam_beta2=0.999, adam_eps=1e-8)


def peft_model(base: str, **settings: Any) -> Any:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    lora = {"r": 2, "lora_dropout": 0.3, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
    return get_peft_model(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), LoraConfig(**{**lora, **settings})
    )


def make_batch(num_rows: int = 3, seed: int = 0) -> dict[str, Tensor]:
    """Rows of 6, 7, 8, ... tokens; the first two carry no loss."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 330, (num_rows, 5 + num_rows), generator=generator)
    mask = (torch.arange(ids.shape[1]) < torch.arange(6, 6 + num_rows)[:, None]).long()
    labels = torch.where(mask.bool() & (torch.arange(ids.shape[1]) > 1), ids, -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@pytest.fixture
def model(base_folder: str) -> Any:
    return peft_model(base_folder)


def state_of(model: Any) -> dict[str, Any]:
    return {
        "requires_grad": {name: p.requires_grad for name, p in model.named_parameters()},
        "training": {name: part.training for name, part in model.named_modules()},
        "attributes": {name: sorted(vars(part)) for name, part in model.named_modules()},
        "forward": {name: part.forward for name, part in model.named_modules()},
        "hooks": [(len(p._forward_hooks), len(p._forward_pre_hooks)) for p in model.modules()],
        "dropout": {name: part.p for name, part in model.named_modules() if isinstance(part, nn.Dropout)},
        "grads": [p.grad for p in model.parameters()],
        "use_cache": model.get_base_model().config.use_cache,
    }


def use(engine: GradientEngine) -> None:
    engine.gradients(make_batch())
    engine.scores(make_batch(), engine.pair_directions(make_batch(seed=1), make_batch(seed=2)))
    engine.pair_directions(make_batch(seed=1), make_batch(seed=2), objective="dpo_weighted")


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_comes_back_as_it_was(fails: bool, model: Any) -> None:
    layer = model.get_submodule("base_model.model.model.layers.1")
    layer.eval()  # and the rest in training mode
    model.get_base_model().config.use_cache = True
    before, weights = state_of(model), {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(KeyError, match="inside") if fails else _nothing(), GradientEngine(model) as engine:
        assert not any(p.requires_grad for p in model.parameters()) and not model.training
        use(engine)
        if fails:
            raise KeyError("inside")
    assert state_of(model) == before
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
    model(**make_batch()).loss.backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())


def _nothing() -> Any:
    from contextlib import nullcontext

    return nullcontext()


def test_a_model_that_alters_its_logits_comes_back_too(model: Any) -> None:
    head = model.get_base_model().lm_head
    handle = model.get_base_model().register_forward_hook(
        lambda module, inputs, output: setattr(output, "logits", output.logits * 0.5)
    )
    before = state_of(model)
    with GradientEngine(model) as engine:
        use(engine)
    assert state_of(model) == before and isinstance(head, nn.Linear)
    handle.remove()


def test_engines_follow_one_another_and_see_what_training_changed(model: Any) -> None:
    found = []
    for _ in range(2):
        with GradientEngine(model) as engine:
            found.append(engine.gradients(make_batch()))
            parameters = engine.parameters
            with torch.no_grad():
                found.append(engine.gradients(make_batch()))  # gradients all the same
        optimizer = torch.optim.AdamW(parameters.values(), lr=1e-2)
        model(**make_batch()).loss.backward()
        optimizer.step()
    assert torch.equal(found[0], found[1]) and torch.equal(found[2], found[3])
    assert not torch.allclose(found[0], found[2])


def test_a_closed_engine_says_so(model: Any) -> None:
    engine = GradientEngine(model)
    engine.close()
    engine.close()
    with pytest.raises(ModelError, match="closed"):
        engine.gradients(make_batch())


def refuse(model: Any, match: str) -> None:
    before = state_of(model) if hasattr(model, "get_base_model") else None
    with pytest.raises(ModelError, match=match):
        GradientEngine(model)
    assert before is None or state_of(model) == before


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"use_dora": True}, "plain LoRA.*lora_variant"),
        ({"lora_bias": True}, "plain LoRA.*bias"),
        ({"bias": "all"}, "besides the LoRA weights are trainable"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "Embedding"),
        ({"modules_to_save": ["lm_head"]}, "besides the LoRA weights are trainable"),
    ],
)
def test_other_adapters_are_refused_and_the_model_left_alone(
    settings: dict[str, Any], match: str, base_of: Callable[[str], str]
) -> None:
    refuse(peft_model(base_of("qwen2"), **settings), match)


def test_models_in_another_state_are_refused(model: Any) -> None:
    refuse(nn.Linear(2, 2), "Linear; expected what peft")
    with GradientEngine(model):
        refuse(model, "somebody else's")
    with model.disable_adapter():
        refuse(model, "merged or disabled")
    model.merge_adapter()
    refuse(model, "merged or disabled")
    model.unmerge_adapter()
    model.add_adapter("second", model.peft_config["default"])
    refuse(model, "one plain LoRA adapter")


def edited(name: str, place: tuple[int, int], value: int) -> dict[str, Tensor]:
    batch = make_batch()
    batch[name][place] = value
    return batch


@pytest.mark.parametrize(
    ("batch", "kind", "match"),
    [
        (edited("attention_mask", (1, 0), 0), DataError, r"padded on the left.*rows \[1\].*padding_side"),
        (edited("attention_mask", (2, 4), 0), DataError, r"left or inside: rows \[2\]"),
        (edited("labels", (0, 7), 9), DataError, r"labels at padding: rows \[0\]"),
        (edited("labels", (1, 3), 3), DataError, r"labels other than their tokens: rows \[1\]"),
        ({**make_batch(), "position_ids": torch.zeros(3, 8)}, DataError, "position_ids"),
        ({"input_ids": torch.ones(1, 2), "labels": torch.ones(1, 2)}, DataError, "attention_mask"),
        ({**make_batch(), "labels": [[1]]}, DataError, "list.*return_tensors"),
        ({**make_batch(), "labels": make_batch()["labels"].float()}, DataError, "float32"),
        ({**make_batch(), "labels": torch.ones(3, 5, dtype=torch.int64)}, ShapeError, r"\(3, 5\)"),
        ({name: tensor[0] for name, tensor in make_batch().items()}, ShapeError, r"expected \[B, S\]"),
        ({name: tensor[:0] for name, tensor in make_batch().items()}, ShapeError, "at least 1"),
    ],
)
def test_batches_of_another_form_are_refused(
    batch: dict[str, Any], kind: type[Exception], match: str, model: Any
) -> None:
    with GradientEngine(model) as engine:
        with pytest.raises(kind, match=match):
            engine.gradients(batch)
        with pytest.raises(kind, match=f"(?s)rejected.*{match}"):
            engine.pair_directions(make_batch(), batch)


def test_rows_without_a_labelled_token_are_named(model: Any) -> None:
    batch = make_batch()
    batch["labels"][[0, 2]] = -100
    batch["labels"][2, 0] = batch["input_ids"][2, 0]  # nothing predicts it
    with GradientEngine(model) as engine, pytest.raises(DataError, match=r"2 of 3 rows have no labelled.*\[0, 2\]"):
        engine.gradients(batch)


def test_numbers_that_cannot_be_used_are_named_by_row(model: Any) -> None:
    batch = make_batch()
    with GradientEngine(model) as engine:
        directions = engine.pair_directions(make_batch(seed=1), make_batch(seed=2))
        with pytest.raises(NumericsError, match=r"the same in rows \[0, 1, 2\]"):
            engine.pair_directions(batch, batch)
        with pytest.raises(ShapeError, match="2 rejected"):
            engine.pair_directions(make_batch(3), make_batch(2))
        with pytest.raises(ShapeError, match="projection reads"):
            engine.scores(batch, directions[:, 1:])
        with pytest.raises(ShapeError, match="projection reads"):
            engine.features(batch, make_projection("sketch", 8, 0, engine.layout.num_parameters + 1))
        with torch.no_grad():
            embedding = model.get_input_embeddings().weight
            embedding[batch["input_ids"][1, 3]] = torch.nan
        with pytest.raises(NonFiniteError, match=r"rows \[1\]"):
            engine.scores(batch, directions)


def test_a_zero_direction_has_no_unit_vector(model: Any) -> None:
    with GradientEngine(model) as engine:
        zeros = {name: torch.zeros_like(p) for name, p in engine.parameters.items()}
        with torch.no_grad():
            for parameter in engine.parameters.values():
                parameter.zero_()  # both factors: no gradient in either
        features = engine.features(make_batch(), engine.projection(dim=8), adam=AdamMoments(zeros, zeros, STATE))
        assert not features.norms_B.any()
        with pytest.raises(NumericsError, match=r"zero in rows \[0, 1, 2\]"):
            _ = features.unit_BD


def test_moments_and_mode_have_to_fit(model: Any) -> None:
    with GradientEngine(model) as engine:
        sketch, batch = engine.projection(dim=8), make_batch()
        ones = {name: torch.ones_like(p) for name, p in engine.parameters.items()}
        with pytest.raises(ConfigError, match="'v_only' needs moments"):
            engine.features(batch, sketch, mode="v_only")
        with pytest.raises(ConfigError, match="needs exp_avg"):
            engine.features(batch, sketch, adam=AdamMoments({}, ones, STATE))
        with pytest.raises(ModelError, match=r"exp_avg_sq.*missing"):
            engine.features(batch, sketch, adam=AdamMoments(ones, dict(list(ones.items())[1:]), STATE))
        engine.features(batch, sketch, adam=AdamMoments({}, ones, STATE), mode="v_only")
        default = engine.features(batch, sketch, adam=AdamMoments(ones, ones, STATE))
        named = engine.features(batch, sketch, adam=AdamMoments(ones, ones, STATE), mode="torch")
        assert torch.equal(default.projected_BD, named.projected_BD)
