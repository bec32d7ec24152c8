"""The reducing task refuses tables that do not add up. Called plainly, without Ray."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from rose_ray.config.target import TargetConfig
from rose_ray.errors import AccountingError, AlteredFileError, DataError, SpaceMismatchError
from rose_ray.schemas import FEATURE_REJECTED, bank_schema, features_schema
from rose_ray.stages.score import ShardRows, check_same_space
from rose_ray.stores.features import StoredShard
from tests.tiny import digest, score_rows

DIM = 3
SPACE = {"base": "b", "adapters": ["x", "y"], "layout": "l", "projection": "sketch/v1/dim=3/seed=0"}


def ids(*names: str) -> pa.Array:
    return pa.array(map(digest, names), pa.string())


def features(names: list[str], seed: int = 0) -> pa.Table:
    random = np.random.default_rng(seed)
    count = len(names)
    vectors = random.normal(size=count * DIM).astype(np.float32)
    columns: list[Any] = [ids(*names), pa.FixedSizeListArray.from_arrays(pa.array(vectors), DIM)]
    columns += [pa.array(np.ones(count)), *(pa.array(np.ones(count, np.float32)) for _ in range(2))]
    columns += [pa.array(np.full(count, 5, np.int32)) for _ in range(3)]
    return pa.Table.from_arrays(columns, schema=features_schema(DIM, "float32"))


def bank() -> pa.Table:
    row: dict[str, Any] = {"pair_id": "p", "subtask": "s", "gradient_w": [1.0, 0.0, 0.0], "gradient_l": [0.0, 1.0, 0.0]}
    for field in bank_schema(DIM):
        row.setdefault(field.name, {"dot_wl": 0.0}.get(field.name, 1))
    return pa.Table.from_pylist([row], schema=bank_schema(DIM))


def rejected(*names: str) -> pa.Table:
    rows = [{"row_id": digest(name), "reason": "prompt_too_long", "detail": ""} for name in names]
    return pa.Table.from_pylist(rows, schema=FEATURE_REJECTED)


TARGET = TargetConfig.model_validate({"name": "t", "pairs": [{"files": ["unused"]}]})
STORED = StoredShard([features(["a", "c"]), features(["a", "c"], seed=1)], rejected("b"))
SHARD = ShardRows("shard-0", ids("a", "b", "c"), pa.array(["x", "x", "y"]), STORED)


def score(shard: ShardRows, stored: StoredShard) -> Any:
    return score_rows([replace(shard, stored=stored)], [bank(), bank()], [1.0, 1.0], TARGET)


def test_rows_that_are_not_wanted_are_left_out() -> None:
    wanted = replace(SHARD, row_ids=ids("c"), sources=pa.array(["y"]))
    result = score(wanted, STORED)
    assert result.table["row_id"].to_pylist() == [digest("c")] and result.table["rank"].to_pylist() == [1]
    assert result.rejected.num_rows == 0


def test_a_row_that_is_neither_scored_nor_rejected() -> None:
    with pytest.raises(AccountingError, match="shard shard-0: 3 rows wanted, 2 scored, 0 rejected"):
        score(SHARD, replace(STORED, rejected=rejected()))


def test_checkpoints_with_different_rows() -> None:
    with pytest.raises(AlteredFileError, match="its checkpoints hold different rows"):
        score(SHARD, replace(STORED, tables=[features(["a", "c"]), features(["a", "b"])]))


def test_no_row_scored_at_all() -> None:
    with pytest.raises(DataError, match=r"none of 3 rows could be scored; first reason: .*prompt_too_long"):
        score(SHARD, StoredShard([features([]), features([])], rejected("a", "b", "c")))


@pytest.mark.parametrize("key", SPACE)
def test_spaces_must_agree_in_everything(key: str) -> None:
    check_same_space(SPACE, dict(SPACE))
    for other in ({**SPACE, key: "other"}, {name: value for name, value in SPACE.items() if name != key}):
        with pytest.raises(SpaceMismatchError, match=f"{key}: features .* bank "):
            check_same_space(SPACE, other)
