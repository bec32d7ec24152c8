"""Files to shards."""

import contextlib
import gzip
import json
import resource

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rose_ray.data.conversation import Conversation, Message, row_id
from rose_ray.errors import ConfigError, DataError
from rose_ray.filesystem import locate
from rose_ray.schemas import REJECTED, SHARD
from rose_ray.stages.ingest import (
    IngestSettings,
    PoolFile,
    detect_file_format,
    ingest_file,
)
from rose_ray.stores.workspace import Workspace

SMALL = IngestSettings(shard_rows=3)


@pytest.fixture
def workspace(tmp_path):
    return Workspace.open(str(tmp_path / "ws"), create=True)


def _row(number, **extra):
    return {"prompt": f"q{number}", "completion": f"a{number}", **extra}


def _id(number):
    return row_id(Conversation((Message("user", f"q{number}"), Message("assistant", f"a{number}"))))


def _file(tmp_path, rows, name="pool.jsonl", **how):
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (tmp_path / name).write_text("\n".join(lines))
    return PoolFile(locate(str(tmp_path / name)), **how)


def _shards(workspace, manifest):
    return [workspace.read_table(entry["path"]) for entry in manifest.facts["shards"]]


def _rows(workspace, manifest):
    return [row for table in _shards(workspace, manifest) for row in table.to_pylist()]


def _rejected(workspace, manifest):
    table = workspace.read_table(f"{manifest.folder}/rejected.parquet")
    assert table.schema.equals(REJECTED, check_metadata=True)
    return [(row["place"], row["reason"]) for row in table.to_pylist()]


def test_shards_are_cut_by_unique_rows_in_file_order(tmp_path, workspace):
    lines = [_row(0), _row(1), _row(0), "", "{bad", _row(2), _row(1, other=True), _row(3), _row(0)]
    manifest = ingest_file(workspace, _file(tmp_path, lines), SMALL)
    first, second = _shards(workspace, manifest)
    assert first.schema.equals(SHARD, check_metadata=True)
    assert first["row_id"].to_pylist() == [_id(0), _id(1), _id(2)]
    assert first["place"].to_pylist() == [1, 2, 6]
    assert first["num_copies"].to_pylist() == [3, 2, 1]
    assert second["place"].to_pylist() == [8]
    assert manifest.counts == {"rows_read": 8, "unique": 4, "duplicates": 3, "rejected": 1, "unsampled": 0}
    assert _rejected(workspace, manifest) == [(5, "not_json")]
    entry = manifest.facts["shards"][0]
    assert (entry["shard"], entry["num_rows"]) == (f"{manifest.key}-00000", 3)
    assert (entry["first_place"], entry["last_place"]) == (1, 6)


def test_records_keep_their_exact_text_and_ids_their_type(tmp_path, workspace):
    lines = [
        '{"id": "000123",  "prompt": "q\\u00e9", "completion": "a", "score": 1.50, "n": 1e2}',
        '{"completion":"b","prompt":"q","id":42,"big":12345678901234567890123}',
        '{"prompt": "q", "completion": "c"}',
        '{"prompt": "q", "completion": "d", "id": null}',
        '{"prompt": "q", "completion": "e", "id": "42"}',
    ]
    rows = _rows(workspace, ingest_file(workspace, _file(tmp_path, lines), SMALL))
    assert [row["record"] for row in rows] == lines
    assert [row["record_id"] for row in rows] == ['"000123"', "42", None, None, '"42"']
    assert rows[0]["conversation"] == (
        '{"messages":[{"content":"qé","role":"user"},{"content":"a","role":"assistant"}]}'
    )
    assert rows[0]["file"] == str(tmp_path / "pool.jsonl")


def test_row_ids_depend_on_the_conversation_alone(tmp_path, workspace):
    lines = [
        '{"prompt": "caf\\u00e9 \\/", "completion": "a", "id": 1}',
        '{"id": 2, "completion": "a", "prompt": "café /", "more": [1, 2]}',
    ]
    manifest = ingest_file(workspace, _file(tmp_path, lines), SMALL)
    assert manifest.counts["duplicates"] == 1
    messages = [{"content": "café /", "role": "user"}, {"role": "assistant", "content": "a"}]
    other = ingest_file(workspace, _file(tmp_path, [{"messages": messages}], "other.jsonl"), SMALL)
    assert _rows(workspace, manifest)[0]["row_id"] == _rows(workspace, other)[0]["row_id"]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{nope", "not_json"),
        ("[]", "not_object"),
        ('{"prompt": "q", "completion": "a", "score": NaN}', "not_json"),
        ('{"prompt": "q", "completion": "a", "prompt": "r"}', "duplicate_key"),
        ('{"prompt": "\\ud800", "completion": "a"}', "invalid_unicode"),
        ('{"question": "q"}', "unknown_schema"),
        ('{"prompt": "q", "completion": " "}', "empty_answer"),
        ('{"prompt": "q", "completion": []}', "no_assistant_turn"),
        ('{"prompt": [], "completion": []}', "empty_messages"),
        ('{"prompt": [{"role": "assistant", "content": "x"}], "completion": "a"}', "wrong_role_order"),
        ('{"prompt": [{"role": "narrator", "content": "x"}], "completion": "a"}', "unknown_role"),
        ('{"prompt": "q", "completion": "a", "images": ["x.png"]}', "unsupported_content"),
    ],
)
def test_a_bad_row_is_a_line_of_the_rejected_table(tmp_path, workspace, line, reason):
    manifest = ingest_file(workspace, _file(tmp_path, [_row(0), line], format="prompt_completion"), SMALL)
    assert _rejected(workspace, manifest) == [(2, reason)]
    assert manifest.facts["reject_reasons"] == {reason: 1}
    assert manifest.counts["unique"] == 1


def test_invalid_utf8_is_a_line_of_the_rejected_table(tmp_path, workspace):
    (tmp_path / "pool.jsonl").write_bytes(json.dumps(_row(0)).encode() + b'\n{"prompt": "\xff"}\n')
    manifest = ingest_file(workspace, PoolFile(locate(str(tmp_path / "pool.jsonl"))), SMALL)
    assert _rejected(workspace, manifest) == [(2, "invalid_utf8")]


def test_deep_nesting_is_rejected_and_not_a_crash(tmp_path, workspace):
    lines = [_row(0)]
    for depth in (300, 480, 900, 980, 1500):
        lines.append('{"id": ' + "[" * depth + "]" * depth + ', "prompt": "q", "completion": "a"}')
    manifest = ingest_file(workspace, _file(tmp_path, lines), SMALL)
    assert manifest.counts["rows_read"] == 6 and manifest.counts["rejected"] >= 1


def test_equal_ids_with_different_content(tmp_path, workspace):
    lines = [
        _row(0, id="x"),
        _row(1, id="x"),
        _row(0, id="x"),
        _row(2, id="x", source="other"),
        _row(1, id="y"),
    ]
    manifest = ingest_file(workspace, _file(tmp_path, lines), SMALL)
    assert _rejected(workspace, manifest) == [(2, "id_conflict")]
    detail = workspace.read_table(f"{manifest.folder}/rejected.parquet")["detail"].to_pylist()[0]
    assert detail.startswith("row 1 of this source has the same id")
    assert [(row["place"], row["num_copies"]) for row in _rows(workspace, manifest)] == [
        (1, 2),
        (4, 1),
        (5, 1),
    ]


def test_ids_of_different_type_are_different_ids(tmp_path, workspace):
    lines = [_row(0, id=7), _row(1, id="7"), _row(2), _row(3)]
    assert ingest_file(workspace, _file(tmp_path, lines), SMALL).counts["unique"] == 4


def test_sources(tmp_path, workspace):
    def sources(rows, name, **how):
        return [
            row["source"] for row in _rows(workspace, ingest_file(workspace, _file(tmp_path, rows, name, **how), SMALL))
        ]

    rows = [_row(0, source="s"), _row(1, dataset="d"), _row(2), _row(3, source=3), _row(4, source="")]
    assert sources(rows, "my.pool.jsonl") == ["s", "d", "my.pool", "my.pool", "my.pool"]
    assert sources(rows[:2], "a.jsonl", source="fixed") == ["fixed", "fixed"]
    assert sources([_row(0, task="t")], "b.jsonl", source_field="task") == ["t"]
    manifest = ingest_file(
        workspace, _file(tmp_path, [_row(0, task="t"), _row(1)], "c.jsonl", source_field="task"), SMALL
    )
    assert _rejected(workspace, manifest) == [(2, "no_source")]
    manifest = ingest_file(workspace, _file(tmp_path, [*rows, _row(0)], "d.jsonl"), SMALL)
    assert manifest.facts["sources"] == {
        "d": {"unique": 4, "duplicates": 1, "unsampled": 0},
        "s": {"unique": 1, "duplicates": 0, "unsampled": 0},
    }


def test_sampling_is_decided_by_content(tmp_path, workspace):
    half = IngestSettings(shard_rows=1000, sample_fraction=0.5)
    rows = [_row(i) for i in range(200)]
    manifest = ingest_file(workspace, _file(tmp_path, rows), half)
    shuffled = ingest_file(workspace, _file(tmp_path, [*rows[::-1], *rows[:50]], "b.jsonl"), half)
    kept, again = ({row["row_id"] for row in _rows(workspace, m)} for m in (manifest, shuffled))
    assert kept == again and 60 < len(kept) < 140
    assert manifest.counts["unsampled"] == 200 - len(kept)
    counts = shuffled.counts
    assert counts["rows_read"] == 250 == counts["unique"] + counts["duplicates"] + counts["unsampled"]
    other = ingest_file(workspace, _file(tmp_path, rows), IngestSettings(1000, 0.5, sample_seed=1))
    assert {row["row_id"] for row in _rows(workspace, other)} != kept


def test_a_second_run_does_nothing(tmp_path, workspace):
    file = _file(tmp_path, [_row(i) for i in range(5)])
    manifest = ingest_file(workspace, file, SMALL)
    assert ingest_file(workspace, file, SMALL) == manifest
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    assert ingest_file(workspace, _file(moved, [_row(i) for i in range(5)]), SMALL).key == manifest.key


def test_another_setting_or_content_is_another_artefact(tmp_path, workspace):
    shorter = tmp_path / "shorter"
    shorter.mkdir()
    rows = [_row(i, source="s") for i in range(5)]
    keys = [
        ingest_file(workspace, file, settings).key
        for file, settings in [
            (_file(tmp_path, rows), SMALL),
            (_file(tmp_path, rows), IngestSettings(shard_rows=4)),
            (_file(tmp_path, rows), IngestSettings(3, sample_fraction=0.9)),
            (_file(tmp_path, rows), IngestSettings(3, sample_fraction=0.9, sample_seed=1)),
            (_file(tmp_path, rows, source="x"), SMALL),
            (_file(tmp_path, rows, source_field="source"), SMALL),
            (_file(tmp_path, rows, format="prompt_completion"), SMALL),
            (_file(tmp_path, rows, "renamed.jsonl"), SMALL),
            (_file(shorter, rows[:4]), SMALL),
        ]
    ]
    assert len(set(keys)) == len(keys)
    seeds = [ingest_file(workspace, _file(tmp_path, rows), IngestSettings(3, sample_seed=seed)).key for seed in (0, 1)]
    assert seeds[0] == seeds[1]


def test_a_damaged_shard_is_written_again(tmp_path, workspace):
    file = _file(tmp_path, [_row(i) for i in range(5)])
    manifest = ingest_file(workspace, file, SMALL)
    workspace.write(manifest.facts["shards"][1]["path"], b"")
    again = ingest_file(workspace, file, SMALL)
    assert (again.key, again.files) == (manifest.key, manifest.files)
    assert len(_rows(workspace, again)) == 5


def test_containers_give_the_same_conversations(tmp_path, workspace):
    rows = [_row(i, id=f"{i:03}") for i in range(4)]
    (tmp_path / "a.json").write_text(json.dumps(rows, indent=1))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    ids = [
        [row["row_id"] for row in _rows(workspace, ingest_file(workspace, PoolFile(locate(str(tmp_path / n))), SMALL))]
        for n in ("a.json", "a.jsonl.gz", "a.parquet")
    ]
    assert ids[0] == ids[1] == ids[2] == [_id(i) for i in range(4)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "empty file"),
        ('{"question": "q"}', "fit no format"),
        ("{bad\n[1]", "not one record can be read; row 1: not_json"),
        (json.dumps(_row(0)) + "\n" + json.dumps({"messages": []}), "expected records of one format"),
    ],
)
def test_unusable_files(tmp_path, workspace, content, message):
    (tmp_path / "pool.jsonl").write_text(content)
    with pytest.raises(DataError, match=message) as caught:
        ingest_file(workspace, PoolFile(locate(str(tmp_path / "pool.jsonl"))), SMALL)
    assert "pool.jsonl" in str(caught.value)
    assert workspace.list_folder("ingest") == []


def test_detection_sees_the_first_good_records(tmp_path):
    file = _file(tmp_path, ["{bad", *[_row(i) for i in range(100)], {"messages": []}])
    assert detect_file_format(file.location) == "prompt_completion"


def test_a_full_disk_leaves_no_manifest(tmp_path, workspace):
    file = _file(tmp_path, [{"prompt": str(i) * 50, "completion": f"{i * 7919:x}" * 40} for i in range(200)])
    with _full_disk(1500), pytest.raises(OSError):
        ingest_file(workspace, file, IngestSettings(shard_rows=100))
    assert not any(path.endswith("manifest.json") for path in workspace.list_folder("ingest", recursive=True))
    assert ingest_file(workspace, file, IngestSettings(shard_rows=100)).counts["unique"] == 200


@contextlib.contextmanager
def _full_disk(num_bytes):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_settings_are_checked(tmp_path):
    location = locate(str(tmp_path / "a.jsonl"))
    for make in (
        lambda: IngestSettings(shard_rows=0),
        lambda: IngestSettings(sample_fraction=0.0),
        lambda: IngestSettings(sample_fraction=1.5),
        lambda: PoolFile(location, format="csv"),
        lambda: PoolFile(location, source="x", source_field="y"),
    ):
        with pytest.raises(ConfigError):
            make()
