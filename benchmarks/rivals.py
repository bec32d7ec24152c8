"""Other ways to the same features, timed against the same plain LoRA step, on a CPU.

    python benchmarks/rivals.py --out results                 every rival; those with an environment of their own too
    python benchmarks/rivals.py --dim 8192 --only released ours
    python benchmarks/rivals.py --quick                       whether it runs

bergson and dattri are measured by interpreters that have them, which time the plain step beside them:

    python -m venv .scratch/bergson
    .scratch/bergson/bin/pip install torch==2.13.0 transformers==5.23.0 peft datasets jaxtyping ml_dtypes natsort scipy
    .scratch/bergson/bin/pip install petname pyarrow simple-parsing torchopt
    .scratch/bergson/bin/pip install --no-deps bergson==2.5.1
    python -m venv .scratch/dattri
    .scratch/dattri/bin/pip install torch==2.13.0 transformers==5.23.0 peft scipy tqdm pyyaml
    .scratch/dattri/bin/pip install --no-deps dattri==0.3.0
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest.mock import patch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

import rose_ray.kernels.direction_sums as direction_sums  # noqa: E402
from benchmarks.released import (  # noqa: E402
    GROUP_SIZE,
    HeldProjector,
    Projector,
    RegeneratingProjector,
    ReleasedPass,
    released_adam,
)
from benchmarks.rivals_common import (  # noqa: E402
    ADAM,
    PROJECTION,
    Clock,
    Problem,
    Rival,
    Row,
    measure,
    parser,
    relative_error,
    row_of,
    wanted,
)
from benchmarks.timing import machine  # noqa: E402
from benchmarks.vmapped import VmappedPass  # noqa: E402
from rose_ray.data.batches import padding_fraction  # noqa: E402
from rose_ray.data.tokenize import Sample  # noqa: E402
from rose_ray.kernels.adam import adam_direction  # noqa: E402
from rose_ray.kernels.projection import Projection, make_projection  # noqa: E402
from rose_ray.kernels.span import SpanProjection  # noqa: E402
from rose_ray.model.batch import Batch, pad_batch  # noqa: E402
from rose_ray.model.checkpoint import Checkpoint, OptimizerState  # noqa: E402
from rose_ray.model.layout import layout_of  # noqa: E402
from rose_ray.model.scoring import ScoringModel  # noqa: E402
from rose_ray.stages.directions import AdamMoments, DirectionSettings, batch_directions  # noqa: E402

NUM_DIRECTIONS = 16
SETTINGS = DirectionSettings(adam="less_code", stored_dtype="float32", max_batch_tokens=2048)
RUNNERS = ("bergson", "dattri")


class _ClockedProjection:
    """A projection whose work is timed."""

    def __init__(self, inner: Projection, clock: Clock) -> None:
        self._inner, self._clock = inner, clock

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def add(self, out_BD: Tensor, offset: int, values_Bn: Tensor) -> None:
        """See ``Projection``."""
        with self._clock.part(PROJECTION):
            self._inner.add(out_BD, offset, values_Bn)


class OurPass:
    """One pass of this project's engine.

    Args:
        problem: Model, samples, moments.
        projection: To [D].
    """

    def __init__(self, problem: Problem, projection: Projection) -> None:
        self.problem, self.projection = problem, projection
        module = copy.deepcopy(problem.model)
        self.layout = layout_of(module)
        self.model = ScoringModel(module, "cpu", merge_adapter=True)
        self.model.load_adapter(self.model.weights)
        names = [name for name, _ in self.layout.shapes]
        avg, avg_sq = (dict(zip(names, problem.split(flat).values(), strict=True)) for flat in problem.moments)
        state = OptimizerState(100, 1e-4, 0.9, 0.999, 1e-8, 1.0, 1)
        checkpoint = Checkpoint("checkpoint-1", self.model.weights, avg, avg_sq, state)
        self.moments = AdamMoments.of(checkpoint).to(self.model.device)
        self.batches = [self._batch(indices) for indices in problem.indices]

    def _batch(self, indices: Sequence[int]) -> Batch:
        chosen = [self.problem.samples[i] for i in indices]
        return pad_batch([Sample(each.input_ids, each.loss_mask) for each in chosen])

    def gradients(self, indices: Sequence[int]) -> Tensor:
        """Return raw gradients [B, P]."""
        found: dict[str, Tensor] = {}

        def consume(name: str, grads_BOI: Tensor) -> None:
            found[name] = grads_BOI.flatten(1).clone()

        self.model.backward_per_sample(self._batch(indices), "mean_loss", consume)
        return torch.cat([found[name] for name, _ in self.layout.shapes], dim=1)

    def features(self, batch: Batch, projection: Projection) -> Tensor:
        """Return a batch's features [B, D]."""
        found = batch_directions(self.model, batch, self.moments, self.layout, [projection], SETTINGS)
        return found.features[0]

    def __call__(self, clock: Clock) -> Tensor:
        """Return features [N, D]."""
        out_ND = torch.zeros(len(self.problem.samples), self.projection.dim)
        projection: Any = _ClockedProjection(self.projection, clock)
        self.model.load_adapter(self.model.weights)  # merges, as a job does once a shard
        unclocked = adam_direction

        def clocked(*args: Any, **kwargs: Any) -> Any:
            with clock.part(ADAM):
                return unclocked(*args, **kwargs)

        with patch.object(direction_sums, "adam_direction", clocked):
            for indices, batch in zip(self.problem.indices, self.batches, strict=True):
                out_ND[indices] = self.features(batch, projection)
        return out_ND


def orthonormal_rows(number: int, num_parameters: int) -> Tensor:
    """Return random orthonormal rows [J, P]."""
    generator = torch.Generator().manual_seed(2)
    basis_PJ: Tensor = torch.linalg.qr(torch.randn(num_parameters, number, generator=generator)).Q
    return basis_PJ.T.contiguous()


def rivals(problem: Problem, only: Sequence[str] | None) -> Iterator[Rival]:
    """The passes of this process that were asked for, each with its gradients checked."""
    size, dim = problem.num_parameters, problem.dim
    some = problem.indices[-1][:2]
    directions_BP = torch.stack([released_adam(problem.reference_gradient(i), *problem.moments) for i in some])

    if wanted("ours-sketch", only):
        yield _ours(problem, "ours-sketch", make_projection("sketch", dim, 0, size), f"sketch, D {dim}", directions_BP)
    if wanted("ours-exact", only):
        exact = SpanProjection(orthonormal_rows(NUM_DIRECTIONS, size), "random")
        yield _ours(problem, "ours-exact", exact, f"exact products with {NUM_DIRECTIONS} directions", directions_BP)
    if wanted("released", only):
        regenerating = RegeneratingProjector(size, dim)
        note = f"batch 1; signs drawn again for every {GROUP_SIZE} samples"
        yield _dense(problem, "released", ReleasedPass(problem, regenerating), regenerating, note, directions_BP)
    if wanted("held", only) or wanted("vmap", only):
        held = HeldProjector(size, dim)
        if wanted("held", only):
            note = f"batch 1; {held.note}"
            yield _dense(problem, "held", ReleasedPass(problem, held), held, note, directions_BP)
        if wanted("vmap", only):
            note = f"vmap(grad) of a batch; {held.note}"
            yield _dense(problem, "vmap", VmappedPass(problem, held), held, note, directions_BP)


def _ours(problem: Problem, name: str, projection: Projection, note: str, directions_BP: Tensor) -> Rival:
    ours = OurPass(problem, projection)
    expected_BD = torch.zeros(len(directions_BP), projection.dim)
    projection.add(expected_BD, 0, directions_BP)
    some = problem.indices[-1][: len(directions_BP)]
    checks = {"features": relative_error(ours.features(ours._batch(some), projection), expected_BD)}
    return Rival(name, note, ours, problem.gradient_error(ours.gradients), checks)


def _dense(
    problem: Problem,
    name: str,
    rival: ReleasedPass | VmappedPass,
    projector: Projector,
    note: str,
    directions_BP: Tensor,
) -> Rival:
    some = problem.indices[-1][: len(directions_BP)]
    found_BD = projector.project(released_adam(rival.gradients(some), *problem.moments))
    checks = {"features": relative_error(found_BD, projector.project(directions_BP))}
    return Rival(name, note, rival, problem.gradient_error(rival.gradients), checks)


def run_runner(name: str, interpreter: Path, options: argparse.Namespace) -> list[Row]:
    """Measure a library in its own environment."""
    # Not resolved: a virtual environment's interpreter is a link, and finds its packages by where the link lies.
    if not interpreter.exists():
        print(f"{name}: no interpreter at {interpreter}; left out", file=sys.stderr)
        return []
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.json"
        command = [
            str(interpreter),
            "-W",
            "ignore",
            str(ROOT / "benchmarks" / f"{name}_runner.py"),
            "--json",
            str(rows),
        ]
        command += [f"--dim={options.dim}", f"--rounds={options.rounds}", f"--samples={options.samples}"]
        command += [f"--threads={options.threads}", f"--batch-tokens={options.batch_tokens}"]
        if options.only:
            command += ["--only", *options.only]
        done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT), "TQDM_DISABLE": "1"})
        if done.returncode:
            print(f"{name}: stopped with {done.returncode}; left out", file=sys.stderr)
            return []
        return [row_of(fields) for fields in json.loads(rows.read_text())]


def version_in(interpreter: Path, package: str) -> str:
    """Return a package's version in an environment."""
    command = [str(interpreter), "-c", f"from importlib.metadata import version; print(version({package!r}))"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def table(rows: Sequence[Row], facts: dict[str, Any]) -> str:
    """Return the rows as Markdown."""
    lines = ["# Rivals", "", *(f"- {key}: {value}" for key, value in facts.items()), ""]
    lines += [
        "| variant | rate against the plain step | 90 % | CPU s | plain step, s "
        "| parts, s (rest: forward and backward, where not named) | gradients: error | note |"
    ]
    lines += ["|---|---|---|---|---|---|---|---|"]
    for row in rows:
        parts = ", ".join(f"{name} {seconds:.3g}" for name, seconds in row.parts.items())
        error = "" if row.gradient_error is None else f"{row.gradient_error:.1e}"
        checks = "".join(f"; {name} {value:.1e}" for name, value in row.checks.items())
        lines += [
            f"| {row.name} | {row.rate:.3g} | {row.low:.3g} to {row.high:.3g} | {row.seconds:.3g} "
            f"| {row.plain_seconds:.3g} | {parts} | {error}{checks} | {row.note} |"
        ]
    return "\n".join(lines)


def facts_of(problem: Problem, options: argparse.Namespace) -> dict[str, Any]:
    """What the figures depend on."""
    lengths = [len(sample.input_ids) for sample in problem.samples]
    return {
        **machine(),
        "parameters": problem.num_parameters,
        "dim": options.dim,
        "rounds": options.rounds,
        "samples": len(lengths),
        "mean tokens": round(sum(lengths) / len(lengths), 1),
        "tokens of a batch, at most": options.batch_tokens,
        "batches": len(problem.indices),
        "padding in batches": round(padding_fraction(lengths, problem.indices), 3),
    }


def main() -> None:
    """Measure and print; write with ``--out``."""
    made = parser((__doc__ or "").split("\n", 1)[0])
    made.add_argument("--out", type=Path, help="folder of the table and the JSON")
    made.add_argument("--quick", action="store_true", help="12 samples, one round")
    for name in RUNNERS:
        made.add_argument(f"--{name}", type=Path, default=ROOT / ".scratch" / name / "bin" / "python", metavar="PYTHON")
    options = made.parse_args()
    if options.quick:
        options.samples, options.rounds = 12, 1
    torch.set_num_threads(options.threads)
    problem = Problem(options.samples, options.dim, options.batch_tokens)
    facts = facts_of(problem, options)
    rows: list[Row] = []
    if wanted("plain", options.only):
        control = Rival("plain", "the plain step against itself", lambda clock: problem.plain_step())
        rows.append(measure(control, problem.plain_step, options.rounds))
    for rival in rivals(problem, options.only):
        rows.append(measure(rival, problem.plain_step, options.rounds))
        print(f"{rows[-1].name}: {rows[-1].rate:.3g}", file=sys.stderr)
    for name in RUNNERS:
        if not options.only or any(each.startswith(name) for each in options.only):
            measured = run_runner(name, getattr(options, name), options)
            if measured:
                facts[name] = version_in(getattr(options, name), name)
            rows += measured
    text = table(rows, facts)
    print(text)
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        stem = options.out / f"{facts['date']}-rivals-{options.dim}"
        stem.with_suffix(".md").write_text(text + "\n")
        stem.with_suffix(".json").write_text(
            json.dumps({"about": facts, "rows": [asdict(row) for row in rows]}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
