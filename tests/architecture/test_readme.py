"""The README does what it says: its commands run in order, its records and keys are ones that the code knows."""

from __future__ import annotations

import gzip
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml
from typer.testing import CliRunner

from rose_ray.cli import app
from rose_ray.config import JobConfig, parse_config
from rose_ray.data.conversation import validate_conversation
from rose_ray.data.formats import POOL_FORMATS, fitting_formats, to_conversation
from rose_ray.data.pair_formats import pair_content, pair_format
from rose_ray.schemas import scores_schema
from tests.tiny import make_pair_rows, make_pool_rows, write_jsonl

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCUMENTS = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "cluster").glob("*.md")], key=lambda path: str(path)
)
CONFIG_FILE = "my-job.yaml"

SMALL = [
    "model.dtype=float32",
    "model.max_tokens=128",
    "lora.rank=2",
    "lora.alpha=4",
    "gradients.projection.dim=64",
    "warmup.fraction=0.3",
    "warmup.epochs=1",
    "warmup.batch_size=8",
    "warmup.learning_rate=1e-3",
    "ray.cpus_per_actor=0.75",
]
"""What makes the README's job small enough for a test; none of it changes what the commands do."""


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def commands() -> list[list[str]]:
    """Arguments of every ``rose-ray`` line in the README's shell blocks, in order."""
    lines = [line for block in blocks("sh") for line in block.splitlines() if line.startswith("rose-ray ")]
    return [shlex.split(line, comments=True)[1:] for line in lines]


def job_of_readme() -> dict[str, Any]:
    """The one YAML block that is a whole job."""
    (job,) = (content for content in map(yaml.safe_load, blocks("yaml")) if "workspace" in content)
    return dict(job)


def write_inputs(job: dict[str, Any], base_folder: str) -> None:
    """Put data where the README's job looks for it, and small settings into the job."""
    (pattern,) = job["pool"]["inputs"][0]["files"]
    (pairs,) = job["targets"][0]["pairs"][0]["files"]
    pool = Path(pattern.replace("*", "part-0"))
    pool.parent.mkdir(parents=True)
    pool.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in make_pool_rows(40)).encode()))
    write_jsonl(Path(pairs), make_pair_rows(10))
    assert job["targets"][0]["pairs"][0]["subtask_field"] in make_pair_rows(1)[0]
    job["model"]["base"] = base_folder
    config = parse_config(job, SMALL)
    Path(CONFIG_FILE).write_text(yaml.safe_dump(config.model_dump(mode="json", exclude_none=True)))


def first_row_id() -> str:
    (table,) = Path().glob("my-workspace/scores/*/*/scores.parquet")
    return str(pq.read_table(table, columns=["row_id"])["row_id"][0])


@pytest.mark.ray
@pytest.mark.slow
def test_commands_run_in_order(
    ray_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, base_folder: str
) -> None:
    monkeypatch.chdir(tmp_path)
    job = job_of_readme()
    assert job["ray"]["address"] == "local"
    runner, done = CliRunner(), []
    for arguments in commands():
        arguments = [first_row_id() if argument == "ROW_ID" else argument for argument in arguments]
        result = runner.invoke(app, arguments)
        assert result.exit_code == 0, f"rose-ray {shlex.join(arguments)}: {result.output}"
        if arguments[0] == "init":
            assert Path(CONFIG_FILE).is_file()
            write_inputs(job, base_folder)
        done.append(arguments[0])
    assert {"init", "validate", "run", "status", "explain", "features"} <= set(done)
    (latest,) = Path().glob("my-workspace/selections/*/latest.json")
    folder = Path("my-workspace") / json.loads(latest.read_text())["folder"]
    line = json.loads((folder / "selected.jsonl").read_text().splitlines()[0])
    assert sorted(line["rose_ray"]) == ["place", "row_id", "score", "source"]


def test_job_validates() -> None:
    assert parse_config(job_of_readme()).targets[0].shots == 5


def test_pool_records_are_of_the_four_formats() -> None:
    records = [json.loads(line) for line in blocks("json")[0].splitlines()]
    assert tuple(name for record in records for name in fitting_formats(record)) == POOL_FORMATS
    for record in records:
        validate_conversation(to_conversation(record, fitting_formats(record)[0]))


def test_pair_records_can_be_read() -> None:
    records = [json.loads(line) for line in blocks("json")[1].splitlines()]
    assert [pair_format(record) for record in records] == ["explicit", "implicit"]
    for record in records:
        content = pair_content(record, pair_format(record))
        assert content.chosen == "Air scatters blue light most."


def test_score_columns_are_those_of_the_table() -> None:
    table = README[README.index("| column | meaning |") :].split("\n\n")[0]
    named = [name for line in table.splitlines()[2:] for name in re.findall(r"`(\w+)`", line.split("|")[1])]
    assert named == scores_schema(["NAME"]).names


def test_sections_come_in_order() -> None:
    assert re.findall(r"^## (.+)$", README, re.MULTILINE) == [
        "Two commands",
        "What came out",
        "On your own data",
        "On a cluster",
        "The method in ten lines",
        "Limits",
        "Further",
    ]


def links() -> Iterator[tuple[Path, str]]:
    for path in DOCUMENTS:
        for target in re.findall(r"\]\(([^)#\s]+)", path.read_text(encoding="utf-8")):
            if "://" not in target:
                yield path, target


def test_links_lead_somewhere() -> None:
    broken = [f"{path.relative_to(ROOT)}: {target}" for path, target in links() if not (path.parent / target).exists()]
    assert broken == []


def known_keys(schema: dict[str, Any], node: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """Dotted keys of the configuration's JSON Schema, items of lists without their number."""
    node = node.get("items", node)
    for option in node.get("anyOf", [node]):
        option = option.get("items", option)
        found = schema["$defs"][option["$ref"].rsplit("/", 1)[-1]] if "$ref" in option else option
        for name, below in found.get("properties", {}).items():
            yield f"{prefix}{name}"
            yield from known_keys(schema, below, f"{prefix}{name}.")


def test_keys_named_in_the_documents_exist() -> None:
    schema = JobConfig.model_json_schema()
    known = set(known_keys(schema, schema))
    below_target = {key.removeprefix("targets.") for key in known if key.startswith("targets.")}
    tops = {key.partition(".")[0] for key in known | below_target}
    unknown = []
    for path in DOCUMENTS:
        text = path.read_text(encoding="utf-8")
        mentioned = set(re.findall(r"`([a-z_]+(?:\.[a-z_]+)+)(?::[^`]*)?`", text))
        mentioned |= {re.sub(r"\.\d+", "", key) for key in re.findall(r"--set ([\w.]+)=", text)}
        keys = {key for key in mentioned if key.partition(".")[0] in tops and not (ROOT / key).exists()}
        unknown += [f"{path.relative_to(ROOT)}: {key}" for key in sorted(keys - known - below_target)]
    assert unknown == []
