"""The demo's pool, pairs and base model are what its printed figures rely on."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from random import Random

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rose_ray.config.load import load_config
from rose_ray.data.conversation import Message
from rose_ray.data.tokenize import Sample, Tokeniser
from rose_ray.demo.base_model import chat_text, draft_corpus, train_base, train_tokenizer
from rose_ray.demo.compare import FineTuning, compare_selection
from rose_ray.demo.families import FAMILIES, OPPOSED_FAMILY, REWARDED_FAMILY, Exchange
from rose_ray.demo.make import (
    HELD_OUT_PER_SUBTASK,
    MALFORMED_LINES,
    NUM_DUPLICATES,
    PAIRS_PER_SUBTASK,
    ROWS_PER_FAMILY,
    SUBTASKS,
    DemoPaths,
    make_demo,
    pool_lines,
    split_tasks,
)
from rose_ray.demo.matching import answer_lengths, drafts_of_length
from rose_ray.demo.vocabulary import ROOMS, all_tasks
from rose_ray.model.tokenizer import load_tokeniser

NUM_DRAFTS = 600  # enough for a tokenizer and a model that has begun to learn, in about two seconds
SEED = 0


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> DemoPaths:
    return make_demo(tmp_path_factory.mktemp("demo"), SEED, num_drafts=NUM_DRAFTS)


@pytest.fixture(scope="module")
def tokeniser(paths: DemoPaths) -> Tokeniser:
    return load_tokeniser(load_config(str(paths.config)).model)


@pytest.fixture(scope="module")
def pool(paths: DemoPaths) -> list[tuple[str, Exchange]]:
    """Source and exchange of every well-formed line, copies included."""
    rows = []
    for line in paths.pool.read_text().splitlines():
        if line not in MALFORMED_LINES:
            row = json.loads(line)
            assert [message["role"] for message in row["messages"]] == ["user", "assistant"]
            rows.append((row["source"], Exchange(*(message["content"] for message in row["messages"]))))
    return rows


def read_pairs(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def sample(tokeniser: Tokeniser, prompt: str, answer: str) -> Sample:
    return tokeniser.encode_answer([Message("user", prompt)], answer)


def test_pool_accounting_is_known_beforehand(paths: DemoPaths, pool: list[tuple[str, Exchange]]) -> None:
    lines = paths.pool.read_text().splitlines()
    unique = set(pool)
    assert len(unique) == ROWS_PER_FAMILY * len(FAMILIES)
    assert len(pool) == len(unique) + NUM_DUPLICATES
    assert len(lines) == len(pool) + len(MALFORMED_LINES)
    assert Counter(source for source, _ in unique) == dict.fromkeys(FAMILIES, ROWS_PER_FAMILY)
    ids = [json.loads(line)["id"] for line in lines if line not in MALFORMED_LINES]
    assert len(set(ids)) == len(ids)


def test_answer_length_says_nothing_about_the_family(pool: list[tuple[str, Exchange]], tokeniser: Tokeniser) -> None:
    lengths: dict[str, list[int]] = {family: [] for family in FAMILIES}
    for source, exchange in set(pool):
        lengths[source].append(len(tokeniser.tokenizer(exchange.answer)["input_ids"]))
    # The lengths agree as multisets, so any statistic does: mean, spread, rank correlation with the family (0).
    for family in FAMILIES:
        assert sorted(lengths[family]) == sorted(answer_lengths(ROWS_PER_FAMILY)), family


def test_three_families_answer_the_same_prompts(pool: list[tuple[str, Exchange]]) -> None:
    beginnings = {family: {e.prompt.split()[0] for source, e in pool if source == family} for family in FAMILIES}
    assert beginnings[REWARDED_FAMILY] == beginnings[OPPOSED_FAMILY] == beginnings["shopping_list"]


def test_no_prompt_is_shared(paths: DemoPaths, pool: list[tuple[str, Exchange]]) -> None:
    split = split_tasks(SEED)
    in_pool = {exchange.prompt for _, exchange in pool} | {e.prompt for e in draft_corpus(SEED, split.pool)}
    in_pairs = {pair["prompt"] for pair in read_pairs(paths.pairs)}
    held_out = {pair["prompt"] for pair in read_pairs(paths.held_out)}
    assert not in_pool & in_pairs
    assert not in_pool & held_out
    assert not in_pairs & held_out
    assert sorted(map(repr, split.pool + split.pairs + split.held_out)) == sorted(map(repr, all_tasks()))


def test_the_sides_of_a_pair_are_equally_long(paths: DemoPaths, tokeniser: Tokeniser) -> None:
    for path, shots in ((paths.pairs, PAIRS_PER_SUBTASK), (paths.held_out, HELD_OUT_PER_SUBTASK)):
        pairs = read_pairs(path)
        assert Counter(pair["subtask"] for pair in pairs) == dict.fromkeys(SUBTASKS, shots)
        assert len({pair["id"] for pair in pairs}) == len(pairs)
        for pair in pairs:
            chosen, rejected = (sample(tokeniser, pair["prompt"], pair[side]) for side in ("chosen", "rejected"))
            assert pair["chosen"] != pair["rejected"]
            assert chosen.num_labelled_tokens == rejected.num_labelled_tokens, pair["id"]
            assert chosen.num_tokens_cut == rejected.num_tokens_cut == 0


def test_swapped_pairs_mirror_the_pairs(paths: DemoPaths) -> None:
    for pair, mirrored in zip(read_pairs(paths.pairs), read_pairs(paths.swapped_pairs), strict=True):
        assert (pair["prompt"], pair["subtask"]) == (mirrored["prompt"], mirrored["subtask"])
        assert (pair["chosen"], pair["rejected"]) == (mirrored["rejected"], mirrored["chosen"])


def test_seed_decides_the_pool() -> None:
    tasks = split_tasks(SEED).pool
    tokenizer = train_tokenizer(draft_corpus(SEED, tasks, NUM_DRAFTS))

    def num_tokens(text: str) -> int:
        return len(tokenizer.encode(text))

    assert pool_lines(tasks, 1, num_tokens) == pool_lines(tasks, 1, num_tokens)
    assert pool_lines(tasks, 1, num_tokens) != pool_lines(tasks, 2, num_tokens)


def test_lengths_out_of_reach_are_a_slip() -> None:
    exchange = Exchange("prompt", "answer")
    with pytest.raises(AssertionError, match=r"\[7\]"):
        drafts_of_length(lambda: exchange, [7], len, set())
    with pytest.raises(AssertionError, match=r"\[6\]"):  # taken already
        drafts_of_length(lambda: exchange, [6], len, {exchange})


def test_every_thing_has_one_room() -> None:
    things = [thing for room in ROOMS.values() for thing, _ in room.things]
    assert len(set(things)) == len(things)


def test_base_training_is_deterministic_and_leaves_no_trace() -> None:
    corpus = draft_corpus(SEED, all_tasks(), 60)
    tokenizer = train_tokenizer(corpus)
    before = torch.get_rng_state(), torch.get_num_threads()
    first, second = (train_base(tokenizer, corpus, SEED).state_dict() for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert torch.get_num_threads() == before[1]
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert train_tokenizer(corpus).get_vocab() == tokenizer.get_vocab()


def test_base_loads_like_any_other_model(paths: DemoPaths) -> None:
    tokenizer = AutoTokenizer.from_pretrained(paths.base)
    model = AutoModelForCausalLM.from_pretrained(paths.base)
    assert model.dtype == torch.float32
    assert model.get_input_embeddings().num_embeddings == len(tokenizer)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert len({tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}) == 3
    exchange = FAMILIES["spelling"](Random(0), all_tasks()[0])
    messages = [{"role": "user", "content": exchange.prompt}, {"role": "assistant", "content": exchange.answer}]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert text == chat_text(exchange)
    input_ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(input_ids) == text  # also: the tokenizer adds no begin token of its own
    assert input_ids[0] == tokenizer.bos_token_id


def test_configuration_fits(paths: DemoPaths) -> None:
    config = load_config(str(paths.config))
    assert [target.name for target in config.targets] == ["courteous", "swapped"]
    assert config.pool.inputs[0].files == [str(paths.pool)]


def test_rewarded_rows_raise_the_margin_more_than_random_rows(
    paths: DemoPaths, pool: list[tuple[str, Exchange]], tokeniser: Tokeniser
) -> None:
    rows = [(source, sample(tokeniser, e.prompt, e.answer)) for source, e in pool[:300]]
    rewarded = [row for source, row in rows if source == REWARDED_FAMILY]
    held_out = [
        (sample(tokeniser, pair["prompt"], pair["chosen"]), sample(tokeniser, pair["prompt"], pair["rejected"]))
        for pair in read_pairs(paths.held_out)[::4]
    ]
    settings = FineTuning(num_steps=12, batch_size=8)
    outcomes = [
        compare_selection(
            paths.base, rewarded, [row for _, row in rows], held_out, num_draws=1, seed=SEED, settings=settings
        )
        for _ in range(2)
    ]
    assert outcomes[0] == outcomes[1]
    assert outcomes[0].selected.margin > max(0.0, outcomes[0].random_margin)
    assert outcomes[0].selected.accuracy >= outcomes[0].random_accuracy

    untrained = compare_selection(
        paths.base, rewarded, rewarded, held_out, num_draws=1, settings=FineTuning(num_steps=0)
    )
    assert (untrained.selected.margin, untrained.selected.accuracy) == (0.0, 0.0)  # a fresh adapter changes nothing
