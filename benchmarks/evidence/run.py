"""Which selector helps: every selector on every task, trained on and measured; resumable.

    python -m benchmarks.evidence.run --data ../shared --out benchmarks/results
    python -m benchmarks.evidence.run --data ../shared --share 0.01 --tasks control --selectors rose random --seeds 0

The job and its evaluation are `rose-ray evaluate`: what is done is found when the command is given again. Beside its
table stand what was selected: the share of the control's source, lengths, and how far two selectors agree.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import yaml

from benchmarks.evidence.protocol import CONTROL_SOURCE, PREFERENCES, SELECTORS, Scale, protocol
from benchmarks.timing import write_results

ROOT = Path(__file__).resolve().parents[2]


def selected_rows(workspace: Path, targets: list[str]) -> list[dict[str, Any]]:
    """What each target selected: a row each."""
    chosen = {}
    for target in targets:
        latest = json.loads((workspace / f"selections/{target}/latest.json").read_text(encoding="utf-8"))
        chosen[target] = pq.read_table(workspace / latest["folder"] / "selected.parquet").to_pylist()
    rows = []
    for target, each in chosen.items():
        task = target.split("-")[0]
        first = {row["row_id"] for row in chosen.get(f"{task}-rose", [])}
        own = {row["row_id"] for row in each}
        sources: dict[str, int] = {}
        for row in each:
            sources[row["source"]] = sources.get(row["source"], 0) + 1
        most = sorted(sources.items(), key=lambda item: -item[1])[:3]
        rows.append(
            {
                "target": target,
                "rows": len(each),
                "tokens, median": float(np.median([row["num_tokens"] for row in each])),
                f"share of {CONTROL_SOURCE}": sources.get(CONTROL_SOURCE, 0) / len(each),
                "Jaccard with rose": len(own & first) / len(own | first) if first else None,
                "most from": ", ".join(f"{name} {count / len(each):.0%}" for name, count in most),
            }
        )
    return rows


def main() -> None:
    """Run the protocol and write what came of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with data/ and models/")
    parser.add_argument("--base", help="base model; the shared tiny one where unset")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--scratch", type=Path, default=Path("build/evidence"))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--tasks", nargs="+", choices=[*PREFERENCES, "control"], default=[*PREFERENCES, "control"])
    parser.add_argument("--selectors", nargs="+", choices=list(SELECTORS), default=list(SELECTORS))
    default = Scale()
    parser.add_argument("--share", type=float, default=default.share, help="of the pool")
    parser.add_argument("--shots", type=int, default=default.shots)
    parser.add_argument("--held-out", type=int, default=default.held_out)
    parser.add_argument("--budgets", type=float, nargs="+", default=list(default.budgets))
    parser.add_argument("--seeds", type=int, nargs="+", default=list(default.seeds))
    parser.add_argument("--epochs", type=int, default=default.epochs)
    options = parser.parse_args()
    scale = Scale(
        options.share, options.shots, options.held_out, tuple(options.budgets), tuple(options.seeds), options.epochs
    )
    scratch, data = options.scratch.resolve(), options.data.resolve()
    base = options.base or str(data / "models/tiny-llama-4m")
    content = protocol(data, scratch, scale, options.tasks, options.selectors, base, options.dtype)
    config = scratch / "evidence.yaml"
    config.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    started = time.monotonic()
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-m", "rose_ray", "evaluate", str(config)], env=environment, check=True)
    seconds = time.monotonic() - started
    workspace = Path(content["workspace"])
    table = json.loads((workspace / "evaluation/report/table.json").read_text(encoding="utf-8"))
    sections = {"what was selected": selected_rows(workspace, [target["name"] for target in content["targets"]])}
    facts = {"base": Path(base).name, "dtype": options.dtype, "scale": asdict(scale), "seconds": seconds}
    if options.out:
        write_results("evidence", sections, facts, options.out)
        (options.out / "evidence-table.json").write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
        text = (workspace / "evaluation/report/table.txt").read_text(encoding="utf-8")
        (options.out / "evidence-table.txt").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
