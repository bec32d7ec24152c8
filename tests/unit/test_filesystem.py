"""Paths, URIs and patterns; whole-file writes."""

import contextlib
import errno
import os
import pickle
import resource
import tempfile
from pathlib import Path

import pytest
from pyarrow import fs

from rose_ray.errors import DataError
from rose_ray.filesystem import Location, child, expand, locate, open_for_writing, read_bytes, write_bytes


@pytest.fixture
def tree(tmp_path):
    for name in ("b.jsonl", "a.jsonl", "c.json", "sub/d.jsonl", "sub/deep/e.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    return tmp_path


@contextlib.contextmanager
def full_disk(num_bytes: int):
    """Let no file grow beyond ``num_bytes``: the kernel refuses the write as it does on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def _names(locations, root):
    return [os.path.relpath(location.path, root) for location in locations]


def test_paths_and_uris_meet(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_bytes(b"content")
    monkeypatch.chdir(tmp_path)
    for name in ("a.txt", "./a.txt", str(tmp_path / "a.txt"), f"file://{tmp_path}/a.txt"):
        location = locate(name)
        assert (location.path, location.name) == (str(tmp_path / "a.txt"), name)
        assert read_bytes(location) == b"content"
    assert locate("a.txt", relative_to="elsewhere").path == str(tmp_path / "elsewhere" / "a.txt")
    assert locate(str(tmp_path / "a.txt"), relative_to="elsewhere").path == str(tmp_path / "a.txt")


def test_child_and_pickle(tmp_path):
    location = child(locate(str(tmp_path)), "x", "y.json")
    assert location.path == location.name == str(tmp_path / "x" / "y.json")
    again = pickle.loads(pickle.dumps(location))
    assert again.path == location.path and again.filesystem == location.filesystem


def test_unknown_uri():
    with pytest.raises(DataError, match="cannot open 'gopher://x/y'"):
        locate("gopher://x/y")


def test_patterns(tree):
    assert _names(expand([f"{tree}/*.jsonl"]), tree) == ["a.jsonl", "b.jsonl"]
    assert _names(expand([f"{tree}/**/*.jsonl"]), tree) == [
        "a.jsonl",
        "b.jsonl",
        "sub/d.jsonl",
        "sub/deep/e.jsonl",
    ]
    assert _names(expand([f"{tree}/[bc].json*"]), tree) == ["b.jsonl", "c.json"]
    assert _names(expand(["s?b/*"], relative_to=str(tree)), tree) == ["sub/d.jsonl"]


def test_order_is_as_given_and_files_count_once(tree):
    names = ["c.json", "*.jsonl", "a.jsonl", f"file://{tree}/c.json"]
    assert _names(expand(names, relative_to=str(tree)), tree) == ["c.json", "a.jsonl", "b.jsonl"]


def test_missing_file(tree):
    with pytest.raises(DataError, match=r"'none\.jsonl': expected a file, found nothing"):
        expand(["none.jsonl"], relative_to=str(tree))


def test_folder_for_a_file(tree):
    with pytest.raises(DataError, match="expected a file, found a folder"):
        expand([f"{tree}/sub"])


@pytest.mark.parametrize("pattern", ["*.parquet", "nowhere/*.jsonl", "sub/*.json"])
def test_pattern_without_a_match(tree, pattern):
    with pytest.raises(DataError, match="matches no file"):
        expand([pattern], relative_to=str(tree))


@pytest.mark.parametrize("kind", ["local", "other"])
def test_whole_file_writes(tmp_path, kind):
    location = locate(str(tmp_path / "x" / "y.bin"))
    if kind == "other":
        location = Location(fs.SubTreeFileSystem(str(tmp_path), fs.LocalFileSystem()), "x/y.bin", "y.bin")
    write_bytes(location, b"old")
    write_bytes(location, b"newer")
    assert read_bytes(location) == b"newer"
    assert os.listdir(tmp_path / "x") == ["y.bin"]


def test_reading_does_not_decompress(tmp_path):
    location = locate(str(tmp_path / "a.gz"))
    write_bytes(location, b"not gzip at all")
    assert read_bytes(location) == b"not gzip at all"


def test_full_disk_leaves_the_old_file_and_nothing_else(tmp_path):
    location = locate(str(tmp_path / "a.bin"))
    write_bytes(location, b"old")
    with full_disk(1000), pytest.raises(OSError):
        write_bytes(location, b"x" * 5000)
    assert read_bytes(location) == b"old"
    assert os.listdir(tmp_path) == ["a.bin"]


@pytest.mark.parametrize("kind", ["local", "other"])
def test_a_file_whose_writing_fails_is_not_there(tmp_path, kind):
    location = locate(str(tmp_path / "x" / "y.bin"))
    if kind == "other":
        location = Location(fs.SubTreeFileSystem(str(tmp_path), fs.LocalFileSystem()), "x/y.bin", "y.bin")
    with pytest.raises(KeyError), open_for_writing(location) as stream:
        stream.write(b"a part")
        raise KeyError("stop")
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_full_folder_for_temporary_files_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    location = Location(fs.SubTreeFileSystem(str(tmp_path), fs.LocalFileSystem()), "x/y.bin", "y.bin")
    with pytest.raises(OSError) as raised, open_for_writing(location):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert raised.value.filename == tempfile.gettempdir()


def test_an_absolute_path_needs_no_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert locate(str(tmp_path / "pool.jsonl")).path == str(tmp_path / "pool.jsonl")
