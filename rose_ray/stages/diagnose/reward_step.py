"""Does a training step on a row change the margin as the row's influence foretells?

For a few rows and pairs the adapter is really moved along the row's direction, minus Gamma, and both answers'
log-probabilities are taken before and after. To first order a step of length h changes what the objective asks for, for
``rose`` the margin log p(chosen) - log p(rejected), by ``h |d| influence``, with d the pair's direction.

Shapes: C checkpoints, N rows, V pairs, P parameters of the adapter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rose_ray.config.gradients import AdamMode
from rose_ray.data.batches import length_batches
from rose_ray.data.tokenize import Sample
from rose_ray.errors import ModelError, NonFiniteError
from rose_ray.kernels.correlation import pearson, spearman
from rose_ray.kernels.objectives import PairGradients, bank_directions, side_scales
from rose_ray.kernels.projection import NoProjection
from rose_ray.model.batch import pad_batch
from rose_ray.model.checkpoint import Checkpoint
from rose_ray.model.layout import ParameterLayout
from rose_ray.model.scoring import ScoringModel
from rose_ray.stages.bank import EncodedPair
from rose_ray.stages.diagnose.stored import StoredBank
from rose_ray.stages.directions import AdamMoments, DirectionSettings, batch_directions


@dataclass(frozen=True)
class StepSettings:
    """How the adapter is moved.

    Attributes:
        adam: From gradient to direction, as the features were made.
        max_batch_tokens: Bound on rows times length of a batch.
        share: Length of the short step over the adapter's own length.
    """

    adam: AdamMode
    max_batch_tokens: int
    share: float = 0.01


@dataclass(frozen=True, eq=False)
class MeasuredSteps:
    """What was measured at one checkpoint.

    Attributes:
        norms_N: Length of each row's direction Gamma.
        slopes_NV2: Change of the chosen and of the rejected log-probability per unit of step length along minus Gamma,
            nats, by central difference over the short step.
        changes_NV2: Their change over the checkpoint's own step, its mean learning rate times minus Gamma, nats; None
            where it has no such step.
        learning_rate: That rate; None where the adapter came without a state of its optimizer.
        step_length: Of the short step.
    """

    norms_N: np.ndarray
    slopes_NV2: np.ndarray
    changes_NV2: np.ndarray | None
    learning_rate: float | None
    step_length: float


def measured_steps(
    model: ScoringModel,
    samples: Sequence[Sample],
    pairs: Sequence[EncodedPair],
    checkpoint: Checkpoint,
    layout: ParameterLayout,
    settings: StepSettings,
) -> MeasuredSteps:
    """Move the adapter along each row's direction and measure; the adapter in the slot is the checkpoint's afterwards.

    Args:
        model: Base model with an adapter slot, whole, float32 or float64: a change of a thousandth has to show.
        samples: Rows.
        pairs: Pairs.
        checkpoint: Where steps start, with the optimizer's state unless the mode is ``sgd``.
        layout: Of the adapter.
        settings: Adam mode, batches, length of the short step.

    Raises:
        ModelError: The checkpoint's weights are all zero.
        NonFiniteError: A direction or a log-probability is not finite; the row's number is named.
    """
    model.load_adapter(checkpoint.adapter)
    length = float(torch.sqrt(sum((t.double().square().sum() for t in checkpoint.adapter.values()), torch.tensor(0.0))))
    if not length:
        raise ModelError(f"{checkpoint.name}: its weights are all zero, so a short step has no scale.")
    step, rate = settings.share * length, checkpoint.state.mean_learning_rate if checkpoint.state else None
    logps = _logps_of(model, pairs, settings.max_batch_tokens)
    before_V2 = logps()
    norms, slopes, changes = [], [], []
    for number, sample in enumerate(samples):
        direction_P = _direction(model, sample, checkpoint, layout, settings)
        norm = float(direction_P.norm())

        def moved(scale: float, direction_P: Tensor = direction_P) -> np.ndarray:
            model.load_adapter(_moved(checkpoint.adapter, direction_P, scale, layout))
            return logps()

        if not np.isfinite(norm) or not norm:
            raise NonFiniteError(f"row {number}: its direction at {checkpoint.name} has length {norm}; leave it out.")
        slopes.append((moved(-step / norm) - moved(step / norm)) / (2 * step))
        if rate is not None:
            changes.append(moved(-rate) - before_V2)
        norms.append(norm)
        model.load_adapter(checkpoint.adapter)
        if not np.isfinite([slopes[-1], *changes[-1:]]).all():
            raise NonFiniteError(f"row {number}: log-probabilities at {checkpoint.name} are not finite after the step.")
    return MeasuredSteps(np.array(norms), np.stack(slopes), np.stack(changes) if changes else None, rate, step)


def _direction(
    model: ScoringModel, sample: Sample, checkpoint: Checkpoint, layout: ParameterLayout, settings: StepSettings
) -> Tensor:
    """Gamma [P] of one row, float64, on the CPU."""
    made = DirectionSettings(settings.adam, "float32", settings.max_batch_tokens)
    with torch.enable_grad():
        found = batch_directions(
            model,
            pad_batch([sample], device=model.device),
            AdamMoments.of(checkpoint).to(model.device),
            layout,
            [NoProjection(layout.num_parameters)],
            made,
        )
    return found.features[0][0].double().cpu()


def _moved(
    adapter: Mapping[str, Tensor], direction_P: Tensor, scale: float, layout: ParameterLayout
) -> dict[str, Tensor]:
    """The adapter plus ``scale`` times a flat vector, float64."""
    tensors = {}
    for name, shape in layout.shapes:
        start = layout.offsets[name]
        part = direction_P[start : start + adapter[name].numel()].reshape(shape)
        tensors[name] = adapter[name].double().cpu() + scale * part
    return tensors


def _logps_of(model: ScoringModel, pairs: Sequence[EncodedPair], max_batch_tokens: int) -> Callable[[], np.ndarray]:
    """What takes the log-probabilities of both sides of all pairs, [V, 2], always in the same batches."""
    samples = [side for pair in pairs for side in (pair.chosen, pair.rejected)]
    batches = length_batches([len(sample.input_ids) for sample in samples], max_batch_tokens)

    def logps() -> np.ndarray:
        values = np.empty(len(samples))
        with torch.no_grad():
            for indices in batches:
                batch = pad_batch([samples[i] for i in indices], device=model.device)
                values[indices] = model.sample_values(batch, "sum_logps").double().cpu().numpy()
        return values.reshape(-1, 2)

    return logps


@dataclass(frozen=True)
class Fit:
    """How well foretold numbers rank and scale measured ones, over all rows and pairs; None where one is constant."""

    pearson: float | None
    spearman: float | None


@dataclass(frozen=True)
class OwnStep:
    """What was foretold and measured over a checkpoint's own step.

    Attributes:
        linear: Measured slope times the step's length against the change over the checkpoint's own step: low where that
            step is too long for a first-order forecast. Low ``slope`` alone is noise of projection and stored type.
        step: Foretold against measured change over the checkpoint's own step, of what the objective asks for.
        margin: Foretold change against that of the margin log p(chosen) - log p(rejected); the same for ``rose``.
        mean_foretold, mean_change: Means of the change over the own step, nats (or nats a token).
        raised: Share of rows and pairs, of those foretold to raise it, whose margin rose.
    """

    linear: Fit
    step: Fit
    margin: Fit
    mean_foretold: float
    mean_change: float
    raised: float | None


@dataclass(frozen=True)
class CheckpointFit:
    """One checkpoint.

    Attributes:
        checkpoint: Its name.
        slope: Influences against measured slopes per unit of step and of the pair's direction.
        largest_error: Largest difference of the two; both are cosines, so 2 would be the most.
        own_step: None where the checkpoint has no learning rate.
    """

    checkpoint: str
    slope: Fit
    largest_error: float
    own_step: OwnStep | None


@dataclass(frozen=True)
class RewardStepReport:
    """What `reward-step` measured.

    Attributes:
        target, objective: As configured.
        row_ids, pair_ids: Rows and pairs that took part.
        share: Length of the short step over the adapter's.
        checkpoints: In order of training.
        norms_agree: Largest relative difference of a direction's length from the stored one.
    """

    target: str
    objective: str
    row_ids: tuple[str, ...]
    pair_ids: tuple[str, ...]
    share: float
    checkpoints: tuple[CheckpointFit, ...]
    norms_agree: float

    def as_json(self) -> dict[str, Any]:
        """The same for a file."""
        return asdict(self)


def compare_steps(
    bank: StoredBank,
    places: Sequence[int],
    row_ids: Sequence[str],
    features_CND: Sequence[np.ndarray],
    norms_CN: Sequence[np.ndarray],
    measured: Sequence[MeasuredSteps],
    share: float,
) -> RewardStepReport:
    """Set what stored features and bank foretell beside what was measured.

    Args:
        bank: Of the target.
        places: Of the pairs in the bank.
        row_ids: Of the rows.
        features_CND, norms_CN: Stored features of the rows, divided by exact lengths, and these, by checkpoint.
        measured: By checkpoint.
        share: Of the short step.
    """
    fits, disagreement = [], 0.0
    objective = "rose" if bank.target.objective == "dpo_weighted" else bank.target.objective
    for name, pairs, features_ND, norms_N, steps in zip(
        bank.checkpoints, bank.pairs, features_CND, norms_CN, measured, strict=True
    ):
        each = [str(number) for number in range(len(pairs.pair_ids))]
        own = bank_directions(objective, pairs, dpo_beta=bank.target.dpo_beta, subtasks=each, normalize="exact")
        vectors_VD, lengths_V = own.vectors_UD[list(places)], own.exact_norms_U[list(places)]
        influences_NV = features_ND.astype(np.float64) @ vectors_VD.T
        slopes_NV = _asked(objective, pairs, places, steps.slopes_NV2) / lengths_V
        disagreement = max(disagreement, float(np.abs(steps.norms_N / norms_N - 1).max()))
        fits.append(
            CheckpointFit(
                name,
                _fit(influences_NV, slopes_NV),
                float(np.abs(influences_NV - slopes_NV).max()),
                _own_step(
                    steps,
                    None if steps.changes_NV2 is None else _asked(objective, pairs, places, steps.changes_NV2),
                    norms_N[:, None] * lengths_V * influences_NV,
                    norms_N[:, None] * lengths_V * slopes_NV,
                ),
            )
        )
    ids = tuple(bank.pairs[0].pair_ids[place] for place in places)
    return RewardStepReport(
        bank.target.name, bank.target.objective, tuple(row_ids), ids, share, tuple(fits), disagreement
    )


def _asked(objective: Any, pairs: PairGradients, places: Sequence[int], values_NV2: np.ndarray) -> np.ndarray:
    """What the objective asks to rise, of log-probabilities or their changes [N, V, 2]: [N, V]."""
    scales_w_V, scales_l_V = (scales[list(places)] for scales in side_scales(objective, pairs))
    asked_NV: np.ndarray = scales_w_V * values_NV2[..., 0] - scales_l_V * values_NV2[..., 1]
    return asked_NV


def _own_step(
    steps: MeasuredSteps, changes_NV: np.ndarray | None, forecast_NV: np.ndarray, straight_NV: np.ndarray
) -> OwnStep | None:
    """Compare over a checkpoint's own step.

    Args:
        steps: Of the checkpoint.
        changes_NV: Measured over it, of what the objective asks for.
        forecast_NV, straight_NV: By influence and by measured slope, per unit of learning rate.
    """
    if changes_NV is None or steps.changes_NV2 is None or steps.learning_rate is None:
        return None
    foretold_NV = steps.learning_rate * forecast_NV
    margins_NV = steps.changes_NV2[..., 0] - steps.changes_NV2[..., 1]
    hopeful = foretold_NV > 0
    return OwnStep(
        _fit(steps.learning_rate * straight_NV, changes_NV),
        _fit(foretold_NV, changes_NV),
        _fit(foretold_NV, margins_NV),
        float(foretold_NV.mean()),
        float(changes_NV.mean()),
        float((margins_NV[hopeful] > 0).mean()) if hopeful.any() else None,
    )


def _fit(foretold_NV: np.ndarray, measured_NV: np.ndarray) -> Fit:
    return Fit(pearson(foretold_NV.ravel(), measured_NV.ravel()), spearman(foretold_NV.ravel(), measured_NV.ravel()))


def reward_step_lines(report: RewardStepReport) -> Iterator[str]:
    """Tell a report to people."""
    yield (
        f"target {report.target}, objective {report.objective}: {len(report.row_ids)} rows x {len(report.pair_ids)} "
        f"pairs, short step {report.share:g} of the adapter's length"
    )
    yield (f"  lengths of the directions differ from the stored ones by at most {report.norms_agree:.1e} of them")
    yield "  foretold against measured: Pearson / Spearman"
    yield (
        f"  {'checkpoint':<14} {'influence, slope':>18} {'largest error':>14} {'slope, own step':>16} "
        f"{'forecast of it':>15} {'of the margin':>15}"
    )
    for each in report.checkpoints:
        line = f"  {each.checkpoint:<14} {_shown(each.slope):>18} {each.largest_error:>14.4f}"
        if own := each.own_step:
            line += f" {_shown(own.linear):>16} {_shown(own.step):>15} {_shown(own.margin):>15}"
        yield line
    for each in report.checkpoints:
        yield f"  {each.checkpoint}: {_told(each.own_step)}"


def _told(own: OwnStep | None) -> str:
    if own is None:
        return "no step of its own, for the adapter came without a learning rate; import one with its optimizer's state"
    raised = "" if own.raised is None else f"; the margin rose in {own.raised:.0%} of the cases where it should"
    return f"mean change over its own step {own.mean_change:+.3g}, foretold {own.mean_foretold:+.3g}{raised}"


def _shown(fit: Fit) -> str:
    return " / ".join("-" if value is None else f"{value:+.3f}" for value in (fit.pearson, fit.spearman))
