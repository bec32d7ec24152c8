"""Preference pairs to the validation bank: the gradients of both sides, kept apart.

With ``G_w`` and ``G_l`` (gradients of the summed log-probability of the chosen and the rejected answer) every objective
is arithmetic on stored vectors. The gradient of the DPO loss (arXiv:2305.18290) is parallel to ``G_l - G_w``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from rose_ray.config.target import TargetConfig
from rose_ray.data.batches import length_batches
from rose_ray.data.official import encode_official_pair
from rose_ray.data.preferences import PreferencePair
from rose_ray.data.tokenize import Sample, Tokeniser
from rose_ray.errors import NonFiniteError, PairError, RowError
from rose_ray.kernels.losses import dpo_margin
from rose_ray.kernels.objectives import PairGradients
from rose_ray.kernels.projection import Projection
from rose_ray.model.batch import pad_batch
from rose_ray.model.checkpoint import Checkpoint
from rose_ray.model.layout import ParameterLayout
from rose_ray.model.scoring import ScoringModel
from rose_ray.schemas import bank_schema

BANK_VERSION = 2
"""Raised whenever the same input would give other numbers."""


@dataclass(frozen=True)
class EncodedPair:
    """A pair ready for the model."""

    pair_id: str
    subtask: str
    chosen: Sample
    rejected: Sample


def pairs_digest(pairs: Sequence[PreferencePair]) -> str:
    """Return what a bank remembers of its pairs: SHA-256 of their ids, subtasks, texts and order, in hex."""
    return hashlib.sha256(repr([asdict(pair) for pair in pairs]).encode()).hexdigest()


def encode_pairs(pairs: Sequence[PreferencePair], tokeniser: Tokeniser, target: TargetConfig) -> list[EncodedPair]:
    """Tokenise both sides of every pair.

    Raises:
        PairError: Sides that cannot be tokenised, or that become equal once cut; all of them are listed.
    """
    encoded, problems = [], []
    for pair in pairs:
        try:
            if target.encoding == "rose_official":
                chosen, rejected = encode_official_pair(
                    pair, tokeniser.tokenizer, max_tokens=tokeniser.max_tokens, cut=target.official_cut
                )
            else:
                chosen = tokeniser.encode_answer(pair.prompt, pair.chosen, pair.tools)
                rejected = tokeniser.encode_answer(pair.prompt, pair.rejected, pair.tools)
        except (RowError, PairError) as error:
            problems.append(f"{pair.pair_id}: {error}")
            continue
        if chosen.input_ids == rejected.input_ids:
            problems.append(f"{pair.pair_id}: both sides are the same {len(chosen.input_ids)} tokens")
        encoded.append(EncodedPair(pair.pair_id, pair.subtask, chosen, rejected))
    if problems:
        raise PairError(
            f"target {target.name}: {len(problems)} of {len(pairs)} pairs cannot be used:\n  "
            + "\n  ".join(problems)
            + "\nRemove them, or raise `model.max_tokens`."
        )
    return encoded


def reference_logps(model: ScoringModel, pairs: Sequence[EncodedPair], *, max_batch_tokens: int) -> Tensor:
    """Return summed log-probabilities [V, 2] of both answers under the untouched base model, float64, nats.

    They are the same at every checkpoint, so one forward pass serves them all.
    """
    samples = [side for pair in pairs for side in (pair.chosen, pair.rejected)]
    logps = torch.zeros(len(samples), dtype=torch.float64, device=model.device)
    with torch.no_grad(), model.without_adapter():
        for indices in length_batches([len(sample.input_ids) for sample in samples], max_batch_tokens):
            batch = pad_batch([samples[i] for i in indices], device=model.device)
            logps[indices] = model.sample_values(batch, "sum_logps").double()
    return logps.reshape(-1, 2)


def pair_gradients(
    model: ScoringModel,
    pairs: Sequence[EncodedPair],
    checkpoint: Checkpoint,
    layout: ParameterLayout,
    projection: Projection,
    *,
    max_batch_tokens: int,
    reference_V2: Tensor | None = None,
    half_precision_beta: float | None = None,
) -> PairRows:
    """Compute a target's pairs at one checkpoint.

    Args:
        model: Base model with an adapter slot.
        pairs: Encoded pairs.
        checkpoint: Policy; the reference is the model without its adapter.
        layout: Of the adapter.
        projection: From the flat gradient [P] to [D].
        max_batch_tokens: Bound on rows times longest row.
        reference_V2: From `reference_logps`, for a caller with several checkpoints; computed where not given.
        half_precision_beta: Where given, both gradients are scaled as in the DPO loss with this beta and rounded to
            float16 before projection, as the released code does; entries below 6e-8 vanish.

    Raises:
        NonFiniteError: A gradient or log-probability is NaN or infinite; the pairs are listed.
    """
    samples = [side for pair in pairs for side in (pair.chosen, pair.rejected)]
    if reference_V2 is None:
        reference_V2 = reference_logps(model, pairs, max_batch_tokens=max_batch_tokens)
    model.load_adapter(checkpoint.adapter)
    projection = projection.to(model.device)
    rows = PairRows(pairs, projection.dim, model.device)
    batches = length_batches([len(sample.input_ids) for sample in samples], max_batch_tokens, multiple=2)
    for indices in batches:
        batch = pad_batch([samples[i] for i in indices], device=model.device)
        places = [i // 2 for i in indices[::2]]
        reference_B = reference_V2[places].flatten()
        part = _PairBatch(rows, places, layout, projection, reference_B, half_precision_beta)
        part.finish(model.backward_per_sample(batch, "sum_logps", part.consume, part.set_scales))
    rows.check_finite(checkpoint.name)
    return rows


class PairRows:
    """A target's pairs at one checkpoint, filled batch by batch. Gradients [V, 2, D]: chosen, rejected."""

    def __init__(self, pairs: Sequence[EncodedPair], dim: int, device: torch.device) -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=torch.float64, device=device)

        self.pairs = pairs
        self.projected_V2D = torch.zeros(len(pairs), 2, dim, dtype=torch.float32, device=device)
        self.squares_V2, self.dots_V = zeros(len(pairs), 2), zeros(len(pairs))
        self.logps_V2, self.reference_V2 = zeros(len(pairs), 2), zeros(len(pairs), 2)

    def check_finite(self, checkpoint: str) -> None:
        """Refuse a pair whose numbers are NaN or infinite."""
        finite_V = torch.isfinite(self.projected_V2D).all(2).all(1) & torch.isfinite(
            self.logps_V2 + self.reference_V2 + self.squares_V2
        ).all(1)
        if not bool(finite_V.all()):
            bad = [pair.pair_id for pair, fine in zip(self.pairs, finite_V.tolist(), strict=True) if not fine]
            raise NonFiniteError(
                f"{checkpoint}: NaN or infinite gradients for pairs {bad}. Look at their texts and the model."
            )

    def numbers(self) -> PairGradients:
        """The same for the objectives, which know no tables."""
        norms_V2 = self.squares_V2.sqrt().cpu().numpy()
        logps_V2, reference_V2 = self.logps_V2.cpu().numpy(), self.reference_V2.cpu().numpy()
        projected_V2D = self.projected_V2D.double().cpu().numpy()
        return PairGradients(
            pair_ids=[pair.pair_id for pair in self.pairs],
            g_w_VD=projected_V2D[:, 0],
            g_l_VD=projected_V2D[:, 1],
            norms_w_V=norms_V2[:, 0],
            norms_l_V=norms_V2[:, 1],
            dots_wl_V=self.dots_V.cpu().numpy(),
            tokens_w_V=np.array([pair.chosen.num_labelled_tokens for pair in self.pairs]),
            tokens_l_V=np.array([pair.rejected.num_labelled_tokens for pair in self.pairs]),
            logps_w_V=logps_V2[:, 0],
            logps_l_V=logps_V2[:, 1],
            ref_logps_w_V=reference_V2[:, 0],
            ref_logps_l_V=reference_V2[:, 1],
        )

    def table(self) -> pa.Table:
        """The bank at this checkpoint: schema ``bank_schema(D)``, a row per pair in the order given."""
        numbers, pairs = self.numbers(), self.pairs
        dim = self.projected_V2D.shape[2]
        sides = [
            pa.FixedSizeListArray.from_arrays(pa.array(self.projected_V2D[:, s].reshape(-1).cpu().numpy()), dim)
            for s in (0, 1)
        ]
        answers = [[p.chosen for p in pairs], [p.rejected for p in pairs]]
        columns = [
            pa.array([p.pair_id for p in pairs], pa.string()),
            pa.array([p.subtask for p in pairs], pa.string()),
            *sides,
            pa.array(numbers.norms_w_V),
            pa.array(numbers.norms_l_V),
            pa.array(numbers.dots_wl_V),
            *(pa.array([a.num_labelled_tokens for a in side], pa.int32()) for side in answers),
            *(pa.array([a.num_tokens_cut for a in side], pa.int32()) for side in answers),
            pa.array(numbers.logps_w_V),
            pa.array(numbers.logps_l_V),
            pa.array(numbers.ref_logps_w_V),
            pa.array(numbers.ref_logps_l_V),
        ]
        return pa.Table.from_arrays(columns, schema=bank_schema(dim))


class _PairBatch:
    """Receives the gradients of one batch, whose rows are chosen, rejected, chosen, rejected, ..."""

    def __init__(
        self,
        rows: PairRows,
        places: list[int],
        layout: ParameterLayout,
        projection: Projection,
        reference_B: Tensor,
        half_precision_beta: float | None,
    ) -> None:
        self.rows, self.layout, self.projection = rows, layout, projection
        self.places = torch.tensor(places, device=reference_B.device)
        self.reference_B, self.beta = reference_B, half_precision_beta
        size = len(reference_B)
        self.projected_BD = torch.zeros(size, projection.dim, dtype=rows.projected_V2D.dtype, device=reference_B.device)
        self.squares_B = torch.zeros_like(reference_B)
        self.dots_V = torch.zeros_like(reference_B[::2])
        self.scales_B: Tensor | None = None

    def set_scales(self, logps_B: Tensor) -> None:
        if self.beta is not None:
            policy_B, reference_B = logps_B.double(), self.reference_B
            margin_V = dpo_margin(policy_B[::2], policy_B[1::2], reference_B[::2], reference_B[1::2], self.beta)
            self.scales_B = (self.beta * torch.sigmoid(-margin_V)).repeat_interleave(2)

    def consume(self, name: str, grads_BOI: Tensor) -> None:
        grads_BP = grads_BOI.flatten(1)
        if self.scales_B is not None:
            scales_B1 = self.scales_B[:, None].to(grads_BP.dtype)
            grads_BP = (grads_BP * scales_B1).half().to(grads_BP.dtype) / scales_B1
        self.squares_B += torch.linalg.vector_norm(grads_BP, dim=1).double().square()
        self.dots_V += (grads_BP[::2].double() * grads_BP[1::2].double()).sum(1)
        self.projection.add(self.projected_BD, self.layout.offsets[name], grads_BP.to(self.projected_BD.dtype))

    def finish(self, logps_B: Tensor) -> None:
        rows, places = self.rows, self.places
        rows.projected_V2D[places] = self.projected_BD.unflatten(0, (-1, 2))
        rows.squares_V2[places] = self.squares_B.unflatten(0, (-1, 2))
        rows.dots_V[places] = self.dots_V
        rows.logps_V2[places] = logps_B.double().unflatten(0, (-1, 2))
        rows.reference_V2[places] = self.reference_B.unflatten(0, (-1, 2))
