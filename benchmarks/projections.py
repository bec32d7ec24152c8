"""What a projection and a stored form cost in rank, on real rows: against exact scores of the same directions.

    python benchmarks/projections.py JOB.yaml

reads the workspace of a finished job (its pool, warm-up, tokenizer and pairs), computes the directions of some rows
whole at the last checkpoint, and makes every kind of feature of them.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from benchmarks.timing import write_results
from rose_ray.config import load_config
from rose_ray.config.job import JobConfig
from rose_ray.distributed.engine import load_scoring_model
from rose_ray.kernels.adam import common_direction
from rose_ray.kernels.aggregation import aggregate_scores, aggregate_subtasks
from rose_ray.kernels.correlation import spearman
from rose_ray.kernels.deflated import DeflatedProjection
from rose_ray.kernels.objectives import PairGradients, bank_directions
from rose_ray.kernels.projection import NoProjection, Projection, make_projection
from rose_ray.kernels.quantization import StoredType, dequantize, quantize
from rose_ray.model.checkpoint import Checkpoint, read_checkpoint
from rose_ray.model.layout import ParameterLayout, layout_of
from rose_ray.model.tokenizer import load_tokeniser
from rose_ray.stages.bank import encode_pairs, pair_gradients
from rose_ray.stages.directions import BatchRunner, DirectionSettings
from rose_ray.stages.pool import read_pool_shard
from rose_ray.stages.target_pairs import read_target_pairs
from rose_ray.stages.tokens import read_samples, tokenize_shard
from rose_ray.stores.manifest import read_manifest
from rose_ray.stores.runs import last_run
from rose_ray.stores.workspace import Workspace

TOP_FRACTION = 0.05
LESS_BYTES = 16384
"""Of a row and checkpoint in LESS: 8192 numbers in float16."""


class Exact:
    """Unit directions of some rows, whole, and a target's pairs, whole.

    Args:
        config: Of a finished job.
        num_rows: How many rows, every so many-th of the pool.
    """

    def __init__(self, config: JobConfig, num_rows: int) -> None:
        workspace = Workspace.open(config.workspace)
        run = last_run(workspace)
        assert run is not None, "run the job first"
        stages = {stage["stage"]: stage["folder"] for stage in run["stages"]}
        warmup = read_manifest(workspace, stages["warmup"])
        self.model = load_scoring_model(config.model.model_copy(update={"loader": "plain"}), config.lora, device="cpu")
        self.layout: ParameterLayout = layout_of(self.model.module)
        name = warmup.facts["checkpoints"][-1]["name"]
        self.checkpoint: Checkpoint = read_checkpoint(workspace.location(f"{warmup.folder}/{name}"), self.layout)
        tokeniser = load_tokeniser(config.model)
        pool = read_manifest(workspace, stages["ingest"])
        shards = [read_pool_shard(workspace, pool, entry["shard"]) for entry in pool.facts["shards"]]
        rows = pa.concat_tables(shards)
        rows = rows.take(pa.array(range(0, rows.num_rows, max(1, rows.num_rows // num_rows))))
        samples = read_samples(tokenize_shard(rows, tokeniser)[0])
        settings = DirectionSettings(config.gradients.adam, "float32", 2048)
        runner = BatchRunner(self.model, self.layout, settings)
        self.units_NP = torch.empty(len(samples), self.layout.num_parameters)
        whole = NoProjection(self.layout.num_parameters)
        for indices, found in runner.run(samples, self.checkpoint, [whole]):
            self.units_NP[indices] = found.features[0] / found.norms_B[:, None].float()
        self.pairs = {
            target.name: (
                target,
                encode_pairs(read_target_pairs(target), tokeniser, target),
            )
            for target in config.targets
        }
        self._banks: dict[str, PairGradients] = {}

    def bank(self, name: str) -> PairGradients:
        """A target's gradients, unprojected."""
        if name not in self._banks:
            _, encoded = self.pairs[name]
            whole = NoProjection(self.layout.num_parameters)
            rows = pair_gradients(self.model, encoded, self.checkpoint, self.layout, whole, max_batch_tokens=4096)
            self._banks[name] = rows.numbers()
        return self._banks[name]

    def scores(self, name: str, units_ND: Tensor, project: Projection | None) -> np.ndarray:
        """Score rows by features, the bank projected as they were."""
        target, encoded = self.pairs[name]
        whole = self.bank(name)
        sides = [torch.from_numpy(side).float() for side in (whole.g_w_VD, whole.g_l_VD)]
        if project is not None:
            sides = [projected(project, side) for side in sides]
        numbers = {**vars(whole), "g_w_VD": sides[0].double().numpy(), "g_l_VD": sides[1].double().numpy()}
        subtasks = [pair.subtask for pair in encoded]
        directions = bank_directions(
            target.objective, PairGradients(**numbers), dpo_beta=target.dpo_beta, subtasks=subtasks
        )
        influences_NU = units_ND.double().numpy() @ directions.vectors_UD.T
        return aggregate_scores(aggregate_subtasks(influences_NU, directions.subtasks), target.aggregation)


def projected(project: Projection, vectors_NP: Tensor, block: int = 64) -> Tensor:
    """Project whole vectors, some rows at a time."""
    out_ND = torch.zeros(len(vectors_NP), project.dim)
    for start in range(0, len(vectors_NP), block):
        project.add(out_ND[start : start + block], 0, vectors_NP[start : start + block])
    return out_ND


def kinds(exact: Exact, dims: Sequence[int], seed: int) -> Iterator[tuple[str, int, Projection]]:
    """Every kind of projection at every width; dense ones up to 4096 only, for time."""
    layout, checkpoint = exact.layout, exact.checkpoint
    shapes = [(shape[0], shape[1]) for _, shape in layout.shapes]
    state: Any = checkpoint.state
    assert checkpoint.exp_avg is not None and checkpoint.exp_avg_sq is not None
    parts = [
        common_direction(checkpoint.exp_avg[name], checkpoint.exp_avg_sq[name], state, "torch")
        for name, _ in layout.shapes
    ]
    common_P = torch.cat([part.flatten() for part in parts if part is not None])
    for dim in dims:
        for kind in ("sketch", "factored", "rademacher"):
            if kind == "rademacher" and dim > 4096:
                continue
            plain = make_projection(kind, dim, seed, layout.num_parameters, shapes=shapes)  # type: ignore[arg-type]
            yield kind, dim, plain
            if kind == "sketch":
                yield "sketch, deflated", dim, DeflatedProjection(plain, common_P)


def row(label: str, found: Sequence[np.ndarray], truth: Sequence[np.ndarray], num_bytes: int) -> dict[str, Any]:
    """Error, rank correlation and overlap of the best rows, mean over targets and seeds."""
    top = max(1, round(TOP_FRACTION * len(truth[0])))
    overlaps = [
        len(set(np.argsort(-f)[:top]) & set(np.argsort(-t)[:top])) / top for f, t in zip(found, truth, strict=True)
    ]
    return {
        "feature": label,
        "RMS error of a score": float(
            np.mean([np.sqrt(np.mean((f - t) ** 2)) for f, t in zip(found, truth, strict=True)])
        ),
        "Spearman": float(np.mean([spearman(f, t) for f, t in zip(found, truth, strict=True)])),
        "overlap of the best 5 %": float(np.mean(overlaps)),
        "bytes a row": num_bytes,
        "of LESS's": num_bytes / LESS_BYTES,
    }


def main() -> None:
    """Compute directions once and every feature of them; write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job", help="configuration of a finished job")
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--targets", nargs="*", help="names; all where left out")
    parser.add_argument("--dims", type=int, nargs="*", default=[1024, 2048, 4096, 8192, 16384])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    exact = Exact(load_config(options.job), options.rows)
    names = options.targets or list(exact.pairs)
    truth = [exact.scores(name, exact.units_NP, None) for name in names]
    by_kind, by_form = [], []
    labels: dict[tuple[str, int], list[np.ndarray]] = {}
    sizes: dict[tuple[str, int], int] = {}
    stored: dict[tuple[StoredType, int], list[np.ndarray]] = {}
    for seed in range(options.seeds):
        for kind, dim, project in kinds(exact, options.dims, seed):
            units_ND = projected(project, exact.units_NP)
            labels.setdefault((kind, dim), []).extend(exact.scores(name, units_ND, project) for name in names)
            sizes[kind, dim] = 2 * (project.dim - project.num_exact) + 4 * project.num_exact
            if kind != "sketch, deflated":
                continue
            form: StoredType
            for form in ("float32", "float16", "int8", "bit1"):
                codes, scales_N = quantize(units_ND[:, :dim].numpy(), form)
                whole = torch.from_numpy(dequantize(codes, scales_N, dim))
                restored = torch.cat([whole, units_ND[:, dim:]], dim=1)
                stored.setdefault((form, dim), []).extend(exact.scores(name, restored, project) for name in names)
    every = truth * options.seeds
    by_kind = [row(f"{kind}, D {dim}", found, every, sizes[kind, dim]) for (kind, dim), found in labels.items()]
    widths = {"float32": 4, "float16": 2, "int8": 1, "bit1": 1 / 8}
    scale = {"int8": 4, "bit1": 4}
    by_form = [
        row(f"sketch, deflated, D {dim}, {form}", found, every, int(widths[form] * dim) + scale.get(form, 0) + 4)
        for (form, dim), found in stored.items()
    ]
    facts = {
        "rows": len(exact.units_NP),
        "parameters": exact.layout.num_parameters,
        "targets": ", ".join(names),
        "seeds": options.seeds,
        "standard deviation of exact scores": float(np.mean([np.std(each) for each in truth])),
    }
    write_results("projections", {"kinds, stored in float16": by_kind, "stored forms": by_form}, facts, options.out)


if __name__ == "__main__":
    main()
