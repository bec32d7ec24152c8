"""Preference pairs: reading files, naming subtasks, choosing shots.

A pool row that cannot be used is set aside; a pair that cannot be used stops the run, since every pair was
chosen to steer it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from rose_ray.data.conversation import Message
from rose_ray.data.pair_formats import PairContent, pair_content, pair_format
from rose_ray.data.records import RejectedRecord, file_kind, file_stem, iter_records, read_text
from rose_ray.data.strict_json import canonical_text, kind_of, parse_object
from rose_ray.errors import ConfigError, EmptyFileError, PairError, RowError
from rose_ray.filesystem import Location

_ID_LENGTH = 32
_NUM_LISTED = 20


@dataclass(frozen=True)
class PreferencePair:
    """A prompt with a better and a worse answer.

    Attributes:
        pair_id: The record's ``id`` as text, or a digest of raw prompt and raw answers.
        subtask: The group it is averaged with.
        prompt, chosen, rejected, raw_prompt, raw_chosen, raw_rejected, tools: As in `PairContent`.
    """

    pair_id: str
    subtask: str
    prompt: tuple[Message, ...]
    chosen: str
    rejected: str
    raw_prompt: str
    raw_chosen: str
    raw_rejected: str
    tools: str | None = None


class Shot(NamedTuple):
    """What is taken, drawn or left out together: all pairs of a labelled row, or a pair that stands alone.

    Attributes:
        subtask: Of its pairs.
        is_row: Whether it is a labelled row: a row and a pair may have the same id.
        name: Id of the row or the pair.
    """

    subtask: str
    is_row: bool
    name: str


def shots_of_pairs(pairs: Sequence[PreferencePair], row_of: Mapping[str, str]) -> list[Shot]:
    """Return the shot of each pair.

    Args:
        pairs: Any.
        row_of: Labelled rows by pair id; a pair without an entry is a shot itself.
    """
    rows = [row_of.get(pair.pair_id) for pair in pairs]
    return [
        Shot(pair.subtask, row is not None, pair.pair_id if row is None else row)
        for pair, row in zip(pairs, rows, strict=True)
    ]


@dataclass(frozen=True)
class _Record:
    """A record on its way to a pair: where it stands, what it holds, what it says."""

    file: Location
    place: int
    value: Mapping[str, Any]
    content: PairContent

    @property
    def where(self) -> str:
        return f"{self.file.name} row {self.place}"


def read_pairs(
    locations: Sequence[Location],
    *,
    target: str,
    format: str = "auto",
    subtask: str | None = None,
    subtasks_by_file: Mapping[str, str] | None = None,
    subtask_field: str | None = None,
    subtask_blocks: int | None = None,
    shots: int | None = None,
    checked: bool = True,
) -> list[PreferencePair]:
    """Read pairs, in file order.

    At most one of the four ways to name subtasks may be set; with none, all pairs are one subtask named
    ``target``.

    Args:
        locations: Files, in order.
        target: Name for messages and for the only subtask.
        format: One of ``PAIR_FORMATS``, or ``auto``: each record's keys decide, and all of a file must agree.
        subtask: Subtask of every pair.
        subtasks_by_file: Subtask of each file, by its name as configured or without folder and endings.
        subtask_field: Key of the record that names its subtask.
        subtask_blocks: The one file holds that many subtasks, block_00, block_01 and so on, of equal size.
        shots: As in `take_shots`.
        checked: False to get pairs as well that `check_pairs` refuses.

    Raises:
        ConfigError: Subtasks are named in more than one way, or a file has no entry in ``subtasks_by_file``.
        DataError: A file cannot be read.
        PairError: A file without pairs, rows that are no pairs, pairs with equal or empty sides, ids that stand twice,
            a missing subtask, blocks that do not divide, too few pairs. Rows or ids are listed.
    """
    ways: dict[str, object] = {"subtask": subtask, "subtasks_by_file": subtasks_by_file}
    ways |= {"subtask_field": subtask_field, "subtask_blocks": subtask_blocks}
    given = [name for name, way in ways.items() if way is not None]
    if len(given) > 1:
        raise ConfigError(f"target {target}: {' and '.join(given)} contradict each other. Set one of them.")
    records = []
    for location in locations:
        own = subtask if subtasks_by_file is None else _by_file(location, subtasks_by_file, target)
        records += _filled_records(location, format, f"target {target}:" + (f" subtask {own!r} has" if own else ""))
    if subtask_blocks is not None:
        names = _blocks(records, subtask_blocks, target)
    elif subtask_field is not None:
        names = _fields(records, subtask_field, target)
    elif subtasks_by_file is not None:
        names = [_by_file(record.file, subtasks_by_file, target) for record in records]
    else:
        names = [subtask if subtask is not None else target] * len(records)
    ids = _pair_ids(records, target)
    pairs = [
        PreferencePair(pair_id, name, **vars(record.content))
        for pair_id, name, record in zip(ids, names, records, strict=True)
    ]
    if checked:
        check_pairs(pairs, target=target, places=[record.where for record in records])
    return take_shots(pairs, shots, target=target)


def check_pairs(pairs: Sequence[PreferencePair], *, target: str, places: Sequence[str] | None = None) -> None:
    """Refuse pairs that say nothing, or whose ids do not tell them apart.

    `read_pairs` does it for what it reads; do it again where the pairs of several calls are joined.

    Raises:
        PairError: No pair at all; sides that are empty or, outer white space aside, equal; an id that stands
            twice. The ids are listed, with ``places``, where each pair stands, if given.
    """
    if not pairs:
        raise PairError(f"target {target}: no preference pairs. Check its files.")
    empty: list[str] = []
    equal: list[str] = []
    seen: dict[str, PreferencePair] = {}
    clashing: list[str] = []
    repeated: list[str] = []
    for number, pair in enumerate(pairs):
        name = f"{pair.pair_id} ({places[number]})" if places else pair.pair_id
        if not pair.chosen.strip() or not pair.rejected.strip():
            empty.append(name)
        elif pair.chosen.strip() == pair.rejected.strip():
            equal.append(name)
        first = seen.setdefault(pair.pair_id, pair)
        if first is not pair:
            (repeated if first == pair else clashing).append(name)
    problems = {
        "have an empty side": empty,
        "have equal sides": equal,
        "share an id with a pair of other content or subtask": clashing,
        "stand twice": repeated,
    }
    found = [f"{len(ids)} of {len(pairs)} pairs {problem}: {_listed(ids)}" for problem, ids in problems.items() if ids]
    if found:
        raise PairError(f"target {target}: {'; '.join(found)}. Remove or mend them.")


def take_shots(
    pairs: Sequence[PreferencePair],
    shots: int | None,
    *,
    target: str,
    row_of: Mapping[str, str] | None = None,
) -> list[PreferencePair]:
    """Return the pairs of the first ``shots`` shots of every subtask in the order given; all where None.

    Args:
        pairs: To choose from.
        shots: How many.
        target: Name for messages.
        row_of: As in `shots_of_pairs`; every pair is a shot where None.

    Raises:
        PairError: A subtask has fewer.
    """
    if shots is None:
        return list(pairs)
    if shots < 1:
        raise ConfigError(f"target {target}: shots is {shots}, expected at least 1.")
    own = shots_of_pairs(pairs, row_of or {})
    by_subtask: dict[str, list[Shot]] = {}
    for shot in dict.fromkeys(own):
        by_subtask.setdefault(shot.subtask, []).append(shot)
    short = [f"{name!r} has {len(group)}" for name, group in by_subtask.items() if len(group) < shots]
    if short:
        raise PairError(
            f"target {target}: {shots} shots asked for, but subtask {', '.join(short[:_NUM_LISTED])}. "
            "Lower `shots` or add pairs."
        )
    kept = {shot for group in by_subtask.values() for shot in group[:shots]}
    return [pair for pair, shot in zip(pairs, own, strict=True) if shot in kept]


def _filled_records(location: Location, format_name: str, whose: str) -> list[_Record]:
    try:
        records = _file_records(location, format_name)
    except EmptyFileError as error:
        raise PairError(f"{whose} no pairs ({location.name}: empty file). Fill the file or take it out.") from error
    if not records:
        raise PairError(f"{whose} no pairs ({location.name}: no record). Fill the file or take it out.")
    return records


def _file_records(location: Location, format_name: str) -> list[_Record]:
    records: list[_Record] = []
    problems: list[str] = []
    formats: dict[str, int] = {}
    for place, value, own_format in _entries(location, format_name):
        try:
            if isinstance(value, RejectedRecord):
                raise RowError(value.reason, value.detail)
            name = own_format or (pair_format(value) if format_name == "auto" else format_name)
            formats.setdefault(name, place)
            records.append(_Record(location, place, value, pair_content(value, name)))
        except RowError as error:
            problems.append(f"row {place}: {error}")
    if problems:
        more = f"\n  ... and {len(problems) - _NUM_LISTED} more" if len(problems) > _NUM_LISTED else ""
        listed = "\n  ".join(problems[:_NUM_LISTED])
        raise PairError(f"{location.name}: {len(problems)} rows are no usable pairs:\n  {listed}{more}\nMend the file.")
    if len(formats) > 1:
        found = " and ".join(f"{name} (row {place})" for name, place in formats.items())
        raise PairError(f"{location.name}: expected pairs of one format, found {found}. Split the file.")
    return records


def _entries(location: Location, format_name: str) -> Iterator[tuple[int, Any, str | None]]:
    kind, _ = file_kind(location)
    if kind == "json" and format_name in ("auto", "rose_authors"):
        text = read_text(location)
        if text.lstrip().startswith("{"):
            yield from _authors_entries(location, text)
            return
    if format_name == "rose_authors":
        raise PairError(f"{location.name}: format rose_authors is a .json file with one object, prompt -> answers.")
    for record in iter_records(location):
        yield record.place, record if isinstance(record, RejectedRecord) else record.value, None


def _authors_entries(location: Location, text: str) -> Iterator[tuple[int, Any, str]]:
    try:
        content = parse_object(text)
    except RowError as error:
        raise PairError(f"{location.name}: {error}. Expected one object, prompt -> answers, or an array.") from error
    for place, (prompt, entry) in enumerate(content.items(), start=1):
        if isinstance(entry, dict):
            yield place, {**entry, "prompt": prompt}, "rose_authors"
        else:
            detail = f"expected an object with sft_target and rejected_target, found {kind_of(entry)}"
            yield place, RejectedRecord(place, "unknown_schema", detail), "rose_authors"


def _pair_ids(records: Sequence[_Record], target: str) -> list[str]:
    ids, wrong = [], []
    for record in records:
        own = record.value.get("id")
        if own is None:
            ids.append(_content_digest(record.content))
        elif isinstance(own, str) or type(own) is int:
            ids.append(str(own))
        else:
            wrong.append(f"{record.where} ({kind_of(own)})")
    if wrong:
        raise PairError(f"target {target}: ids that are neither text nor whole numbers: {_listed(wrong)}.")
    return ids


def _content_digest(content: PairContent) -> str:
    text = canonical_text([content.raw_prompt, content.raw_chosen, content.raw_rejected])
    return hashlib.sha256(text.encode()).hexdigest()[:_ID_LENGTH]


def _fields(records: Sequence[_Record], field: str, target: str) -> list[str]:
    names = [record.value.get(field) for record in records]
    missing = [
        str(record.place)
        for record, name in zip(records, names, strict=True)
        if not isinstance(name, (str, int)) or isinstance(name, bool) or not str(name).strip()
    ]
    if missing:
        files = _listed(sorted({record.file.name for record in records}))
        raise PairError(
            f"target {target}: {len(missing)} of {len(records)} rows name no subtask at {field!r}: rows "
            f"{_listed(missing)} of {files}. Mend them or the field's name."
        )
    return [str(name) for name in names]


def _blocks(records: Sequence[_Record], num_blocks: int, target: str) -> list[str]:
    files = {record.file.name for record in records}
    if len(files) > 1:
        raise PairError(
            f"target {target}: subtask_blocks needs one file, found {len(files)}: {_listed(sorted(files))}."
        )
    size, left_over = divmod(len(records), num_blocks)
    if left_over or not size:
        raise PairError(
            f"target {target}: {len(records)} pairs in {_listed(sorted(files)) or 'no file'} do not "
            f"divide into {num_blocks} equal blocks. Check `subtask_blocks`, or whether the file is whole."
        )
    return [f"block_{place // size:02d}" for place in range(len(records))]


def _by_file(file: Location, subtasks: Mapping[str, str], target: str) -> str:
    for name in (file.name, file_stem(file)):
        if name in subtasks:
            return subtasks[name]
    raise ConfigError(f"target {target}: no subtask for {file.name!r}; subtasks_by_file names {sorted(subtasks)}.")


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NUM_LISTED} more" if len(names) > _NUM_LISTED else ""
    return ", ".join(names[:_NUM_LISTED]) + more
