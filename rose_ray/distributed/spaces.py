"""Feature spaces of a run: the configured projection, and one exact space per target that wants it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import safetensors.torch
import torch

from rose_ray.config.gradients import GradientConfig
from rose_ray.config.job import JobConfig
from rose_ray.errors import AlteredFileError, ConfigError
from rose_ray.kernels.adam import AdamState, common_direction
from rose_ray.kernels.deflated import DEFLATED_VERSION, DeflatedProjection
from rose_ray.kernels.projection import Projection, make_projection
from rose_ray.kernels.span import SpanProjection
from rose_ray.model.checkpoint import Checkpoint
from rose_ray.model.layout import ParameterLayout
from rose_ray.stores.workspace import FileRecord, Workspace

_BASIS = "basis"


@dataclass(frozen=True)
class SpaceSpec:
    """One feature space; travels by pickle.

    Attributes:
        features_key: Key of its features.
        basis: Files of an exact basis, a checkpoint each; None for the configured projection.
    """

    features_key: str
    basis: tuple[FileRecord, ...] | None = None


def projection_identity(settings: GradientConfig, layout: ParameterLayout) -> str:
    """Text that names the configured projection, and the Adam mode where its moment term is part of it."""
    identity = _plain(settings, layout).identity()
    return f"deflated/v{DEFLATED_VERSION}/adam={settings.adam}/{identity}" if deflates(settings) else identity


def load_projections(
    workspace: Workspace,
    space: SpaceSpec,
    settings: GradientConfig,
    layout: ParameterLayout,
    checkpoints: Sequence[Checkpoint],
) -> list[Projection]:
    """Return what makes features of directions, one for each checkpoint.

    Raises:
        AlteredFileError: A file of the basis differs from its record.
    """
    if space.basis is not None:
        return [_read_basis(workspace, record, space.features_key) for record in space.basis]
    plain = _plain(settings, layout)
    if not deflates(settings):
        return [plain] * len(checkpoints)
    return [_deflated(plain, settings, layout, checkpoint) for checkpoint in checkpoints]


def basis_bytes(basis_JP: torch.Tensor) -> bytes:
    """Serialise a basis."""
    return safetensors.torch.save({_BASIS: basis_JP.contiguous()})


def _plain(settings: GradientConfig, layout: ParameterLayout) -> Projection:
    chosen = settings.projection
    shapes = [(shape[0], shape[1]) for _, shape in layout.shapes]
    return make_projection(chosen.kind, chosen.dim, chosen.seed, layout.num_parameters, shapes=shapes)


def too_wide(settings: GradientConfig, layout: ParameterLayout) -> str | None:
    """Return what to tell the user where features have more numbers than the adapter, else None."""
    chosen, size = settings.projection, layout.num_parameters
    if chosen.kind in ("none", "exact") or chosen.dim <= size:
        return None
    return (
        f"gradients.projection.dim is {chosen.dim:,}, but the adapter has {size:,} parameters: kind: none keeps all of "
        "them without error, in fewer numbers"
    )


def check_sign_vectors(config: JobConfig, layout: ParameterLayout) -> None:
    """Refuse to compare rows by signs of numbers that nothing is added to: all rows have those in common.

    Raises:
        ConfigError: A selection asks for it.
    """
    if config.gradients.stored_type != "bit1" or (told := too_wide(config.gradients, layout)) is None:
        return
    asking = {target.name: target.selection for target in config.gradient_targets if not config.is_exact(target)}
    if config.training_set is not None:
        asking["training_set"] = config.training_set.selection
    for name, selection in asking.items():
        if selection.diversity is not None and selection.diversity.vectors == "gradients":
            raise ConfigError(f"{name}: selection.diversity cannot compare rows by gradients. {told}")


def deflates(settings: GradientConfig) -> bool:
    """Whether the configured projection keeps the direction that all share exactly: it has one for each checkpoint."""
    chosen = settings.projection
    return chosen.deflate and chosen.kind not in ("none", "exact") and settings.adam in ("torch", "less_code")


def _deflated(
    plain: Projection, settings: GradientConfig, layout: ParameterLayout, checkpoint: Checkpoint
) -> Projection:
    assert checkpoint.exp_avg is not None and checkpoint.exp_avg_sq is not None and checkpoint.state is not None
    stored = checkpoint.state
    state = AdamState(stored.num_updates, stored.adam_beta1, stored.adam_beta2, stored.adam_eps)
    parts = []
    for name, _ in layout.shapes:
        part = common_direction(checkpoint.exp_avg[name], checkpoint.exp_avg_sq[name], state, settings.adam)
        assert part is not None
        parts.append(part.flatten())
    return DeflatedProjection(plain, torch.cat(parts))


def _read_basis(workspace: Workspace, record: FileRecord, digest: str) -> SpanProjection:
    try:
        basis_JP = safetensors.torch.load(workspace.read(record.path, record))[_BASIS]
    except (safetensors.SafetensorError, KeyError) as error:
        raise AlteredFileError(f"{record.path}: not a basis ({error}). Delete its folder and run again.") from error
    return SpanProjection(basis_JP, digest)
