"""Base model, tokenizer and template: loaded, told apart, refused."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken
from transformers import Gemma2Config, Gemma2ForCausalLM

from rose_ray.config.model import DeepSpeedConfig, LoraConfig, ModelConfig
from rose_ray.data.chat import TULU_TEMPLATE
from rose_ray.errors import ModelError
from rose_ray.model.base import attach_adapter, base_digest, load_base
from rose_ray.model.layout import adapter_parameters, layout_of
from rose_ray.model.tokenizer import chat_template, load_tokeniser, load_tokenizer, resolve_base
from tests.tiny import CHAT_TEMPLATE, as_pickle


@pytest.fixture
def copied(base_folder: str, tmp_path: Path) -> Path:
    return Path(shutil.copytree(base_folder, tmp_path / "base"))


def _config(base: Any, **settings: Any) -> ModelConfig:
    return ModelConfig(base=str(base), **settings)


def _edit_json(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_a_folder_is_its_absolute_path(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(copied.parent)
    assert resolve_base(_config("base")) == str(copied)


def test_a_name_that_is_nowhere_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match=r"model.base: 'no/such-model' is no folder here, and the hub gave"):
        resolve_base(_config("no/such-model"))


def test_the_digest_stands_for_weights_and_configuration(copied: Path, base_folder: str) -> None:
    first = base_digest(str(copied))
    assert first == base_digest(base_folder)
    _edit_json(copied / "tokenizer_config.json", added=1)
    assert base_digest(str(copied)) == first
    _edit_json(copied / "config.json", rms_norm_eps=1e-3)
    second = base_digest(str(copied))
    weights = copied / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert len({first, second, base_digest(str(copied))}) == 3
    weights.unlink()
    with pytest.raises(ModelError, match=r"no \*.safetensors file"):
        base_digest(str(copied))


def test_weights_are_not_read_from_a_pickle(copied: Path) -> None:
    as_pickle(copied)
    with pytest.raises(ModelError, match=r"cannot load it as a causal language model: .*model\.safetensors"):
        load_base(_config(copied))


def test_a_tokenizer_without_padding_uses_its_end_token(copied: Path) -> None:
    assert load_tokenizer(_config(copied)).pad_token == "<|pad|>"
    _edit_json(copied / "tokenizer_config.json", pad_token=None)
    assert load_tokenizer(_config(copied)).pad_token == "<|end|>"


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot load its tokenizer"):
        load_tokenizer(_config(tmp_path))


def test_the_three_kinds_of_template(copied: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(_config(copied))
    own = chat_template(_config(copied), tokenizer)
    assert (own.source, own.bos_token, own.eos_token) == (CHAT_TEMPLATE, "<|begin|>", "<|end|>")
    assert set(own.end_tokens) == {"<|pad|>", "<|begin|>", "<|end|>", "<|user|>", "<|assistant|>"}
    assert chat_template(_config(copied, template="tulu"), tokenizer).source == TULU_TEMPLATE
    file = tmp_path / "my.jinja"
    file.write_text("{{ messages }}", encoding="utf-8")
    assert chat_template(_config(copied, template=str(file)), tokenizer).source == "{{ messages }}"


def test_tulu_begins_as_the_tokenizer_itself_would(copied: Path) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = load_tokenizer(_config(copied))
    template = _config(copied, template="tulu")
    assert chat_template(template, tokenizer).bos_token == ""
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|begin|> $A", special_tokens=[("<|begin|>", tokenizer.bos_token_id)]
    )
    assert chat_template(template, tokenizer).bos_token == "<|begin|>"


def test_templates_that_are_not_there_are_refused(copied: Path) -> None:
    tokenizer = load_tokenizer(_config(copied))
    tokenizer.chat_template = None
    with pytest.raises(
        ModelError, match=r"model.template: tokenizer, but the tokenizer of '.*base' has no chat template"
    ):
        chat_template(_config(copied), tokenizer)
    with pytest.raises(ModelError, match=r"'no.jinja' is neither tokenizer nor tulu nor a readable file: No such file"):
        chat_template(_config(copied, template="no.jinja"), tokenizer)


def test_tulu_needs_an_end_token(copied: Path) -> None:
    tokenizer = load_tokenizer(_config(copied))
    tokenizer.eos_token = None
    assert chat_template(_config(copied), tokenizer).eos_token == ""
    with pytest.raises(ModelError, match=r"model.template: tulu ends answers with the end token, .*base' has none"):
        chat_template(_config(copied, template="tulu"), tokenizer)


def test_the_tokeniser_has_the_configured_limit_and_tail(base_folder: str) -> None:
    tokeniser = load_tokeniser(_config(base_folder, max_tokens=99, loss_on_turn_tail=True))
    assert tokeniser.max_tokens == 99 and tokeniser.template.loss_on_turn_tail


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_base_is_frozen_in_its_type_and_the_adapter_is_float32(dtype: str, base_folder: str) -> None:
    base = load_base(_config(base_folder, dtype=dtype))
    assert {p.dtype for p in base.parameters()} == {getattr(torch, dtype)}
    assert not any(p.requires_grad for p in base.parameters()) and base.config.use_cache is False  # type: ignore[union-attr]
    lora = LoraConfig(rank=2, alpha=6.0, target_modules=["q_proj"])
    model = attach_adapter(base, lora, dropout=0.25)
    adapter = adapter_parameters(model)
    assert {p.dtype for p in adapter.values()} == {torch.float32}
    assert all(p.requires_grad == ("lora_" in name) for name, p in model.named_parameters())
    layer = base.get_submodule("model.layers.0.self_attn.q_proj")
    assert layer.scaling["default"] == 3.0 and layer.lora_dropout["default"].p == 0.25  # type: ignore[index,union-attr]


def test_a_float64_model_has_a_float64_adapter(base_folder: str) -> None:
    model = attach_adapter(load_base(_config(base_folder), dtype=torch.float64), LoraConfig(rank=2), dropout=0.0)
    assert {p.dtype for p in model.parameters()} == {torch.float64}


def test_the_meta_device_reads_no_weights(copied: Path) -> None:
    (copied / "model.safetensors").unlink()
    assert {p.device.type for p in load_base(_config(copied), device="meta").parameters()} == {"meta"}
    with pytest.raises(ModelError, match="cannot load it as a causal language model"):
        load_base(_config(copied))


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_a_model_without_fused_attention_is_told_what_to_set(device: str, tmp_path: Path) -> None:
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "head_dim": 8, "vocab_size": 330}
    made = Gemma2ForCausalLM(Gemma2Config(num_attention_heads=2, num_key_value_heads=1, **shape))
    made.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"do not run with torch's fused attention\. Set model\.attention: eager\.$"):
        load_base(_config(tmp_path), device=device)
    loaded: Any = load_base(_config(tmp_path, attention="eager"), device=device)
    assert loaded.config._attn_implementation == "eager"


def test_lora_targets_that_the_model_lacks_are_named(base_folder: str) -> None:
    base = load_base(_config(base_folder), device="meta")
    with pytest.raises(ModelError, match=r"no linear layer \['c_attn', 'wq'\]; it has \['down_proj', .*'v_proj'\]"):
        attach_adapter(base, LoraConfig(target_modules=["wq", "q_proj", "c_attn"]), dropout=0.0)


def test_special_tokens_without_a_name_end_answers_too(base_folder: Any, tmp_path: Any) -> None:
    model = ModelConfig(base=str(base_folder), dtype="float32")
    tokenizer = load_tokenizer(model)
    tokenizer.add_tokens([AddedToken("<|eot|>", special=True)])
    assert "<|eot|>" in chat_template(model, tokenizer).end_tokens


def test_a_base_whose_files_lack_weights_is_refused(base_folder: Any, tmp_path: Any) -> None:
    folder = tmp_path / "headless"
    shutil.copytree(base_folder, folder)
    weights = load_file(folder / "model.safetensors")
    lost = next(name for name in weights if "q_proj" in name)
    save_file({name: tensor for name, tensor in weights.items() if name != lost}, folder / "model.safetensors")
    with pytest.raises(ModelError, match="1 weights are missing"):
        load_base(ModelConfig(base=str(folder), dtype="float32"))


def test_a_quantised_base_has_the_layout_of_a_whole_one(wide_base: str) -> None:
    lora = LoraConfig(rank=2, target_modules=["q_proj", "down_proj"])
    packed = load_base(_config(wide_base, dtype="bfloat16", quantized="nf4"))
    layers = {name: p for name, p in packed.named_parameters() if name.endswith("_proj.weight")}
    assert len(layers) == 14 and {p.dtype for p in layers.values()} == {torch.uint8}
    assert packed.get_submodule("lm_head").weight.dtype == torch.bfloat16
    assert not any(p.requires_grad for p in packed.parameters())
    model = attach_adapter(packed, lora, dropout=0.0)
    assert {p.dtype for p in adapter_parameters(model).values()} == {torch.float32}
    for quantized in ("none", "nf4"):
        meta = load_base(_config(wide_base, quantized=quantized), device="meta")
        assert layout_of(model) == layout_of(attach_adapter(meta, lora, dropout=0.0))


def test_a_quantised_base_without_its_library_is_refused(wide_base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(
        ModelError, match=r"^model.quantized: nf4 needs bitsandbytes: pip install 'rose-ray\[quantized\]'"
    ):
        load_base(_config(wide_base, quantized="nf4"))
    load_base(_config(wide_base, quantized="nf4"), device="meta")


def test_a_quantised_base_of_incomplete_files_is_refused(wide_base: str, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(wide_base, tmp_path / "base"))
    weights = load_file(copied / "model.safetensors")
    lost = next(name for name in weights if "q_proj" in name)
    save_file({name: tensor for name, tensor in weights.items() if name != lost}, copied / "model.safetensors")
    with pytest.raises(ModelError, match="1 weights are missing"):
        load_base(_config(copied, quantized="nf4"))


def test_packed_weights_are_not_partitioned(wide_base: str) -> None:
    with pytest.raises(ValueError, match=r"quantized: nf4 with deepspeed.zero_stage: 3 is not supported"):
        _config(wide_base, quantized="nf4", deepspeed=DeepSpeedConfig(zero_stage=3))


def test_layers_that_the_cpu_would_unpack_wrongly_are_refused(base_folder: str) -> None:
    with pytest.raises(
        ModelError,
        match=r"^model.quantized: nf4 .* multiple of 64; .* has 14 others, such as model.layers.0.self_attn.q_proj",
    ):
        load_base(_config(base_folder, quantized="nf4"))


def test_on_a_gpu_a_quantised_base_is_packed_where_the_process_computes(
    wide_base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}

    def from_pretrained(folder: str, **settings: Any) -> None:
        asked.update(settings)
        raise OSError("no GPU here")

    monkeypatch.setattr("torch.cuda.current_device", lambda: 3)
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", from_pretrained)
    with pytest.raises(ModelError, match="no GPU here"):
        load_base(_config(wide_base, quantized="nf4"), device="cuda")
    packing = asked["quantization_config"]
    assert asked["device_map"] == {"": 3} and asked["dtype"] == packing.bnb_4bit_compute_dtype == torch.bfloat16
    assert (packing.load_in_4bit, packing.bnb_4bit_quant_type, packing.bnb_4bit_use_double_quant) == (
        True,
        "nf4",
        False,
    )
