"""A tiny Llama and its tokenizer, trained from scratch on drafts of every family in a few seconds."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from random import Random

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging as progress

from rose_ray.data.batches import length_batches
from rose_ray.demo.families import FAMILIES, OPPOSED_FAMILY, REWARDED_FAMILY, Exchange, mixed_manners
from rose_ray.demo.vocabulary import Task

BEGIN, END, PADDING = "<|begin|>", "<|end|>", "<|pad|>"
ROLE_TOKENS = ("<|system|>", "<|user|>", "<|assistant|>")

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\n' + message['content'] + eos_token + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)

VOCABULARY_SIZE = 1000
HIDDEN_SIZE = 64
NUM_LAYERS = 2
NUM_HEADS = 4
MAX_POSITIONS = 256

NUM_DRAFTS = 4000
MAX_DRAFT_TOKENS = 120
MAX_BATCH_TOKENS = 2048
NUM_EPOCHS = 2
PEAK_LEARNING_RATE = 4e-3
WARMUP_FRACTION = 0.05
MAX_GRAD_NORM = 1.0


def draft_corpus(seed: int, tasks: Sequence[Task], num_drafts: int = NUM_DRAFTS) -> list[Exchange]:
    """Draw what the base model learns from: every family in equal parts, with lengths as they come.

    Courteous and dismissive sentences come mixed within an answer, see :func:`mixed_manners`.
    """
    rng = Random(f"corpus {seed}")
    mixed = dict.fromkeys((REWARDED_FAMILY, OPPOSED_FAMILY), mixed_manners)
    families = list({**FAMILIES, **mixed}.values())
    return [families[i % len(families)](rng, rng.choice(tasks)) for i in range(num_drafts)]


def train_tokenizer(exchanges: Iterable[Exchange]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer with begin, end, padding and role tokens and a chat template.

    It adds no token by itself: the chat template writes all of them.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=[PADDING, BEGIN, END, *ROLE_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator((text for e in exchanges for text in (e.prompt, e.answer)), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=BEGIN,
        eos_token=END,
        pad_token=PADDING,
        additional_special_tokens=list(ROLE_TOKENS),
        chat_template=CHAT_TEMPLATE,
        model_max_length=MAX_POSITIONS,
    )


def chat_text(exchange: Exchange) -> str:
    """Return what :data:`CHAT_TEMPLATE` makes of one prompt and its answer."""
    return f"{BEGIN}<|user|>\n{exchange.prompt}{END}\n<|assistant|>\n{exchange.answer}{END}\n"


def train_base(tokenizer: PreTrainedTokenizerFast, exchanges: Sequence[Exchange], seed: int) -> LlamaForCausalLM:
    """Train a Llama of about 0.2 million float32 parameters to predict every token of the corpus.

    Runs on one thread and leaves the global random state and thread count as they were. Same arguments, same weights
    on the same machine.
    """
    encoded = [tokenizer.encode(chat_text(e), add_special_tokens=False) for e in exchanges]
    rows = [ids for ids in encoded if len(ids) <= MAX_DRAFT_TOKENS]
    batches = length_batches([len(ids) for ids in rows], MAX_BATCH_TOKENS)
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = LlamaForCausalLM(_architecture(tokenizer))
        shuffled = Random(f"order {seed}")
        order = [batch for _ in range(NUM_EPOCHS) for batch in shuffled.sample(batches, len(batches))]
        _train(model, [_padded([rows[i] for i in batch]) for batch in order])
    finally:
        torch.set_num_threads(num_threads)
    model.eval()
    return model


def save_base(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write both so that ``AutoModelForCausalLM`` and ``AutoTokenizer`` load them from ``folder``."""
    shown = progress.is_progress_bar_enabled()
    progress.disable_progress_bar()  # one small file
    try:
        model.save_pretrained(folder)
    finally:
        if shown:
            progress.enable_progress_bar()
    tokenizer.save_pretrained(folder)


def _architecture(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=HIDDEN_SIZE,
        intermediate_size=3 * HIDDEN_SIZE,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=NUM_HEADS,
        num_key_value_heads=NUM_HEADS,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _train(model: LlamaForCausalLM, batches: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LEARNING_RATE, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        PEAK_LEARNING_RATE,
        total_steps=len(batches),
        pct_start=WARMUP_FRACTION,
        cycle_momentum=False,
    )
    model.train()
    for input_ids, labels in batches:
        loss = model(input_ids=input_ids, attention_mask=(labels >= 0).long(), labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
        optimizer.step()
        schedule.step()


def _padded(rows: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    length = max(len(ids) for ids in rows)
    input_ids = torch.zeros(len(rows), length, dtype=torch.int64)
    labels = torch.full_like(input_ids, -100)
    for row, ids in enumerate(rows):
        input_ids[row, : len(ids)] = labels[row, : len(ids)] = torch.tensor(ids)
    return input_ids, labels
