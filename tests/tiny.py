"""Builders of small things: tokenizers, base models of random weights, records of a pool and of pairs.

Imports that take seconds stay inside the functions that need them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any, NamedTuple

import pyarrow as pa

if TYPE_CHECKING:
    from rose_ray.config.target import TargetConfig
    from rose_ray.data.tokenize import Sample
    from rose_ray.stages.score import ShardRows

_WORDS = (
    "water stone river green apple bread house light music paper seven table cloud garden letter winter "
    "summer coffee bridge mirror pencil window sugar lemon copper silver market ticket engine island"
)
WORDS = _WORDS.split()
UNUSUAL = ("Grüße aus Köln", "naïve café", "🙂 fine 👍🏽", "東京 is a city", "tabs\tand\nnew lines", "  spaces  ")

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\n' + message['content'] + eos_token + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)

ARCHITECTURES = ("llama", "qwen2", "qwen3", "mistral")


GROUPS = (WORDS[:3], WORDS[3:6], WORDS[6:9])
"""Answers keep to one of these: chosen ones to the first, rejected ones to the second."""


def sentence(random: Random, num_words: int, words: Sequence[str] = WORDS) -> str:
    """Words in random order."""
    return " ".join(random.choice(words) for _ in range(num_words))


def make_pool_rows(num_rows: int, seed: int = 0) -> list[dict[str, Any]]:
    """Records in the messages format: answers of 1 to 16 words, some with two turns, a system turn or odd text."""
    random = Random(seed)
    rows = []
    for number in range(num_rows):
        words = GROUPS[number % len(GROUPS)]
        messages = [
            {"role": "user", "content": f"Question {number}: {sentence(random, random.randint(1, 6))}?"},
            {"role": "assistant", "content": sentence(random, random.randint(1, 16), words)},
        ]
        if number % 5 == 1:
            messages.insert(0, {"role": "system", "content": sentence(random, 3)})
        if number % 5 == 2:
            messages += [
                {"role": "user", "content": "And then?"},
                {"role": "assistant", "content": sentence(random, 4, words)},
            ]
        if number % 5 == 3:
            messages[-1]["content"] += f" {UNUSUAL[number % len(UNUSUAL)]}"
        rows.append({"id": f"row-{number}", "source": "ab"[number % 2], "messages": messages})
    return rows


def make_pair_rows(num_pairs: int, seed: int = 1) -> list[dict[str, Any]]:
    """Records in the explicit pair format, of two subtasks in turn; the longer side is now one, now the other."""
    random = Random(seed)
    return [
        {
            "id": f"pair-{number}",
            "topic": ("first", "second")[number % 2],
            "prompt": f"Tell me about {sentence(random, 2)}.",
            "chosen": sentence(random, random.randint(2, 12), GROUPS[0]),
            "rejected": sentence(random, random.randint(2, 12), GROUPS[1]),
        }
        for number in range(num_pairs)
    ]


def digest(name: str) -> str:
    """A row id for a short name. Ids sort as their names do."""
    return name.encode().hex().ljust(32, "0")


def score_rows(
    shards: Iterable[ShardRows], banks: Sequence[pa.Table], rates: Sequence[float], target: TargetConfig
) -> ScoredRows:
    """One target's score table in memory."""
    from rose_ray.stages.score import TargetScorer, score_shards
    from rose_ray.stages.score_table import ScoreTable

    scorer = TargetScorer(banks, rates, target)
    with ScoreTable(scorer.subtasks, scorer.pairs) as table:
        score_shards(shards, [scorer], [table])
        table.settle()
        return ScoredRows(pa.concat_tables(table.scored()), pa.concat_tables(table.rejected()), scorer.subtasks)


class ScoredRows(NamedTuple):
    """A score table, the rows that have no score, and the names of the subtasks."""

    table: pa.Table
    rejected: pa.Table
    subtasks: list[str]


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Write records, one JSON object a line."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def byte_level_tokenizer(vocabulary_size: int = 360) -> Any:
    """A byte-level BPE tokenizer, as Llama 3 and Qwen have: spaces belong to the token that follows them."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=["<|pad|>", "<|begin|>", "<|end|>", "<|user|>", "<|assistant|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([sentence(Random(seed), 40) for seed in range(20)], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<|begin|>",
        eos_token="<|end|>",
        pad_token="<|pad|>",
        additional_special_tokens=["<|user|>", "<|assistant|>"],
        chat_template=CHAT_TEMPLATE,
    )


def tiny_config(architecture: str, vocabulary_size: int, **settings: Any) -> Any:
    """Configuration of a two-layer model with grouped attention heads.

    Weights are drawn wide (standard deviation 0.15), since attention of models drawn as usual is all but uniform at
    this width, and gradients through it would be too small to test. Mistral attends to 8 tokens only, and
    Granite divides its logits.
    """
    from transformers import GraniteConfig, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

    kinds: dict[str, tuple[Any, dict[str, Any]]] = {
        "llama": (LlamaConfig, {}),
        "qwen2": (Qwen2Config, {"tie_word_embeddings": True}),
        "qwen3": (Qwen3Config, {"head_dim": 8}),
        "mistral": (MistralConfig, {"sliding_window": 8, "head_dim": 8}),
        "granite": (GraniteConfig, {"logits_scaling": 3.0}),
    }
    kind, own = kinds[architecture]
    common = {
        "vocab_size": vocabulary_size,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.15,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    return kind(**{**common, **own, **settings})


def save_base(folder: Path, config: Any, tokenizer: Any, seed: int = 0) -> str:
    """Write a base model of random float32 weights and its tokenizer; return the folder."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):  # drawn as zeros, which would hide a forgotten bias
                torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def make_samples(lengths: Sequence[int], vocabulary_size: int, seed: int = 0) -> list[Sample]:
    """Samples of random tokens; those that carry loss lie in one or two stretches."""
    from rose_ray.data.tokenize import Sample

    random = Random(seed)
    samples = []
    for length in lengths:
        start = random.randint(1, max(1, length // 2))
        mask = [place >= start for place in range(length)]
        if length > 12:
            gap = start + (length - start) // 2
            mask[gap : gap + 3] = [False] * 3
        samples.append(Sample([random.randrange(5, vocabulary_size) for _ in range(length)], mask))
    return samples


def sentencepiece_like_tokenizer(words: Sequence[str] = ("good", "answer", "yes")) -> Any:
    """A BPE tokenizer over characters, as Llama 2 has: spaces written as a mark, bytes where a character is unknown."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<unk>", "<s>", "</s>"]
    characters = "▁abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ<|>/:?.,!'"
    pieces = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), *characters]
    merges = []
    for word in words:
        for size in range(1, len(word) + 1):
            merges.append(("▁" + word[: size - 1], word[size - 1]))
            pieces.append("▁" + word[:size])
    vocabulary = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
    model = models.BPE(
        vocab=vocabulary, merges=list(dict.fromkeys(merges)), byte_fallback=True, unk_token="<unk>", fuse_unk=True
    )
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(special)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<unk>"
    )


def as_pickle(folder: Path) -> None:
    """Let a model's folder hold its weights in PyTorch's own format alone."""
    import torch
    from safetensors.torch import load_file

    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
