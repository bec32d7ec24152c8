"""Workspaces, receipts and manifests: what was written is what is read."""

import json
import os
import pickle
from dataclasses import replace

import pyarrow as pa
import pytest
from pyarrow import fs

from rose_ray.errors import AlteredFileError, NewerFormatError, StoreError
from rose_ray.filesystem import Location
from rose_ray.stores.manifest import (
    MANIFEST_FILE,
    Manifest,
    artefact_key,
    commit_manifest,
    damaged_files,
    find_manifest,
    read_manifest,
)
from rose_ray.stores.workspace import FORMAT_VERSION, Workspace

TABLE = pa.table({"row_id": ["a", "b"], "value": [1.5, None]})


@pytest.fixture
def workspace(tmp_path):
    return Workspace.open(str(tmp_path / "ws"), create=True)


def _flip(workspace, path):
    """Change one byte and keep the size."""
    name = workspace.location(path).path
    with open(name, "r+b") as file:
        file.seek(os.path.getsize(name) // 2)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))


def _artefact(workspace, made_from=None):
    made_from = made_from or {"rows": 2, "version": 1}
    key = artefact_key(made_from)
    record = workspace.write_table(f"demo/{key}/table.parquet", TABLE)
    manifest = Manifest("demo", key, made_from, [record], {"rows": 2}, {"note": "é"}, 0.5, {}, "", f"demo/{key}")
    return commit_manifest(workspace, manifest)


def test_open_and_create(tmp_path):
    with pytest.raises(StoreError, match="no workspace at"):
        Workspace.open(str(tmp_path / "ws"))
    Workspace.open(str(tmp_path / "ws"), create=True).write("x/y", b"1")
    again = Workspace.open("ws", create=True, relative_to=str(tmp_path))
    assert again.read("x/y") == b"1"


def test_newer_format(tmp_path, workspace):
    workspace.write_json("rose_ray.json", {"format": FORMAT_VERSION + 1})
    with pytest.raises(NewerFormatError, match=f"format {FORMAT_VERSION + 1}"):
        Workspace.open(str(tmp_path / "ws"), create=True)


@pytest.mark.parametrize("content", ['{"format": "1"}', "{}", "not json"])
def test_unreadable_format_file(tmp_path, workspace, content):
    workspace.write("rose_ray.json", content.encode())
    with pytest.raises(StoreError):
        Workspace.open(str(tmp_path / "ws"))


@pytest.mark.parametrize("path", ["/etc/passwd", "../outside", "a/../../b"])
def test_paths_stay_inside(workspace, path):
    with pytest.raises(StoreError, match="not inside the workspace"):
        workspace.write(path, b"")


def test_listing(workspace):
    for path in ("a/2", "a/1", "a/sub/3"):
        workspace.write(path, b"")
    assert workspace.list_folder("a") == ["a/1", "a/2", "a/sub"]
    assert workspace.list_folder("a", recursive=True) == ["a/1", "a/2", "a/sub", "a/sub/3"]
    assert workspace.list_folder("none") == []
    workspace.delete_folder("a")
    workspace.delete_folder("a")
    assert not workspace.exists("a/1")


def test_tables_come_back_whole_and_same_bytes(workspace):
    first, second = workspace.write_table("a.parquet", TABLE), workspace.write_table("b.parquet", TABLE)
    assert (first.num_rows, first.sha256) == (2, second.sha256)
    assert workspace.read_table("a.parquet", first).equals(TABLE)
    assert workspace.read_table("a.parquet", first, columns=["row_id"]).column_names == ["row_id"]


def test_a_schema_keeps_its_notes(workspace):
    schema = pa.schema([pa.field("a", pa.int8(), nullable=False, metadata={"unit": "1"})], metadata={"version": "1"})
    record = workspace.write_table("a.parquet", pa.table({"a": [1]}, schema=schema))
    assert workspace.read_table("a.parquet", record).schema.equals(schema, check_metadata=True)


def test_altered_files(workspace):
    record = workspace.write_table("a.parquet", TABLE)
    assert workspace.is_intact(record)
    _flip(workspace, "a.parquet")
    assert workspace.is_intact(record)
    with pytest.raises(AlteredFileError, match=r"a\.parquet.*altered or cut short"):
        workspace.read_table("a.parquet", record)
    workspace.write("a.parquet", b"PAR1")
    assert not workspace.is_intact(record)
    with pytest.raises(AlteredFileError, match="not a readable Parquet file"):
        workspace.read_table("a.parquet")
    workspace.write("a.json", b"{")
    with pytest.raises(AlteredFileError, match="not JSON"):
        workspace.read_json("a.json")
    with pytest.raises(StoreError, match="no such file"):
        workspace.read("none")


def test_keys_depend_on_values_and_not_on_order():
    key = artefact_key({"a": 1, "b": [1.0, "é", None]})
    assert key == artefact_key({"b": [1.0, "é", None], "a": 1}) and len(key) == 16
    assert len({key, artefact_key({"a": 2, "b": [1.0, "é", None]}), artefact_key({"a": "1", "b": []})}) == 3


def test_manifest_round_trip(workspace):
    manifest = _artefact(workspace)
    assert find_manifest(workspace, manifest.folder) == read_manifest(workspace, manifest.folder) == manifest
    assert manifest.file("table.parquet").num_rows == 2 and manifest.num_bytes == manifest.files[0].num_bytes
    with pytest.raises(AlteredFileError, match="does not list"):
        manifest.file("other.parquet")


def test_an_artefact_without_manifest_or_with_damaged_files_counts_for_nothing(workspace, caplog):
    assert find_manifest(workspace, "demo/none") is None
    manifest = _artefact(workspace)
    workspace.write(manifest.files[0].path, b"")
    assert caplog.messages == []
    assert find_manifest(workspace, manifest.folder) is None
    assert caplog.messages == [
        f"{manifest.folder} counts as unfinished: missing or cut short: {manifest.files[0].path}"
    ]
    assert damaged_files(workspace, manifest.files) == [manifest.files[0].path]


def test_a_manifest_that_was_altered(workspace, caplog):
    manifest = _artefact(workspace)
    path = f"{manifest.folder}/{MANIFEST_FILE}"
    content = workspace.read_json(path)
    workspace.write_json(path, {**content, "made_from": {"rows": 3}})
    with pytest.raises(AlteredFileError, match="key and content disagree"):
        read_manifest(workspace, manifest.folder)
    workspace.write_json(path, {key: value for key, value in content.items() if key != "counts"})
    with pytest.raises(AlteredFileError, match="not a manifest"):
        read_manifest(workspace, manifest.folder)
    workspace.write(path, json.dumps(content)[:-20].encode())
    with pytest.raises(AlteredFileError, match="not JSON"):
        read_manifest(workspace, manifest.folder)
    assert find_manifest(workspace, manifest.folder) is None
    said = f"{manifest.folder} counts as unfinished: its manifest.json was altered or cut short"
    assert caplog.messages == [said]
    assert find_manifest(workspace, _artefact(workspace).folder) == manifest


def test_any_filesystem_and_other_processes(tmp_path, workspace):
    other = Workspace(Location(fs.SubTreeFileSystem(str(tmp_path), fs.LocalFileSystem()), "ws", "sub://ws"))
    manifest = _artefact(other)
    assert find_manifest(pickle.loads(pickle.dumps(workspace)), manifest.folder) == manifest
    assert other.list_folder("demo") == [manifest.folder]
    other.delete_folder("demo")
    assert not workspace.exists(manifest.files[0].path)


def test_records_compare_by_content(workspace):
    record = workspace.write("a", b"1")
    assert record == workspace.write("a", b"1") != replace(record, num_bytes=2)


def test_tables_written_one_after_the_other_are_one(workspace):
    parts = [TABLE, TABLE.slice(1), TABLE.slice(0, 0)]
    record = workspace.write_tables("t.parquet", iter(parts), TABLE.schema)
    assert record.num_rows == 3 and workspace.read_table("t.parquet", record).equals(pa.concat_tables(parts))
    table = workspace.open_table("t.parquet", record)
    assert [table.read_row_group(number).num_rows for number in range(table.num_row_groups)][:2] == [2, 1]
    assert workspace.write_tables("one.parquet", [TABLE], TABLE.schema).sha256 == (
        workspace.write_table("two.parquet", TABLE).sha256
    )


def test_a_table_whose_writing_fails_is_not_there(workspace):
    def parts():
        yield TABLE
        raise KeyError("stop")

    with pytest.raises(KeyError):
        workspace.write_tables("x/t.parquet", parts(), TABLE.schema)
    assert workspace.list_folder("x") == []


def test_an_opened_table_is_checked_as_a_read_one_is(workspace):
    record = workspace.write_table("t.parquet", TABLE)
    assert workspace.open_table("t.parquet", record).read().equals(TABLE)
    _flip(workspace, "t.parquet")
    with pytest.raises(AlteredFileError, match="differ from"):
        workspace.open_table("t.parquet", record)
    plain = workspace.write("plain.parquet", b"no table")
    with pytest.raises(AlteredFileError, match="not a readable Parquet file"):
        workspace.open_table("plain.parquet", plain)
    with pytest.raises(StoreError, match="no such file"):
        workspace.open_table("nowhere.parquet", record)


def test_vectors_of_floats_have_no_dictionary(workspace):
    vectors = pa.FixedSizeListArray.from_arrays(pa.array([0.5] * 8, pa.float32()), 4)
    codes = pa.FixedSizeListArray.from_arrays(pa.array([1] * 8, pa.int8()), 4)
    record = workspace.write_table("t.parquet", pa.table({"name": ["a", "b"], "feature": vectors, "code": codes}))
    group = workspace.open_table("t.parquet", record).metadata.row_group(0)
    dictionaries = {
        group.column(number).path_in_schema.split(".")[0]: group.column(number).has_dictionary_page
        for number in range(group.num_columns)
    }
    assert dictionaries == {"name": True, "feature": False, "code": True}
