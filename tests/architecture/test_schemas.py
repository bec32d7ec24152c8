"""Every table says what its columns mean and which version it is."""

from __future__ import annotations

import pyarrow as pa
import pytest

from rose_ray import schemas

TABLES = {
    **{name: value for name, value in vars(schemas).items() if isinstance(value, pa.Schema)},
    "features": schemas.features_schema(4, "int8", 2),
    "bank": schemas.bank_schema(4),
    "shard_scores": schemas.shard_scores_schema(2),
    "scores": schemas.scores_schema(["a", "b"]),
}


@pytest.mark.parametrize("name", TABLES)
def test_columns_have_meanings_and_tables_a_version(name: str) -> None:
    schema = TABLES[name]
    assert schema.metadata[b"table"] == name.lower().encode() and int(schema.metadata[b"version"]) >= 1
    for column in schema:
        assert len(column.metadata[b"meaning"]) > 2, column.name


def test_each_table_has_a_name_of_its_own() -> None:
    names = [schema.metadata[b"table"] for schema in TABLES.values()]
    assert len(set(names)) == len(names) == 12
