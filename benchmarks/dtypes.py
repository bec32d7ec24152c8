"""What a bfloat16 base costs in rank against float32, on real rows: exact scores and features, of the same adapters.

    python -m benchmarks.dtypes JOB.yaml --rows 600
    python -m benchmarks.dtypes JOB.yaml --rows 600 --emulate

reads the workspace of a finished job as `benchmarks/projections.py` does, and computes the directions of rows and pairs
at every checkpoint in both types. ``--emulate`` is for processors without bfloat16 products: matrices are multiplied in
float32, which products of bfloat16 numbers are added up in anyway, and the result is rounded to bfloat16.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from benchmarks.projections import Feature, Influences, Job, Whole, features, restored, row
from benchmarks.timing import write_results
from rose_ray.config import load_config

DEFAULT = Feature("sketch, deflated", 16384, "bit1")
SEED = 0


class RoundedProducts(TorchDispatchMode):
    """Multiplies bfloat16 matrices in float32 and rounds what comes out."""

    _products = (
        torch.ops.aten.mm,
        torch.ops.aten.bmm,
        torch.ops.aten.addmm,
        torch.ops.aten.addmm_,
        torch.ops.aten.baddbmm,
        torch.ops.aten.baddbmm_,
    )

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        """Run one operator."""
        kwargs = kwargs or {}
        is_product = func.overloadpacket in self._products
        if not is_product or "out_dtype" in kwargs or not _holds_bfloat16(args):
            return func(*args, **kwargs)
        made = func(*tree_map(_wide, args), **kwargs)
        if func.overloadpacket in (torch.ops.aten.addmm_, torch.ops.aten.baddbmm_):
            return args[0].copy_(made)
        return made.to(torch.bfloat16)


def _holds_bfloat16(args: Sequence[Any]) -> bool:
    return any(isinstance(each, Tensor) and each.dtype == torch.bfloat16 for each in args)


def _wide(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype == torch.bfloat16 else value


def scored(job: Job, dtype: str) -> tuple[dict[str, Any], dict[str, Any], list[Whole]]:
    """Return exact scores and those of the default feature, by target, and what nothing was projected of."""
    exact, stored, wholes = Influences(job), Influences(job), []
    for weight, checkpoint in zip(job.weights, job.checkpoints, strict=True):
        whole = job.whole(checkpoint)
        for name, bank in whole.banks.items():
            exact.add(weight, name, whole.units_NP, bank)
        for label, num_exact, units_ND, banks in features(job, whole, DEFAULT.dim, "sketch", SEED):
            if label == DEFAULT.kind:
                for name, bank in banks.items():
                    stored.add(weight, name, restored(units_ND, num_exact, DEFAULT.stored), bank)
        wholes.append(whole)
        print(f"{dtype}: {len(wholes)} of {len(job.checkpoints)} checkpoints", flush=True)
    return exact.scores(), stored.scores(), wholes


def main() -> None:
    """Compute both types and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job", help="configuration of a finished job")
    parser.add_argument("--rows", type=int, default=600)
    parser.add_argument("--targets", nargs="*", help="names; all where left out")
    parser.add_argument("--emulate", action="store_true", help="round products of float32 to bfloat16")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    config = load_config(options.job)
    found = {}
    for dtype in ("float32", "bfloat16"):
        own = config.model_copy(update={"model": config.model.model_copy(update={"dtype": dtype})})
        job = Job(own, options.rows, options.targets or ())
        emulated = RoundedProducts() if options.emulate and dtype == "bfloat16" else contextlib.nullcontext()
        with emulated:
            found[dtype] = scored(job, dtype)
    truth = found["float32"][0]
    rows = []
    for name, scores in (
        ("bfloat16, exact", found["bfloat16"][0]),
        ("float32, default feature", found["float32"][1]),
        ("bfloat16, default feature", found["bfloat16"][1]),
    ):
        made = row(DEFAULT, [scores], truth, 0)
        kept = ("RMS error of a score", "Spearman", "overlap of the best 5 %")
        rows.append({"scores": name, **{key: made[key] for key in kept}})
    both = zip(found["float32"][2], found["bfloat16"][2], strict=True)
    cosines = [float((a.units_NP * b.units_NP).sum(1).mean()) for a, b in both]
    facts = {
        "rows": len(job.samples),
        "parameters": job.layout.num_parameters,
        "targets": ", ".join(job.targets),
        "products": "emulated: float32, rounded" if options.emulate else "the processor's",
        "standard deviation of exact scores": float(np.mean([np.std(scores) for scores in truth.values()])),
        "mean cosine of a row's directions in both types, by checkpoint": [round(each, 6) for each in cosines],
    }
    write_results("dtypes", {"against exact scores in float32": rows}, facts, options.out)


if __name__ == "__main__":
    main()
