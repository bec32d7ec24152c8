"""Which selector helps: every selector on every task, trained on and measured; resumable.

    python -m benchmarks.evidence.run --data ../shared --out benchmarks/results
    python -m benchmarks.evidence.run --data ../shared --share 0.01 --tasks control --selectors rose bm25 --seeds 0
    python -m benchmarks.evidence.run --data ../shared --adam sgd --selectors rose less --budgets 0.05
    python -m benchmarks.evidence.run --data ../shared --draw 1 --tasks control --selectors rose less rds_plus

The job and its evaluations are `rose-ray evaluate`, once a task: what is done is found when the command is given again.
Beside the tables stand what was selected at every budget: how much of the control's source, lengths, and how far two
selectors agree; and which side of the held-out pairs each training moved. A training that failed is named, and leaves
a gap in its table.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from dataclasses import asdict
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from benchmarks.evidence.pairs import TASKS
from benchmarks.evidence.protocol import SELECTORS, Scale, protocol
from benchmarks.evidence.selected import selected_rows
from benchmarks.evidence.sides import moved_sides
from benchmarks.timing import write_results
from rose_ray.evaluate.index import INDEX_FILE, Index, read_index
from rose_ray.evaluate.report import REPORT_FOLDER
from rose_ray.evaluate.work import read_items
from rose_ray.stores.workspace import Workspace

ROOT = Path(__file__).resolve().parents[2]
TABLES = ("table.json", "table.txt")


def evaluated(config: Path, workspace: Path) -> Index:
    """Evaluate one task, and return what came of it.

    `rose-ray evaluate` ends with an error where a training failed, and has written the table of all others by then; so
    what it wrote decides, not its exit status. What an earlier task wrote is out of the way first.
    """
    for path in (INDEX_FILE, *(f"{REPORT_FOLDER}/{name}" for name in TABLES)):
        (workspace / path).unlink(missing_ok=True)
    command = [sys.executable, "-m", "rose_ray", "evaluate", str(config)]
    status = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False).returncode
    if not all((workspace / REPORT_FOLDER / name).is_file() for name in TABLES):
        raise SystemExit(f"{config}: no table, exit status {status}. What is done is kept; give the command again.")
    return read_index(Workspace.open(str(workspace)))


def failures(index: Index) -> list[str]:
    """What failed, a line a trial."""
    return [f"{e.arm} at {e.budget}, seed {e.seed}: {e.failure}" for e in index.entries if e.failure]


def main() -> None:
    """Run the protocol and write what came of it."""
    options = _options()
    scale = Scale(
        options.share,
        options.shots,
        options.held_out,
        tuple(options.budgets),
        tuple(options.seeds),
        options.epochs,
        options.adam,
        options.draw,
    )
    scratch, data = options.scratch.resolve(), options.data.resolve()
    scratch = scratch / f"draw-{scale.draw}" if scale.draw else scratch
    base = options.base or str(data / "models/tiny-llama-4m")
    plan = protocol(data, scratch, scale, options.tasks, options.selectors, base, options.dtype)
    workspace = scratch / "workspace"
    facts: dict[str, Any] = {"base": Path(base).name, "dtype": options.dtype, "scale": asdict(scale)}
    facts["pairs passed over"] = plan.left_out
    sections: dict[str, list[dict[str, Any]]] = {}
    tables: dict[str, str] = {}
    failed: list[str] = []
    started = time.monotonic()
    for task, content in plan.configs.items():
        config = scratch / f"evidence-{task}.yaml"
        config.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
        index = evaluated(config, workspace)
        failed += failures(index)
        opened = Workspace.open(str(workspace))
        sections[f"what was selected for {task}"] = selected_rows(opened, index, task)
        sections[f"where the margins on {task} come from"] = moved_sides(index, partial(read_items, opened))
        tables |= {f"{task}-{name}": (workspace / REPORT_FOLDER / name).read_text("utf-8") for name in TABLES}
    facts["failed"] = failed or "nothing"
    # What an earlier start has done is found, and not counted.
    facts["seconds of the last start"] = round(time.monotonic() - started)
    if options.out:
        adam = scale.adam if scale.adam != "torch" else None
        draw = f"draw-{scale.draw}" if scale.draw else None
        results = "-".join(filter(None, ("evidence", options.label, adam, draw)))
        write_results(results, sections, facts, options.out)
        for name, text in tables.items():
            (options.out / f"{date.today().isoformat()}-{results}-{name}").write_text(text, encoding="utf-8")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with data/ and models/")
    parser.add_argument("--base", help="base model; the shared tiny one where unset")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--scratch", type=Path, default=Path("build/evidence"))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--label", help="behind `evidence` in the names of what is written, so that a day has several")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--selectors", nargs="+", choices=list(SELECTORS), default=list(SELECTORS))
    default = Scale()
    parser.add_argument("--share", type=float, default=default.share, help="of the pool")
    parser.add_argument("--shots", type=int, default=default.shots)
    parser.add_argument("--held-out", type=int, default=default.held_out)
    parser.add_argument("--budgets", type=float, nargs="+", default=list(default.budgets))
    parser.add_argument("--seeds", type=int, nargs="+", default=list(default.seeds))
    parser.add_argument("--epochs", type=int, default=default.epochs)
    parser.add_argument(
        "--adam", choices=("torch", "less_code", "v_only", "sgd"), default=default.adam, help="what a gradient becomes"
    )
    parser.add_argument("--draw", type=int, default=default.draw, help="another one: other rows, warm-up and pairs")
    return parser.parse_args()


if __name__ == "__main__":
    main()
