"""What a bank says of its pairs: which side makes the direction, which pairs pull against the others, and labels that
the base model contradicts.

Shapes: C checkpoints, V pairs.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from rose_ray.errors import NumericsError
from rose_ray.kernels.correlation import pearson
from rose_ray.kernels.pair_terms import chosen_shares, cosines_with_rest, pair_terms
from rose_ray.stages.diagnose.findings import Finding
from rose_ray.stages.diagnose.pair_texts import TextLimits, length_findings
from rose_ray.stages.diagnose.stored import StoredBank

DOMINANT_SHARE = 0.8
"""Part of a direction's squared length from which on one side counts as making it: the other adds a quarter of that."""

OUTLIER = 3.5
"""Modified z score from which on a value is an outlier: Iglewicz and Hoaglin, How to Detect and Handle Outliers (1993).
"""

_MAD_TO_SIGMA = 0.6745
"""Median absolute deviation of a normal variable, in standard deviations."""


def vector_findings(bank: StoredBank, limits: TextLimits) -> Iterator[Finding]:
    """Yield what the bank of one target shows."""
    first = bank.pairs[0]
    tokens = zip(first.pair_ids, first.tokens_w_V.tolist(), first.tokens_l_V.tolist(), strict=True)
    yield from length_findings(
        {name: (int(chosen), int(rejected)) for name, chosen, rejected in tokens}, "tokens", limits
    )
    yield from _dominant_side(bank)
    if bank.has_pair_vectors:
        yield from _conflicts(bank)
    yield from _labels(bank)


def untold_by(bank: StoredBank) -> Iterator[str]:
    """Say what this bank cannot tell."""
    if not bank.has_pair_vectors:
        yield (
            "conflicting_pairs: the exact basis holds one direction a subtask; `gradients.exact_basis: pairs` and "
            "`rose-ray bank CONFIG` make vectors of single pairs"
        )
    alone = [name for name in dict.fromkeys(bank.subtasks) if bank.subtasks.count(name) == 1]
    if alone and bank.has_pair_vectors:
        yield f"conflicting_pairs of {len(alone)} subtasks with one pair: it has none to be compared with"


def _dominant_side(bank: StoredBank) -> Iterator[Finding]:
    first, objective = bank.pairs[0], bank.target.objective
    if objective == "less":
        return  # the chosen side alone, by definition
    try:
        shares_V = sum(
            weight * chosen_shares(objective, pairs) for weight, pairs in zip(bank.weights_C, bank.pairs, strict=True)
        )
    except NumericsError as error:
        advice = "Remove or mend them: a run refuses them."
        yield Finding("zero_direction", "error", str(error), advice)
        return
    longer_V = np.where(first.tokens_w_V >= first.tokens_l_V, shares_V, 1 - shares_V)
    unlike_V = first.tokens_w_V != first.tokens_l_V
    norms_w_V, norms_l_V = _weighted(bank, "norms_w_V"), _weighted(bank, "norms_l_V")
    if not unlike_V.any():
        return
    median = float(np.median(longer_V[unlike_V]))
    longest_V = np.where(first.tokens_w_V >= first.tokens_l_V, norms_w_V, norms_l_V) / (norms_w_V + norms_l_V)
    message = (
        f"the side with more tokens makes {median:.0%} of the direction's squared length in the median pair, and has "
        f"{float(np.median(longest_V[unlike_V])):.0%} of the two gradients' lengths ({objective})"
    )
    order = np.argsort(-longer_V, kind="stable")
    ids = tuple(first.pair_ids[v] for v in order.tolist() if unlike_V[v] and longer_V[v] >= DOMINANT_SHARE)
    numbers = {
        "median_share_of_longer_side": median,
        "share_of_longer_side": dict(zip(first.pair_ids, longer_V.tolist(), strict=True)),
        "norm_w": dict(zip(first.pair_ids, norms_w_V.tolist(), strict=True)),
        "norm_l": dict(zip(first.pair_ids, norms_l_V.tolist(), strict=True)),
    }
    if median >= DOMINANT_SHARE:
        advice = "The direction is mostly one side's: `objective: rose_balanced` or `rose_simpo` weighs them anew."
        yield Finding("longer_side", "warning", message, advice, ids, numbers)
    else:
        advice = f"Nothing to do: both sides make the direction{', except for the pairs named' if ids else ''}."
        yield Finding("longer_side", "note", message, advice, ids, numbers)


def _conflicts(bank: StoredBank) -> Iterator[Finding]:
    target, names = bank.target, bank.pairs[0].pair_ids
    cosines_CV = np.stack(
        [
            cosines_with_rest(
                pair_terms(target.objective, pairs, dpo_beta=target.dpo_beta, normalize=target.normalize),
                bank.subtasks,
            )
            for pairs in bank.pairs
        ]
    )
    cosines_V = bank.weights_C @ cosines_CV
    known = np.flatnonzero(np.isfinite(cosines_V)).tolist()
    against = sorted((v for v in known if cosines_V[v] < 0), key=lambda v: float(cosines_V[v]))
    if not against:
        return
    dim = bank.pairs[0].g_w_VD.shape[1]
    noise = "" if "exact/" in bank.manifest.made_from["space"]["projection"] else f", known to +-{dim**-0.5:.3f}"
    message = (
        f"{len(against)} of {len(known)} pairs point away from the rest of their subtask, lowest cosine "
        f"{cosines_V[against[0]]:+.3f}, median {float(np.median(cosines_V[known])):+.3f}{noise}"
    )
    advice = "Look at them: a wrong label, another task, or a subtask that should be two."
    if 2 * len(against) >= len(known):
        advice = "As many point away as not: they have hardly a direction in common. See `rose-ray shots`; add pairs."
    numbers = {"cosine_with_rest": {names[v]: float(cosines_V[v]) for v in known}}
    yield Finding("conflicting_pairs", "warning", message, advice, tuple(names[v] for v in against), numbers)


def _labels(bank: StoredBank) -> Iterator[Finding]:
    first = bank.pairs[0]
    if first.ref_logps_w_V is None or first.ref_logps_l_V is None:
        return
    summed_V = first.ref_logps_w_V - first.ref_logps_l_V
    mean_V = first.ref_logps_w_V / first.tokens_w_V - first.ref_logps_l_V / first.tokens_l_V
    total, agreed = len(mean_V), int((summed_V > 0).sum())
    by_length = pearson(summed_V, first.tokens_w_V - first.tokens_l_V)
    follows = "" if by_length is None else f"; correlation of the margin with the difference in tokens {by_length:+.2f}"
    message = (
        f"the base model finds the chosen side likelier in {agreed} of {total} pairs, token by token in "
        f"{int((mean_V > 0).sum())}; median margin {float(np.median(summed_V)):+.1f} nats, "
        f"{float(np.median(mean_V)):+.2f} a token{follows}"
    )
    numbers = {
        "margin": dict(zip(first.pair_ids, summed_V.tolist(), strict=True)),
        "margin_per_token": dict(zip(first.pair_ids, mean_V.tolist(), strict=True)),
        "pearson_with_length_difference": by_length,
    }
    less_likely = tuple(first.pair_ids[v] for v in np.argsort(summed_V, kind="stable").tolist() if summed_V[v] < 0)
    named = "; for the pairs named it prefers the rejected side" if less_likely else ""
    advice = f"Nothing to do: it says how much of the preference the base model has already{named}."
    yield Finding("label_margin", "note", message, advice, less_likely, numbers)
    deviations_V = mean_V - np.median(mean_V)
    spread = float(np.median(np.abs(deviations_V)))
    if not spread:
        return
    scores_V = _MAD_TO_SIGMA * deviations_V / spread
    low = [v for v in np.argsort(scores_V, kind="stable").tolist() if scores_V[v] < -OUTLIER and mean_V[v] < 0]
    if low:
        message = f"{len(low)} of {total} pairs have a chosen side that the base model finds far less likely than usual"
        advice = "Look whether their labels are swapped or their chosen side is broken."
        ids = tuple(first.pair_ids[v] for v in low)
        yield Finding(
            "unlikely_label",
            "warning",
            message,
            advice,
            ids,
            {"z": {i: float(scores_V[v]) for i, v in zip(ids, low, strict=True)}},
        )


def _weighted(bank: StoredBank, name: str) -> np.ndarray:
    return np.asarray(sum(w * getattr(pairs, name) for w, pairs in zip(bank.weights_C, bank.pairs, strict=True)))
