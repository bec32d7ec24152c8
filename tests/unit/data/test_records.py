"""Reading files: exact text, rejected rows, unusable files."""

import datetime
import decimal
import gzip
import hashlib
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rose_ray.data.records import RawRecord, RejectedRecord, file_digest, file_stem, iter_records, read_text
from rose_ray.errors import DataError
from rose_ray.filesystem import locate

LINES = ['{"id": "000123", "x": 1.50}', '{"id":42,"x":"\\u00e9"}', ' {"id": 12345678901234567890} ']


def _zst(data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


def _file(tmp_path, name: str, data: bytes):
    pack = {".gz": gzip.compress, ".zst": _zst}.get("." + name.rsplit(".", 1)[-1], bytes)
    (tmp_path / name).write_bytes(pack(data))
    return locate(str(tmp_path / name))


def _records(tmp_path, name: str, data: bytes):
    return list(iter_records(_file(tmp_path, name, data)))


@pytest.mark.parametrize("ending", ["", ".gz", ".zst"])
@pytest.mark.parametrize("kind", ["jsonl", "ndjson", "json", "JSONL"])
def test_text_is_exact_whatever_the_container(tmp_path, kind, ending):
    text = "[\n" + ",\n".join(LINES) + "]" if kind == "json" else "\n".join(LINES)
    records = _records(tmp_path, f"a.{kind}{ending}", text.encode())
    expected = [line.strip() for line in LINES] if kind == "json" else LINES
    assert [record.text for record in records] == expected
    assert [record.place for record in records] == [1, 2, 3]
    assert [type(record.value["id"]) for record in records] == [str, int, int]
    assert records[0].value["id"] == "000123"


def test_concatenated_gzip_members_are_one_file(tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(b"".join(gzip.compress(f"{line}\n".encode()) for line in LINES))
    assert [r.text for r in iter_records(locate(str(tmp_path / "a.jsonl.gz")))] == LINES


def test_lines(tmp_path):
    data = b'\xef\xbb\xbf{"a": 1}\r\n\n   \n{"a": "x\xe2\x80\xa8y"}\n{"b": 2}'
    assert [(r.place, r.text) for r in _records(tmp_path, "a.jsonl", data)] == [
        (1, '{"a": 1}'),
        (4, '{"a": "x\u2028y"}'),
        (5, '{"b": 2}'),
    ]


def test_bad_lines_are_rejected_and_reading_goes_on(tmp_path):
    lines = [
        b'{"a": 1}',
        b"{not json",
        b"[1, 2]",
        b'{"a": "\xff\xfe"}',
        b'{"a": "\\ud800"}',
        b'{"a": 1, "a": 2}',
        b'{"a": NaN}',
        b'{"a": 2}',
    ]
    records = _records(tmp_path, "a.jsonl", b"\n".join(lines))
    reasons = [r.reason if isinstance(r, RejectedRecord) else None for r in records]
    assert reasons == [
        None,
        "not_json",
        "not_object",
        "invalid_utf8",
        "invalid_unicode",
        "duplicate_key",
        "not_json",
        None,
    ]
    assert [record.place for record in records] == list(range(1, 9))


def test_bad_elements_of_an_array_are_rejected(tmp_path):
    records = _records(tmp_path, "a.json", b'[{"a": 1}, 3, {"a": Infinity}, {"a": 2}]')
    assert [getattr(record, "reason", "") for record in records] == ["", "not_object", "not_json", ""]
    assert [record.place for record in records] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.jsonl", b"", "empty file"),
        ("a.jsonl", b"\n \n", "empty file"),
        ("a.jsonl", b"\xef\xbb\xbf", "empty file"),
        ("a.jsonl.gz", b"", "empty file"),
        ("a.json", b"[]", "empty file"),
        ("a.json", b" ", "empty file"),
        ("a.json", b'{"data": [{"a": 1}]}', "array of objects, found an object"),
        ("a.json", b'{"a": 1}\n{"a": 2}', r"belongs in a \.jsonl file"),
        ("a.json", b'[{"a": 1}, {"b": ]', "not_json"),
        ("a.json", b'[{"a": "\xff"}]', "not UTF-8"),
        ("a.csv", b"a,b\n1,2\n", "does not tell the kind"),
        ("a.parquet.gz", b"x", "does not tell the kind"),
        ("a.gz", b"x", "does not tell the kind"),
        ("a.parquet", b"PAR1 no more", "not a readable Parquet"),
    ],
)
def test_unusable_files(tmp_path, name, data, message):
    with pytest.raises(DataError, match=message) as caught:
        _records(tmp_path, name, data)
    assert str(tmp_path / name) in str(caught.value)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.parquet", "a.jsonl.gz"])
def test_missing_file(tmp_path, name):
    with pytest.raises(DataError, match="no such file"):
        list(iter_records(locate(str(tmp_path / name))))


@pytest.mark.parametrize("ending", ["gz", "zst"])
@pytest.mark.parametrize("kind", ["jsonl", "json"])
@pytest.mark.parametrize("cut", [1, 200])
def test_truncated_compression(tmp_path, kind, ending, cut):
    rows = [json.dumps({"a": hashlib.sha256(str(i).encode()).hexdigest()}) for i in range(2000)]
    text = "[" + ",".join(rows) + "]" if kind == "json" else "\n".join(rows)
    location = _file(tmp_path, f"a.{kind}.{ending}", text.encode())
    with open(location.path, "rb") as file:
        whole = file.read()
    with open(location.path, "wb") as file:
        file.write(whole[:-cut])
    with pytest.raises(DataError, match="cut short"):
        list(iter_records(location))


def test_not_compressed_at_all(tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(b'{"a": 1}\n')
    with pytest.raises(DataError, match="cut short or not gzip"):
        list(iter_records(locate(str(tmp_path / "a.jsonl.gz"))))


def test_parquet_rows_become_json(tmp_path):
    utc = datetime.UTC
    table = pa.table(
        {
            "z": pa.array(["000123", "é"]),
            "n": pa.array([2**62, None], pa.int64()),
            "f": pa.array([float("nan"), float("-inf")]),
            "day": pa.array([datetime.date(2024, 2, 29), None]),
            "at": pa.array([datetime.datetime(2024, 2, 29, 1, 2, 3, tzinfo=utc), None], pa.timestamp("us", "UTC")),
            "raw": pa.array([b"\x00\xff", None]),
            "price": pa.array([decimal.Decimal("1.10"), None]),
            "turns": pa.array([[{"role": "user", "content": "hi"}], []]),
        }
    )
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=1)
    first, second = iter_records(locate(str(tmp_path / "a.parquet")))
    assert isinstance(first, RawRecord) and (first.place, second.place) == (1, 2)
    assert first.text == (
        '{"z":"000123","n":4611686018427387904,"f":"NaN","day":"2024-02-29","at":"2024-02-29T01:02:03+00:00",'
        '"raw":"AP8=","price":"1.10","turns":[{"role":"user","content":"hi"}]}'
    )
    assert first.value == json.loads(first.text)
    assert second.value["f"] == "-Infinity" and second.value["n"] is None and second.value["z"] == "é"


def test_parquet_with_invalid_utf8(tmp_path):
    bad = pa.Array.from_buffers(
        pa.string(), 3, [None, pa.py_buffer(b"\0\0\0\0\1\0\0\0\3\0\0\0\4\0\0\0"), pa.py_buffer(b"a\xff\xfeb")]
    )
    pq.write_table(pa.table({"a": bad}), tmp_path / "a.parquet")
    records = list(iter_records(locate(str(tmp_path / "a.parquet"))))
    assert [getattr(record, "reason", None) for record in records] == [None, "invalid_utf8", None]


def test_parquet_that_is_empty_or_ambiguous(tmp_path):
    pq.write_table(pa.table({"a": pa.array([], pa.string())}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="empty file"):
        list(iter_records(locate(str(tmp_path / "a.parquet"))))
    twice = pa.Table.from_arrays([pa.array([1]), pa.array([2])], names=["a", "a"])
    pq.write_table(twice, tmp_path / "b.parquet")
    with pytest.raises(DataError, match="two columns have one name"):
        list(iter_records(locate(str(tmp_path / "b.parquet"))))


def test_names_and_digests(tmp_path):
    location = _file(tmp_path, "my.pool.jsonl.gz", b'{"a": 1}')
    assert file_stem(location) == "my.pool"
    with open(location.path, "rb") as file:
        assert file_digest(location) == hashlib.sha256(file.read()).hexdigest()
    assert read_text(location) == '{"a": 1}'
    with pytest.raises(DataError, match="no such file"):
        file_digest(locate(str(tmp_path / "none.jsonl")))
