"""Whether a target's exact basis keeps both sides of every pair, or one direction a subtask.

Decided from the configuration and from sizes that it fixes, never from free memory: what a basis keeps may decide its
key, and with it that of all its features, which must not hang on the hour or on the machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rose_ray.config.gradients import GradientConfig
from rose_ray.config.target import TargetConfig
from rose_ray.data.preferences import PreferencePair
from rose_ray.stores.manifest import Manifest, find_manifest
from rose_ray.stores.workspace import Workspace

LOST_WITH_SUBTASKS = (
    "explain shows subtasks and no pairs",
    "shots and reward-step are refused",
    "doctor leaves out conflicting_pairs",
    "another objective, normalize or dpo_beta takes another pass over pairs and pool",
)
"""What one direction a subtask cannot give; scores under the target's own objective are the same."""


@dataclass(frozen=True)
class BasisChoice:
    """What one target's exact basis keeps.

    Attributes:
        target: Its name.
        keeps: Both sides of the ``pairs``, or one direction for each of the ``subtasks``.
        num_rows: Directions [P] of a checkpoint, at most: those that others span are left out.
        num_bytes: Of these rows at all checkpoints, float32: what a scoring actor holds.
        reason: Why so, for people.
    """

    target: str
    keeps: Literal["pairs", "subtasks"]
    num_rows: int
    num_bytes: int
    reason: str

    @property
    def per_subtask(self) -> bool:
        """Whether it is one direction a subtask."""
        return self.keeps == "subtasks"

    def line(self) -> str:
        """What is kept, what it takes, why, and what that loses."""
        what = "one direction a subtask" if self.per_subtask else "both sides of every pair"
        lost = f"; lost: {'; '.join(LOST_WITH_SUBTASKS)}" if self.per_subtask else ""
        return (
            f"basis {self.target}: {what}, {self.num_rows:,} rows, {_size(self.num_bytes)} in an actor: "
            f"{self.reason}{lost}"
        )

    def facts(self) -> dict[str, Any]:
        """For the manifest of the basis."""
        lost = list(LOST_WITH_SUBTASKS) if self.per_subtask else []
        return {"keeps": self.keeps, "actor_bytes": self.num_bytes, "reason": self.reason, "lost": lost}


def choose_basis(
    settings: GradientConfig,
    target: TargetConfig,
    pairs: Sequence[PreferencePair],
    *,
    num_parameters: int,
    num_checkpoints: int,
) -> BasisChoice:
    """Return what the exact basis of a target keeps: as configured, or under ``auto`` the pairs where they fit.

    No other target plays a part: one that comes or goes must not change this one's key.

    Args:
        settings: ``exact_basis`` and its bound.
        target: One that is scored exactly.
        pairs: All of its pairs.
        num_parameters: P, of the adapter.
        num_checkpoints: An actor holds the bases of all of them.
    """
    rows = {"pairs": 2 * len(pairs), "subtasks": len({pair.subtask for pair in pairs})}
    rows = {name: min(number, num_parameters) for name, number in rows.items()}
    sizes = {name: 4 * number * num_parameters * num_checkpoints for name, number in rows.items()}
    keeps, reason = _decided(settings, target, sizes["pairs"])
    return BasisChoice(target.name, keeps, rows[keeps], sizes[keeps], reason)


def _decided(
    settings: GradientConfig, target: TargetConfig, pairs_bytes: int
) -> tuple[Literal["pairs", "subtasks"], str]:
    if settings.exact_basis != "auto":
        return settings.exact_basis, f"gradients.exact_basis: {settings.exact_basis}"
    bound = f"gradients.exact_basis_gib: {settings.exact_basis_gib:g}"
    if pairs_bytes <= settings.exact_basis_gib * 2**30:
        return "pairs", f"within {bound}"
    needing = "method: gist" if target.gist is not None else "selection.method: round_robin_pairs"
    if target.gist is not None or target.scores_pairs:
        return "pairs", f"{needing} needs single pairs, though they take more than {bound}"
    return "subtasks", f"both sides of every pair would take {_size(pairs_bytes)}, more than {bound}"


def has_pair_vectors(workspace: Workspace, bank: Manifest) -> bool:
    """Whether single pairs have vectors in a bank: not where its exact basis holds one direction a subtask, or is lost.

    Args:
        workspace: That holds both.
        bank: Of any target.
    """
    projection: str = bank.made_from["space"]["projection"]
    if not projection.startswith("exact/"):
        return True
    basis = find_manifest(workspace, f"basis/{projection.rpartition('=')[2]}")
    return basis is not None and basis.made_from["objective"] is None


def _size(num_bytes: int) -> str:
    size, unit = num_bytes / 2**10, "KiB"
    for larger in ("MiB", "GiB"):
        if size >= 1024:
            size, unit = size / 1024, larger
    return f"{size:,.1f} {unit}"
