"""The library is what docs/library.md says: its blocks run in order, and nothing is loaded before it is used."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import rose_ray

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "library.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)


def python(statement: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", statement], cwd=ROOT, capture_output=True, text=True, check=False, timeout=120
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_blocks_run_in_order() -> None:
    torch.manual_seed(0)
    names: dict[str, Any] = {}
    exec(compile(BLOCKS[0], "docs/library.md", "exec"), names)
    num_parameters = names["gradients"].shape[1]
    assert names["gradients"].shape[0] == 8 and names["directions"].shape == (2, num_parameters)
    assert names["features"].shape == (8, 256) and sorted(names["best"].tolist()) == list(range(8))
    for row, gradient in enumerate(names["gradients"]):
        for pair, direction in enumerate(names["directions"]):
            cosine = torch.cosine_similarity(gradient.double(), direction.double(), dim=0)
            assert float(names["scores"][row, pair]) == pytest.approx(float(cosine), abs=1e-5)  # float32 sums
    plain = names["scores"]
    for block in BLOCKS[1:]:
        exec(compile(block, "docs/library.md", "exec"), names)
    assert names["features"].momentum_shares_B.min() > 0 and not torch.allclose(names["scores"], plain)


def test_the_example_is_short() -> None:
    lines = [line for line in BLOCKS[0].splitlines() if line and not line.startswith(("import ", "from "))]
    assert len(lines) <= 12


def test_nothing_is_loaded_before_it_is_used() -> None:
    found = python("import sys, rose_ray; print(rose_ray.__version__, {'torch', 'ray'} & set(sys.modules))")
    assert found.split() == [rose_ray.__version__, "set()"]


def test_the_library_works_without_ray_and_deepspeed() -> None:
    found = python("import sys; from rose_ray import GradientEngine; print({'ray', 'deepspeed'} & set(sys.modules))")
    assert found.strip() == "set()"


def test_every_name_can_be_had_and_others_cannot() -> None:
    assert all(getattr(rose_ray, name).__name__ == name for name in rose_ray.__all__)
    with pytest.raises(AttributeError, match="Gradients"):
        rose_ray.Gradients  # noqa: B018
