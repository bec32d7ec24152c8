"""A method over a pool in shards: every row is accounted for, found again, and set aside as for any method."""

from __future__ import annotations

import os
import socket
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rose_ray.config.method import Needs, NoOptions
from rose_ray.config.target import PairInput, TargetConfig
from rose_ray.errors import AccountingError, ConfigError, DataError, NonFiniteError, ShapeError, StoreError
from rose_ray.methods import shards as steps
from rose_ray.methods.interface import Arrays, Method, MethodModel, PoolRows, Scored, Target, pack_texts, unpack_texts
from rose_ray.methods.registry import method_of
from rose_ray.methods.shards import MethodRun
from rose_ray.schemas import scores_schema
from rose_ray.stores.manifest import read_manifest
from rose_ray.stores.shards import (
    LENGTHS,
    SHARD_SCORES,
    SURVEYS,
    find_receipt,
    missing_shards,
    read_arrays,
    write_arrays,
)
from rose_ray.stores.workspace import Workspace
from tests.methods import make_pair, make_pool, run_method, tiny_tokeniser
from tests.tiny import make_pool_rows

PAIRS = [make_pair("water", "river stone", subtask="x"), make_pair("paper", "silver", subtask="y", number=1)]


class Own(Method[NoOptions]):
    """A user's method: the share of the pairs' words that a row has; rows of one answer token are rejected."""

    options_model = NoOptions
    needs = Needs(pairs=True)

    def score(self, rows: PoolRows, state: Arrays, model: MethodModel | None) -> Scored:
        numbers = np.array([[len(text), len(row_id)] for text, row_id in zip(rows.texts, rows.row_ids, strict=True)])
        short = {place: ("one_token", "1 answer token") for place in np.flatnonzero(rows.num_labelled_tokens < 5)}
        return Scored(numbers.astype(np.float64), short)


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace.open(str(tmp_path / "workspace"), create=True)


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    module = types.ModuleType("own_methods")
    module.Own = Own
    monkeypatch.setitem(sys.modules, "own_methods", module)
    return module


def target(method: str, **options: Any) -> TargetConfig:
    return TargetConfig(name="t", method=method, pairs=[PairInput(files=["f"])], method_options=options)


def a_pool(workspace: Workspace, tmp_path: Path, extra: int = 0) -> Any:
    rows = make_pool_rows(14)
    long = {"messages": [{"role": "user", "content": "word " * 200}, {"role": "assistant", "content": "yes"}]}
    files = {"one": rows[:8], "two": [*rows[6:14], {"id": "long", "source": "a", **long}]}
    return make_pool(workspace, tmp_path, files | ({"three": make_pool_rows(extra, seed=9)} if extra else {}))


@pytest.mark.parametrize("method", ["random", "length", "bm25", "dsir"])
def test_every_row_is_scored_or_rejected(method: str, workspace: Workspace, tmp_path: Path, tokenizer: Any) -> None:
    pool = a_pool(workspace, tmp_path)
    assert pool.counts["unique"] == 15 and len(pool.facts["shards"]) == 5
    table, made = run_method(workspace, pool, target(method), tiny_tokeniser(tokenizer), PAIRS)
    assert made.counts == {"unique": 15, "scored": 14, "rejected": 1}
    receipts = [read_manifest(workspace, path) for path in workspace.list_folder(workspace.list_folder(LENGTHS)[0])]
    assert {(each.facts["host"], each.facts["pid"]) for each in receipts} == {(socket.gethostname(), os.getpid())}
    assert made.facts["reject_reasons"] == {"prompt_too_long": 1}
    subtasks = ["x", "y"] if method in ("bm25", "dsir") else ["t"]
    assert table.schema.equals(scores_schema(subtasks), check_metadata=True)
    rows = table.to_pylist()
    assert sorted(row["rank"] for row in rows) == list(range(1, 15))
    assert all(row["score"] == max(row[f"subtask_{name}"] for name in subtasks) for row in rows)
    assert all(row["gradient_norm"] is None and row["num_tokens"] > row["num_labelled_tokens"] > 0 for row in rows)


def test_a_method_of_ones_own(own: types.ModuleType, workspace: Workspace, tmp_path: Path, tokenizer: Any) -> None:
    pool = a_pool(workspace, tmp_path)
    mean = target("own_methods:Own").model_copy(update={"aggregation": "mean"})
    table, made = run_method(workspace, pool, mean, tiny_tokeniser(tokenizer), PAIRS)
    assert made.counts["unique"] == made.counts["scored"] + made.counts["rejected"] == 15
    assert set(made.facts["reject_reasons"]) == {"prompt_too_long", "one_token"}
    assert (table["num_labelled_tokens"].to_numpy() >= 5).all()
    for row in table.to_pylist():
        assert (row["subtask_y"], row["score"]) == (32.0, (row["subtask_x"] + 32) / 2)


@pytest.mark.parametrize(("method", "is_rescored"), [("random", False), ("length", False), ("dsir", True)])
def test_new_files_cost_their_rows_alone_unless_the_pool_is_looked_at(
    method: str, is_rescored: bool, workspace: Workspace, tmp_path: Path, tokenizer: Any
) -> None:
    tokeniser = tiny_tokeniser(tokenizer)
    keys = []
    for extra in (0, 5):
        pool = a_pool(workspace, tmp_path, extra)
        chosen = method_of(target(method))
        told = Target("t", tuple(PAIRS) if chosen.needs.pairs else ())
        content = steps.method_content(chosen, method, told, steps.lengths_key("text", 96), {})
        keys.append(MethodRun(chosen, told, content, steps.lengths_key("text", 96), pool.key))
        if not extra:
            run_method(workspace, pool, target(method), tokeniser, PAIRS)
    assert (keys[0].key != keys[1].key) == is_rescored and keys[0].survey_key == keys[1].survey_key
    shards = [entry["shard"] for entry in pool.facts["shards"]]
    missing = missing_shards(workspace, SHARD_SCORES, keys[1].key, shards, skipped_of(workspace, pool))
    assert len(missing) == (len(shards) if is_rescored else 2)
    if is_rescored:
        assert len(missing_shards(workspace, SURVEYS, keys[1].survey_key, shards, skipped_of(workspace, pool))) == 2


def skipped_of(workspace: Workspace, pool: Any) -> dict[str, list[str]]:
    from rose_ray.stages.pool import skipped_rows

    return skipped_rows(workspace, pool)


def test_sums_over_other_rows_are_made_again(workspace: Workspace, tmp_path: Path, tokenizer: Any) -> None:
    pool = a_pool(workspace, tmp_path)
    run_method(workspace, pool, target("dsir"), tiny_tokeniser(tokenizer), PAIRS)
    shard, skipped = next(iter(skipped_of(workspace, pool).items()))
    (survey,) = workspace.list_subfolders(SURVEYS)
    (scores,) = workspace.list_subfolders(SHARD_SCORES)
    more = [*skipped, "0" * 32]
    assert find_receipt(workspace, SHARD_SCORES, scores.split("/")[1], shard, more) is not None
    assert find_receipt(workspace, SURVEYS, survey.split("/")[1], shard, skipped) is not None
    assert find_receipt(workspace, SURVEYS, survey.split("/")[1], shard, more) is None
    assert find_receipt(workspace, SHARD_SCORES, scores.split("/")[1], shard, []) is None


@pytest.mark.parametrize("kind", [LENGTHS, SURVEYS, SHARD_SCORES])
def test_a_shard_whose_files_cannot_be_read_is_missing(
    workspace: Workspace, tmp_path: Path, tokenizer: Any, kind: str
) -> None:
    pool = a_pool(workspace, tmp_path)
    run_method(workspace, pool, target("dsir"), tiny_tokeniser(tokenizer), PAIRS)
    (folder,) = workspace.list_subfolders(kind)
    shards, skipped = [entry["shard"] for entry in pool.facts["shards"]], skipped_of(workspace, pool)
    path = next(path for path in workspace.list_folder(f"{folder}/{shards[1]}") if not path.endswith(".json"))
    assert missing_shards(workspace, kind, folder.split("/")[1], shards, skipped) == {}
    workspace.write(path, bytes(len(workspace.read(path))))
    found = missing_shards(workspace, kind, folder.split("/")[1], shards, skipped)
    what = "safetensors header" if kind == SURVEYS else "Parquet footer"
    assert found.keys() == {shards[1]} and found[shards[1]].startswith(f"{path}: no readable {what}")


@pytest.mark.parametrize(
    ("scored", "error", "message"),
    [
        (lambda n: Scored(np.full((n, 2), np.nan)), NonFiniteError, r"method Own, shard \S+: 4 rows have scores"),
        (lambda n: Scored(np.zeros((n, 1))), ShapeError, r"scores have shape \(4, 1\); expected \(4, 2\)"),
        (
            lambda n: Scored(np.zeros((n, 2)), {n: ("no", "no")}),
            AccountingError,
            r"rejects rows \[4\], expected 0 to 3",
        ),
    ],
)
def test_what_a_method_must_not_return(
    own: types.ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    workspace: Workspace,
    tmp_path: Path,
    tokenizer: Any,
    scored: Any,
    error: type[Exception],
    message: str,
) -> None:
    monkeypatch.setattr(Own, "score", lambda self, rows, state, model: scored(len(rows)))
    pool = a_pool(workspace, tmp_path)
    with pytest.raises(error, match=message):
        run_method(workspace, pool, target("own_methods:Own"), tiny_tokeniser(tokenizer), PAIRS)


def test_a_pool_without_one_sample_is_refused(workspace: Workspace, tmp_path: Path, tokenizer: Any) -> None:
    pool = a_pool(workspace, tmp_path)
    with pytest.raises(DataError, match=r"none of 15 rows could be scored; first reason: .*prompt_too_long"):
        run_method(workspace, pool, target("length"), tiny_tokeniser(tokenizer, 2))


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("no_such_package.x:Y", "cannot import 'no_such_package.x'.*add its folder to PYTHONPATH"),
        ("own_methods:Missing", "expected a subclass of rose_ray.methods.interface.Method, found nothing of that name"),
        ("own_methods:__name__", "expected a subclass of .*, found 'own_methods'"),
        ("rose_ray.methods.interface:Method", "has no options_model"),
    ],
)
def test_paths_that_lead_to_no_method(own: types.ModuleType, path: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        method_of(target(path))


def test_needs_and_columns_of_ones_own_are_checked(own: types.ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    without = TargetConfig(name="t", method="own_methods:Own")
    with pytest.raises(ConfigError, match="target t: method own_methods:Own needs preference pairs"):
        method_of(without)
    with pytest.raises(ConfigError, match="method_options: unknown key 'x'; own_methods:Own has no options"):
        method_of(target("own_methods:Own", x=1))
    monkeypatch.setattr(Own, "columns", "rows")
    with pytest.raises(ConfigError, match="columns is 'rows'; expected one of subtasks, pairs, one"):
        method_of(target("own_methods:Own"))


def test_arrays_and_texts_come_back(workspace: Workspace) -> None:
    arrays = {"a b/ü": np.arange(6).reshape(2, 3).T, "number": np.array(2.5), "none": np.zeros((0, 4), np.uint64)}
    found = read_arrays(workspace, write_arrays(workspace, "states/x/state.safetensors", arrays))
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        assert (found[name] == array).all() and (found[name].dtype, found[name].shape) == (array.dtype, array.shape)
    assert read_arrays(workspace, write_arrays(workspace, "states/y/state.safetensors", {})) == {}
    assert unpack_texts(pack_texts(["", "é\n🙂", '"'])) == ["", "é\n🙂", '"']


def test_a_step_that_was_left_out_is_named(workspace: Workspace, tmp_path: Path) -> None:
    pool = a_pool(workspace, tmp_path)
    with pytest.raises(StoreError, match="its tokens were not counted"):
        steps.pool_rows(workspace, pool, pool.facts["shards"][0]["shard"], [], "0" * 16)
