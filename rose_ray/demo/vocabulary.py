"""Words the demo's instructions are made of: rooms of a house with garden, and what is done in them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Room:
    """One domain of the demo.

    Attributes:
        verbs: What is done to a thing.
        things: Thing and its colour.
        tools: What it is done with.
        places: Where it is done; follows "on".
        supplies: What is used up; mass nouns.
    """

    verbs: tuple[str, ...]
    things: tuple[tuple[str, str], ...]
    tools: tuple[str, ...]
    places: tuple[str, ...]
    supplies: tuple[str, ...]


@dataclass(frozen=True)
class Task:
    """What a prompt is about, such as ``clean`` the ``kettle`` in the ``kitchen``."""

    room: str
    verb: str
    thing: str
    colour: str


def _things(text: str) -> tuple[tuple[str, str], ...]:
    return tuple((thing, colour) for thing, colour in (pair.split(":") for pair in text.split()))


ROOMS = {
    "kitchen": Room(
        verbs=("clean", "wash", "dry", "warm", "store", "sort", "wrap", "cool", "weigh", "rinse", "move", "empty"),
        things=_things(
            "kettle:silver pan:black bowl:white jug:blue plate:white cup:red tray:grey jar:green "
            "basket:brown oven:black bottle:green pot:copper tin:silver mug:yellow"
        ),
        tools=("cloth", "sponge", "spoon", "brush", "towel", "ladle", "funnel", "rack"),
        places=("counter", "table", "shelf", "stove"),
        supplies=("soap", "salt", "vinegar", "warm water", "flour", "paper"),
    ),
    "workshop": Room(
        verbs=("mend", "oil", "sand", "paint", "fix", "tighten", "polish", "drill", "cut", "glue", "measure", "seal"),
        things=_things(
            "chair:brown gate:green bicycle:red lamp:yellow clock:gold drawer:brown wheel:black ladder:grey "
            "hinge:silver frame:white stool:blue pump:copper toolbox:red door:white"
        ),
        tools=("hammer", "wrench", "saw", "file", "clamp", "ruler", "chisel", "plane"),
        places=("bench", "floor", "stand", "trestle"),
        supplies=("oil", "glue", "varnish", "wax", "sandpaper", "tape"),
    ),
    "garden": Room(
        verbs=("plant", "water", "prune", "shade", "feed", "trim", "tie", "cover", "weed", "lift", "label", "thin"),
        things=_things(
            "rose:pink tulip:yellow hedge:green apple:red carrot:orange bean:green violet:blue vine:green "
            "lemon:yellow plum:purple fern:green pumpkin:orange orchid:white beetroot:purple"
        ),
        tools=("spade", "rake", "hose", "fork", "trowel", "barrow", "sieve", "hoe"),
        places=("lawn", "path", "patio", "wall"),
        supplies=("compost", "straw", "gravel", "twine", "mulch", "rain water"),
    ),
}

NAMES = ("Ada", "Ben", "Cleo", "Dan", "Eve", "Finn", "Gus", "Hana", "Ivo", "Jill", "Kim", "Leo", "Mia", "Ned")

MANNERS = (
    "slowly",
    "gently",
    "with care",
    "evenly",
    "from top to bottom",
    "twice",
    "a little at a time",
    "firmly",
)


def all_tasks() -> list[Task]:
    """Every task there is, in a fixed order."""
    return [
        Task(name, verb, thing, colour)
        for name, room in ROOMS.items()
        for verb in room.verbs
        for thing, colour in room.things
    ]
