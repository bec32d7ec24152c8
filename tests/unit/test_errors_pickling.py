"""Errors cross processes: every class of the tree survives pickling, message and all."""

from __future__ import annotations

import pickle
import re
from collections.abc import Iterator

import pytest

from rose_ray import errors
from rose_ray.errors import RoseError, RowError


def subclasses(kind: type[RoseError]) -> Iterator[type[RoseError]]:
    yield kind
    for below in kind.__subclasses__():
        yield from subclasses(below)


ALL = [kind for kind in subclasses(RoseError) if kind.__module__ == errors.__name__]


@pytest.mark.parametrize("kind", ALL, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("protocol", [2, pickle.HIGHEST_PROTOCOL])
def test_every_error_survives_pickling(kind: type[RoseError], protocol: int) -> None:
    error = RowError("not_json", "line 3: é") if kind is RowError else kind("found é, expected e")
    again = pickle.loads(pickle.dumps(error, protocol))
    assert type(again) is kind and str(again) == str(error) and again.args == error.args
    assert vars(again) == vars(error)


def test_the_tree_in_the_docstring_is_the_tree() -> None:
    assert errors.__doc__ is not None
    drawn = re.findall(r"^(.*?)(\w+Error)\b", errors.__doc__.split("Messages say")[0], re.MULTILINE)
    parents: dict[int, str] = {}
    found: dict[str, str] = {}
    for indent, name in drawn:
        depth = len(indent)
        found[name] = next((parents[d] for d in sorted(parents, reverse=True) if d < depth), "Exception")
        parents = {d: parent for d, parent in parents.items() if d < depth} | {depth: name}
    assert found == {kind.__name__: kind.__bases__[0].__name__ for kind in ALL}


def test_each_error_is_a_built_in_too() -> None:
    leaves = [kind for kind in ALL if kind is not RoseError]
    for kind in leaves:
        built_in = [base for base in kind.__mro__ if base.__module__ == "builtins"]
        assert built_in[0] not in (Exception, BaseException), kind
