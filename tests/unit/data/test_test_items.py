"""Test text from files of many shapes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rose_ray.data.test_items import MeasuredItem, read_test_items
from rose_ray.errors import DataError, PairError
from rose_ray.filesystem import expand
from tests.tiny import write_jsonl


def read(path: Path, **settings: Any) -> list[MeasuredItem]:
    return list(read_test_items(expand([str(path)]), **settings))


@pytest.mark.parametrize(
    ("record", "prompt", "others"),
    [
        ({"question": "q", "choices": ["a", "b"], "answer": "A"}, ("q",), ("a", "b", "A")),
        ({"input": "q", "target": "t"}, ("q",), ("t",)),
        ({"context": "c", "question": "q", "answers": ["a"]}, ("q",), ("c", "a")),
        ({"prompt": "q", "golden_answer": "g"}, ("q",), ("g",)),
        ({"prompt": "\n\nHuman: q\n\nAssistant: r\n\nHuman: s\n\nAssistant:"}, ("q", "r", "s"), ()),
        ({"prompt": "q", "chosen": "c", "rejected": "r"}, ("q",), ("c", "r")),
        ({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}, ("q",), ("a",)),
        ({"instruction": "q", "output": "a"}, ("q",), ("a",)),
        ({"text": "q"}, ("q",), ()),
    ],
)
def test_known_shapes(tmp_path: Path, record: dict[str, Any], prompt: tuple[str, ...], others: tuple[str, ...]) -> None:
    (item,) = read(write_jsonl(tmp_path / "x.jsonl", [record]))
    assert (item.prompt, item.others) == (prompt, others)
    assert item.name.endswith("x.jsonl row 1")


def test_plain_text_and_csv(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("First line.\n\nThird line.\n")
    assert [(item.name[-5:], item.prompt) for item in read(tmp_path / "x.txt")] == [
        ("row 1", ("First line.",)),
        ("row 3", ("Third line.",)),
    ]
    (tmp_path / "maths_test.csv").write_text("q,a,b,A\n")
    assert [(item.prompt, item.others) for item in read(tmp_path / "maths_test.csv")] == [(("q",), ("a", "b", "A"))]


def test_fields_and_split(tmp_path: Path) -> None:
    rows = [{"split": split, "body": f"{split} text", "question": "q"} for split in ("dev", "test")]
    file = write_jsonl(tmp_path / "x.jsonl", rows)
    assert [item.prompt for item in read(file, fields=["body"])] == [("dev text",), ("test text",)]
    assert len(read(file, split="test")) == 1
    with pytest.raises(DataError, match=r"x\.jsonl: no row of split 'val'"):
        read(file, split="val")
    with pytest.raises(PairError, match=r"row 1: no_test_text: expected text at 'bodi', found the keys"):
        read(file, fields=["bodi"])


def test_rows_without_test_text(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "x.jsonl", [{"text": "t"}, {"foo": "t"}])
    with pytest.raises(PairError, match=r"x\.jsonl row 2: no_test_text: expected one of the keys prompt, .*\['foo'\]"):
        read(file)
    file.write_text('{"text": "t"}\n{"text"\n')
    with pytest.raises(PairError, match=r"x\.jsonl row 2: not_json"):
        read(file)
