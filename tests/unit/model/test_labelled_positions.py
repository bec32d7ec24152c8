"""What no loss reads is not computed, and nothing else is left out."""

from __future__ import annotations

import logging
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig as PeftLoraConfig
from peft import get_peft_model
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    FalconConfig,
    Gemma2Config,
    GPTNeoXConfig,
    GptOssConfig,
    MambaConfig,
    MixtralConfig,
    OPTConfig,
    Phi3Config,
)

from rose_ray.errors import ModelError
from rose_ray.model.batch import Batch, pack_batch, pad_batch
from rose_ray.model.labelled_positions import LabelledPositions
from rose_ray.model.layout import adapter_parameters
from rose_ray.model.scoring import ScoringModel
from rose_ray.model.values import sample_values
from tests import oracles
from tests.tiny import make_samples, tiny_config

FLOAT64 = 1e-9
"""Relative to a weight's largest gradient: the sums of two dozen tokens in another order, through two layers."""

FLOAT32_WITHIN = 1e-5
"""The same for models whose norms, capped products or states are float32 whatever the type of their weights."""

SAMPLES = make_samples((12, 5, 21), 330)
SIZES = {"vocab_size": 330, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
WIDE = {"initializer_range": 0.15, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
"""Weights under which attention is far from uniform."""

LLAMA = {"layers.1.mlp", "layers.1.post_attention_layernorm", "layers.1.self_attn.o_proj", "norm"}
QUERIES = "layers.1.self_attn.q_proj"
NORMS = {"layers.1.pre_feedforward_layernorm", "layers.1.post_feedforward_layernorm"}
MODELS: dict[str, tuple[Callable[[], Any], set[str]]] = {
    "llama": (lambda: tiny_config("llama", 330), LLAMA | {QUERIES}),
    "qwen3": (lambda: tiny_config("qwen3", 330), LLAMA | {QUERIES, "layers.1.self_attn.q_norm"}),
    "sliding window": (lambda: tiny_config("mistral", 330), LLAMA | {QUERIES}),
    "divided logits": (lambda: tiny_config("granite", 330), LLAMA | {QUERIES}),
    "capped logits": (
        lambda: Gemma2Config(
            **SIZES, **WIDE, intermediate_size=48, num_key_value_heads=2, head_dim=8, attn_implementation="eager"
        ),
        LLAMA | NORMS | {QUERIES},
    ),
    "one matrix for query, key and value": (
        lambda: Phi3Config(**SIZES, **WIDE, intermediate_size=48, num_key_value_heads=2),
        LLAMA,
    ),
    "experts": (
        lambda: MixtralConfig(
            **SIZES,
            **WIDE,
            intermediate_size=48,
            num_key_value_heads=2,
            num_local_experts=4,
            experts_implementation="eager",
        ),
        LLAMA | {QUERIES},
    ),
    "feed-forward beside attention, added in place": (
        lambda: FalconConfig(**SIZES, **WIDE, parallel_attn=True, multi_query=True),
        {"h.1.mlp", "h.1.self_attention.dense", "ln_f"},
    ),
    "two norms beside each other": (
        lambda: GPTNeoXConfig(**SIZES, **WIDE, intermediate_size=48),
        {"layers.1.mlp", "layers.1.attention.dense", "layers.1.post_attention_layernorm", "final_layer_norm"},
    ),
    "a state space": (
        lambda: MambaConfig(vocab_size=330, hidden_size=32, num_hidden_layers=2, bos_token_id=1, eos_token_id=2),
        {"layers.1.mixer.out_proj", "norm_f"},
    ),
    "experts that give two tensors": (
        lambda: GptOssConfig(
            **SIZES,
            **WIDE,
            intermediate_size=48,
            num_key_value_heads=2,
            head_dim=8,
            num_local_experts=4,
            num_experts_per_tok=2,
            attn_implementation="eager",
            experts_implementation="eager",
        ),
        {"layers.1.post_attention_layernorm", "layers.1.self_attn.o_proj", "norm", QUERIES},
    ),
    "layers without a feed-forward module": (
        lambda: OPTConfig(**SIZES, **WIDE, ffn_dim=48, word_embed_proj_dim=32, max_position_embeddings=64),
        {
            "decoder.layers.1.self_attn.out_proj",
            QUERIES.replace("layers", "decoder.layers"),
            "decoder.final_layer_norm",
        },
    ),
}

IN_FLOAT32 = ("capped logits", "a state space")
TARGETS = {
    "experts": r".*\.[qkvo]_proj",
    "experts that give two tensors": r".*\.[qkvo]_proj",
    "layers without a feed-forward module": r".*\.([qkv]|out)_proj",
    "a state space": r".*\.(in|x)_proj",
}
"""Elsewhere every linear layer; these models' others take no rows of tokens, or PEFT leaves them alone."""

PACKABLE = ("llama", "qwen3", "divided logits")
"""Whose attention keeps packed rows apart by their positions; a sliding window is tested elsewhere."""


def _model(kind: str) -> Any:
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(MODELS[kind][0](), dtype=torch.float64)
    base.config.use_cache = False
    lora = PeftLoraConfig(r=2, lora_alpha=4, target_modules=TARGETS.get(kind, "all-linear"), task_type="CAUSAL_LM")
    model = get_peft_model(base, lora).double().eval()
    oracles.set_adapter(model, oracles.random_adapter(model, 3))
    return model


def _found(module: nn.Module) -> LabelledPositions:
    positions = LabelledPositions()
    positions.find(module)
    return positions


def _gradients(model: ScoringModel, batch: Batch) -> dict[str, Tensor]:
    kept, consume = oracles.collect(list(model.weights))
    model.backward_per_sample(batch, "mean_loss", consume)
    return kept


@pytest.mark.parametrize("kind", MODELS)
def test_modules_are_found_and_gradients_are_those_of_autograd_a_sample_at_a_time(kind: str) -> None:
    peft_model = _model(kind)
    expected = [oracles.gradient(peft_model, (s.input_ids, s.loss_mask), "mean_loss")[1] for s in SAMPLES]
    model = ScoringModel(peft_model, "cpu", merge_adapter=True)
    model.load_adapter({name: weight.clone() for name, weight in model.weights.items()})
    prefix = f"base_model.model.{peft_model.get_base_model().base_model_prefix}."
    assert set(model.labelled_positions.names) == {prefix + name for name in MODELS[kind][1]}
    batches = [pad_batch(SAMPLES), *([pack_batch(SAMPLES)] if kind in PACKABLE else [])]
    for found in (_gradients(model, batch) for batch in batches):
        for row, named in enumerate(expected):
            for name, wanted in named.items():
                share = FLOAT32_WITHIN if kind in IN_FLOAT32 else FLOAT64
                atol = share * float(wanted.abs().max()) + 1e-15
                torch.testing.assert_close(found[name][row], wanted, rtol=0, atol=atol, msg=f"{name}, row {row}")


def test_modules_get_the_labelled_positions_alone() -> None:
    peft_model = _model("llama")
    model = ScoringModel(peft_model, "cpu")
    seen: dict[str, list[tuple[int, ...]]] = {}
    layers = peft_model.get_base_model().model.layers
    for name, part in (("lower", layers[0].mlp.gate_proj), ("last", layers[1].mlp.gate_proj)):
        part.base_layer.register_forward_hook(
            lambda _m, args, _output, name=name: seen.setdefault(name, []).append(tuple(args[0].shape))
        )
    batch = pad_batch(SAMPLES)
    _gradients(model, batch)
    model.sample_values(batch, "sum_logps")
    assert seen == {"lower": 2 * [(3, 21, 32)], "last": 2 * [(1, len(batch.labels.flat_T), 32)]}
    seen.clear()
    peft_model(batch.input_ids)  # what reads states at every position, as embeddings of rows do
    assert seen == {"lower": [(3, 21, 32)], "last": [(3, 21, 32)]}


def _hooks(module: nn.Module) -> list[int]:
    return [len(part._forward_hooks) + len(part._forward_pre_hooks) for part in module.modules()]


def test_a_closed_model_runs_everything_everywhere() -> None:
    peft_model = _model("llama")
    before = _hooks(peft_model)
    model = ScoringModel(peft_model, "cpu")
    assert model.labelled_positions.names and _hooks(peft_model) != before
    model.close()
    assert _hooks(peft_model) == before and model.labelled_positions.names == ()


def test_what_is_within_a_module_gets_what_it_gets() -> None:
    peft_model = _model("llama")
    positions = _found(peft_model.requires_grad_(False))
    held = [name for name in adapter_parameters(peft_model) if positions.holds(name)]
    parts = {name.split("layers.")[1].split(".lora")[0] for name in held}
    assert parts == {"1.self_attn.q_proj", "1.self_attn.o_proj", *(f"1.mlp.{w}_proj" for w in ("gate", "up", "down"))}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", ["llama", "experts", "capped logits"])
def test_rounding_hides_no_module(kind: str, dtype: torch.dtype) -> None:
    peft_model = _model(kind).to(dtype).requires_grad_(False)
    assert len(_found(peft_model).names) == len(MODELS[kind][1])


def test_a_pass_within_another_leaves_the_outer_one_s_positions() -> None:
    positions = LabelledPositions()
    outer, inner = pad_batch(SAMPLES), pad_batch(SAMPLES[:1])
    with positions.of(outer):
        with positions.of(inner):
            assert positions._batch is inner
        assert positions._batch is outer
    assert positions._batch is None


class Toy(nn.Module):
    """Sums over what comes before, a layer, and something of one's own behind it."""

    def __init__(self, behind: Callable[[Tensor], Tensor], within: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.layer, self.head = nn.Embedding(330, 8), Layer(within), nn.Linear(8, 330)
        self.behind = behind
        self.double().requires_grad_(False).eval()

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, input_ids: Tensor) -> Any:
        hidden_BSH = self.layer(self.embed(input_ids).cumsum(1))
        return SimpleNamespace(logits=self.head(self.behind(hidden_BSH)))


class Layer(nn.Module):
    """A linear map, and something of one's own before it."""

    def __init__(self, within: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.map, self.within = nn.Linear(8, 8), within

    def forward(self, hidden_BSH: Tensor) -> Tensor:
        output: Tensor = self.map(self.within(hidden_BSH))
        return output


def _same(states: Tensor) -> Tensor:
    return states


def _mixed(states: Tensor) -> Tensor:
    return states + states.cumsum(1)


def _mixed_without_gradient(states: Tensor) -> Tensor:
    return states + states.detach().cumsum(1)


def _mixed_where_large(states: Tensor) -> Tensor:
    """What the trial's states, and zeros in their place, are too small for."""
    return states + (states.detach().clamp(min=1e3) - 1e3).cumsum(1)


def _place(states: Tensor) -> Tensor:
    return states + torch.arange(states.shape[1], dtype=states.dtype)[:, None]


def _never_a_single_row(states: Tensor) -> Tensor:
    if len(states) == 1:
        raise ValueError("a row alone")
    return states


READ = "values or gradients are others without them"
REACHED = "gradients reach all of them"


@pytest.mark.parametrize(
    ("behind", "within", "names", "said"),
    [
        pytest.param(_same, _same, ("layer",), None, id="nothing"),
        pytest.param(_mixed, _same, (), REACHED, id="mixed behind"),
        pytest.param(_same, _mixed, ("layer.map",), None, id="mixed within"),
        pytest.param(_mixed_without_gradient, _same, (), READ, id="mixed behind, without a gradient"),
        pytest.param(_same, _mixed_without_gradient, (), READ, id="mixed within, without a gradient"),
        pytest.param(_mixed_where_large, _same, (), READ, id="mixed behind, where large"),
        pytest.param(_same, _place, (), READ, id="dependent on the place in the row"),
        pytest.param(_place, _same, ("layer",), None, id="dependent on the place behind"),
        pytest.param(_same, _never_a_single_row, (), "it cannot be tried: a row alone", id="an error"),
    ],
)
def test_states_that_may_be_read_are_computed(
    behind: Callable[[Tensor], Tensor],
    within: Callable[[Tensor], Tensor],
    names: tuple[str, ...],
    said: str | None,
    caplog: pytest.LogCaptureFixture,
) -> None:
    module, batch = Toy(behind, within), pad_batch(SAMPLES)
    expected_B = sample_values(module, batch, "sum_logps")
    with caplog.at_level(logging.INFO, logger="rose_ray.model.labelled_positions"):
        positions = _found(module)
    assert positions.names == names
    told = [f"states are computed where no loss reads them too: {said}"] if said else []
    assert [record.message for record in caplog.records] == told
    with positions.of(batch):
        torch.testing.assert_close(sample_values(module, batch, "sum_logps"), expected_B, rtol=1e-12, atol=0)
    assert (_hooks(module) == _hooks(Toy(behind, within))) == (not names)


def test_what_no_gradient_reaches_in_short_rows_runs_everywhere() -> None:
    class Compressing(Toy):
        """Adds a map of blocks of 16 tokens, of which short rows have none, so that zeros go back through it."""

        def __init__(self) -> None:
            super().__init__(_same, _same)
            self.block = nn.Linear(8, 8).double().requires_grad_(False)

        def forward(self, input_ids: Tensor) -> Any:
            embedded_BSH = self.embed(input_ids)
            whole = input_ids.shape[1] // 16 * 16
            blocks_B1H = self.block(embedded_BSH)[:, :whole].sum(1, keepdim=True)
            return SimpleNamespace(logits=self.head(self.layer(embedded_BSH.cumsum(1) + blocks_B1H)))

    module, batch = Compressing(), pad_batch(SAMPLES)
    assert batch.input_ids.shape[1] > 16
    expected_B = sample_values(module, batch, "sum_logps")
    positions = _found(module)
    assert positions.names == ("layer",)
    with positions.of(batch):
        torch.testing.assert_close(sample_values(module, batch, "sum_logps"), expected_B, rtol=1e-12, atol=0)


def test_partitioned_weights_and_models_without_embedding_are_left_alone() -> None:
    module = Toy(_same, _same)
    module.head.weight.ds_id = 1  # type: ignore[assignment]
    assert _found(module).names == ()
    module = Toy(_same, _same)
    module.get_input_embeddings = lambda: None  # type: ignore[method-assign, return-value, assignment]
    assert _found(module).names == ()
    unused = Toy(_same, _same)
    unused.get_input_embeddings = lambda: nn.Embedding(330, 8)  # type: ignore[method-assign]
    assert _found(unused).names == ()


def test_a_module_that_takes_long_rows_in_pieces_ends_the_pass() -> None:
    class Chunked(Toy):
        """Runs its layer over 16 tokens at a time."""

        def forward(self, input_ids: Tensor) -> Any:
            pieces = self.embed(input_ids).cumsum(1).split(16, dim=1)
            return SimpleNamespace(logits=self.head(torch.cat([self.layer(piece) for piece in pieces], dim=1)))

    module, batch = Chunked(_same, _same), pad_batch(SAMPLES)
    positions = _found(module)
    message = r"^Layer takes \[3, 16, 8\] of a batch of \[3, 21\] tokens, .* Lower model\.max_tokens\.$"
    with positions.of(batch), pytest.raises(ModelError, match=message):
        sample_values(module, batch, "sum_logps")


def test_short_memory_is_no_reason_to_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    peft_model = _model("llama")
    before = _hooks(peft_model), [p.requires_grad for p in peft_model.parameters()]

    def exhausted(*_args: object) -> None:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr("rose_ray.model.labelled_positions._silent_elsewhere", exhausted)
    with pytest.raises(torch.OutOfMemoryError):
        ScoringModel(peft_model, "cpu")
    assert (_hooks(peft_model), [p.requires_grad for p in peft_model.parameters()]) == before
    assert not any("forward" in vars(part) for part in peft_model.modules())
