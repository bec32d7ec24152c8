"""Messages to text, and which stretches of it carry loss."""

from __future__ import annotations

import json

import pytest

from rose_ray.data.chat import TULU_TEMPLATE, ChatTemplate
from rose_ray.data.conversation import Message
from rose_ray.errors import RowError

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA_2 = (
    "{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + message['content'].strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
WITH_TOOLS = "{% if tools %}{{ tools | tojson }}\n{% endif %}" + CHATML

USER, ANSWER = Message("user", "Q?"), Message("assistant", "Good answer.")
TWO_TURNS = (Message("system", "Be kind."), USER, ANSWER, Message("user", "More?"), Message("assistant", "No."))
TOOL_TURNS = (
    USER,
    Message("assistant", '{"call": "look_up"}', is_call=True),
    Message("tool", "42"),
    Message("assistant", "It is 42."),
)


def chatml(**settings: bool) -> ChatTemplate:
    return ChatTemplate(CHATML, "", "<|im_end|>", ("<|im_start|>", "<|im_end|>"), **settings)


def tulu(bos: str = "", **settings: bool) -> ChatTemplate:
    return ChatTemplate(TULU_TEMPLATE, bos, "</s>", ("<s>", "</s>"), **settings)


def spans(template: ChatTemplate, messages: tuple[Message, ...], *, last_only: bool = False) -> list[str]:
    chat = template.render(messages, last_only=last_only)
    return [chat.text[start:end] for start, end in chat.spans]


def test_every_assistant_turn_and_its_end_token_carry_loss() -> None:
    assert spans(chatml(), TWO_TURNS) == ["Good answer.<|im_end|>", "No.<|im_end|>"]
    assert spans(chatml(), TOOL_TURNS) == ['{"call": "look_up"}<|im_end|>', "It is 42.<|im_end|>"]


def test_only_the_last_turn_of_a_pair_carries_loss() -> None:
    assert spans(chatml(), TWO_TURNS, last_only=True) == ["No.<|im_end|>"]
    assert spans(chatml(), TOOL_TURNS, last_only=True) == ["It is 42.<|im_end|>"]


def test_the_turn_tail_carries_loss_when_asked_to() -> None:
    assert spans(chatml(loss_on_turn_tail=True), TWO_TURNS) == ["Good answer.<|im_end|>\n", "No.<|im_end|>\n"]


def test_tulu_is_the_template_of_the_released_code() -> None:
    chat = tulu(bos="<s>").render(TWO_TURNS)
    assert chat.text == (
        "<s><|system|>\nBe kind.\n<|user|>\nQ?\n<|assistant|>\nGood answer.</s>\n"
        "<|user|>\nMore?\n<|assistant|>\nNo.</s>\n"
    )
    assert spans(tulu(), TWO_TURNS) == ["Good answer.</s>", "No.</s>"]
    assert spans(tulu(loss_on_turn_tail=True), TWO_TURNS) == ["Good answer.</s>\n", "No.</s>\n"]


def test_tulu_trims_contents_and_the_span_with_them() -> None:
    messages = (Message("user", "  Q?\n"), Message("assistant", "\n  Good answer.  "))
    assert tulu().render(messages).text == "<|user|>\nQ?\n<|assistant|>\nGood answer.</s>\n"
    assert spans(tulu(), messages) == ["Good answer.</s>"]


def test_outer_spaces_that_the_template_keeps_carry_loss() -> None:
    assert spans(chatml(), (USER, Message("assistant", "  spaces  "))) == ["  spaces  <|im_end|>"]


def test_a_space_written_between_prompt_and_answer_belongs_to_the_answer() -> None:
    template = ChatTemplate(LLAMA_2, "<s>", "</s>", ("<s>", "</s>"))
    messages = (USER, ANSWER, Message("user", "More?"), Message("assistant", "No."))
    assert template.render(messages).text == "<s>[INST] Q? [/INST] Good answer. </s><s>[INST] More? [/INST] No. </s>"
    assert spans(template, messages) == [" Good answer. </s>", " No. </s>"]


def test_the_first_special_token_behind_an_answer_ends_its_span() -> None:
    source = CHATML.replace("'<|im_end|>\n'", "'<|eot|><|im_end|>\n'")
    template = ChatTemplate(source, "", "<|im_end|>", ("<|im_end|>", "<|eot|>"))
    assert spans(template, (USER, ANSWER)) == ["Good answer.<|eot|>"]


def test_without_an_end_token_the_content_alone_carries_loss() -> None:
    template = ChatTemplate(CHATML.replace("<|im_end|>", "|"), "", "</s>", ("<s>", "</s>"))
    assert spans(template, (USER, ANSWER)) == ["Good answer."]


def test_an_answer_that_stands_in_the_prompt_too_is_found_in_its_own_place() -> None:
    messages = (
        Message("user", "Say: yes"),
        Message("assistant", "yes"),
        Message("user", "yes"),
        Message("assistant", "yes"),
    )
    chat = chatml().render(messages)
    assert [chat.text[:start].count("<|im_start|>assistant\n") for start, _ in chat.spans] == [1, 2]
    assert spans(chatml(), messages) == ["yes<|im_end|>"] * 2


def test_tools_reach_the_template() -> None:
    template = ChatTemplate(WITH_TOOLS, "", "<|im_end|>", ("<|im_end|>",))
    tools = json.dumps([{"name": "look_up"}])
    chat = template.render(TOOL_TURNS, tools)
    assert chat.text.startswith('[{"name": "look_up"}]\n<|im_start|>user')
    assert [chat.text[start:end] for start, end in chat.spans] == spans(chatml(), TOOL_TURNS)


def test_a_template_that_rewrites_earlier_turns_is_refused() -> None:
    forgetful = (
        "{% for message in messages %}{% if message['role'] != 'assistant' or loop.last %}"
        "{{ message['role'] + ': ' + message['content'] + '\n' }}{% else %}"
        "{{ 'assistant: ...\n' }}{% endif %}{% endfor %}"
    )
    template = ChatTemplate(forgetful, "", "</s>", ("</s>",))
    assert spans(template, (USER, ANSWER))
    with pytest.raises(RowError, match=r"renders turns 1-3 differently once more turns follow") as caught:
        template.render(TWO_TURNS)
    assert caught.value.reason == "template_rewrites"
    assert spans(template, TWO_TURNS, last_only=True)  # earlier turns carry no loss here, so nothing is undefined


def test_a_template_that_changes_the_answer_is_refused() -> None:
    template = ChatTemplate(CHATML.replace("message['content']", "message['content'] | upper"), "", "", ())
    with pytest.raises(RowError, match=r"changes the answer of turn 2") as caught:
        template.render((USER, ANSWER))
    assert caught.value.reason == "template_rewrites"


def test_a_template_may_refuse_a_conversation() -> None:
    source = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turns') }}{% endif %}" + CHATML
    template = ChatTemplate(source, "", "<|im_end|>", ("<|im_end|>",))
    assert spans(template, (USER, ANSWER)) == ["Good answer.<|im_end|>"]
    with pytest.raises(RowError, match=r"refuses the conversation: no system turns") as caught:
        template.render(TWO_TURNS)
    assert caught.value.reason == "template_failed"


def test_a_broken_template_is_refused() -> None:
    with pytest.raises(RowError, match=r"template_failed"):
        ChatTemplate("{% for message in %}", "", "", ()).render((USER, ANSWER))


def test_a_header_that_the_generation_prompt_does_not_bring_carries_no_loss():
    # The template ignores add_generation_prompt, and the answer's text stands in its header too.
    template = ChatTemplate(
        "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}", "", "", ("<|end|>",)
    )
    chat = template.render([Message("user", "q"), Message("assistant", "a")])
    assert [chat.text[start:end] for start, end in chat.spans] == ["a<|end|>"]


def test_text_that_the_template_puts_before_an_answer_carries_no_loss():
    template = ChatTemplate(
        "{% for m in messages %}<|{{ m['role'] }}|>\n"
        "{% if m['role'] == 'assistant' %}<think>\n\n</think>\n\n{% endif %}{{ m['content'] }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
        "",
        "",
        ("<|end|>",),
    )
    chat = template.render([Message("user", "q"), Message("assistant", "think")])
    assert [chat.text[start:end] for start, end in chat.spans] == ["think<|end|>"]


@pytest.mark.parametrize(
    ("date", "text"),
    [
        ("{% if strftime_now is defined %}{{ strftime_now('%Y') }}{% else %}26 Jul 2024{% endif %}", "26 Jul 2024qa"),
        ("{{ strftime_now('%Y') }}", None),
    ],
)
def test_templates_see_no_clock(date: str, text: str | None):
    template = ChatTemplate(date + "{% for m in messages %}{{ m['content'] }}{% endfor %}", "", "", ())
    messages = [Message("user", "q"), Message("assistant", "a")]
    if text is not None:
        assert template.render(messages).text == text
    else:
        with pytest.raises(RowError, match="template_failed"):
            template.render(messages)
