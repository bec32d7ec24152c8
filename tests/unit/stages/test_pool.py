"""Shards of several files to one pool."""

import json
from collections import Counter

import pytest

from rose_ray.data.conversation import Conversation, Message, row_id
from rose_ray.errors import AccountingError, AlteredFileError, DataError
from rose_ray.filesystem import locate
from rose_ray.schemas import DUPLICATES, REJECTED, SHARD
from rose_ray.stages.ingest import IngestSettings, PoolFile, ingest_file
from rose_ray.stages.pool import check_row_counts, pool_row_ids, read_pool_shard, say_files, settle_pool, skipped_rows
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


def _pool(workspace, *files, settings=SMALL):
    return settle_pool(workspace, [ingest_file(workspace, file, settings) for file in files])


def test_earlier_files_own_shared_rows(tmp_path, workspace):
    one = _file(tmp_path, [_row(i, source="one") for i in range(5)], "one.jsonl")
    two = _file(tmp_path, [_row(i, source="two") for i in (7, 3, 4, 8, 3)], "two.jsonl")
    pool = _pool(workspace, one, two)
    assert pool.counts == {"rows_read": 10, "unique": 7, "duplicates": 3, "rejected": 0, "unsampled": 0}
    assert pool.facts["sources"] == {"one": 5, "two": 2}
    assert [(e["num_rows"], e["num_skipped"]) for e in pool.facts["shards"]] == [
        (3, 0),
        (2, 0),
        (3, 2),
        (1, 0),
    ]
    assert pool_row_ids(workspace, pool) == [_id(i) for i in (0, 1, 2, 3, 4, 7, 8)]
    names = [entry["shard"] for entry in pool.facts["shards"]]
    table = read_pool_shard(workspace, pool, names[2])
    assert table.schema.equals(SHARD, check_metadata=True)
    assert table["row_id"].to_pylist() == [_id(7)]
    assert skipped_rows(workspace, pool) == {names[2]: [_id(3), _id(4)]}
    index = workspace.read_table(f"{pool.folder}/duplicates.parquet")
    assert index.schema.equals(DUPLICATES, check_metadata=True)
    assert index["owner"].to_pylist() == [names[1], names[1]]


def test_order_of_files_decides_who_owns(tmp_path, workspace):
    one = _file(tmp_path, [_row(0), _row(1)], "one.jsonl")
    two = _file(tmp_path, [_row(1), _row(2)], "two.jsonl")
    forth, back = _pool(workspace, one, two), _pool(workspace, two, one)
    assert forth.key != back.key
    assert forth.facts["sources"] == {"one": 2, "two": 1} and back.facts["sources"] == {"one": 1, "two": 2}
    assert sorted(pool_row_ids(workspace, forth)) == sorted(pool_row_ids(workspace, back))


def test_files_added_later_move_no_shard(tmp_path, workspace):
    one = _file(tmp_path, [_row(i) for i in range(7)], "one.jsonl")
    before = _pool(workspace, one)
    two = _file(tmp_path, [_row(i) for i in range(5, 12)], "two.jsonl")
    zero = _file(tmp_path, [_row(2), _row(20)], "zero.jsonl")
    after = _pool(workspace, zero, one, two)
    shards = [{k: v for k, v in entry.items() if k != "num_skipped"} for entry in before.facts["shards"]]
    later = [{k: v for k, v in entry.items() if k != "num_skipped"} for entry in after.facts["shards"]]
    assert later[1:4] == shards
    assert after.counts["unique"] == 13 == len(pool_row_ids(workspace, after))


def test_pool_equals_a_plain_loop(tmp_path, workspace):
    numbers = [[(i * k) % 17 for i in range(12)] for k in (3, 5, 2)]
    files = [_file(tmp_path, [_row(n) for n in part], f"f{k}.jsonl") for k, part in enumerate(numbers)]
    expected = list(dict.fromkeys(n for part in numbers for n in part))
    pool = _pool(workspace, *files)
    assert pool_row_ids(workspace, pool) == [_id(n) for n in expected]
    owner = {n: f"f{k}" for k, part in reversed(list(enumerate(numbers))) for n in part}
    assert pool.facts["sources"] == dict(sorted(Counter(owner.values()).items()))


def test_a_pool_is_made_once(tmp_path, workspace):
    file = _file(tmp_path, [_row(0)])
    assert _pool(workspace, file) == _pool(workspace, file)


def test_the_same_file_under_two_names(tmp_path, workspace, caplog):
    folders = [tmp_path / name for name in "ab"]
    for folder in folders:
        folder.mkdir()
    files = [_file(folder, [_row(i) for i in range(4)]) for folder in folders]
    manifests = [ingest_file(workspace, file, SMALL) for file in files]
    pool = settle_pool(workspace, manifests)
    assert pool.counts == {"rows_read": 8, "unique": 4, "duplicates": 4, "rejected": 0, "unsampled": 0}
    assert len(pool.facts["shards"]) == 2 and len(pool_row_ids(workspace, pool)) == 4
    caplog.set_level("INFO")
    say_files(workspace, pool, [file.location.name for file in files], manifests)
    first, second, repeats = (record.getMessage() for record in caplog.records)
    said = "format prompt_completion, 4 rows read, 4 unique, 0 duplicates, 0 rejected, 0 unsampled"
    assert (first, second) == tuple(f"{folder}/pool.jsonl: {said}" for folder in folders)
    assert repeats.endswith(f"one of them counts: {folders[0]}/pool.jsonl, {folders[1]}/pool.jsonl")


def test_ids_that_clash_across_files(tmp_path, workspace, caplog):
    one = _file(tmp_path, [_row(0, id="x"), _row(1, id="y"), _row(2)], "one.jsonl", source="s")
    two = _file(
        tmp_path, [_row(3, id="x"), _row(4, id="x"), _row(1, id="z"), _row(5, id=["x"])], "two.jsonl", source="s"
    )
    elsewhere = _file(tmp_path, [_row(6, id="x"), _row(3), _row(7, id="z")], "three.jsonl", source="other")
    later = _file(tmp_path, [_row(8, id="z")], "four.jsonl", source="s")
    files = [one, two, elsewhere, later]
    manifests = [ingest_file(workspace, file, SMALL) for file in files]
    pool = settle_pool(workspace, manifests)
    # Row 4 clashes within its file; row 3 clashes with row 0, so the third file owns its content.
    assert pool.counts == {"rows_read": 11, "unique": 7, "duplicates": 1, "rejected": 3, "unsampled": 0}
    assert pool_row_ids(workspace, pool) == [_id(i) for i in (0, 1, 2, 5, 6, 3, 7)]
    assert pool.facts["sources"] == {"other": 3, "s": 4}
    assert pool.facts["reject_reasons"] == {"id_conflict": 3} and pool.facts["num_id_conflicts"] == 2
    index = workspace.read_table(f"{pool.folder}/duplicates.parquet")
    assert index["reason"].to_pylist() == ["id_conflict", "duplicate", "id_conflict"]
    rejected = workspace.read_table(f"{pool.folder}/rejected.parquet")
    assert rejected.schema.equals(REJECTED, check_metadata=True)
    assert [(row["file"], row["place"], row["detail"].split(" has ")[0]) for row in rejected.to_pylist()] == [
        (two.location.name, 1, f"row 1 of {one.location.name}"),
        (later.location.name, 1, f"row 3 of {two.location.name}"),
    ]
    say_files(workspace, pool, [file.location.name for file in files], manifests)
    assert f"2 rows are rejected, since an earlier file has their source and id: {two.location.name} row 1" in (
        caplog.text.replace(" with other content", "")
    )


def test_a_file_taken_out_frees_the_rows_that_clashed_with_it(tmp_path, workspace):
    one = _file(tmp_path, [_row(0, id="x")], "one.jsonl", source="s")
    two = _file(tmp_path, [_row(1, id="x")], "two.jsonl", source="s")
    assert pool_row_ids(workspace, _pool(workspace, one, two)) == [_id(0)]
    assert pool_row_ids(workspace, _pool(workspace, two)) == [_id(1)]


def test_an_empty_pool(tmp_path, workspace):
    file = _file(tmp_path, [{"prompt": "q", "completion": ""}, "{bad"])
    with pytest.raises(DataError, match=r"no row: 2 read from .*empty_answer 1, not_json 1"):
        _pool(workspace, file)
    with pytest.raises(DataError, match="no file"):
        settle_pool(workspace, [])


def test_altered_shards_and_indexes_are_noticed(tmp_path, workspace):
    one = _file(tmp_path, [_row(i) for i in range(3)], "one.jsonl")
    two = _file(tmp_path, [_row(i) for i in range(2, 5)], "two.jsonl")
    pool = _pool(workspace, one, two)
    entry = pool.facts["shards"][1]
    with pytest.raises(AlteredFileError, match="3 rows left, expected 3 less 1"):
        read_pool_shard(workspace, pool, entry["shard"], skipped={})
    with pytest.raises(DataError, match="no shard 'other'"):
        read_pool_shard(workspace, pool, "other")
    workspace.write_table(f"{pool.folder}/duplicates.parquet", DUPLICATES.empty_table())
    with pytest.raises(AlteredFileError, match=r"duplicates\.parquet"):
        read_pool_shard(workspace, pool, entry["shard"])
    workspace.write_table(entry["path"], SHARD.empty_table())
    with pytest.raises(AlteredFileError, match="altered or cut short"):
        read_pool_shard(workspace, pool, entry["shard"], skipped={})


def test_counts_that_do_not_add_up():
    counts = {"rows_read": 5, "unique": 2, "duplicates": 1, "rejected": 1, "unsampled": 0}
    with pytest.raises(AccountingError, match="pool: 5 rows read, but 2 unique"):
        check_row_counts(counts, "pool")
    check_row_counts({**counts, "unsampled": 1}, "pool")
