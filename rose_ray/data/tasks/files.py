"""Files of labelled data: tables with and without keys, BIG-Bench Hard's JSON, worked examples, archives of them.

=====================  ================================================================================================
``.csv``               no header; question, options, letter of the answer (MMLU as released); the name is
                       ``SUBJECT_SPLIT.csv``, split one of ``SPLITS``
``.json``, an object   ``examples``: objects with ``input`` and ``target`` (BIG-Bench Hard as released); the name is the
                       subtask's, the split ``test``
``.txt``               an instruction and worked examples behind a line of dashes: ``Q: ...``, ``A: ...`` (its
                       ``cot-prompts``), split ``fewshot``; without such a line, a ``text`` a line
``.jsonl``, ``.json``  records with keys, as `rose_ray.data.records` reads them; also ``.ndjson``, ``.parquet``
``.tar.gz``, ``.tar``  members of these kinds by name; members of other kinds, such as a licence, are passed over
=====================  ================================================================================================

All but ``.parquet`` and ``.tar`` may also be compressed (``.gz``, ``.zst``).
"""

from __future__ import annotations

import csv
import io
import os
import posixpath
import re
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pyarrow import fs

from rose_ray.data.records import RejectedRecord, iter_records
from rose_ray.data.strict_json import kind_of, parse_object
from rose_ray.errors import DataError, EmptyFileError, RowError
from rose_ray.filesystem import Location

SPLITS = ("dev", "val", "validation", "test", "train", "auxiliary_train")
"""Ends of CSV names that are splits."""

TEST, FEWSHOT = "test", "fewshot"

_COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
_RECORDS = (".jsonl", ".ndjson", ".json", ".parquet")
_ARCHIVES = (".tar.gz", ".tgz", ".tar")
_TABLE, _PROMPTS = ".csv", ".txt"
_LEAST_COLUMNS = 3


@dataclass(frozen=True)
class LabelledRecord:
    """One labelled row, whatever its file looks like.

    Attributes:
        file: Name of the file; of a member of an archive, ``ARCHIVE:MEMBER``.
        stem: The file's name without folder and endings, and without the split of a CSV.
        place: Number of the row in its file, from 1; lines in JSONL.
        value: Keys and values. A CSV row has ``question``, ``choices``, ``answer`` and ``split``.
        instruction: What the file says of the task before its worked examples; empty elsewhere.
    """

    file: str
    stem: str
    place: int
    value: dict[str, Any] | RejectedRecord
    instruction: str = ""


def iter_labelled(location: Location) -> Iterator[LabelledRecord]:
    """Yield the rows of a file in order, those that cannot be read as a `RejectedRecord`.

    Raises:
        DataError: The file is missing, empty, cut short, of an unknown kind, or not what its name says.
    """
    if location.path.lower().endswith(_ARCHIVES):
        yield from _archived(location)
        return
    stem, ending, compression = _split_name(location.path)
    if ending == _TABLE:
        yield from _table_rows(location, stem, compression)
    elif ending == _PROMPTS:
        yield from _worked_examples(location, stem, compression)
    elif ending == ".json" and (text := _text(location, compression)).lstrip().startswith("{"):
        yield from _examples(location, stem, text)
    else:
        for record in iter_records(location):
            value = record if isinstance(record, RejectedRecord) else record.value
            yield LabelledRecord(location.name, stem, record.place, value)


def _split_name(path: str) -> tuple[str, str, str | None]:
    stem, ending = posixpath.splitext(posixpath.basename(path))
    compression = _COMPRESSIONS.get(ending.lower())
    if compression:
        stem, ending = posixpath.splitext(stem)
    return stem, ending.lower(), compression


def _text(location: Location, compression: str | None) -> str:
    try:
        with location.filesystem.open_input_stream(location.path, compression=compression) as stream:
            data = stream.read()
    except FileNotFoundError as error:
        raise DataError(f"{location.name}: no such file. Check the path.") from error
    except OSError as error:
        raise DataError(f"{location.name}: cut short or not {compression} ({error}). Fetch the file again.") from error
    try:
        text = str(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(f"{location.name}: not UTF-8, byte {error.start} ({error.reason}). Convert it.") from error
    if not text.strip():
        raise EmptyFileError(f"{location.name}: empty file, expected at least one row. Remove it or fill it.")
    return text


def _archived(location: Location) -> Iterator[LabelledRecord]:
    """Members are written to the disk one at a time: an archive is read forwards only, and may be large."""
    found: list[tuple[str, str]] = []
    with tempfile.TemporaryDirectory(prefix="rose_ray-") as folder:
        try:
            with (
                location.filesystem.open_input_stream(location.path, compression=None) as stream,
                tarfile.open(fileobj=stream, mode="r|*") as archive,
            ):
                for member in archive:
                    _, ending, _ = _split_name(member.name)
                    if not member.isfile() or ending not in (*_RECORDS, _TABLE, _PROMPTS):
                        continue
                    path = os.path.join(folder, f"{len(found)}", posixpath.basename(member.name))
                    os.mkdir(os.path.dirname(path))
                    content = archive.extractfile(member)
                    assert content is not None  # a regular file has content
                    with open(path, "wb") as file:
                        while block := content.read(1 << 20):
                            file.write(block)
                    found.append((member.name, path))
        except FileNotFoundError as error:
            raise DataError(f"{location.name}: no such file. Check the path.") from error
        except (tarfile.TarError, OSError, EOFError) as error:
            raise DataError(f"{location.name}: not a readable archive ({error}). Fetch the file again.") from error
        if not found:
            raise DataError(f"{location.name}: no member ends in .csv, .txt, {', '.join(_RECORDS)}. Check the archive.")
        for name, path in sorted(found):
            yield from iter_labelled(Location(fs.LocalFileSystem(), path, f"{location.name}:{name}"))


def _table_rows(location: Location, stem: str, compression: str | None) -> Iterator[LabelledRecord]:
    subject, split = stem, None
    for ending in SPLITS:
        if stem.endswith(f"_{ending}"):
            subject, split = stem.removesuffix(f"_{ending}"), ending
            break
    reader = csv.reader(io.StringIO(_text(location, compression), newline=""), strict=True)
    place = 0
    while True:
        place += 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise DataError(f"{location.name} row {place}: not CSV ({error}). Mend the file.") from error
        value: dict[str, Any] | RejectedRecord
        if len(cells) < _LEAST_COLUMNS:
            value = RejectedRecord(
                place, "too_few_columns", f"expected question, options and answer, found {len(cells)} columns"
            )
        else:
            value = {"question": cells[0], "choices": cells[1:-1], "answer": cells[-1], "task": subject, "split": split}
        yield LabelledRecord(location.name, subject, place, value)


def _examples(location: Location, stem: str, text: str) -> Iterator[LabelledRecord]:
    try:
        content = parse_object(text)
    except RowError as error:
        raise DataError(f"{location.name}: {error}. Expected an array, or an object with examples.") from error
    examples = content.get("examples")
    if not isinstance(examples, list) or not examples:
        raise DataError(
            f"{location.name}: expected an array, or an object with a list of examples as BIG-Bench Hard has it; found "
            f"{kind_of(examples) if 'examples' in content else f'the keys {sorted(content)[:10]}'}."
        )
    for place, example in enumerate(examples, start=1):
        value: dict[str, Any] | RejectedRecord
        if isinstance(example, dict):
            value = {"task": stem, "split": TEST, **example}
        else:
            value = RejectedRecord(place, "not_object", f"expected an object, found {kind_of(example)}")
        yield LabelledRecord(location.name, stem, place, value)


def _worked_examples(location: Location, stem: str, compression: str | None) -> Iterator[LabelledRecord]:
    text = _text(location, compression)
    _, dashes, body = text.partition("\n-----\n")
    if not dashes:
        for place, line in enumerate(text.splitlines(), start=1):
            if line.strip():
                yield LabelledRecord(location.name, stem, place, {"text": line.strip()})
        return
    instruction, *blocks = re.split(r"^Q: ", body, flags=re.MULTILINE)
    if not blocks:
        raise DataError(f"{location.name}: expected 'Q: ...' and 'A: ...' behind the line '-----'; found none.")
    for place, block in enumerate(blocks, start=1):
        question, answer_mark, answer = block.partition("\nA: ")
        value: dict[str, Any] | RejectedRecord = {
            "question": question.strip(),
            "answer": answer.strip(),
            "task": stem,
            "split": FEWSHOT,
        }
        if not answer_mark:
            value = RejectedRecord(place, "no_answer", "expected a line that begins with 'A: ' behind the question")
        yield LabelledRecord(location.name, stem, place, value, instruction.strip())
