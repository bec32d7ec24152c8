"""Each quirk of the released code that the preset ``rose_official`` reproduces."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from rose_ray.config.job import JobConfig
from rose_ray.config.load import parse_config
from rose_ray.config.model import ModelConfig
from rose_ray.config.target import PairInput, TargetConfig
from rose_ray.data.conversation import Conversation, Message
from rose_ray.data.official import MAX_PROMPT_TOKENS, encode_official_pair
from rose_ray.data.preferences import PreferencePair
from rose_ray.errors import ModelError, PairError
from rose_ray.kernels.adam import AdamState, adam_direction
from rose_ray.kernels.projection import make_projection
from rose_ray.model.tokenizer import load_tokeniser
from rose_ray.stages.stored_features import normalized_features

END = 2
FLOAT32_RELATIVE = 1e-6
"""A few operations in float32 (6e-8 each)."""


def _pair(prompt: str = "\n\nHuman: water?\n\nAssistant:", chosen: str = " stone", rejected: str = " river bread"):
    return PreferencePair(
        "p", "t", (Message("user", "water?"),), chosen.strip(), rejected.strip(), prompt, chosen, rejected
    )


def _ids(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def _config(**settings: Any) -> JobConfig:
    content = {
        "workspace": "w",
        "preset": "rose_official",
        "model": {"base": "base"},
        "pool": {"inputs": [{"files": ["pool.jsonl"]}]},
        "targets": [{"name": "t", "pairs": [{"files": ["pairs.json"]}]}],
    }
    return parse_config({**content, **settings})


def test_the_raw_transcript_is_the_prompt(tokenizer: Any) -> None:
    chosen, _ = encode_official_pair(_pair(), tokenizer, max_tokens=2048, cut="keep_start")
    assert tokenizer.decode(chosen.input_ids) == "\n\nHuman: water?\n\nAssistant:<|end|> stone<|end|>"


def test_a_tokenizer_without_an_end_token_is_refused(tokenizer: Any) -> None:
    endless = copy.deepcopy(tokenizer)
    endless.eos_token = None
    with pytest.raises(ModelError, match=r"rose_official puts the end token .* has none \(eos_token\)"):
        encode_official_pair(_pair(), endless, max_tokens=2048, cut="keep_start")


def test_the_end_token_follows_the_prompt_too(tokenizer: Any) -> None:
    for sample in encode_official_pair(_pair(), tokenizer, max_tokens=2048, cut="keep_start"):
        prompt = _ids(tokenizer, _pair().raw_prompt)
        assert sample.input_ids[: len(prompt) + 1] == [*prompt, END]
        assert not any(sample.loss_mask[: len(prompt) + 1])


def test_there_is_no_beginning_token(tokenizer: Any) -> None:
    for sample in encode_official_pair(_pair(), tokenizer, max_tokens=2048, cut="keep_start"):
        assert tokenizer.bos_token_id not in sample.input_ids


def test_answers_carry_loss_up_to_their_end_token(tokenizer: Any) -> None:
    for sample, answer in zip(
        encode_official_pair(_pair(), tokenizer, max_tokens=2048, cut="keep_start"),
        (" stone", " river bread"),
        strict=True,
    ):
        labelled = [token for token, carries in zip(sample.input_ids, sample.loss_mask, strict=True) if carries]
        assert labelled == [*_ids(tokenizer, answer), END]


def test_an_end_token_that_is_there_already_is_not_repeated(tokenizer: Any) -> None:
    pair = _pair(chosen=" stone<|end|> more", rejected=" river<|end|>")
    samples = encode_official_pair(pair, tokenizer, max_tokens=2048, cut="keep_start")
    assert [sample.input_ids.count(END) for sample in samples] == [2, 2]  # the prompt's and the answer's own
    assert samples[0].input_ids[-1] != END


def test_a_prompt_that_fits_is_not_cut_however_long(tokenizer: Any) -> None:
    pair = _pair(prompt="water " * 400)
    chosen, rejected = encode_official_pair(pair, tokenizer, max_tokens=2048, cut="keep_start")
    assert chosen.loss_mask.index(True) == len(_ids(tokenizer, pair.raw_prompt)) + 1 > MAX_PROMPT_TOKENS
    assert chosen.num_tokens_cut == rejected.num_tokens_cut == 0


@pytest.mark.parametrize("cut", ["keep_start", "keep_end"])
def test_a_prompt_that_does_not_fit_is_cut_to_256_tokens(cut: Any, tokenizer: Any) -> None:
    pair = _pair(prompt=" ".join(["water stone river green apple"] * 80))
    prompt = [*_ids(tokenizer, pair.raw_prompt), END]
    kept = prompt[:MAX_PROMPT_TOKENS] if cut == "keep_start" else prompt[-MAX_PROMPT_TOKENS:]
    for sample, answer in zip(
        encode_official_pair(pair, tokenizer, max_tokens=300, cut=cut),
        (pair.raw_chosen, pair.raw_rejected),
        strict=True,
    ):
        assert sample.input_ids == [*kept, *_ids(tokenizer, answer), END]
        assert sample.loss_mask.index(True) == MAX_PROMPT_TOKENS == 256
        assert sample.num_tokens_cut == len(prompt) - MAX_PROMPT_TOKENS


def test_the_longer_answer_decides_whether_the_prompt_is_cut(tokenizer: Any) -> None:
    pair = _pair(prompt="water " * 280, chosen=" stone", rejected=" river" * 40)
    chosen, _ = encode_official_pair(pair, tokenizer, max_tokens=300, cut="keep_start")
    assert chosen.loss_mask.index(True) == MAX_PROMPT_TOKENS


def test_answers_are_cut_to_what_the_prompt_s_256_tokens_leave(tokenizer: Any) -> None:
    pair = _pair(prompt="water " * 300, chosen=" stone", rejected=" river" * 40)
    chosen, rejected = encode_official_pair(pair, tokenizer, max_tokens=270, cut="keep_start")
    lengths = [len(_ids(tokenizer, text)) + 1 for text in (pair.raw_prompt, pair.raw_chosen, pair.raw_rejected)]
    assert rejected.num_labelled_tokens == 270 - MAX_PROMPT_TOKENS
    assert rejected.num_tokens_cut == lengths[0] + lengths[2] - 270
    assert chosen.num_labelled_tokens == lengths[1]


def test_no_room_for_an_answer_is_refused(tokenizer: Any) -> None:
    with pytest.raises(PairError, match=r"pair p: model.max_tokens 256 leaves no room behind 256 prompt tokens"):
        encode_official_pair(_pair(prompt="water " * 300), tokenizer, max_tokens=256, cut="keep_start")


def test_adam_is_the_released_formula_whatever_the_optimizer_had() -> None:
    generator = torch.Generator().manual_seed(0)
    grads, m = torch.randn(4, 3, 2, generator=generator), torch.randn(3, 2, generator=generator)
    v = torch.rand(3, 2, generator=generator) * 1e-9
    found = adam_direction(grads, m, v, AdamState(99, 0.5, 0.5, 1e-3), _config().gradients.adam)
    expected = (0.9 * m + 0.1 * grads) / torch.sqrt(0.999 * v + 0.001 * grads**2 + 1e-8)
    torch.testing.assert_close(found.direction_B, expected, rtol=FLOAT32_RELATIVE, atol=0)


def test_the_projection_is_rademacher_with_8192_rows_and_seed_0() -> None:
    settings = _config().gradients.projection
    assert (settings.kind, settings.dim, settings.seed) == ("rademacher", 8192, 0)
    projection = make_projection(settings.kind, settings.dim, settings.seed, 5)
    columns = torch.zeros(5, 8192)
    projection.add(columns, 0, torch.eye(5))
    assert set((columns * 8192**0.5).round(decimals=4).unique().tolist()) == {-1.0, 1.0}


def test_features_are_normalised_by_their_projected_length() -> None:
    assert _config().targets[0].normalize == "projected"
    vectors = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
    feature = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), 4)
    table = pa.table({"feature": feature, "norm": pa.array([1.0, 2.0, 3.0])}).replace_schema_metadata({"dim": "4"})
    lengths = np.linalg.norm(normalized_features(table, "projected").restored(), axis=1)
    np.testing.assert_allclose(lengths, 1, rtol=FLOAT32_RELATIVE)


def test_the_pool_goes_through_the_template_of_less_and_the_newline_carries_loss(base_folder: str) -> None:
    settings = _config().model
    assert (settings.template, settings.loss_on_turn_tail) == ("tulu", True)
    model = ModelConfig(base=base_folder, template=settings.template, loss_on_turn_tail=settings.loss_on_turn_tail)
    tokeniser = load_tokeniser(model)
    sample = tokeniser.encode(Conversation((Message("user", "water"), Message("assistant", "stone"))))
    assert tokeniser.tokenizer.decode(sample.input_ids) == "<|user|>\nwater\n<|assistant|>\nstone<|end|>\n"
    labelled = [token for token, carries in zip(sample.input_ids, sample.loss_mask, strict=True) if carries]
    assert tokeniser.tokenizer.decode(labelled) == "stone<|end|>\n"


def test_pairs_are_encoded_officially_then_max_and_top_k() -> None:
    target = _config().targets[0]
    assert (target.objective, target.encoding, target.aggregation) == ("rose", "rose_official", "max")
    assert (target.selection.method, target.selection.budget) == ("top_k", ("fraction", 0.05))
    assert target.official_cut == "keep_start"


def test_what_is_set_wins_over_the_preset() -> None:
    config = _config(
        model={"base": "base", "template": "tokenizer"},
        targets=[{"name": "hh", "pairs": [{"files": ["hh.json"]}], "official_cut": "keep_end", "normalize": "exact"}],
        gradients={"projection": {"dim": 64}},
    )
    assert config.model.template == "tokenizer" and config.model.loss_on_turn_tail
    assert (config.targets[0].official_cut, config.targets[0].normalize) == ("keep_end", "exact")
    assert config.gradients.projection.dim == 64 and config.gradients.projection.kind == "rademacher"


def test_without_the_preset_nothing_of_it_applies() -> None:
    config = _config(preset=None)
    assert config.targets[0] == TargetConfig(name="t", pairs=[PairInput(files=["pairs.json"])])
    assert (config.gradients.adam, config.targets[0].encoding, config.model.template) == ("torch", "chat", "tokenizer")
