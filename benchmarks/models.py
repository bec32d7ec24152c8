"""Models of random weights, samples, and moments for the benchmarks."""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from rose_ray.config.gradients import AdamMode
from rose_ray.data.chat import ChatTemplate
from rose_ray.data.conversation import parse_conversation
from rose_ray.data.tokenize import Sample, Tokeniser
from rose_ray.kernels.adam import AdamState, common_direction
from rose_ray.model.attention import attend_short_rows
from rose_ray.model.checkpoint import Checkpoint, OptimizerState
from rose_ray.model.layout import ParameterLayout, layout_of

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]


@dataclass(frozen=True)
class Size:
    """Shape of a Llama."""

    hidden: int
    layers: int
    intermediate: int
    heads: int
    vocabulary: int


SIZES = {
    "small": Size(128, 2, 344, 4, 4096),
    "base": Size(256, 4, 688, 4, 8192),
    "large": Size(512, 6, 1376, 8, 16384),
    "1b": Size(2048, 16, 8192, 32, 128256),
    "7b": Size(4096, 32, 11008, 32, 32000),
}


def make_model(
    size: Size, rank: int, dtype: torch.dtype, *, adapter: torch.dtype, device: str = "cpu", short_rows: bool = False
) -> nn.Module:
    """Return a PEFT model of random weights, its B matrices not zero; the same weights for the same arguments.

    Args:
        size: Shape.
        rank: Of the LoRA matrices on q, k, v, o.
        dtype: Of the base.
        adapter: Of the adapter: float32 as PEFT trains it, or the base's as it is scored.
        device: Where it is made.
        short_rows: Short rows' attention as jobs run it in bfloat16 on a CPU, instead of transformers' own.
    """
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        max_position_embeddings=4096,
        attn_implementation="sdpa",  # type: ignore[call-arg]  # taken by the class it derives from
        use_cache=False,
    )
    with torch.device(device):
        base: Any = LlamaForCausalLM(config)
        base = base.to(dtype)
    if short_rows:
        attend_short_rows(base)
    lora = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=TARGETS, task_type="CAUSAL_LM")
    model: nn.Module = get_peft_model(base, lora)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.02)
            parameter.data = parameter.data.to(adapter)
    return model.to(device).eval()


def make_samples(number: int, vocabulary: int, *, length: int | None = None, seed: int = 0) -> list[Sample]:
    """Return samples of about 155 tokens (log-normal, at most 1024), or of one length; the later half is labelled."""
    random = Random(seed)
    lengths = [length or min(1024, max(16, round(random.lognormvariate(4.75, 0.75)))) for _ in range(number)]
    return [
        Sample([random.randrange(vocabulary) for _ in range(size)], [place >= size // 2 for place in range(size)])
        for size in lengths
    ]


def pool_samples(pool: Path, model: Path, number: int) -> list[Sample]:
    """Return the samples of ``number`` rows of a real pool, every so many-th, in a real tokenizer.

    Args:
        pool: Gzipped JSONL with a conversation under ``messages``.
        model: Folder with tokenizer and chat template.
        number: How many.
    """
    tokenizer = AutoTokenizer.from_pretrained(model)
    template = ChatTemplate(
        source=tokenizer.chat_template,
        bos_token=tokenizer.bos_token or "",
        eos_token=tokenizer.eos_token or "",
        end_tokens=tuple(tokenizer.all_special_tokens),
    )
    tokeniser = Tokeniser(tokenizer, template, 1024)
    with gzip.open(pool, "rt", encoding="utf-8") as file:
        records = [json.loads(line) for line in file]
    step = max(1, len(records) // number)
    texts = [json.dumps({"messages": record["messages"], "tools": None}) for record in records[::step][:number]]
    return [tokeniser.encode(parse_conversation(text)) for text in texts]


def shared_direction(
    layout: ParameterLayout,
    exp_avg: Mapping[str, Tensor],
    exp_avg_sq: Mapping[str, Tensor],
    state: AdamState,
    adam: AdamMode = "torch",
) -> Tensor:
    """Return [P], the part of the direction that all rows of a checkpoint have in common."""
    parts = [common_direction(exp_avg[name], exp_avg_sq[name], state, adam) for name, _ in layout.shapes]
    return torch.cat([part.flatten() for part in parts if part is not None])


def make_checkpoint(model: nn.Module, seed: int = 0) -> Checkpoint:
    """Return the model's adapter with moments of the size that LoRA training leaves."""
    layout = layout_of(model)
    torch.manual_seed(seed)

    def drawn(scale: float) -> dict[str, Tensor]:
        return {name: scale * torch.randn(shape) for name, shape in layout.shapes}

    second = {name: tensor.square() for name, tensor in drawn(1e-4).items()}
    state = OptimizerState(100, 1e-4, 0.9, 0.999, 1e-8, 1.0, 1)
    adapter = {
        name.replace(".default", ""): parameter.detach().float().cpu()
        for name, parameter in model.named_parameters()
        if "lora_" in name
    }
    return Checkpoint("checkpoint-1", adapter, drawn(1e-4), second, state)
