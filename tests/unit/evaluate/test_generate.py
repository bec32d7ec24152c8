"""Greedy answers against one token at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rose_ray.config.model import LoraConfig, ModelConfig
from rose_ray.data.conversation import Message
from rose_ray.evaluate.fine_tune import fresh_model
from rose_ray.evaluate.generate import greedy_answers
from rose_ray.model.tokenizer import load_tokeniser


@pytest.mark.parametrize("max_batch_tokens", [1, 10_000])
def test_the_likeliest_token_each_time(base_folder: str, max_batch_tokens: int) -> None:
    settings = ModelConfig(base=base_folder, dtype="float32", max_tokens=64)
    tokeniser: Any = load_tokeniser(settings)
    model: Any = fresh_model(settings, LoraConfig(rank=2, alpha=4.0, target_modules=["q_proj"]), 0)
    texts = ["Why?", "Tell me about water and stone.", "A green apple"]
    prompts = [tokeniser.encode_prompt([Message("user", text)]) for text in texts]
    found = greedy_answers(model, tokeniser, prompts, max_new_tokens=6, max_batch_tokens=max_batch_tokens)
    model.eval()
    ends = {tokeniser.tokenizer.convert_tokens_to_ids(token) for token in tokeniser.template.end_tokens}
    for prompt, answer in zip(prompts, found, strict=True):
        ids = list(prompt)
        for _ in range(6):
            with torch.no_grad():
                ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] in ends | {tokeniser.tokenizer.eos_token_id}:
                break
        assert answer == tokeniser.tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True).strip()


def test_a_long_prompt_keeps_its_end(base_folder: str) -> None:
    tokeniser = load_tokeniser(ModelConfig(base=base_folder, dtype="float32", max_tokens=10))
    ids = tokeniser.encode_prompt([Message("user", "water " * 50)])
    whole = load_tokeniser(ModelConfig(base=base_folder, dtype="float32")).encode_prompt(
        [Message("user", "water " * 50)]
    )
    assert ids == whole[-10:]
