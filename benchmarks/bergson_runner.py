"""bergson on the same model and samples, run by an interpreter that has it; the plain step is timed beside it.

    PYTHONPATH=. .scratch/bergson/bin/python benchmarks/bergson_runner.py --json rows.json

It is driven as its ``build`` command drives it: base weights frozen, the embedding left trainable so that hooks fire,
``CollectorComputer.run_with_collector_hooks`` over an ``InMemoryCollector`` (no index on disk, which favours it).
"""

from __future__ import annotations

import argparse
import copy
import logging
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import bergson.collector.collector as collecting
import torch
from bergson.collector.collector import CollectorComputer
from bergson.collector.in_memory_collector import InMemoryCollector
from bergson.config.config import IndexConfig
from bergson.gradients import AdamNormalizer, GradientProcessor
from bergson.utils.worker_utils import extract_peft_target_modules
from datasets import Dataset
from torch import Tensor

from benchmarks.rivals_common import Clock, Problem, Rival, parser, relative_error, run_runner, wanted

PREFIX = "base_model."
PER_MODULE = 16
MATRIX, GRADIENTS, PROJECTING = "matrix drawn", "per-sample gradients", "projection"


class Bergson:
    """The library around our model.

    Args:
        problem: Model, samples, moments.
        folder: Where it writes what it must.
    """

    def __init__(self, problem: Problem, folder: Path) -> None:
        self.problem, self.folder = problem, folder
        self.model = cast(Any, copy.deepcopy(problem.model))
        self.targets = extract_peft_target_modules(self.model)
        self.model.requires_grad_(False)
        self.model.get_input_embeddings().requires_grad_(True)
        self.data = Dataset.from_list(
            [{"input_ids": sample.input_ids, "labels": sample.labels} for sample in problem.samples]
        )
        second = problem.split(problem.moments[1])
        self.normalizers = {name.removeprefix(PREFIX): AdamNormalizer(tensor) for name, tensor in second.items()}

    def collect(
        self, dim: int | None, target: str, *, adam: bool, clock: Clock, indices: Sequence[Sequence[int]] | None = None
    ) -> dict[str, Tensor]:
        """Run one pass and return what it collected, by module.

        Args:
            dim: Numbers of a side (per module) or of a feature (global); None keeps gradients whole.
            target: ``per_module`` or ``global``.
            adam: With the second moments as its normaliser.
            clock: Parts go here.
            indices: Batches; all of them if None.
        """
        config = IndexConfig(
            run_path=str(self.folder / "run"),
            projection_dim=dim or 0,
            projection_target=target,
            loss_reduction="mean",
        )
        config.partial_run_path.mkdir(exist_ok=True)
        processor = GradientProcessor(
            self.normalizers if adam else {},
            projection_dim=dim,
            projection_target=target,
        )
        collector = InMemoryCollector(
            model=self.model.base_model,
            data=self.data,
            cfg=config,
            processor=processor,
            target_modules=self.targets,
        )
        batches = [list(each) for each in indices or self.problem.indices]
        computer = CollectorComputer(self.model, self.data, collector=collector, batches=batches, cfg=config)
        with _clocked(collector, clock):
            computer.run_with_collector_hooks()
        return dict(collector.gradients)

    def raw(self, indices: Sequence[int], *, adam: bool) -> Tensor:
        """Return gradients [B, P], whole and in our order."""
        found = self.collect(None, "per_module", adam=adam, clock=Clock(), indices=[indices])
        ordered = [found[name.removeprefix(PREFIX)][list(indices)] for name in self.problem.parameters]
        return torch.cat([each.flatten(1).clone() for each in ordered], dim=1)


@contextmanager
def _clocked(collector: InMemoryCollector, clock: Clock) -> Iterator[None]:
    """Time what the collector does beside forward and backward. Nested parts are taken out of the outer one."""

    def timed(name: str, call: Callable[..., Any], inner: str | None = None) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            before = clock.seconds[inner] if inner else 0.0
            with clock.part(name):
                found = call(*args, **kwargs)
            if inner:
                clock.seconds[name] -= clock.seconds[inner] - before
            return found

        return wrapped

    drawn = collecting.random_matrix
    collecting.random_matrix = timed(MATRIX, drawn)
    collector._module_gradient = timed(GRADIENTS, collector._module_gradient, MATRIX)
    collector.accumulate_global_projection = timed(PROJECTING, collector.accumulate_global_projection, MATRIX)
    collector._materialize_gradient = timed(GRADIENTS, collector._materialize_gradient)
    try:
        yield
    finally:
        collecting.random_matrix = drawn


def rivals(problem: Problem, options: argparse.Namespace) -> Iterator[Rival]:
    """The library's variants that were asked for."""
    with tempfile.TemporaryDirectory() as folder:
        bergson = Bergson(problem, Path(folder))
        error = problem.gradient_error(lambda indices: bergson.raw(indices, adam=False))
        some = problem.indices[-1][:2]
        denominator_P = problem.moments[1].sqrt() + 1e-8
        expected_BP = torch.stack([problem.reference_gradient(i) / denominator_P for i in some])
        checks = {
            "its linear Adam against g / (sqrt(v) + eps)": relative_error(bergson.raw(some, adam=True), expected_BP)
        }
        side = f"{PER_MODULE} x {PER_MODULE} a module, two-sided"
        variants = [
            ("bergson-module", f"{side}, no Adam", PER_MODULE, "per_module", False),
            ("bergson-module-adam", f"{side}, its linear Adam (no momentum, no g^2)", PER_MODULE, "per_module", True),
            (
                "bergson-global",
                f"global D {options.dim}, its linear Adam: its LESS-like mode",
                options.dim,
                "global",
                True,
            ),
        ]
        for name, note, dim, target, adam in variants:
            if wanted(name, options.only):

                def run(clock: Clock, dim: int = dim, target: str = target, adam: bool = adam) -> object:
                    return bergson.collect(dim, target, adam=adam, clock=clock)

                yield Rival(name, note, run, error, checks if adam else {})


def main() -> None:
    """Measure and write rows."""
    made = parser(__doc__ or "")
    made.add_argument("--json", required=True, help="where rows go")
    logging.disable(logging.INFO)
    run_runner(rivals, made.parse_args())


if __name__ == "__main__":
    main()
