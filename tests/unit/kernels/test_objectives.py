"""Bank directions against autograd on a toy model and against loops."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch import Tensor

from rose_ray.errors import ConfigError, NonFiniteError, NumericsError, ShapeError
from rose_ray.kernels.losses import dpo_loss, sequence_logps
from rose_ray.kernels.objectives import Floats, Objective, PairGradients, bank_directions
from rose_ray.kernels.projection import make_projection

torch.set_num_threads(1)  # tiny tensors: handing them to threads costs more than the sums

PARALLEL = 1e-12  # float64 backward passes of a toy model, summed in another order
FLOAT64_RELATIVE = 1e-12  # arithmetic on a few dozen float64 numbers
PAIR_OBJECTIVES: list[Objective] = ["rose", "rose_simpo", "rose_balanced", "less"]
SUBTASKS = ["a", "b", "a", "b", "a"]


class Toy:
    """A bag-of-tokens language model with few parameters, in float64."""

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.embed = torch.randn(7, 4, generator=generator, dtype=torch.float64)
        self.head = torch.randn(4, 7, generator=generator, dtype=torch.float64)

    def parameters(self) -> list[Tensor]:
        return [self.embed.requires_grad_(), self.head.requires_grad_()]

    def logps(self, ids: Tensor, mask: Tensor) -> Tensor:
        hidden = torch.tanh(self.embed[ids].cumsum(dim=1))
        return sequence_logps(hidden @ self.head, ids, mask)

    def gradient(self, loss: Tensor) -> Tensor:
        return torch.cat([part.flatten() for part in torch.autograd.grad(loss, self.parameters())])


def _answers(seed: int, num_pairs: int = 5) -> list[tuple[Tensor, Tensor]]:
    """(input_ids, loss_mask) of answers of different lengths to prompts of two tokens."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, 6, (num_pairs,), generator=generator).tolist()
    ids = [torch.randint(0, 7, (1, 2 + length), generator=generator) for length in lengths]
    return [(row, torch.arange(row.shape[1]).unsqueeze(0) >= 2) for row in ids]


CHOSEN, REJECTED = _answers(1), _answers(2)
POLICY, REFERENCE = Toy(0), Toy(9)


def _stacked(rows: list[Tensor]) -> Floats:
    array: Floats = torch.stack(rows).detach().numpy()
    return array


def _bank(reference: Toy = REFERENCE) -> PairGradients:
    """The toy's pairs as a bank without projection would hold them."""
    POLICY.parameters()
    logps = {
        side: [model.logps(*answer).squeeze(0) for answer in answers]
        for side, model, answers in (
            ("w", POLICY, CHOSEN),
            ("l", POLICY, REJECTED),
            ("ref_w", reference, CHOSEN),
            ("ref_l", reference, REJECTED),
        )
    }
    g_w, g_l = (_stacked([POLICY.gradient(logp) for logp in logps[side]]) for side in ("w", "l"))
    return PairGradients(
        pair_ids=[f"pair-{v}" for v in range(len(CHOSEN))],
        g_w_VD=g_w,
        g_l_VD=g_l,
        norms_w_V=np.linalg.norm(g_w, axis=1),
        norms_l_V=np.linalg.norm(g_l, axis=1),
        dots_wl_V=np.einsum("vd,vd->v", g_w, g_l),
        tokens_w_V=np.array([float(mask.sum()) for _, mask in CHOSEN]),
        tokens_l_V=np.array([float(mask.sum()) for _, mask in REJECTED]),
        logps_w_V=_stacked(logps["w"]),
        logps_l_V=_stacked(logps["l"]),
        ref_logps_w_V=_stacked(logps["ref_w"]),
        ref_logps_l_V=_stacked(logps["ref_l"]),
    )


def _swapped(bank: PairGradients) -> PairGradients:
    names = [name for name in vars(bank) if "_w_" in name]
    changes: dict[str, Any] = {}
    for name in names:
        other = name.replace("_w_", "_l_")
        if other in vars(bank):
            changes[name], changes[other] = getattr(bank, other), getattr(bank, name)
    return replace(bank, **changes)


def _dpo_gradients(dpo_beta: float, reference: Toy = REFERENCE) -> list[Tensor]:
    """Gradient of every pair's DPO loss by autograd."""
    gradients = []
    for chosen, rejected in zip(CHOSEN, REJECTED, strict=True):
        loss = dpo_loss(
            POLICY.logps(*chosen),
            POLICY.logps(*rejected),
            reference.logps(*chosen).detach(),
            reference.logps(*rejected).detach(),
            dpo_beta,
        )
        gradients.append(POLICY.gradient(loss.sum()))
    return gradients


@pytest.mark.parametrize("dpo_beta", [0.01, 0.1, 2.0])
@pytest.mark.parametrize("reference_seed", [9, 10])
def test_rose_is_parallel_to_the_gradient_of_the_dpo_loss(dpo_beta: float, reference_seed: int) -> None:
    reference = Toy(reference_seed)
    directions = bank_directions("rose", _bank(reference), dpo_beta=dpo_beta, subtasks=SUBTASKS)
    for ours, gradient in zip(directions.vectors_UD, _dpo_gradients(dpo_beta, reference), strict=True):
        unit = (gradient / gradient.norm()).numpy()
        np.testing.assert_allclose(ours, unit, rtol=0, atol=PARALLEL)


@pytest.mark.parametrize("objective", PAIR_OBJECTIVES)
def test_beta_and_reference_do_not_matter_to_pair_objectives(objective: Objective) -> None:
    one = bank_directions(objective, _bank(), dpo_beta=0.1, subtasks=SUBTASKS)
    two = bank_directions(objective, _bank(Toy(33)), dpo_beta=7.0, subtasks=SUBTASKS)
    np.testing.assert_array_equal(one.vectors_UD, two.vectors_UD)


def test_dpo_weighted_is_the_gradient_of_a_subtasks_summed_dpo_loss() -> None:
    gradients = _dpo_gradients(0.7)
    directions = bank_directions("dpo_weighted", _bank(), dpo_beta=0.7, subtasks=SUBTASKS, normalize="none")
    assert directions.names == directions.subtasks == ("a", "b")
    for row, name in enumerate(directions.names):
        total = torch.stack([g for g, label in zip(gradients, SUBTASKS, strict=True) if label == name]).sum(0)
        np.testing.assert_allclose(directions.vectors_UD[row], total.numpy(), rtol=0, atol=PARALLEL)
        assert directions.exact_norms_U[row] == pytest.approx(float(total.norm()), rel=FLOAT64_RELATIVE)


def test_dpo_weighted_depends_on_beta_and_reference() -> None:
    one = bank_directions("dpo_weighted", _bank(), dpo_beta=0.1, subtasks=SUBTASKS)
    for bank, beta in ((_bank(), 3.0), (_bank(Toy(33)), 0.1)):
        two = bank_directions("dpo_weighted", bank, dpo_beta=beta, subtasks=SUBTASKS)
        assert float(np.abs(one.vectors_UD - two.vectors_UD).max()) > 1e-3  # far above rounding


def test_dpo_weighted_of_one_pair_is_rose() -> None:
    names = [f"alone-{v}" for v in range(5)]
    weighted = bank_directions("dpo_weighted", _bank(), dpo_beta=0.3, subtasks=names)
    rose = bank_directions("rose", _bank(), dpo_beta=0.3, subtasks=names)
    np.testing.assert_allclose(weighted.vectors_UD, rose.vectors_UD, rtol=0, atol=PARALLEL)


def _slow_direction(objective: str, bank: PairGradients, pair: int) -> Floats:
    g_w, g_l = bank.g_w_VD[pair].tolist(), bank.g_l_VD[pair].tolist()
    n_w, n_l = bank.tokens_w_V[pair], bank.tokens_l_V[pair]
    norm_w, norm_l = (math.sqrt(sum(x * x for x in g)) for g in (g_w, g_l))
    formulas: dict[str, Callable[[float, float], float]] = {
        "rose": lambda w, rejected: rejected - w,
        "less": lambda w, rejected: -w / n_w,
        "rose_simpo": lambda w, rejected: -(w / n_w - rejected / n_l),
        "rose_balanced": lambda w, rejected: -(w / norm_w - rejected / norm_l),
    }
    entry = formulas[objective]
    return np.array([entry(w, rejected) for w, rejected in zip(g_w, g_l, strict=True)])


@pytest.mark.parametrize("objective", PAIR_OBJECTIVES)
def test_pair_objectives_equal_their_formulas(objective: Objective) -> None:
    bank = _bank()
    raw = bank_directions(objective, bank, dpo_beta=0.1, subtasks=SUBTASKS, normalize="none")
    exact = bank_directions(objective, bank, dpo_beta=0.1, subtasks=SUBTASKS, normalize="exact")
    projected = bank_directions(objective, bank, dpo_beta=0.1, subtasks=SUBTASKS, normalize="projected")
    own = bank_directions(objective, bank, dpo_beta=0.1, subtasks=SUBTASKS, normalize="own")
    assert raw.names == tuple(bank.pair_ids) and raw.subtasks == tuple(SUBTASKS)
    for pair in range(5):
        expected = _slow_direction(objective, bank, pair)
        length = float(np.linalg.norm(expected))
        np.testing.assert_allclose(raw.vectors_UD[pair], expected, rtol=0, atol=PARALLEL)
        assert raw.exact_norms_U[pair] == pytest.approx(length, rel=FLOAT64_RELATIVE)
        # nothing was projected, so the two lengths are one
        np.testing.assert_allclose(exact.vectors_UD[pair], expected / length, rtol=0, atol=PARALLEL)
        np.testing.assert_allclose(projected.vectors_UD[pair], expected / length, rtol=0, atol=PARALLEL)
        beside = np.append(expected[:-1], 0.0)
        np.testing.assert_allclose(own.vectors_UD[pair], beside / np.linalg.norm(beside), rtol=0, atol=PARALLEL)


@pytest.mark.parametrize("objective", ["rose", "rose_simpo", "rose_balanced"])
@pytest.mark.parametrize("normalize", ["exact", "own", "projected", "none"])
def test_a_swapped_pair_negates(objective: Objective, normalize: Any) -> None:
    bank = _bank()
    one = bank_directions(objective, bank, dpo_beta=0.1, subtasks=SUBTASKS, normalize=normalize)
    two = bank_directions(objective, _swapped(bank), dpo_beta=0.1, subtasks=SUBTASKS, normalize=normalize)
    np.testing.assert_array_equal(one.vectors_UD, -two.vectors_UD)


@pytest.mark.parametrize("objective", PAIR_OBJECTIVES)
def test_lengths_are_those_before_projection(objective: Objective) -> None:
    bank = _bank()
    projection = make_projection("rademacher", 8, 0, bank.g_w_VD.shape[1])

    def project(values: Floats) -> Floats:
        out = torch.zeros(len(values), 8, dtype=torch.float64)
        projection.add(out, 0, torch.from_numpy(values))
        projected: Floats = out.numpy()
        return projected

    small = replace(bank, g_w_VD=project(bank.g_w_VD), g_l_VD=project(bank.g_l_VD))
    whole = bank_directions(objective, bank, dpo_beta=0.1, subtasks=SUBTASKS)
    exact = bank_directions(objective, small, dpo_beta=0.1, subtasks=SUBTASKS)
    np.testing.assert_allclose(exact.exact_norms_U, whole.exact_norms_U, rtol=FLOAT64_RELATIVE)
    np.testing.assert_allclose(exact.vectors_UD, project(whole.vectors_UD), rtol=0, atol=PARALLEL)
    unit = bank_directions(objective, small, dpo_beta=0.1, subtasks=SUBTASKS, normalize="projected")
    np.testing.assert_allclose(np.linalg.norm(unit.vectors_UD, axis=1), 1.0, rtol=FLOAT64_RELATIVE)


@pytest.mark.parametrize("objective", ["rose", "rose_balanced", "dpo_weighted"])
@pytest.mark.parametrize("noise", [0.0, 1e-8])
def test_equal_sides_are_refused_by_name(objective: Objective, noise: float) -> None:
    bank = _bank()
    g_l = bank.g_l_VD.copy()
    g_l[[1, 3]] = bank.g_w_VD[[1, 3]] * (1 + noise)
    equal = replace(
        bank,
        g_l_VD=g_l,
        norms_l_V=np.linalg.norm(g_l, axis=1),
        dots_wl_V=np.einsum("vd,vd->v", bank.g_w_VD, g_l),
    )
    with pytest.raises(NumericsError, match=r"2 of the bank's rows \(pair-1, pair-3\)"):
        bank_directions(objective, equal, dpo_beta=0.1, subtasks=SUBTASKS)


def test_zero_gradients_are_refused_by_name() -> None:
    bank = _bank()
    g_w, norms_w, dots = bank.g_w_VD.copy(), bank.norms_w_V.copy(), bank.dots_wl_V.copy()
    g_w[2], norms_w[2], dots[2] = 0, 0, 0
    zero = replace(bank, g_w_VD=g_w, norms_w_V=norms_w, dots_wl_V=dots)
    for objective in ("less", "rose_balanced"):
        with pytest.raises(NumericsError, match="pair-2"):
            bank_directions(objective, zero, dpo_beta=0.1, subtasks=SUBTASKS)
    bank_directions("rose", zero, dpo_beta=0.1, subtasks=SUBTASKS)
    lost = replace(bank, g_w_VD=g_w, g_l_VD=g_w)  # lengths above zero, projections that vanish
    with pytest.raises(NumericsError, match="projected direction is zero"):
        bank_directions("rose", lost, dpo_beta=0.1, subtasks=SUBTASKS, normalize="projected")


def test_inputs_are_checked() -> None:
    bank = _bank()
    with pytest.raises(ConfigError, match="'dpo'"):
        bank_directions("dpo", bank, dpo_beta=0.1, subtasks=SUBTASKS)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="'unit'"):
        bank_directions("rose", bank, dpo_beta=0.1, subtasks=SUBTASKS, normalize="unit")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="dpo_beta"):
        bank_directions("rose", bank, dpo_beta=0.0, subtasks=SUBTASKS)
    with pytest.raises(ShapeError, match="4 subtask labels for 5 pairs"):
        bank_directions("rose", bank, dpo_beta=0.1, subtasks=SUBTASKS[:4])
    with pytest.raises(ConfigError, match="needs log-probabilities"):
        bank_directions("dpo_weighted", replace(bank, ref_logps_l_V=None), dpo_beta=0.1, subtasks=SUBTASKS)
    with pytest.raises(ShapeError, match="norms_w_V"):
        replace(bank, norms_w_V=np.ones(4))
    with pytest.raises(ShapeError, match="g_l_VD"):
        replace(bank, g_l_VD=np.ones((5, 3)))
    with pytest.raises(NumericsError, match=r"answers without tokens.*pair-0"):
        replace(bank, tokens_l_V=np.array([0.0, 1, 1, 1, 1]))
    spoilt = bank.g_w_VD.copy()
    spoilt[4, 0] = np.nan
    with pytest.raises(NonFiniteError, match=r"g_w_VD .* 1 of .*pair-4"):
        replace(bank, g_w_VD=spoilt)


def test_every_objective_is_covered() -> None:
    assert {*PAIR_OBJECTIVES, "dpo_weighted"} == set(get_args(Objective))
