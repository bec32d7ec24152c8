"""Conversations to token ids and loss masks, with tokenizers of two families."""

from __future__ import annotations

from typing import Any

import pytest

from rose_ray.data.chat import TULU_TEMPLATE, ChatTemplate
from rose_ray.data.conversation import Conversation, Message
from rose_ray.data.tokenize import Sample, Tokeniser
from rose_ray.errors import ModelError, RowError
from tests.tiny import CHAT_TEMPLATE, UNUSUAL, sentencepiece_like_tokenizer

USER = Message("user", "Tell me about water 🙂")
ANSWERS = ("good answer", "yes", "a", "  leading and trailing  ", "two\nlines\n\nand more", "🙂🙂 x 👍🏽", *UNUSUAL)


@pytest.fixture(scope="module")
def metaspace() -> Any:
    return sentencepiece_like_tokenizer()


def _template(tokenizer: Any, source: str = CHAT_TEMPLATE) -> ChatTemplate:
    return ChatTemplate(source, tokenizer.bos_token, tokenizer.eos_token, tuple(tokenizer.all_special_tokens))


def _labelled(tokenizer: Any, sample: Sample) -> list[int]:
    return [token for token, labelled in zip(sample.input_ids, sample.loss_mask, strict=True) if labelled]


def _conversation(*turns: str) -> Conversation:
    roles = ("user", "assistant")
    return Conversation(tuple(Message(roles[i % 2], content) for i, content in enumerate(turns)))


@pytest.mark.parametrize("source", [CHAT_TEMPLATE, TULU_TEMPLATE])
@pytest.mark.parametrize("answer", ANSWERS)
def test_labelled_tokens_are_answers_and_end_tokens_byte_level(source: str, answer: str, tokenizer: Any) -> None:
    tokeniser = Tokeniser(tokenizer, _template(tokenizer, source), 500)
    sample = tokeniser.encode(_conversation("Q? 🙂", answer, "More?", "no"))
    kept = answer.strip() if source == TULU_TEMPLATE else answer
    assert tokenizer.decode(_labelled(tokenizer, sample)) == f"{kept}<|end|>no<|end|>"
    assert len(sample.input_ids) == len(sample.loss_mask) and sample.num_tokens_cut == 0


@pytest.mark.parametrize("answer", ANSWERS)
def test_labelled_tokens_are_answers_and_end_tokens_metaspace(answer: str, metaspace: Any) -> None:
    tokeniser = Tokeniser(metaspace, _template(metaspace, TULU_TEMPLATE), 500)
    sample = tokeniser.encode(_conversation("Q? 🙂", answer, "More?", "no"))
    assert metaspace.decode(_labelled(metaspace, sample)) == f"{answer.strip()}</s>no</s>"


@pytest.mark.parametrize("family", ["byte level", "metaspace"])
def test_a_token_that_begins_with_the_space_before_an_answer_carries_loss(
    family: str, tokenizer: Any, metaspace: Any
) -> None:
    chosen = tokenizer if family == "byte level" else metaspace
    source = (
        "{% for message in messages %}{% if message['role'] == 'user' %}{{ 'Q: ' + message['content'] + ' A:' }}"
        "{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
    )
    sample = Tokeniser(chosen, _template(chosen, source), 500).encode(_conversation("water", "good answer", "x", "yes"))
    assert chosen.decode(_labelled(chosen, sample)) == f" good answer{chosen.eos_token} yes{chosen.eos_token}"


@pytest.fixture(scope="module")
def trimming(tokenizer: Any) -> Any:
    """The same tokenizer, but with spaces left out of offsets, as many published ones have it."""
    from tokenizers import processors
    from transformers import PreTrainedTokenizerFast

    twin = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, bos_token="<|begin|>", eos_token="<|end|>", pad_token="<|pad|>"
    )
    twin.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    offsets = [each("a stone", return_offsets_mapping=True)["offset_mapping"][1] for each in (tokenizer, twin)]
    assert [start for start, _ in offsets] == [1, 2]
    return twin


def test_offsets_without_the_leading_space_make_no_difference(tokenizer: Any, trimming: Any) -> None:
    for answer in ANSWERS:
        samples = [
            Tokeniser(each, _template(tokenizer), 500).encode(_conversation("Q? 🙂", answer, "More?", "no"))
            for each in (tokenizer, trimming)
        ]
        assert samples[0] == samples[1], answer


def test_a_space_token_before_an_answer_carries_no_loss(tokenizer: Any, trimming: Any) -> None:
    source = (
        "{% for message in messages %}{% if message['role'] == 'user' %}{{ message['content'] + ' A: ' }}"
        "{% else %}{{ message['content'] + eos_token }}{% endif %}{% endfor %}"
    )
    for each in (tokenizer, trimming):
        sample = Tokeniser(each, _template(tokenizer, source), 500).encode(_conversation("water", "🙂"))
        assert tokenizer.decode(_labelled(tokenizer, sample)) == "🙂<|end|>"


def test_nothing_but_the_template_adds_special_tokens(tokenizer: Any) -> None:
    sample = Tokeniser(tokenizer, _template(tokenizer), 500).encode(_conversation("water", "stone"))
    assert sample.input_ids.count(tokenizer.bos_token_id) == 1 and sample.input_ids[0] == tokenizer.bos_token_id
    text = "<|begin|><|user|>\nwater<|end|>\n<|assistant|>\nstone<|end|>\n"
    assert sample.input_ids == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(sample.input_ids) == text


def test_only_the_answer_of_a_pair_carries_loss(tokenizer: Any) -> None:
    tokeniser = Tokeniser(tokenizer, _template(tokenizer), 500)
    prompt = (USER, Message("assistant", "river"), Message("user", "More?"))
    sample = tokeniser.encode_answer(prompt, "stone bread")
    assert tokenizer.decode(_labelled(tokenizer, sample)) == "stone bread<|end|>"
    both = tokeniser.encode(Conversation((*prompt, Message("assistant", "stone bread"))))
    assert sample.input_ids == both.input_ids and sample.num_labelled_tokens < both.num_labelled_tokens


def test_too_long_samples_keep_their_first_tokens_and_the_rest_is_counted(tokenizer: Any) -> None:
    conversation = _conversation("water", "river " * 30)
    whole = Tokeniser(tokenizer, _template(tokenizer), 500).encode(conversation)
    for limit in (len(whole.input_ids) + 1, len(whole.input_ids), len(whole.input_ids) - 1, 20):
        cut = Tokeniser(tokenizer, _template(tokenizer), limit).encode(conversation)
        assert cut.input_ids == whole.input_ids[:limit]
        assert cut.loss_mask == whole.loss_mask[:limit]
        assert cut.num_tokens_cut == max(0, len(whole.input_ids) - limit)


def test_a_prompt_that_leaves_no_room_for_an_answer_is_refused(tokenizer: Any) -> None:
    conversation = _conversation("water " * 30, "stone")
    whole = Tokeniser(tokenizer, _template(tokenizer), 500).encode(conversation)
    first = whole.loss_mask.index(True)
    assert Tokeniser(tokenizer, _template(tokenizer), first + 1).encode(conversation).num_labelled_tokens == 1
    for limit in (first, 8):
        with pytest.raises(
            RowError, match=f"the first answer token is number {first + 1}, the limit is {limit} tok"
        ) as e:
            Tokeniser(tokenizer, _template(tokenizer), limit).encode(conversation)
        assert e.value.reason == "prompt_too_long"


def test_an_answer_without_tokens_is_refused(tokenizer: Any) -> None:
    template = ChatTemplate(CHAT_TEMPLATE.replace("eos_token", "''"), "", "", ())
    with pytest.raises(RowError, match="tokenises to nothing") as caught:
        Tokeniser(tokenizer, template, 500).encode(_conversation("water", ""))
    assert caught.value.reason == "no_labelled_token"


def test_the_first_token_of_a_sequence_does_not_count_as_labelled() -> None:
    assert Sample([1, 2, 3], [True, False, True]).num_labelled_tokens == 1


def test_a_tokenizer_without_offsets_is_refused() -> None:
    class Slow:
        is_fast = False

    with pytest.raises(ModelError, match="a fast tokenizer is needed"):
        Tokeniser(Slow(), ChatTemplate(TULU_TEMPLATE, "", "", ()), 100)
