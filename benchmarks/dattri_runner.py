"""dattri on the same model and samples, run by an interpreter that has it; the plain step is timed beside it.

    PYTHONPATH=. .scratch/dattri/bin/python benchmarks/dattri_runner.py --json rows.json

Its TracIn route: the task's own ``vmap(grad)`` of the loss in the adapter, then its random projection, made anew for
each batch as ``TracInAttributor`` makes it. It has no Adam.
"""

from __future__ import annotations

import argparse
import contextlib
import io
from collections.abc import Iterator, Mapping, Sequence

import torch
from dattri.func.projection import random_project
from dattri.task import AttributionTask
from torch import Tensor
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from benchmarks.rivals_common import (
    FORWARD_BACKWARD,
    IGNORED,
    PROJECTION,
    Clock,
    Padded,
    Problem,
    Rival,
    pad,
    parser,
    run_runner,
    wanted,
    with_eager_attention,
)


class Dattri:
    """The library around our model."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        model = with_eager_attention(problem.model)

        def loss(weights: Mapping[str, Tensor], sample: tuple[Tensor, Tensor]) -> Tensor:
            ids_S, labels_S = sample
            logits_1SV = functional_call(model, dict(weights), kwargs={"input_ids": ids_S.unsqueeze(0)}).logits
            return cross_entropy(logits_1SV[0, :-1], labels_S[1:], ignore_index=IGNORED, reduction="mean")

        names = [f"{name}.weight" for name in problem.parameters]
        task = AttributionTask(loss_func=loss, model=model, checkpoints=model.state_dict())
        self.weights, _ = task.get_param(ckpt_idx=0, layer_name=names)
        self.per_sample = task.get_grad_loss_func(in_dims=(None, 0), layer_name=names, ckpt_idx=0)

    def _flat(self, batch: Padded) -> Tensor:
        with torch.no_grad():  # its own attributor leaves autograd recording around vmap, which costs more
            found: Tensor = self.per_sample(self.weights, (batch.input_ids, batch.labels))
        return found

    def gradients(self, indices: Sequence[int]) -> Tensor:
        """Return raw gradients [B, P]."""
        return self._flat(pad([self.problem.samples[i] for i in indices]))

    def __call__(self, clock: Clock) -> Tensor:
        """Return projected gradients [N, D]."""
        out_ND = torch.zeros(len(self.problem.samples), self.problem.dim)
        for indices, batch in zip(self.problem.indices, self.problem.batches, strict=True):
            with clock.part(FORWARD_BACKWARD):
                grads_BP = self._flat(batch)
            with clock.part(PROJECTION):
                project = random_project(
                    grads_BP,
                    len(indices),
                    proj_dim=self.problem.dim,
                    proj_max_batch_size=32,
                    proj_type="rademacher",
                    device="cpu",
                )
                out_ND[indices] = project(torch.nan_to_num(grads_BP), ensemble_id=0)
        return out_ND


def rivals(problem: Problem, options: argparse.Namespace) -> Iterator[Rival]:
    """The library's one variant."""
    if wanted("dattri", options.only):
        with contextlib.redirect_stdout(io.StringIO()):
            dattri = Dattri(problem)
        error = problem.gradient_error(dattri.gradients)
        yield Rival("dattri", "vmap(grad), its projection drawn anew for each batch, no Adam", dattri, error)


def main() -> None:
    """Measure and write rows."""
    made = parser(__doc__ or "")
    made.add_argument("--json", required=True, help="where rows go")
    run_runner(rivals, made.parse_args())


if __name__ == "__main__":
    main()
