"""Rows that cannot be scored, and the table that the others make. The numbers: tests/equivalence."""

from __future__ import annotations

import weakref
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import torch

from rose_ray.config.gradients import AdamMode
from rose_ray.config.model import LoraConfig, ModelConfig
from rose_ray.data.batches import deal_batches
from rose_ray.data.conversation import Conversation, Message, canonical_json
from rose_ray.errors import AccountingError, ConfigError, ResourceError
from rose_ray.kernels.deflated import DeflatedProjection
from rose_ray.kernels.projection import ProjectionKind, make_projection
from rose_ray.kernels.quantization import StoredType
from rose_ray.kernels.span import SpanProjection
from rose_ray.model.attention import attend_short_rows
from rose_ray.model.base import attach_adapter, load_base
from rose_ray.model.checkpoint import Checkpoint, OptimizerState
from rose_ray.model.layout import adapter_parameters, layout_of
from rose_ray.model.scoring import ScoringModel
from rose_ray.model.tokenizer import load_tokeniser
from rose_ray.schemas import FEATURE_REJECTED, TOKENS, features_schema
from rose_ray.stages.directions import BatchRunner, DirectionSettings
from rose_ray.stages.features import ShardFeatures, ShardParts, assemble, shard_features, shard_parts
from rose_ray.stages.tokens import read_samples, tokenize_shard
from tests import oracles
from tests.tiny import make_samples

LORA = LoraConfig(rank=2, alpha=4.0, target_modules=["q_proj"])
SAMPLES = make_samples((9, 14, 6), 330)


@pytest.fixture(scope="module")
def model(base_folder: str) -> ScoringModel:
    return ScoringModel(
        attach_adapter(load_base(ModelConfig(base=base_folder, dtype="float32")), LORA, dropout=0), "cpu"
    )


@pytest.fixture(scope="module")
def checkpoints(model: ScoringModel) -> list[Checkpoint]:
    return [
        Checkpoint(
            f"checkpoint-{seed}",
            oracles.random_adapter(model.module, seed),
            *oracles.random_moments(model.module, seed),
            OptimizerState(5, 1e-3, 0.9, 0.999, 1e-8, 1.0, seed),
        )
        for seed in (1, 2)
    ]


def _tokens(samples: Any = SAMPLES) -> pa.Table:
    return pa.Table.from_pylist([{"row_id": f"r{n}", **s.__dict__} for n, s in enumerate(samples)], schema=TOKENS)


def _features(
    model: ScoringModel,
    checkpoints: list[Checkpoint],
    tokens: pa.Table | None = None,
    mode: AdamMode = "torch",
    stored_dtype: StoredType = "float32",
) -> ShardFeatures:
    layout = layout_of(model.module)
    projection = make_projection("sketch", 16, 0, layout.num_parameters)
    settings = DirectionSettings(mode, stored_dtype, max_batch_tokens=64)
    return shard_features(
        model, _tokens() if tokens is None else tokens, checkpoints, layout, [[projection] * len(checkpoints)], settings
    )


def test_rows_that_cannot_be_tokenised_are_rejected_in_the_shard_s_order(base_folder: str) -> None:
    prompts = ["short", "long " * 60, "short too", "long " * 50]
    conversations = [
        canonical_json(Conversation((Message("user", prompt), Message("assistant", "stone")))) for prompt in prompts
    ]
    shard = pa.table({"row_id": list("abcd"), "conversation": conversations})
    tokens, rejected = tokenize_shard(shard, load_tokeniser(ModelConfig(base=base_folder, max_tokens=40)))
    assert tokens.schema == TOKENS and tokens["row_id"].to_pylist() == ["a", "c"]
    assert rejected.schema == FEATURE_REJECTED
    assert [(row["row_id"], row["reason"]) for row in rejected.to_pylist()] == [
        ("b", "prompt_too_long"),
        ("d", "prompt_too_long"),
    ]


def test_samples_survive_the_table() -> None:
    samples = [replace(SAMPLES[0], num_tokens_cut=7), *SAMPLES[1:]]
    assert read_samples(_tokens(samples)) == samples


@pytest.mark.parametrize("stored_dtype", ["float16", "float32", "int8", "bit1"])
def test_tables_have_the_schema_and_the_same_rows(
    stored_dtype: StoredType, model: ScoringModel, checkpoints: list[Checkpoint]
) -> None:
    features = _features(model, checkpoints, stored_dtype=stored_dtype)
    assert features.rejected.schema == FEATURE_REJECTED and features.rejected.num_rows == 0
    for table in features.tables[0]:
        expected = features_schema(16, stored_dtype)
        assert table.schema.equals(expected, check_metadata=True)
        assert table["row_id"].to_pylist() == ["r0", "r1", "r2"]
        table.validate(full=True)
    assert features.tables[0][0]["loss"] != features.tables[0][1]["loss"]


def test_a_shard_without_rows_gives_empty_tables(model: ScoringModel, checkpoints: list[Checkpoint]) -> None:
    features = _features(model, checkpoints, TOKENS.empty_table())
    assert [table.num_rows for table in features.tables[0]] == [0, 0]
    assert features.rejected.num_rows == 0


def test_a_row_that_fails_at_one_checkpoint_is_rejected_at_all(
    model: ScoringModel, checkpoints: list[Checkpoint]
) -> None:
    broken = {name: tensor * float("nan") for name, tensor in checkpoints[1].adapter.items()}
    features = _features(model, [checkpoints[0], replace(checkpoints[1], adapter=broken)])
    assert [table.num_rows for table in features.tables[0]] == [0, 0]
    rows = features.rejected.to_pylist()
    assert [row["row_id"] for row in rows] == ["r0", "r1", "r2"]
    # NaN queries alone can pass the attention kernel's softmax unseen; they do not pass its gradient.
    assert {(row["reason"], row["detail"]) for row in rows} <= {
        ("non_finite_loss", "loss nan at checkpoint-2"),
        ("non_finite_gradient", "length nan at checkpoint-2"),
    }


def test_infinite_directions_are_rejected(model: ScoringModel, checkpoints: list[Checkpoint]) -> None:
    assert checkpoints[0].exp_avg is not None
    endless = {name: torch.full_like(tensor, float("inf")) for name, tensor in checkpoints[0].exp_avg.items()}
    features = _features(model, [replace(checkpoints[0], exp_avg=endless)])
    assert {row["reason"] for row in features.rejected.to_pylist()} == {"non_finite_gradient"}


def test_zero_directions_are_rejected(model: ScoringModel, checkpoints: list[Checkpoint]) -> None:
    nothing = {name: torch.zeros_like(tensor) for name, tensor in checkpoints[0].adapter.items()}
    features = _features(model, [replace(checkpoints[0], adapter=nothing)], mode="sgd")  # both factors zero
    assert [(row["reason"], row["detail"]) for row in features.rejected.to_pylist()] == [
        ("zero_direction", "the direction is zero at checkpoint-1")
    ] * 3


def test_only_sgd_does_without_moments(model: ScoringModel, checkpoints: list[Checkpoint]) -> None:
    bare = replace(checkpoints[0], exp_avg=None, exp_avg_sq=None, state=None)
    (alone,), (full,) = (_features(model, [each], mode="sgd").tables[0] for each in (bare, checkpoints[0]))
    assert alone == full and alone["momentum_share"].to_pylist() == [0.0] * 3
    for mode in ("torch", "less_code", "v_only"):
        with pytest.raises(ConfigError, match=f"Adam mode '{mode}' needs exp_avg"):
            _features(model, [bare], mode=mode)  # type: ignore[arg-type]


def test_checkpoints_do_not_leave_traces_in_each_other(model: ScoringModel, checkpoints: list[Checkpoint]) -> None:
    first, second = (_features(model, order).tables[0] for order in (checkpoints, checkpoints[::-1]))
    assert first == second[::-1]


class _Moved(SpanProjection):
    """A basis that counts how many of its kind are on the device at once."""

    alive: ClassVar[weakref.WeakSet[_Moved]] = weakref.WeakSet()
    most: ClassVar[int] = 0

    def to(self, device: torch.device | str) -> _Moved:
        moved = _Moved(self.basis_JP.clone(), self.digest)
        _Moved.alive.add(moved)
        _Moved.most = max(_Moved.most, len(_Moved.alive))
        return moved


def test_one_checkpoint_s_bases_are_on_the_device_at_a_time(model: ScoringModel, checkpoints: list[Checkpoint]) -> None:
    layout = layout_of(model.module)
    space = [_Moved(torch.eye(2, layout.num_parameters), "d") for _ in checkpoints]
    shard_features(model, _tokens(), checkpoints, layout, [space], DirectionSettings("torch", "float32", 64))
    assert _Moved.most == 1 and not _Moved.alive


class _Scarce:
    """Memory for so many rows of a batch at once."""

    def __init__(self, model: ScoringModel, num_rows: int) -> None:
        self.model, self.num_rows, self.refused = model, num_rows, 0
        self.plain = model.backward_per_sample

    def __call__(self, batch: Any, *arguments: Any) -> torch.Tensor:
        if batch.num_samples > self.num_rows:
            self.refused += 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 7 GiB.\nmore text")
        return self.plain(batch, *arguments)


def test_a_batch_that_does_not_fit_is_halved_and_the_bound_remembered(
    model: ScoringModel,
    checkpoints: list[Checkpoint],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    undisturbed = _features(model, checkpoints)
    monkeypatch.setattr(model, "backward_per_sample", _Scarce(model, 1))
    features = _features(model, checkpoints)
    assert features.rejected.num_rows == 0
    # three rows of 14 do not fit, then two of 9; the second checkpoint starts with the lowered bound
    assert (features.num_halvings, features.max_batch_tokens) == (2, 9)
    assert "did not fit into memory: halved" in caplog.text
    for table, expected in zip(features.tables[0], undisturbed.tables[0], strict=True):
        found, wanted = (np.array(each["feature"].to_pylist()) for each in (table, expected))
        np.testing.assert_allclose(found, wanted, atol=1e-5)  # float32 rounding in batches of other sizes


def test_a_row_that_does_not_fit_alone_is_rejected(
    model: ScoringModel, checkpoints: list[Checkpoint], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = model.backward_per_sample

    def scarce(batch: Any, *arguments: Any) -> torch.Tensor:
        if batch.input_ids.shape[1] > 9:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 7 GiB.")
        return plain(batch, *arguments)

    monkeypatch.setattr(model, "backward_per_sample", scarce)
    features = _features(model, checkpoints)
    assert features.tables[0][0]["row_id"].to_pylist() == ["r0", "r2"]
    (row,) = features.rejected.to_pylist()
    assert row["row_id"] == "r1" and row["reason"] == "out_of_memory"
    assert row["detail"] == "14 tokens alone: CUDA out of memory. Tried to allocate 7 GiB."


def test_neighbours_of_a_row_that_does_not_fit_keep_their_numbers(
    model: ScoringModel, checkpoints: list[Checkpoint], monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed = _features(model, checkpoints)
    monkeypatch.setenv("ROSE_RAY_FAILPOINT", "out_of_memory:13")
    features = _features(model, checkpoints)
    (row,) = features.rejected.to_pylist()
    assert row["detail"] == "14 tokens alone: a failpoint leaves room for 13 positions"
    for table, expected in zip(features.tables[0], undisturbed.tables[0], strict=True):
        wanted = expected.filter(pc.is_in(expected["row_id"], value_set=table["row_id"].combine_chunks()))
        assert table["row_id"] == wanted["row_id"] and expected.num_rows == table.num_rows + 1
        found, kept = (np.array(each["feature"].to_pylist()) for each in (table, wanted))
        np.testing.assert_allclose(found, kept, atol=1e-5)  # float32 rounding in batches of other sizes


@pytest.mark.parametrize(("lost", "times"), [(True, 0), (False, 2)])
def test_rows_that_got_no_numbers_or_got_them_twice_end_the_run(
    model: ScoringModel, checkpoints: list[Checkpoint], lost: bool, times: int
) -> None:
    layout = layout_of(model.module)
    projection = make_projection("sketch", 16, 0, layout.num_parameters)
    settings, samples = DirectionSettings("torch", "float32", max_batch_tokens=14), read_samples(_tokens())
    (dealt,) = deal_batches(samples, 14, 1)
    wrong = replace(dealt, batches=dealt.batches[1:] if lost else [*dealt.batches, dealt.batches[0]])
    parts = shard_parts(
        model, [samples[i] for i in dealt.samples], checkpoints, layout, [[projection] * 2], settings, wrong
    )
    joined = ShardParts.joined([parts], [dealt.samples], 3)
    message = rf"^1 of 3 rows, such as r1, got their numbers at checkpoint 1 of 2 not once but {times} times\.$"
    with pytest.raises(AccountingError, match=message):
        assemble(joined, _tokens(), ["one", "two"], "float32")


@pytest.mark.parametrize(
    ("most", "bound", "message"),
    [
        (13, 14, r"1 row of 14 tokens did not fit into a rank's memory .*: lower model\.max_tokens\.$"),
        (14, 28, r"2 rows of 14 tokens did not fit .*: set gradients\.max_batch_tokens to 14 or so\.$"),
        (28, 56, r"4 rows of 14 tokens did not fit .*: set gradients\.max_batch_tokens to 28 or so\.$"),
    ],
)
def test_a_rank_halves_nothing_and_says_what_to_set(
    model: ScoringModel,
    checkpoints: list[Checkpoint],
    monkeypatch: pytest.MonkeyPatch,
    most: int,
    bound: int,
    message: str,
) -> None:
    (longest,) = (sample for sample in read_samples(_tokens()) if len(sample.input_ids) == 14)
    samples = [longest] * 4
    settings = DirectionSettings("torch", "float32", max_batch_tokens=bound)
    runner = BatchRunner(model, layout_of(model.module), settings)
    (dealt,) = deal_batches(samples, bound, 1)
    monkeypatch.setenv("ROSE_RAY_FAILPOINT", f"out_of_memory:{most}")
    with pytest.raises(ResourceError, match=message):
        list(runner.run_dealt(samples, dealt, checkpoints[0], []))
    assert runner.num_halvings == 0


def test_other_errors_are_not_taken_for_a_lack_of_memory(
    model: ScoringModel, checkpoints: list[Checkpoint], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: Any) -> torch.Tensor:
        raise RuntimeError("shapes cannot be multiplied")

    monkeypatch.setattr(model, "backward_per_sample", broken)
    with pytest.raises(RuntimeError, match="shapes"):
        _features(model, checkpoints)


@pytest.mark.parametrize(
    ("dtype", "merged", "short_rows"),
    [
        ("float32", False, False),
        ("float32", True, False),
        ("bfloat16", False, False),
        ("bfloat16", False, True),
    ],
)
@pytest.mark.parametrize(
    ("value", "reason"),
    [(float("nan"), "non_finite_loss"), (float("inf"), "non_finite_loss"), (3e38, "non_finite_gradient")],
)
def test_a_row_that_overflows_changes_no_byte_of_its_neighbours(
    value: float,
    reason: str,
    dtype: str,
    merged: bool,
    short_rows: bool,
    checkpoints: list[Checkpoint],
    base_folder: str,
) -> None:
    base = load_base(ModelConfig(base=base_folder, dtype=dtype, attention="sdpa"))  # type: ignore[arg-type]
    if short_rows:
        attend_short_rows(base)
    module = attach_adapter(base, LORA, dropout=0)
    for parameter in adapter_parameters(module).values():
        parameter.data = parameter.data.to(getattr(torch, dtype))
    model = ScoringModel(module, "cpu", merge_adapter=merged)
    poison = next(t for t in range(5, 330) if all(t not in sample.input_ids for sample in SAMPLES))
    samples = [SAMPLES[0], replace(SAMPLES[1], input_ids=[*SAMPLES[1].input_ids[:-1], poison]), SAMPLES[2]]
    layout = layout_of(model.module)
    shapes = [(shape[0], shape[1]) for _, shape in layout.shapes]
    kinds: tuple[ProjectionKind, ...] = ("sketch", "rademacher", "factored", "none")
    maps: list[Any] = [make_projection(kind, 16, 0, layout.num_parameters, shapes=shapes) for kind in kinds]
    generator = torch.Generator().manual_seed(1)
    common = torch.randn(layout.num_parameters, generator=generator)
    basis_JP = torch.nn.functional.normalize(torch.randn(3, layout.num_parameters, generator=generator), dim=1)
    maps += [DeflatedProjection(maps[0], common), SpanProjection(basis_JP, "drawn")]
    spaces = [[each] * 2 for each in maps]
    settings = DirectionSettings("torch", "float32", max_batch_tokens=64)

    def features() -> ShardFeatures:
        return shard_features(model, _tokens(samples), checkpoints, layout, spaces, settings)

    expected = features()
    with torch.no_grad():
        base.get_input_embeddings().weight[poison] = value  # type: ignore[operator]
    found = features()
    assert [(row["row_id"], row["reason"]) for row in found.rejected.to_pylist()] == [("r1", reason)]
    for tables, whole_tables in zip(found.tables, expected.tables, strict=True):
        for table, whole in zip(tables, whole_tables, strict=True):
            assert table.equals(whole.take([0, 2]))


def test_padding_is_counted(model: ScoringModel, checkpoints: list[Checkpoint]) -> None:
    features = _features(model, checkpoints)
    assert features.num_positions == 3 * 14  # one batch of 9, 14 and 6 tokens
    layout = layout_of(model.module)
    runner = BatchRunner(model, layout, DirectionSettings("torch", "float32", 64, packing=True))
    list(runner.run(SAMPLES, checkpoints[0], []))
    assert runner.num_positions == 9 + 14 + 6


@pytest.mark.parametrize("mode", ["torch", "sgd"])
def test_packed_rows_have_the_features_of_padded_ones(
    mode: AdamMode, model: ScoringModel, checkpoints: list[Checkpoint]
) -> None:
    layout = layout_of(model.module)
    projection = make_projection("sketch", 16, 0, layout.num_parameters)
    found = []
    for packing in (False, True):
        settings = DirectionSettings(mode, "float32", max_batch_tokens=64, packing=packing)
        found.append(shard_features(model, _tokens(), checkpoints, layout, [[projection] * 2], settings))
    padded, packed = found
    assert packed.num_positions == 9 + 14 + 6 < padded.num_positions
    for one, other in zip(packed.tables[0], padded.tables[0], strict=True):
        assert one["row_id"] == other["row_id"]
        features, expected = (np.array(each["feature"].to_pylist()) for each in (one, other))
        np.testing.assert_allclose(features, expected, atol=1e-5)  # float32 rounding in sums over other rows
        np.testing.assert_allclose(one["norm"], other["norm"], rtol=1e-5)
