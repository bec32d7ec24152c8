"""Which keys differ between two runs, and what each costs."""

from __future__ import annotations

import pytest

from rose_ray.config.changes import _RECOMPUTED, STAGES, changed_keys, recomputed_stages
from rose_ray.config.job import JobConfig


def test_leaves_that_differ_by_their_dotted_key() -> None:
    old = {"a": 1, "b": {"c": [1, 2], "d": {"e": None}}, "gone": 3}
    new = {"a": 1, "b": {"c": [1, 3], "d": {"e": 5}}, "come": 4}
    assert changed_keys(old, new) == {
        "b.c": ([1, 2], [1, 3]),
        "b.d.e": (None, 5),
        "gone": (3, None),
        "come": (None, 4),
    }
    assert changed_keys(old, old) == {}


def test_items_of_lists_go_by_number() -> None:
    old = {"targets": [{"name": "a", "shots": 1}, {"name": "b", "shots": 1}]}
    new = {"targets": [{"name": "a", "shots": 1}, {"name": "b", "shots": 2}, {"name": "c"}]}
    assert changed_keys(old, new) == {"targets.1.shots": (1, 2), "targets.2": (None, {"name": "c"})}
    assert changed_keys(new, old)["targets.2"] == ({"name": "c"}, None)


def test_a_part_that_comes_or_goes_is_named_whole() -> None:
    assert changed_keys({"training_set": None}, {"training_set": {"targets": None}}) == {
        "training_set": (None, {"targets": None})
    }
    assert changed_keys({"files": []}, {"files": [{"a": 1}]}) == {"files": ([], [{"a": 1}])}


@pytest.mark.parametrize(
    ("key", "stages"),
    [
        ("workspace", STAGES),
        ("model.base", STAGES[1:]),
        ("model.deepspeed.zero_stage", ()),
        ("lora.rank", STAGES[1:]),
        ("pool.inputs.0.files", ("ingest", "features", "score", "select")),
        ("pool.sample_seed", ("ingest", "features", "score", "select")),
        ("targets.3", ("bank", "score", "select")),
        ("targets.0.pairs.0.files", ("bank", "score", "select")),
        ("targets.0.objective", ("score", "select")),
        ("targets.0.selection.count", ("select",)),
        ("training_set.selection.count", ("select",)),
        ("warmup.workers", ()),
        ("warmup.adapter_weights", ("warmup", "score", "select")),
        ("gradients.adam", ("bank", "features", "score", "select")),
        ("gradients.projection.dim", ("bank", "features", "score", "select")),
        ("ray.actors", ()),
        ("unheard_of", STAGES),
    ],
)
def test_stages_that_compute_again(key: str, stages: tuple[str, ...]) -> None:
    assert recomputed_stages(key) == stages


def test_every_key_named_here_is_one_of_the_configuration() -> None:
    schema = JobConfig.model_json_schema()

    def fields(definition: dict[str, object]) -> dict[str, dict[str, object]]:
        texts = [name for name in schema["$defs"] if f"'#/$defs/{name}'" in str(definition)]
        return schema["$defs"][texts[0]]["properties"] if texts else {}  # type: ignore[no-any-return]

    for key in _RECOMPUTED:
        known = schema["properties"]
        for part in key.split("."):
            assert part in known, key
            known = fields(known[part])
    assert {key for key in _RECOMPUTED if "." not in key} == set(schema["properties"])
