"""Methods that need the model, through their interface: the stages they stand for, whatever the shards."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from rose_ray.config.model import LoraConfig, ModelConfig
from rose_ray.config.target import PairInput, TargetConfig
from rose_ray.errors import PairError, StoreError
from rose_ray.methods import nuggets as nuggets_method
from rose_ray.methods import shards as steps
from rose_ray.methods.answers import chosen_answers
from rose_ray.methods.interface import MethodModel, Target
from rose_ray.methods.rds import POOLING, RowStates
from rose_ray.methods.shards import MethodRun
from rose_ray.model.base import attach_adapter, load_base
from rose_ray.model.core import core_model
from rose_ray.model.scoring import ScoringModel
from rose_ray.model.tokenizer import load_tokeniser
from rose_ray.stages.candidates import Scores, choose, target_candidates
from rose_ray.stages.forwards import unit_embeddings
from rose_ray.stages.ifd import ifd_scores
from rose_ray.stages.loss_drop import TargetTraining, loss_drop_scores, train_on_target
from rose_ray.stages.nuggets import demonstration_scores, prepare_anchors
from rose_ray.stages.rds import embedding_cosines, query_embeddings
from rose_ray.stages.row_vectors import VectorSource, vector_reader
from rose_ray.stores.workspace import Workspace
from tests.methods import make_method, make_pair, make_pool, make_rows, run_method, score_parts, split, tiny_tokeniser
from tests.tiny import GROUPS, make_pool_rows, sentence

LORA = LoraConfig(rank=2, alpha=4.0, target_modules=["q_proj", "v_proj"])
FLOAT64 = 1e-11
"""Batches of other shapes add up in another order, in float64; loss drops are differences of losses."""

PAIRS = [
    make_pair("water?", "stone bread", subtask="one", number=0),
    make_pair("Tell me about music.", "green apple green", subtask="two", number=1),
    make_pair("house light", "river", subtask="one", number=2),
]


def a_pool() -> list[tuple[str, str]]:
    random = Random(0)
    return [
        (f"{sentence(random, random.randint(1, 5))} {n}?", sentence(random, random.randint(2, 9), GROUPS[n % 3]))
        for n in range(11)
    ]


@pytest.fixture(scope="module")
def model(base_folder: str) -> MethodModel:
    config = ModelConfig(base=base_folder, max_tokens=64)
    module = attach_adapter(load_base(config, dtype=torch.float64), LORA, dropout=0)
    return MethodModel(lambda: ScoringModel(module, "cpu"), "cpu", load_tokeniser(config), (), 200)


def _stage_scores(name: str, model: MethodModel) -> np.ndarray:
    """What the stage functions give for the whole pool at once."""
    scoring, bound = model.scoring, {"max_batch_tokens": 100_000}
    samples = make_rows(a_pool()).samples(model.tokeniser)
    answers, ids = chosen_answers(Target("t", tuple(PAIRS)), model.tokeniser), [pair.pair_id for pair in PAIRS]
    bos = model.tokeniser.tokenizer.bos_token_id
    if name in ("rds", "rds_plus"):
        pooling: Any = "last_token" if name == "rds" else "position_weighted"
        queries = query_embeddings(scoring, answers, ids, pooling, **bound)
        return embedding_cosines(scoring, samples, queries, pooling, **bound).values_NU
    if name == "ifd":
        return ifd_scores(scoring, samples, bos, **bound).values_NU
    if name == "loss_drop":
        adapter = train_on_target(scoring, answers, ids, TargetTraining(10, 8, 1e-4, 0.03, 1.0, 0, 200))
        return loss_drop_scores(scoring, samples, adapter, **bound).values_NU
    anchors = prepare_anchors(scoring, answers, ids, limit=128, bos_token_id=bos, **bound)
    return demonstration_scores(scoring, samples, anchors, **bound).values_NU


@pytest.mark.parametrize("name", ["rds", "rds_plus", "ifd", "loss_drop", "nuggets"])
def test_scores_are_the_stage_s_whatever_the_shards(name: str, model: MethodModel) -> None:
    expected = _stage_scores(name, model)
    for size in (11, 4):
        found = score_parts(make_method(name), split(make_rows(a_pool()), size), PAIRS, model)
        np.testing.assert_allclose(found, expected, rtol=0, atol=FLOAT64)


def test_nuggets_of_the_pool_draws_the_same_anchors_whatever_the_shards(model: MethodModel) -> None:
    method = make_method("nuggets", anchors="pool", num_anchors=3, drawn_rows=6, seed=2)
    assert method.columns == "one" and method.needs.pool_statistics and not method.needs.pairs
    rows = make_rows(a_pool())
    whole = score_parts(method, [rows], [], model)
    assert set(np.round(3 * whole[:, 0])) <= {0, 1, 2, 3} and len(set(whole[:, 0])) > 1
    np.testing.assert_allclose(score_parts(method, split(rows, 4), [], model), whole, rtol=0, atol=FLOAT64)
    statistics = [method.survey(part, Target("t", ())) for part in split(rows, 4)]
    merged = method.merge(statistics)
    assert all(merged[key].tolist() == method.survey(rows, Target("t", ()))[key].tolist() for key in merged)
    state = method.prepare(Target("t", ()), merged, model)
    drawn = {tuple(sample.input_ids) for sample in rows.samples(model.tokeniser)}
    starts = [0, *state["ends"].tolist()]
    anchors = [tuple(state["ids"][a:b].tolist()) for a, b in pairwise(starts)]
    assert len(set(anchors)) == 3 and set(anchors) <= drawn


def test_a_drawn_row_that_fills_the_model_is_no_anchor(base_folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = ModelConfig(base=base_folder, max_tokens=64)
    module = attach_adapter(load_base(config, dtype=torch.float64), LORA, dropout=0)
    core_model(module).config.max_position_embeddings = 64  # no room beside a row of full length
    full = MethodModel(lambda: ScoringModel(module, "cpu"), "cpu", load_tokeniser(config), (), 200)
    method = make_method("nuggets", anchors="pool", num_anchors=3, drawn_rows=5)
    rows = make_rows([*a_pool()[:4], ("Tell me all.", "stone " * 90)])
    assert max(len(sample.input_ids) for sample in rows.samples(full.tokeniser)) == 64
    monkeypatch.setattr(nuggets_method, "pool_anchors", lambda model, samples, *_, **__: list(range(len(samples))))
    state = method.prepare(Target("t", ()), method.merge([method.survey(rows, Target("t", ()))]), full)
    assert len(state["ends"]) == 4 and np.diff([0, *state["ends"]]).max() < 64
    assert np.isfinite(state["zero_shot"]).all()


def test_pairs_that_cannot_be_used_are_listed(model: MethodModel) -> None:
    pairs = (*PAIRS, make_pair("stone " * 90, "yes", number=9))
    with pytest.raises(PairError, match=r"target t: 1 of 4 pairs cannot be used:\n  t-9: prompt_too_long"):
        chosen_answers(Target("t", pairs), model.tokeniser)


def test_pairs_take_turns_over_a_method_s_score_table(tmp_path: Path, tokenizer: Any) -> None:
    workspace = Workspace.open(str(tmp_path / "ws"), create=True)
    pool = make_pool(workspace, tmp_path, {"a": make_pool_rows(10)})
    selection: dict[str, Any] = {"count": 4, "method": "round_robin_pairs"}
    target = TargetConfig.model_validate(
        {"name": "words", "method": "bm25", "pairs": [PairInput(files=["f"])], "selection": selection}
    )
    table, made = run_method(workspace, pool, target, tiny_tokeniser(tokenizer), PAIRS)
    ids = [pair.pair_id for pair in PAIRS]
    assert made.facts["pairs"] == ids
    columns = {pair: table[f"pair_{pair}"].to_numpy() for pair in ids}
    np.testing.assert_allclose((columns["one-0"] + columns["one-2"]) / 2, table["subtask_one"], rtol=1e-6)  # float32
    np.testing.assert_array_equal(columns["two-1"], table["subtask_two"])
    record = made.file("scores.parquet")
    scores = Scores(workspace.open_table(record.path, record))
    chosen = choose(target_candidates(scores, ["one", "two"], 10, ids), target.selection)
    row_ids, taken = table["row_id"].to_pylist(), []
    for turn in range(4):
        column = columns[ids[turn % 3]]
        left = [row for row in range(len(row_ids)) if row not in taken]
        taken.append(min(left, key=lambda row: (-column[row], row_ids[row])))
    assert chosen.tolist() == taken
    plain = target.model_copy(update={"selection": target.selection.model_copy(update={"method": "top_k"})})
    other, manifest = run_method(workspace, pool, plain, tiny_tokeniser(tokenizer), PAIRS)
    assert manifest.facts["pairs"] == [] and manifest.key != made.key
    assert other.equals(table.drop_columns([f"pair_{pair}" for pair in ids]).cast(pa.schema(other.schema)))


@pytest.mark.parametrize("vectors", ["rds", "rds_plus"])
def test_states_of_rows_are_stored_for_selections(vectors: str, model: MethodModel, tmp_path: Path) -> None:
    workspace = Workspace.open(str(tmp_path / "workspace"), create=True)
    pool = make_pool(workspace, tmp_path, {"a": [{"prompt": q, "completion": a} for q, a in a_pool()]})
    key = steps.lengths_key("text", 64)
    method, told = RowStates(POOLING[vectors]), Target("states", ())
    run = MethodRun(method, told, steps.method_content(method, "row_states", told, key, {}), key, pool.key)
    stored = []
    for entry in pool.facts["shards"]:
        steps.count_tokens(workspace, pool, entry["shard"], [], key, model.tokeniser)
        receipt = steps.score_shard(workspace, pool, entry["shard"], [], run, {}, model)
        record = receipt.file(steps.SCORES_FILE)
        stored.append(workspace.read_table(record.path, record))
    with model.scoring.without_adapter():
        expected = unit_embeddings(
            model.scoring, make_rows(a_pool()).samples(model.tokeniser), POOLING[vectors], max_batch_tokens=100_000
        )
    ids = make_rows(a_pool()).row_ids
    source = VectorSource("shard_scores", run.key, steps.SCORES_FILE, ())
    shards = [
        (part["row_id"].to_pylist(), entry["shard"]) for part, entry in zip(stored, pool.facts["shards"], strict=True)
    ]
    table = pa.table({"row_id": ids, "shard": [next(s for rows, s in shards if each in rows) for each in ids]})
    sink = pa.BufferOutputStream()
    pq.write_table(table.sort_by([("shard", "ascending")]), sink)
    scores = Scores(pq.ParquetFile(sink.getvalue()))
    sorted_ids = scores.rows(np.arange(len(ids)), ["row_id"])["row_id"].to_pylist()
    found = {}
    for places, values in vector_reader(workspace, pool, scores, source)(np.array([0, 2, 3, 7, 10])):
        assert values.restored().dtype == np.float32
        found.update(zip(places.tolist(), values.restored(), strict=True))
    assert sorted(found) == [0, 2, 3, 7, 10]
    for place, values in found.items():
        wanted = expected.values_NU[ids.index(sorted_ids[place])]
        np.testing.assert_allclose(values, wanted, atol=1e-6)
    with pytest.raises(StoreError, match=r"lacks the vectors of selection\.diversity"):
        list(vector_reader(workspace, pool, scores, replace(source, key="other"))(np.array([1])))
