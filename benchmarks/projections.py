"""What a projection and a stored form cost in rank, on real rows: against exact scores of the same directions.

    python -m benchmarks.projections JOB.yaml

reads the workspace of a finished job (its pool and warm-up; tokenizer and pairs are the configuration's), computes the
directions of some rows whole at every checkpoint, makes every kind of feature of them, and scores the rows as the job
does: checkpoints weighted by their learning rates, pairs and subtasks combined as each target says.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.models import shared_direction
from benchmarks.timing import write_results
from rose_ray.config import load_config
from rose_ray.config.job import JobConfig
from rose_ray.config.target import TargetConfig
from rose_ray.distributed.engine import load_scoring_model
from rose_ray.kernels.aggregation import aggregate_scores, aggregate_subtasks
from rose_ray.kernels.correlation import spearman
from rose_ray.kernels.deflated import DeflatedProjection
from rose_ray.kernels.influence import checkpoint_weights
from rose_ray.kernels.objectives import Directions, PairGradients, bank_directions
from rose_ray.kernels.projection import NoProjection, Projection, ProjectionKind, make_projection
from rose_ray.kernels.quantization import StoredType, dequantize, quantize
from rose_ray.model.checkpoint import Checkpoint, read_checkpoint
from rose_ray.model.layout import layout_of
from rose_ray.model.tokenizer import load_tokeniser
from rose_ray.stages.bank import EncodedPair, encode_pairs, pair_gradients
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

DENSE_ROWS = 4096
"""Vectors of which ``rademacher`` makes its signs once: making them is most of its work on fewer."""

STORED: Sequence[StoredType] = ("float16", "int8", "bit1")
WIDTHS: dict[StoredType, float] = {"float32": 4, "float16": 2, "int8": 1, "bit1": 1 / 8}
SCALE_BYTES: dict[StoredType, int] = {"float32": 0, "float16": 0, "int8": 4, "bit1": 4}


class Feature(NamedTuple):
    """One way to make and keep a feature."""

    kind: str
    dim: int
    stored: StoredType


@dataclass(frozen=True)
class Whole:
    """Nothing projected, at one checkpoint.

    Attributes:
        units_NP: Directions of the rows, each of length 1, float32.
        banks: Pair gradients by target.
        common_P: What all directions have in common.
    """

    units_NP: Tensor
    banks: dict[str, PairGradients]
    common_P: Tensor


class Job:
    """Rows, pairs and checkpoints of a finished job.

    Args:
        config: Its configuration.
        num_rows: How many rows, every so many-th of the pool.
        names: Of the targets; all where empty.
    """

    def __init__(self, config: JobConfig, num_rows: int, names: Sequence[str]) -> None:
        workspace = Workspace.open(config.workspace)
        run = last_run(workspace)
        assert run is not None, "run the job first"
        stages = {stage["stage"]: stage["folder"] for stage in run["stages"]}
        warmup = read_manifest(workspace, stages["warmup"])
        self.adam = config.gradients.adam
        self.model = load_scoring_model(config.model.model_copy(update={"loader": "plain"}), config.lora, device="cpu")
        self.layout = layout_of(self.model.module)
        self.checkpoints: list[Checkpoint] = [
            read_checkpoint(workspace.location(f"{warmup.folder}/{entry['name']}"), self.layout)
            for entry in warmup.facts["checkpoints"]
        ]
        self.weights = checkpoint_weights([entry["mean_learning_rate"] for entry in warmup.facts["checkpoints"]])
        tokeniser = load_tokeniser(config.model)
        pool = read_manifest(workspace, stages["ingest"])
        rows = pa.concat_tables([read_pool_shard(workspace, pool, entry["shard"]) for entry in pool.facts["shards"]])
        rows = rows.take(pa.array(range(0, rows.num_rows, max(1, rows.num_rows // num_rows))))
        self.samples = read_samples(tokenize_shard(rows, tokeniser)[0])
        self.targets: dict[str, tuple[TargetConfig, list[EncodedPair]]] = {
            target.name: (target, list(encode_pairs(read_target_pairs(target), tokeniser, target)))
            for target in config.targets
            if not names or target.name in names
        }

    def whole(self, checkpoint: Checkpoint) -> Whole:
        """Compute directions and pairs at a checkpoint."""
        whole = NoProjection(self.layout.num_parameters)
        units_NP = torch.empty(len(self.samples), self.layout.num_parameters)
        runner = BatchRunner(self.model, self.layout, DirectionSettings(self.adam, "float32", 2048))
        for indices, found in runner.run(self.samples, checkpoint, [whole]):
            units_NP[indices] = found.features[0] / found.norms_B[:, None].float()
        banks = {
            name: pair_gradients(self.model, pairs, checkpoint, self.layout, whole, max_batch_tokens=2048).numbers()
            for name, (_, pairs) in self.targets.items()
        }
        state: Any = checkpoint.state
        assert checkpoint.exp_avg is not None and checkpoint.exp_avg_sq is not None
        common_P = shared_direction(self.layout, checkpoint.exp_avg, checkpoint.exp_avg_sq, state, self.adam)
        return Whole(units_NP, banks, common_P)

    def directions(self, name: str, bank: PairGradients) -> Directions:
        """Return the directions of a target's pairs under its objective."""
        target, pairs = self.targets[name]
        return bank_directions(
            target.objective, bank, dpo_beta=target.dpo_beta, subtasks=[pair.subtask for pair in pairs]
        )

    def scores(self, name: str, influences_NU: NDArray[np.float64], subtasks: Sequence[str]) -> NDArray[np.float64]:
        """Combine influences, checkpoints added up, into scores."""
        return aggregate_scores(aggregate_subtasks(influences_NU, subtasks), self.targets[name][0].aggregation)


class Influences:
    """Influences of rows on a target's directions, checkpoints added up as they come."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self._sums: dict[str, NDArray[np.float64]] = {}
        self._subtasks: dict[str, Sequence[str]] = {}

    def add(self, weight: float, name: str, units_ND: Tensor, bank: PairGradients) -> None:
        """Add those of one checkpoint."""
        directions = self.job.directions(name, bank)
        found_NU = weight * (units_ND.double().numpy() @ directions.vectors_UD.T)
        self._sums[name] = self._sums.get(name, 0.0) + found_NU
        self._subtasks[name] = directions.subtasks

    def scores(self) -> dict[str, NDArray[np.float64]]:
        """Return scores by target."""
        return {name: self.job.scores(name, sums, self._subtasks[name]) for name, sums in self._sums.items()}


def projected(project: Projection, vectors_NP: Tensor, block: int) -> Tensor:
    """Project whole vectors, some rows at a time."""
    out_ND = torch.zeros(len(vectors_NP), project.dim)
    for start in range(0, len(vectors_NP), block):
        project.add(out_ND[start : start + block], 0, vectors_NP[start : start + block])
    return out_ND


def features(
    job: Job, whole: Whole, dim: int, kind: ProjectionKind, seed: int
) -> Iterator[tuple[str, int, Tensor, dict[str, PairGradients]]]:
    """Project rows and pairs, without and with the common direction kept exactly.

    Yields:
        Name of the kind, how many numbers at the end are exact, units [N, D] and the banks by target.
    """
    shapes = [(shape[0], shape[1]) for _, shape in job.layout.shapes]
    project = make_projection(kind, dim, seed, job.layout.num_parameters, shapes=shapes)
    sides = [torch.from_numpy(side).float() for bank in whole.banks.values() for side in (bank.g_w_VD, bank.g_l_VD)]
    vectors_MP = torch.cat([whole.units_NP, *sides])
    plain_MD = projected(project, vectors_MP, DENSE_ROWS if kind == "rademacher" else 64)
    yield kind, 0, *_apart(whole, plain_MD)
    deflated = DeflatedProjection(project, whole.common_P)
    deflated_ME = torch.zeros(len(vectors_MP), deflated.dim)
    along_M = vectors_MP @ deflated.unit(0, vectors_MP.shape[1]).to(vectors_MP.dtype)
    deflated_ME[:, :-1] = plain_MD
    deflated.take_out(deflated_ME, along_M)
    yield f"{kind}, deflated", 1, *_apart(whole, deflated_ME)


def _apart(whole: Whole, projected_MD: Tensor) -> tuple[Tensor, dict[str, PairGradients]]:
    """Rows, and banks by target, of what was projected together."""
    place = len(whole.units_NP)
    banks = {}
    for name, bank in whole.banks.items():
        sides = []
        for side in (bank.g_w_VD, bank.g_l_VD):
            sides.append(projected_MD[place : place + len(side)].double().numpy())
            place += len(side)
        banks[name] = PairGradients(**{**vars(bank), "g_w_VD": sides[0], "g_l_VD": sides[1]})
    return projected_MD[: len(whole.units_NP)], banks


def restored(units_ND: Tensor, num_exact: int, stored: StoredType) -> Tensor:
    """Return features as they are read back."""
    dim = units_ND.shape[1] - num_exact
    codes, scales_N = quantize(units_ND[:, :dim].contiguous().numpy(), stored)
    return torch.cat([torch.from_numpy(dequantize(codes, scales_N, dim)), units_ND[:, dim:]], dim=1)


def row(feature: Feature, found: Sequence[dict[str, Any]], truth: dict[str, Any], num_bytes: int) -> dict[str, Any]:
    """Error, rank correlation and overlap of the best rows: means over targets and seeds, and the seeds' range."""
    errors, ranks, overlaps = [], [], []
    for scores in found:
        pairs = [(scores[name], truth[name]) for name in truth]
        top = max(1, round(TOP_FRACTION * len(pairs[0][0])))
        errors.append(np.mean([np.sqrt(np.mean((f - t) ** 2)) for f, t in pairs]))
        ranks.append(np.mean([spearman(f, t) for f, t in pairs]))
        overlaps.append(np.mean([len({*np.argsort(-f)[:top]} & {*np.argsort(-t)[:top]}) / top for f, t in pairs]))
    return {
        "feature": f"{feature.kind}, D {feature.dim}",
        "stored": feature.stored,
        "seeds": len(found),
        "RMS error of a score": float(np.mean(errors)),
        "Spearman": float(np.mean(ranks)),
        "least": float(np.min(ranks)),
        "greatest": float(np.max(ranks)),
        "overlap of the best 5 %": float(np.mean(overlaps)),
        "bytes a row": num_bytes,
        "of LESS's": num_bytes / LESS_BYTES,
    }


def main() -> None:
    """Compute directions once a checkpoint and every feature of them; write the tables."""
    options = _options()
    job = Job(load_config(options.job), options.rows, options.targets or ())
    exact = Influences(job)
    found: dict[Feature, dict[int, Influences]] = {}
    sizes: dict[Feature, int] = {}
    for number, (weight, checkpoint) in enumerate(zip(job.weights, job.checkpoints, strict=True), start=1):
        whole = job.whole(checkpoint)
        print(f"checkpoint {number} of {len(job.checkpoints)}: directions made", flush=True)
        for name, bank in whole.banks.items():
            exact.add(weight, name, whole.units_NP, bank)
        for kind in options.kinds:
            for seed in range(options.dense_seeds if kind == "rademacher" else options.seeds):
                for dim in options.dims:
                    for label, num_exact, units_ND, banks in features(job, whole, dim, kind, seed):
                        for stored in ("float32", *STORED) if label == "sketch, deflated" else ("float32",):
                            feature = Feature(label, dim, stored)
                            read_ND = restored(units_ND, num_exact, stored)
                            sums = found.setdefault(feature, {}).setdefault(seed, Influences(job))
                            for name, bank in banks.items():
                                sums.add(weight, name, read_ND, bank)
                            width = units_ND.shape[1] - num_exact
                            sizes[feature] = int(WIDTHS[stored] * width) + SCALE_BYTES[stored] + 4 * num_exact
            print(f"checkpoint {number} of {len(job.checkpoints)}: {kind}", flush=True)
    truth = exact.scores()
    rows = [
        row(feature, [sums.scores() for sums in of_seeds.values()], truth, sizes[feature])
        for feature, of_seeds in found.items()
    ]
    facts = {
        "rows": len(job.samples),
        "parameters": job.layout.num_parameters,
        "checkpoints": len(job.checkpoints),
        "targets": ", ".join(job.targets),
        "standard deviation of exact scores": float(np.mean([np.std(scores) for scores in truth.values()])),
    }
    sections = {
        "kinds": [each for each in rows if each["stored"] == "float32"],
        "stored forms": [each for each in rows if each["feature"].startswith("sketch, deflated")],
    }
    write_results("projections", sections, facts, options.out)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job", help="configuration of a finished job")
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--targets", nargs="*", help="names; all where left out")
    parser.add_argument("--kinds", nargs="*", default=["sketch", "factored", "rademacher"])
    parser.add_argument("--dims", type=int, nargs="*", default=[1024, 2048, 4096, 8192, 16384])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--dense-seeds", type=int, default=1, help="of rademacher, which takes most of the time")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    return parser.parse_args()


if __name__ == "__main__":
    main()
