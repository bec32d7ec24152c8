"""``rose-ray sample-answers`` says at once what it cannot do."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from rose_ray.cli import app
from tests.tiny import make_pair_rows, write_jsonl


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("other", "no target 'other'; the configuration has ['t']"),
        ("t", "target t: no input with task kind exact_answer, so nothing to ask a model"),
    ],
)
def test_targets_that_cannot_be_asked(tmp_path: Path, target: str, message: str) -> None:
    pairs = write_jsonl(tmp_path / "p.jsonl", make_pair_rows(2))
    content = {
        "workspace": str(tmp_path / "w"),
        "model": {"base": "b"},
        "pool": {"inputs": [{"files": ["p"]}]},
        "targets": [{"name": "t", "pairs": [{"files": [str(pairs)]}]}],
    }
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(content))
    result = CliRunner().invoke(app, ["sample-answers", str(tmp_path / "job.yaml"), target])
    assert result.exit_code == 1 and message in result.output
    assert not (tmp_path / "w").exists()
