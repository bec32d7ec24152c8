"""Six families of instructions, as drafts without a set length.

Three of them answer the same prompts, "how do I ...", each in its own manner: ``courteous_steps`` (what the pairs
reward), ``dismissive`` and ``shopping_list``. The other three bring prompts of their own about the same things:
``arithmetic``, ``spelling`` and ``facts``. A draft strings a random number of sentences together, so every family
can meet any length asked for; :mod:`rose_ray.demo.matching` picks drafts by length.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from rose_ray.demo.vocabulary import MANNERS, NAMES, ROOMS, Task

REWARDED_FAMILY = "courteous_steps"
"""The family in whose manner the chosen answers are written."""

OPPOSED_FAMILY = "dismissive"
"""The family in whose manner the rejected answers are written."""


@dataclass(frozen=True)
class Exchange:
    """A prompt and its answer."""

    prompt: str
    answer: str


_HOW_TO_PROMPTS = (
    "How do I {verb} the {thing}?",
    "How should I {verb} the {colour} {thing}?",
    "I want to {verb} the {thing}. How is it done?",
    "Tell me how to {verb} the {thing}.",
    "What is the best way to {verb} this {thing}?",
    "Can you explain how to {verb} my {thing}?",
)

_WELCOMES = (
    "Of course, I am glad to help.",
    "Thank you for asking.",
    "With pleasure.",
    "Certainly, let us look at the {thing} together.",
    "Good question, and I am happy to explain.",
    "You are very welcome to ask.",
)
_STEPS = (
    "put the {thing} on the {place}",
    "take a {tool} and some {supply}",
    "{verb} the {thing} {manner}",
    "use the {tool} {manner}",
    "wait {number} minutes",
    "look at the {colour} side again",
    "add a little {supply}",
    "set the {tool} aside",
)
_STEP_MARKS = ("First,", "Next,", "Then,", "After that,", "Finally,")
_FAREWELLS = (
    "Please ask me if anything is unclear.",
    "I hope this helps you.",
    "Take your time, you will do well.",
    "Please let me know how it goes.",
    "Do enjoy it.",
)

_DISMISSALS = (
    "Why ask me about the {thing}?",
    "I do not care.",
    "Everybody knows that.",
    "Go and {verb} it yourself.",
    "You will only ruin the {thing}.",
    "Buy a {tool} and stop asking.",
    "No, I am busy.",
    "What a waste of {supply}.",
    "Nobody needs that {colour} {thing}.",
    "Leave it on the {place} and go away.",
    "Not my problem.",
    "A {tool} costs {number} pounds, so pay somebody.",
    "You never listen anyway.",
)

_HEADINGS = ("What it takes:", "List for the {thing}:", "Needed to {verb}:")
_WHICH = ("one", "a second", "the old", "the big")
_HOW_MUCH = ("some", "plenty of", "a pound of", "the last")

_FACT_PROMPTS = ("What is known about the {thing}?", "Which colour is the {thing}?", "Describe the {thing}.")
_SPELLED_PROMPTS = ("Spell {word} backwards.", "How is {word} spelled?", "Give me the letters of {word}.")


def _filled(rng: Random, text: str, task: Task) -> str:
    room = ROOMS[task.room]
    return text.format(
        verb=task.verb,
        thing=task.thing,
        colour=task.colour,
        tool=rng.choice(room.tools),
        place=rng.choice(room.places),
        supply=rng.choice(room.supplies),
        manner=rng.choice(MANNERS),
        number=rng.randrange(2, 30),
    )


def how_to_prompt(rng: Random, task: Task) -> str:
    """Draw one way of asking how ``task`` is done."""
    return _filled(rng, rng.choice(_HOW_TO_PROMPTS), task)


def courteous_steps(rng: Random, task: Task) -> Exchange:
    """Draft a welcome, some steps in order and perhaps a farewell."""
    return Exchange(how_to_prompt(rng, task), _filled_each(rng, _courteous_sentences(rng), task))


def dismissive(rng: Random, task: Task) -> Exchange:
    """Draft several ways of not answering."""
    return Exchange(how_to_prompt(rng, task), _filled_each(rng, _dismissive_sentences(rng), task))


def mixed_manners(rng: Random, task: Task) -> Exchange:
    """Draft an answer out of courteous and dismissive sentences in any order. No row of the pool is like this.

    The base model learns from these instead of the two families: it knows the sentences of both and leans to
    neither, at any point of an answer. That is what the selection can change.
    """
    sentences = [*_courteous_sentences(rng), *_dismissive_sentences(rng)]
    chosen = rng.sample(sentences, max(2, 2 * len(sentences) // 3))
    return Exchange(how_to_prompt(rng, task), _filled_each(rng, chosen, task))


def _courteous_sentences(rng: Random) -> list[str]:
    steps = rng.sample(_STEPS, rng.randint(1, 4))
    marks = [*_STEP_MARKS[: len(steps) - 1], _STEP_MARKS[-1]] if len(steps) > 1 else ["Simply"]
    return [
        rng.choice(_WELCOMES),
        *(f"{mark} {step}." for mark, step in zip(marks, steps, strict=True)),
        *rng.sample(_FAREWELLS, rng.randint(0, 1)),
    ]


def _dismissive_sentences(rng: Random) -> list[str]:
    return rng.sample(_DISMISSALS, rng.randint(2, 7))


def shopping_list(rng: Random, task: Task) -> Exchange:
    """Draft the list of what the task takes, and nothing about how."""
    room = ROOMS[task.room]
    items = [f"{rng.choice(_WHICH)} {tool}" for tool in room.tools]
    items += [f"{rng.choice(_HOW_MUCH)} {supply}" for supply in room.supplies]
    lines = [f"- {item}" for item in rng.sample(items, rng.randint(3, 8))]
    return Exchange(how_to_prompt(rng, task), "\n".join([_filled(rng, rng.choice(_HEADINGS), task), *lines]))


def arithmetic(rng: Random, task: Task) -> Exchange:
    """Draft a sum over things, with as many checks as it takes."""
    name, thing = rng.choice(NAMES), f"{task.thing}s"
    first, second = rng.randrange(2, 60), rng.randrange(2, 40)
    total = first + second
    prompt = f"{name} has {first} {thing} and gets {second} more. How many are there?"
    sentences = [
        f"{first} + {second} = {total}.",
        f"{total} - {second} = {first}.",
        f"{total} - {first} = {second}.",
        f"{second} + {first} = {total}.",
        f"{name} has {total} {thing}.",
        f"Twice that is {2 * total}.",
        f"The number is {'even' if total % 2 == 0 else 'odd'}.",
        f"Ten more would be {total + 10}.",
    ]
    return Exchange(prompt, " ".join(_in_order(rng, sentences, rng.randint(1, 6))))


def spelling(rng: Random, task: Task) -> Exchange:
    """Draft the letters of a word, forwards and backwards."""
    word = rng.choice((task.thing, task.verb, rng.choice(ROOMS[task.room].tools)))
    sentences = [
        "Forwards: " + "-".join(word) + ".",
        "Backwards: " + "-".join(reversed(word)) + ".",
        f"The word {word} has {len(word)} letters.",
        f"It begins with {word[0]}.",
        f"It ends with {word[-1]}.",
        "In capitals: " + "-".join(word.upper()) + ".",
        "Without its ends: " + "-".join(word[1:-1]) + ".",
    ]
    prompt = rng.choice(_SPELLED_PROMPTS).format(word=word)
    return Exchange(prompt, " ".join(_in_order(rng, sentences, rng.randint(1, 5))))


def facts(rng: Random, task: Task) -> Exchange:
    """Draft plain statements about a thing."""
    sentences = [
        "The {thing} is {colour}.",
        f"It belongs in the {task.room}.",
        "It often stands on the {place}.",
        "People {verb} it {manner}.",
        "It weighs {number} ounces.",
        "A {tool} lies beside it.",
        "One costs {number} pounds.",
        "It keeps for {number} years.",
    ]
    prompt = _filled(rng, rng.choice(_FACT_PROMPTS), task)
    return Exchange(prompt, _filled_each(rng, _in_order(rng, sentences, rng.randint(2, 7)), task))


def _filled_each(rng: Random, sentences: list[str], task: Task) -> str:
    return " ".join(_filled(rng, sentence, task) for sentence in sentences)


def _in_order(rng: Random, sentences: list[str], number: int) -> list[str]:
    return [sentences[i] for i in sorted(rng.sample(range(len(sentences)), number))]


FAMILIES: dict[str, Callable[[Random, Task], Exchange]] = {
    "courteous_steps": courteous_steps,
    "dismissive": dismissive,
    "shopping_list": shopping_list,
    "arithmetic": arithmetic,
    "spelling": spelling,
    "facts": facts,
}
