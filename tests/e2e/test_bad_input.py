"""Bad input through the command line: one clear message, or a row in the rejected table.

What needs a finished job is tested beside it, in tests/distributed: rows too long for the model, NaN, altered files, a
full disk.
"""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml
from typer.testing import CliRunner

from rose_ray.cli import app
from rose_ray.stores.workspace import FORMAT_VERSION
from tests.distributed.tiny import tiny_content, write_inputs
from tests.tiny import make_pool_rows

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A job that is valid; every test spoils one thing."""
    folder = tmp_path_factory.mktemp("inputs")
    write_inputs(folder)
    return folder


def write_config(inputs: Path, folder: Path) -> str:
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(tiny_content(inputs, folder / "workspace")), encoding="utf-8")
    return str(path)


def message_of(command: str, inputs: Path, folder: Path, overrides: list[str]) -> str:
    """Run a command that must fail, and return what it says: one message, no traceback."""
    changes = [word for change in overrides for word in ("--set", change.replace("HERE", str(folder)))]
    result = CliRunner().invoke(app, [command, write_config(inputs, folder), *changes])
    assert result.exit_code == 1, result.stdout
    assert isinstance(result.exception, SystemExit), repr(result.exception)
    assert result.stderr.startswith("error: ") and result.stderr.count("error: ") == 1
    assert "Traceback" not in result.stderr
    return result.stderr


def lines(*rows: Any) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def pair(**changes: Any) -> dict[str, Any]:
    return {"id": "one", "prompt": "Name a fruit.", "chosen": "An apple.", "rejected": "A brick.", **changes}


POOL = ["pool.inputs.0.files=['HERE/pool.jsonl']"]
PAIRS = ["targets.0.pairs.0={files: ['HERE/pairs.jsonl']}"]
ROWS = lines(*make_pool_rows(40))

POOL_FILES: dict[str, tuple[dict[str, bytes], list[str], str]] = {
    "missing file": ({}, POOL, "pool.jsonl': expected a file, found nothing at"),
    "folder": ({}, ["pool.inputs.0.files=['HERE']"], "expected a file, found a folder at"),
    "glob without a match": ({}, ["pool.inputs.0.files=['HERE/*.jsonl']"], "*.jsonl' matches no file"),
    "unknown kind": ({"pool.txt": b"x"}, ["pool.inputs.0.files=['HERE/pool.txt']"], "does not tell the kind of file"),
    "empty file": ({"pool.jsonl": b""}, POOL, "pool.jsonl: empty file, expected at least one record"),
    "blank lines": ({"pool.jsonl": b"\n \n"}, POOL, "pool.jsonl: empty file"),
    "not JSON": ({"pool.jsonl": b"Dear diary,\n"}, POOL, "not one record can be read; row 1: not_json: "),
    "no objects": ({"pool.jsonl": b"[1]\n[2]\n"}, POOL, "row 1: not_object: expected a JSON object, found an array"),
    "not UTF-8": ({"pool.jsonl": b'{"messages": "\xe9t\xe9"}\n'}, POOL, "row 1: invalid_utf8: byte 14 of the line"),
    "unknown schema": (
        {"pool.jsonl": lines({"ask": "a", "say": "b"})},
        POOL,
        "the keys ['ask', 'say'] of record 1 fit no",
    ),
    "pairs as pool": ({"pool.jsonl": lines(pair())}, POOL, "look like preference pairs, which belong under `targets`"),
    "two formats": (
        {"pool.jsonl": ROWS + lines({"instruction": "a", "output": "b"})},
        POOL,
        "expected records of one format, found messages (record 1), alpaca (record 41)",
    ),
    "cut gzip": (
        {"pool.jsonl.gz": gzip.compress(ROWS)[:-30]},
        ["pool.inputs.0.files=['HERE/pool.jsonl.gz']"],
        "pool.jsonl.gz: cut short or not gzip",
    ),
    "no gzip": ({"pool.jsonl.gz": ROWS}, ["pool.inputs.0.files=['HERE/pool.jsonl.gz']"], "cut short or not gzip"),
    "cut JSON": (
        {"pool.json": b"[" + ROWS[:50]},
        ["pool.inputs.0.files=['HERE/pool.json']"],
        "pool.json: not_json, found",
    ),
    "no Parquet": (
        {"pool.parquet": ROWS},
        ["pool.inputs.0.files=['HERE/pool.parquet']"],
        "not a readable Parquet file",
    ),
}

LONG = "word " * 300
PAIR_FILES: dict[str, tuple[bytes, list[str], str]] = {
    "equal sides": (
        lines(pair(), pair(id="two", rejected="An apple. ")),
        PAIRS,
        "target alpha: 1 of 2 pairs have equal sides: two (",
    ),
    "empty side": (lines(pair(chosen=" ")), PAIRS, "1 of 1 pairs have an empty side: one ("),
    "equal ids with different content": (
        lines(pair(), pair(chosen="A pear.")),
        PAIRS,
        "1 of 2 pairs share an id with a pair of other content or subtask: one (",
    ),
    "a pair twice": (lines(pair(), pair()), PAIRS, "1 of 2 pairs stand twice: one ("),
    "no pairs": (lines({"messages": []}), PAIRS, "row 1: unknown_schema: expected chosen and rejected"),
    "roles in a wrong order": (
        lines(pair(prompt=[{"role": "user", "content": "a"}, {"role": "user", "content": "b"}])),
        PAIRS,
        "row 1: wrong_role_order: turn 2 is by user",
    ),
    "prompt too long": (lines(pair(prompt=LONG)), PAIRS, "one: prompt_too_long: the first answer token is number"),
    "equal once cut": (
        lines(pair(chosen=LONG + "yes", rejected=LONG + "no")),
        PAIRS,
        "one: both sides are the same 96 tokens",
    ),
    "not JSON": (b"{\n", PAIRS, "row 1: not_json: "),
    "empty file": (b"", PAIRS, "pairs.jsonl: empty file"),
    "no subtask named": (
        lines(pair(topic="a"), pair(id="two")),
        ["targets.0.pairs.0={files: ['HERE/pairs.jsonl'], subtask_field: topic}"],
        "1 of 2 rows name no subtask at 'topic': rows 2 of ",
    ),
    "a subtask with no pairs": (
        b"",
        ["targets.0.pairs=[{files: [INPUTS/pairs.jsonl], subtask: a}, {files: [HERE/pairs.jsonl], subtask: b}]"],
        "target alpha: subtask 'b' has no pairs (HERE/pairs.jsonl: empty file). Fill the file or take it out.",
    ),
    "an object without pairs": (
        b"{}",
        ["targets.0.pairs=[{files: [INPUTS/pairs.jsonl, HERE/pairs.json]}]"],
        "target alpha: no pairs (HERE/pairs.json: no record).",
    ),
    "more shots than pairs": (
        lines(pair(), pair(id="two", chosen="A pear.")),
        [*PAIRS, "targets.0.shots=3"],
        "target alpha: 3 shots asked for, but subtask 'alpha' has 2",
    ),
    "blocks that do not divide": (
        lines(*(pair(id=str(number), chosen=f"Fruit {number}.") for number in range(5))),
        ["targets.0.pairs.0={files: ['HERE/pairs.jsonl'], subtask_blocks: 2}"],
        "5 pairs in ",
    ),
}


@pytest.mark.parametrize("name", POOL_FILES)
def test_pool_file(inputs: Path, tmp_path: Path, name: str) -> None:
    files, overrides, message = POOL_FILES[name]
    for file, content in files.items():
        (tmp_path / file).write_bytes(content)
    assert message in message_of("validate", inputs, tmp_path, overrides)


@pytest.mark.parametrize("name", PAIR_FILES)
def test_pair_file(inputs: Path, tmp_path: Path, name: str) -> None:
    content, overrides, message = PAIR_FILES[name]
    for file in ("pairs.jsonl", "pairs.json"):
        (tmp_path / file).write_bytes(content)
    overrides = [override.replace("INPUTS", str(inputs)) for override in overrides]
    assert message.replace("HERE", str(tmp_path)) in message_of("validate", inputs, tmp_path, overrides)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("lora.target_modules=[q_proj, c_attn]", "the model has no linear layer ['c_attn']; it has ['down_proj',"),
        ("model.base=HERE/none", "none' is no folder here"),
        ("model.base=HERE", "cannot load its tokenizer"),
        ("model.template=HERE/none.jinja", "neither tokenizer nor tulu nor a readable file: No such file"),
        ("model.max_tokens=8", "pairs cannot be used:"),
        ("lora.rnk=2", "lora.rnk: unknown key (value 2); did you mean 'rank'?"),
    ],
)
def test_model(inputs: Path, tmp_path: Path, override: str, message: str) -> None:
    assert message in message_of("validate", inputs, tmp_path, [override])


def test_template_of_a_tokenizer_that_has_none(inputs: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    base = tmp_path / "base"
    base.mkdir()
    for file in (inputs / "base").iterdir():
        if file.name != "chat_template.jinja":
            (base / file.name).write_bytes(file.read_bytes())
    assert AutoTokenizer.from_pretrained(base).chat_template is None
    message = message_of("validate", inputs, tmp_path, ["model.base=HERE/base"])
    assert "model.template: tokenizer, but the tokenizer of" in message and "Set it to tulu, or to a Jinja" in message


def test_checkpoint_of_another_model(inputs: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(inputs / "base")
    base.model.layers = base.model.layers[:1]
    settings = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    get_peft_model(base, settings).save_pretrained(str(tmp_path / "adapter"))
    overrides = ["warmup={adapters: ['HERE/adapter']}", "gradients.adam=sgd"]
    message = message_of("validate", inputs, tmp_path, overrides)
    assert "adapter is not an adapter of this model: 4 parameters missing" in message


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (json.dumps({"format": FORMAT_VERSION + 1}), f"has format {FORMAT_VERSION + 1}, this rose_ray reads up to"),
        ("{", "rose_ray.json: not JSON"),
        ("[]", "expected a whole number at 'format', found []"),
    ],
)
def test_workspace_that_was_altered_or_is_newer(inputs: Path, tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "workspace").mkdir()
    (tmp_path / "workspace" / "rose_ray.json").write_text(content, encoding="utf-8")
    assert message in message_of("validate", inputs, tmp_path, [])


def test_no_workspace_yet(inputs: Path, tmp_path: Path) -> None:
    for command in ("status", "explain"):
        row = ["0123"] if command == "explain" else []
        result = CliRunner().invoke(app, [command, write_config(inputs, tmp_path), *row])
        assert result.exit_code == 1 and "error: no workspace at " in result.stderr
    assert not (tmp_path / "workspace").exists()


def conversation(*turns: tuple[str, str], **further: Any) -> bytes:
    messages = [{"role": role, "content": content} for role, content in turns]
    return json.dumps({**further, "messages": messages}).encode()


ROW_REASONS: dict[str, bytes] = {
    "not_json": b'{"messages": [',
    "not_object": b"3",
    "invalid_utf8": b'{"messages": "\xff"}',
    "duplicate_key": b'{"messages": [], "messages": []}',
    "unknown_schema": b'{"question": "a", "answer": "b"}',
    "empty_messages": b'{"messages": []}',
    "unknown_role": conversation(("user", "a"), ("robot", "b")),
    "no_assistant_turn": conversation(("user", "a")),
    "empty_answer": conversation(("user", "a"), ("assistant", " ")),
    "wrong_role_order": conversation(("assistant", "a"), ("user", "b")),
    "unsupported_content": json.dumps(
        {"messages": [{"role": "user", "content": [{"type": "image"}]}, {"role": "assistant", "content": "b"}]}
    ).encode(),
    "id_conflict": conversation(("user", "a"), ("assistant", "other"), id="same"),
}
"""A line of the pool by the reason it is rejected for."""


@pytest.mark.ray
def test_bad_rows_stand_in_the_rejected_table(ray_cluster: None, inputs: Path, tmp_path: Path) -> None:
    good = conversation(("user", "a"), ("assistant", "b"), id="same")
    (tmp_path / "pool.jsonl").write_bytes(b"\n".join([good, *ROW_REASONS.values(), b""]))
    changes = ["--set", f"pool.inputs=[{{files: ['{tmp_path}/pool.jsonl'], format: messages}}]"]
    result = CliRunner().invoke(app, ["ingest", write_config(inputs, tmp_path), *changes])
    assert result.exit_code == 0, result.stderr
    assert f"{1 + len(ROW_REASONS)} rows read, 1 unique, 0 duplicates, {len(ROW_REASONS)} rejected" in result.stdout
    (path,) = (tmp_path / "workspace").glob("ingest/*/rejected.parquet")
    rejected = pq.read_table(path).to_pylist()
    assert [(row["place"], row["reason"]) for row in rejected] == list(enumerate(ROW_REASONS, start=2))
    assert all(row["file"] == f"{tmp_path}/pool.jsonl" and len(row["detail"]) > 5 for row in rejected)


@pytest.mark.ray
@pytest.mark.parametrize(
    ("files", "overrides", "message"),
    [
        # Beyond the rows that `validate` looks at.
        (
            {"pool.jsonl.gz": gzip.compress(ROWS * 20, mtime=0)[:-8]},
            ["pool.inputs.0.files=['HERE/pool.jsonl.gz']"],
            "pool.jsonl.gz: cut short or not gzip",
        ),
        (
            {"pool.jsonl": ROW_REASONS["empty_answer"]},
            POOL,
            "the pool has no row: 1 read from HERE/pool.jsonl, 0 outside the sample, 1 rejected (empty_answer 1)",
        ),
        (
            {},
            ["ray.actors=50"],
            "ray.actors: 50 actors of 0.5 CPU and 0 GPU do not fit; the cluster has 1 node(s), 2 CPU",
        ),
        ({}, ["ray.cpus_per_actor=3"], "actors of 3 CPU and 0 GPU do not fit; the cluster has 1 node(s), 2 CPU"),
    ],
)
def test_what_only_a_run_finds(
    ray_cluster: None, inputs: Path, tmp_path: Path, files: dict[str, bytes], overrides: list[str], message: str
) -> None:
    for file, content in files.items():
        (tmp_path / file).write_bytes(content)
    assert message.replace("HERE", str(tmp_path)) in message_of("run", inputs, tmp_path, overrides)
    workspace = tmp_path / "workspace"
    assert not list(workspace.glob("pool/*")) and not list(workspace.glob("warmup/*"))
    run = json.loads((workspace / "runs" / "run-00001.json").read_text(encoding="utf-8"))
    assert message.replace("HERE", str(tmp_path)) in run["outcome"]


def test_a_process_prints_the_message_and_exits_with_1(inputs: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "rose_ray", "validate", write_config(inputs, tmp_path), "--set", "model.base=HERE"]
    command[-1] = command[-1].replace("HERE", str(tmp_path))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert result.returncode == 1
    assert "Traceback" not in result.stderr and "\nerror: " in f"\n{result.stderr}"
