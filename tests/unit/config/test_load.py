"""From YAML to a checked configuration: every mistake names its key, its value and what was meant."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rose_ray.config import load_config, parse_config
from rose_ray.errors import ConfigError


def minimal() -> dict[str, Any]:
    return {
        "workspace": "ws",
        "model": {"base": "m"},
        "pool": {"inputs": [{"files": ["p.jsonl"]}]},
        "targets": [{"name": "t", "pairs": [{"files": ["q.jsonl"]}]}, {"name": "u", "pairs": [{"files": ["q.jsonl"]}]}],
    }


def refused(*overrides: str) -> str:
    with pytest.raises(ConfigError) as raised:
        parse_config(minimal(), overrides)
    return str(raised.value)


def test_a_minimal_configuration_has_the_defaults_of_the_paper() -> None:
    config = parse_config(minimal())
    assert (config.lora.rank, config.lora.alpha, config.lora.dropout) == (128, 512.0, 0.1)
    assert (config.warmup.fraction, config.warmup.epochs, config.warmup.learning_rate) == (0.05, 4, 2e-5)
    assert config.gradients.adam == "torch"
    assert (config.targets[0].objective, config.targets[0].aggregation) == ("rose", "max")
    assert config.targets[0].selection.budget == ("fraction", 0.05)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("lora.rnk=3", "lora.rnk: unknown key (value 3); did you mean 'rank'?"),
        ("warmup.epoch=3", "warmup.epoch: unknown key (value 3); did you mean 'epochs'?"),
        ("targets.0.pairs.0.subtask_fild=x", "targets.0.pairs.0.subtask_fild: unknown key (value 'x'); did you mean"),
        (
            "training_set.selection.cuont=3",
            "training_set.selection.cuont: unknown key (value 3); did you mean 'count'?",
        ),
        ("model.deepspeed.zero_stag=3", "model.deepspeed.zero_stag: unknown key (value 3); did you mean 'zero_stage'?"),
        ("qqq=3", "qqq: unknown key (value 3); known keys: workspace, preset, model, lora,"),
    ],
)
def test_an_unknown_key_names_the_near_miss(override: str, message: str) -> None:
    assert message in refused(override)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model=3", "model: Input should be a valid dictionary"),
        ("workspace=null", "workspace: Input should be a valid string; found None"),
        ("workspace=3", "workspace: Input should be a valid string; found 3"),
        ("pool.inputs.0.files=p.jsonl", "pool.inputs.0.files: Input should be a valid list; found 'p.jsonl'"),
        ("pool.inputs=[]", "pool.inputs: List should have at least 1 item"),
        ("targets.0.shots='5'", "targets.0.shots: Input should be a valid integer; found '5'"),
        ("targets.0.shots=0", "targets.0.shots: Input should be greater than or equal to 1; found 0"),
        ("targets.0.name=a/b", "targets.0.name: String should match pattern"),
        ("warmup.epochs=2.5", "warmup.epochs: Input should be a valid integer; found 2.5"),
        ("warmup.learning_rate=fast", "warmup.learning_rate: Input should be a valid number; found 'fast'"),
        ("warmup.learning_rate=.nan", "warmup.learning_rate: Input should be a finite number"),
        ("lora.alpha=.inf", "lora.alpha: Input should be a finite number; found inf"),
        ("lora.alpha=true", "lora.alpha: Input should be a valid number; found True"),
        ("lora.dropout=1", "lora.dropout: Input should be less than 1; found 1.0"),
        ("model.trust_remote_code=1", "model.trust_remote_code: Input should be a valid boolean; found 1"),
        ("model.dtype=float16", "model.dtype: Input should be 'float32' or 'bfloat16'; did you mean 'bfloat16'?"),
        ("gradients.adam=toch", "did you mean 'torch'?; found 'toch'"),
        ("targets.1.objective=rose_simp", "did you mean 'rose_simpo'?"),
        ("preset=rose_offical", "preset: Input should be 'rose_official'; did you mean 'rose_official'?"),
        ("model.deepspeed.zero_stage=2", "model.deepspeed.zero_stage: Input should be 0 or 3; found 2"),
        ("warmup.adapter_weights=[-1]", "warmup.adapter_weights.0: Input should be greater than or equal to 0"),
    ],
)
def test_a_wrong_type_or_value_is_named(override: str, message: str) -> None:
    assert message in refused(override)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.deepspeed.offload_parameters=cpu"], "offload_parameters: cpu needs zero_stage: 3"),
        (["model.loader=plain", "model.deepspeed.zero_stage=3"], "model: loader: plain leaves no use for"),
        (["pool.inputs.0.source=a", "pool.inputs.0.source_field=b"], "source and source_field contradict each other"),
        (
            ["targets.0.pairs.0.subtask=a", "targets.0.pairs.0.subtask_blocks=2"],
            "subtask and subtask_blocks contradict",
        ),
        (["targets.0.selection={count: 1, fraction: 0.5}"], "fraction and count contradict each other"),
        (["targets.0.selection={count: 1, tokens: 5}"], "count and tokens contradict each other"),
        (
            ["targets.0.selection={include_sources: [a, b], exclude_sources: [b]}"],
            "['b'] are both included and excluded",
        ),
        (["targets.1.name=t"], "names must differ, found ['t'] more than once"),
        (["targets.1.name=training_set"], "the name training_set is taken"),
        (["training_set.targets=[t, v]"], "training_set.targets: ['v'] are not among the targets ['t', 'u']"),
        (
            ["warmup={adapters: [a], epochs: 2, batch_size: 8, seed: 0}"],
            "adapters are used as they are, which leaves no use for epochs, batch_size: take them out",
        ),
        (
            ["targets.0.objective=dpo_weighted", "targets.0.selection={count: 1, method: round_robin_pairs}"],
            "round_robin_pairs needs a score a pair, but objective: dpo_weighted makes one direction",
        ),
        (
            [
                "targets.0.exact=true",
                "gradients.exact_basis=subtasks",
                "targets.0.selection={count: 1, method: round_robin_pairs}",
            ],
            "round_robin_pairs needs exact scores of pairs, which gradients.exact_basis: subtasks does not keep",
        ),
        (["training_set.selection.method=round_robin_pairs"], "training_set.selection.method"),
        (["targets.0.official_cut=keep_end"], "official_cut: keep_end has no meaning with encoding: chat"),
        (
            ["targets.0.normalize=own", "gradients.adam=sgd"],
            "with gradients.adam: sgd they share none: set it to exact",
        ),
        (["targets.0.normalize=own", "targets.0.exact=true"], "own needs the shared moment term kept beside the"),
        (
            ["targets.0.normalize=own", "gradients.projection.deflate=false"],
            "own needs the shared moment term kept beside the projection",
        ),
        (["gradients.kernel=triton"], "gradients.kernel: triton runs on CUDA, and ray.gpus_per_actor: 0 computes on"),
        (
            ["gradients.kernel=triton", "ray.gpus_per_actor=1", "gradients.projection.kind=factored"],
            "kernel: triton has no projection.kind factored",
        ),
        (["ray.gpus_per_actor=1.5"], "ray.gpus_per_actor: 1.5 GPUs: Ray shares one GPU among actors"),
        (["warmup.adapter_weights=[1, 2]"], "adapter_weights has 2 entries for 0 adapters"),
        (
            ["warmup.adapters=[a]", "gradients.adam=sgd", "warmup.adapter_weights=[0]"],
            "adapter_weights are all 0",
        ),
    ],
)
def test_a_contradiction_is_refused(overrides: list[str], message: str) -> None:
    assert message in refused(*overrides)


def test_every_problem_is_listed() -> None:
    message = refused("lora.rnk=3", "warmup.epochs=0", "model={}")
    assert message.startswith("configuration: 3 problem(s)\n")
    assert "lora.rnk" in message and "warmup.epochs" in message and "model.base: required, but not set" in message


@pytest.mark.parametrize("content", [None, [], "text", 3])
def test_what_is_no_mapping(content: Any) -> None:
    with pytest.raises(ConfigError, match="configuration: expected keys and values, found"):
        parse_config(content)


class TestOverrides:
    def test_numbers_lists_and_mappings_are_yaml(self) -> None:
        config = parse_config(
            minimal(),
            [
                "warmup.learning_rate=2e-5",
                "lora.alpha=16",
                "lora.target_modules=[q_proj, v_proj]",
                "targets.1.shots=3",
                "targets.0.pairs.0.files=[a.jsonl, b.jsonl]",
                "targets.0.selection={source_quotas: {chat: 1, code: 5e-1}}",
                "training_set.selection.fraction=1e-1",
                "workspace=a=b",
            ],
        )
        assert config.warmup.learning_rate == 2e-5 and config.lora.alpha == 16.0
        assert config.lora.target_modules == ["q_proj", "v_proj"]
        assert [target.shots for target in config.targets] == [None, 3]
        assert config.targets[0].pairs[0].files == ["a.jsonl", "b.jsonl"]
        assert config.targets[0].selection.source_quotas == {"chat": 1.0, "code": 0.5}
        assert config.training_set is not None and config.training_set.selection.fraction == 0.1
        assert config.workspace == "a=b"

    def test_they_win_over_the_file_and_reach_what_it_leaves_out(self) -> None:
        content = minimal() | {"lora": {"rank": 4}, "ray": None}
        config = parse_config(content, ["lora.rank=8", "ray.actors=2"])
        assert (config.lora.rank, config.ray.actors) == (8, 2)

    @pytest.mark.parametrize(
        ("override", "message"),
        [
            ("lora.rank", "expected a.b=value"),
            ("=3", "expected a.b=value"),
            ("lora.rank=[", "the value is not YAML"),
            ("targets.2.shots=1", "expected an item number from 0 to 1, found '2'"),
            ("targets.first.shots=1", "expected an item number from 0 to 1, found 'first'"),
            ("targets.-1=1", "expected an item number from 0 to 1, found '-1'"),
            ("workspace.path=x", "'path' is below a plain value"),
            ("workspace.path.more=x", "'path' is below a plain value"),
        ],
    )
    def test_mistakes(self, override: str, message: str) -> None:
        text = refused(override)
        assert message in text and text.startswith(f"--set {override!r}")


class TestPresets:
    def test_lie_under_what_is_set(self) -> None:
        content = minimal() | {"preset": "rose_official", "model": {"base": "m", "max_tokens": 512}}
        content["targets"][1]["normalize"] = "exact"
        config = parse_config(content, ["gradients.projection.dim=64"])
        assert (config.model.template, config.model.max_tokens) == ("tulu", 512)
        assert (config.gradients.adam, config.gradients.projection.kind) == ("less_code", "rademacher")
        assert config.gradients.projection.dim == 64
        assert [target.normalize for target in config.targets] == ["projected", "exact"]
        assert {target.encoding for target in config.targets} == {"rose_official"}

    def test_do_not_touch_what_they_do_not_name(self) -> None:
        with_preset = parse_config(minimal() | {"preset": "rose_official"})
        without = parse_config(minimal())
        assert (with_preset.lora, with_preset.warmup, with_preset.ray) == (without.lora, without.warmup, without.ray)


class TestFiles:
    def write(self, folder: Path, text: str) -> str:
        path = folder / "job.yaml"
        path.write_bytes(text.encode("latin-1"))
        return str(path)

    def test_a_missing_file(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=r"cannot read '.*none\.yaml': No such file.*rose-ray init"):
            load_config(str(tmp_path / "none.yaml"))

    @pytest.mark.parametrize("text", ["a: [", "a: b: c", "\tworkspace: x", "workspace: \xff"])
    def test_not_yaml(self, tmp_path: Path, text: str) -> None:
        with pytest.raises(ConfigError, match=r"job\.yaml: not YAML: "):
            load_config(self.write(tmp_path, text))

    def test_an_empty_file(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=r"job\.yaml: expected keys and values, found NoneType"):
            load_config(self.write(tmp_path, ""))

    @pytest.mark.parametrize("text", ["lora: {rank: 4}\nlora: {rank: 8}\n", "lora:\n  rank: 4\n  rank: 8\n"])
    def test_a_key_that_stands_twice(self, tmp_path: Path, text: str) -> None:
        with pytest.raises(ConfigError, match=r"the key '(lora|rank)' stands twice"):
            load_config(self.write(tmp_path, text))

    def test_anchors_and_merges_may_be_overridden(self, tmp_path: Path) -> None:
        text = (
            "workspace: ws\nmodel: {base: m}\npool: {inputs: [{files: [p.jsonl]}]}\n"
            "targets:\n"
            "  - &first {name: t, shots: 2, pairs: [{files: [q.jsonl]}]}\n"
            "  - {<<: *first, name: u}\n"
        )
        config = load_config(self.write(tmp_path, text))
        assert [(target.name, target.shots) for target in config.targets] == [("t", 2), ("u", 2)]


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("workspace=s3://KEYID:topsecret@bucket/ws", "workspace"),
        ("pool.inputs.0.files=['a.jsonl','s3://KEYID:topsecret@bucket/b.jsonl']", "pool.inputs.0.files.1"),
        ("targets.0.pairs.0.files=['https://user@host/x']", "targets.0.pairs.0.files.0"),
        ("workspace=s3://KEYID:top/secret+topsecret@bucket/ws", "workspace"),
        ("workspace=' s3://KEYID:topsecret@bucket/ws'", "workspace"),
        ("workspace=local::s3://KEYID:topsecret@bucket/ws", "workspace"),
        ("workspace=abfss://acc.dfs.core.windows.net/c?client_secret=topsecret", "workspace"),
        ("workspace='abfs://c@acc.dfs.core.windows.net/p?tenant_id=a&Account_Key=topsecret'", "workspace"),
        ("workspace=abfs://c:topsecret@acc.dfs.core.windows.net/p", "workspace"),
        ("workspace='abfs://:top/secret+topsecret@acc.blob.core.windows.net/c'", "workspace"),
        ("workspace='https://h/p?sv=1&sig=topsecret'", "workspace"),
        ("workspace='https://h/p?api%2Dkey=topsecret'", "workspace"),
        ("workspace='https://h/p?X-Amz-Signature=topsecret'", "workspace"),
        ("workspace='s3://bucket/ws?region=r&session_token='", "workspace"),
    ],
)
def test_credentials_in_a_uri_are_refused_and_not_repeated(override: str, key: str) -> None:
    with pytest.raises(ConfigError, match=f"credentials in the URI at {key}") as raised:
        parse_config(minimal(), [override])
    assert "topsecret" not in str(raised.value) and "KEYID" not in str(raised.value)


@pytest.mark.parametrize(
    "uri",
    [
        "s3://bucket/a@b",
        "/data/a:b@c",
        "s3://bucket?endpoint_override=a@b:1",
        "a@b",
        "abfs://container@account.dfs.core.windows.net/path",
        "ABFSS://container@account.dfs.core.windows.net/path?tenant_id=t",
        "s3://bucket/token?region=signals&scheme=http",
        "/data/what?token=1",
    ],
)
def test_a_path_with_an_at_sign_holds_no_credentials(uri: str) -> None:
    assert parse_config(minimal(), [f"workspace='{uri}'"]).workspace == uri


def test_signs_are_stored_unless_nothing_is_projected() -> None:
    def stored(**gradients: Any) -> tuple[int, str]:
        config = parse_config({**minimal(), "gradients": gradients}).gradients
        return config.projection.dim, config.stored_type

    assert stored() == (16384, "bit1")
    assert stored(projection={"kind": "rademacher", "dim": 64}) == (64, "bit1")
    assert stored(projection={"kind": "none"})[1] == "float32"
    assert stored(projection={"kind": "none"}, stored_dtype="bit1")[1] == "bit1"
    assert stored(stored_dtype="int8")[1] == "int8"
    with pytest.raises(ConfigError, match="stored_dtype"):
        parse_config({**minimal(), "gradients": {"stored_dtype": "int4"}})
