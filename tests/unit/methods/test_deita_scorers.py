"""DEITA by models that give its numbers, against one prompt at a time through transformers alone."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rose_ray.data.conversation import Conversation, Message, canonical_json, row_id
from rose_ray.errors import ModelError
from rose_ray.methods.deita import Deita
from rose_ray.methods.interface import MethodModel, PoolRows, Scored
from rose_ray.stages.turn_scores import filled, turns_of
from tests.methods import make_method

COMPLEXITY = "How hard is this?\n{instruction}\nFrom 1 to 6:"
QUALITY = "{instruction}\n-> {answer}\nHow good, from 1 to 6:"
FLOAT32 = 1e-5
"""Batches of other shapes add up in another order, in float32; a score is a sum of products of numbers up to 6."""

CONVERSATIONS = [
    Conversation((Message("user", "water?"), Message("assistant", "stone bread"))),
    Conversation(
        (
            Message("system", "Be brief."),
            Message("user", "Tell me about {answer}."),
            Message("assistant", "green {instruction} green"),
            Message("user", "And then?"),
            Message("assistant", "house"),
        )
    ),
    Conversation(
        (
            Message("user", "market"),
            Message("assistant", "call", is_call=True),
            Message("tool", "7"),
            Message("assistant", "seven"),
        )
    ),
]


def no_base() -> Any:
    raise AssertionError("the base model was loaded")


MODEL = MethodModel(no_base, "cpu", None, (), 64)  # type: ignore[arg-type]  # no tokeniser either


def pool(conversations: list[Conversation]) -> PoolRows:
    none = np.zeros(len(conversations), np.int32)
    texts = [canonical_json(each) for each in conversations]
    return PoolRows([row_id(each) for each in conversations], ["s"] * len(texts), texts, texts, none, none)


def scorer(folder: str, prompt: str, **more: Any) -> dict[str, Any]:
    return {"model": folder, "prompt": prompt, "dtype": "float32", **more}


def deita(folder: str, other: str, **more: Any) -> Deita:
    method = make_method(
        "deita", complexity_scorer=scorer(folder, COMPLEXITY, **more), quality_scorer=scorer(other, QUALITY, **more)
    )
    assert isinstance(method, Deita)
    return method


def expected(folder: str, text: str) -> float:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        logits = model(torch.tensor([tokenizer(text)["input_ids"]])).logits[0, -1].double()
    chances = torch.stack([logits[tokenizer.convert_tokens_to_ids(str(number))] for number in range(1, 7)]).softmax(0)
    return float(sum(number * chance for number, chance in enumerate(chances.tolist(), start=1)))


def test_turns_are_answers_with_what_was_said_before_them() -> None:
    assert [turns_of(each) for each in CONVERSATIONS] == [
        [("water?", "stone bread")],
        [("Tell me about {answer}.", "green {instruction} green"), ("And then?", "house")],
        [("market", "call"), ("7", "seven")],
    ]


def test_a_text_that_looks_like_a_place_stays_as_it_is() -> None:
    turn = turns_of(CONVERSATIONS[1])[0]
    assert filled("{instruction}|{answer}|{instruction}{}", turn) == (
        "Tell me about {answer}.|green {instruction} green|Tell me about {answer}.{}"
    )


def test_scores_are_sums_of_products_of_single_prompts(base_of: Any) -> None:
    first, second = base_of("llama"), base_of("qwen2")
    method = deita(first, second)
    assert method.needs.any_model and not method.needs.base_model
    by_hand = [
        sum(
            expected(first, COMPLEXITY.replace("{instruction}", asked))
            * expected(second, f"{asked}\n-> {answer}\nHow good, from 1 to 6:")
            for asked, answer in turns_of(each)
        )
        for each in CONVERSATIONS
    ]
    whole = method.score(pool(CONVERSATIONS), {}, MODEL)
    np.testing.assert_allclose(whole.values[:, 0], by_hand, rtol=FLOAT32)
    assert not whole.rejected
    alone = [method.score(pool([each]), {}, MODEL).values[0, 0] for each in CONVERSATIONS]
    np.testing.assert_allclose(alone, by_hand, rtol=FLOAT32)


def test_a_turn_that_its_scorer_cannot_take_rejects_its_row_alone(base_folder: str) -> None:
    long = Conversation((*CONVERSATIONS[0].messages, Message("user", "stone " * 3000), Message("assistant", "yes")))
    method = deita(base_folder, base_folder)
    scored: Scored = method.score(pool([long, CONVERSATIONS[0]]), {}, MODEL)
    reason, detail = scored.rejected[0]
    assert list(scored.rejected) == [0] and reason == "scorer_prompt_too_long"
    limit = AutoModelForCausalLM.from_pretrained(base_folder).config.max_position_embeddings
    assert detail.startswith("a turn's prompt has ") and detail.endswith(f"its scorer takes {limit}")
    apart = method.score(pool([CONVERSATIONS[0]]), {}, MODEL)
    np.testing.assert_allclose(scored.values[1], apart.values[0], rtol=FLOAT32)


def test_the_scorers_are_part_of_what_scores_depend_on(base_of: Any) -> None:
    llama, qwen = base_of("llama"), base_of("qwen2")
    contents = [deita(*folders).content() for folders in ((llama, llama), (llama, qwen), (qwen, llama))]
    assert contents[0] != contents[1] != contents[2] != contents[0]
    assert contents[0] == deita(llama, llama).content()


def test_a_number_that_is_no_token_is_refused(base_folder: str) -> None:
    with pytest.raises(ModelError, match=r"\['1234567'\] are no tokens of its own.* Set `labels`"):
        deita(base_folder, base_folder, labels=["1", "1234567"]).content()


@pytest.mark.parametrize("key", ["complexity_scorer", "quality_scorer"])
def test_a_scorer_that_is_not_there_is_named_by_its_key(tmp_path: Path, base_folder: str, key: str) -> None:
    def message(folder: Path) -> str:
        folders = {"complexity_scorer": base_folder, "quality_scorer": base_folder, key: str(folder)}
        method = deita(folders["complexity_scorer"], folders["quality_scorer"])
        with pytest.raises(ModelError) as caught:
            method.content()
        with pytest.raises(ModelError, match=f"^method deita: method_options.{key}: "):  # in an actor
            method.score(pool(CONVERSATIONS), {}, MODEL)
        return str(caught.value)

    absent = tmp_path / "absent"
    assert message(absent).startswith(f"method deita: method_options.{key}: {str(absent)!r} is no folder here, and the")
    bare = tmp_path / "bare"
    shutil.copytree(base_folder, bare)
    for file in bare.glob("*.safetensors"):
        file.unlink()
    told = f"method deita: method_options.{key}: {bare}: no *.safetensors file. Save the model with safe serialisation."
    assert message(bare) == told


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"complexity_scorer": scorer("f", COMPLEXITY)}, "none are named: set"),
        (
            {"complexity_scorer": scorer("f", COMPLEXITY), "scores_files": ["f"]},
            "scores_files and scorers contradict each other: set one of them",
        ),
        (
            {"complexity_scorer": scorer("f", COMPLEXITY), "quality_scorer": scorer("f", "{answer}:")},
            r"quality_scorer.prompt: expected \{instruction\} and \{answer\} in it, lacks \{instruction\}",
        ),
        (
            {
                "complexity_scorer": scorer("f", COMPLEXITY, labels=["1", "x"]),
                "quality_scorer": scorer("f", QUALITY, labels=["2", "2"]),
            },
            "expected numbers as text, such as '1', found 'x'.*expected each number once",
        ),
    ],
)
def test_scorers_that_do_not_fit_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_method("deita", **options)
