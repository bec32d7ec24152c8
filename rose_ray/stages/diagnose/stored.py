"""What a workspace holds for a target as it is configured now, found without Ray and without the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from rose_ray.config.job import JobConfig
from rose_ray.config.method import GRADIENT_METHODS
from rose_ray.config.target import TargetConfig
from rose_ray.data.preferences import PreferencePair
from rose_ray.errors import ConfigError, StoreError
from rose_ray.kernels.influence import checkpoint_weights
from rose_ray.kernels.objectives import PairGradients
from rose_ray.kernels.pair_draws import PairAtoms
from rose_ray.stages.bank import pairs_digest
from rose_ray.stages.basis_choice import has_pair_vectors
from rose_ray.stages.score import stored_pair_gradients
from rose_ray.stores.features import checkpoint_file
from rose_ray.stores.manifest import Manifest, find_manifest
from rose_ray.stores.runs import last_stage
from rose_ray.stores.workspace import Workspace


@dataclass(frozen=True)
class StoredBank:
    """A target's bank and what is needed to weigh its checkpoints.

    Attributes:
        target: As configured now; another objective than the bank was first made for is arithmetic on it.
        manifest: Of the bank.
        warmup: Whose checkpoints it was made at.
        checkpoints: Names, in order of training.
        mean_learning_rates: Theirs.
        pairs: Gradients and numbers, one for each checkpoint.
        subtasks: Of each pair.
        has_pair_vectors: False where an exact basis holds one direction a subtask, so that single pairs have none.
    """

    target: TargetConfig
    manifest: Manifest
    warmup: Manifest
    checkpoints: tuple[str, ...]
    mean_learning_rates: tuple[float, ...]
    pairs: tuple[PairGradients, ...]
    subtasks: tuple[str, ...]
    has_pair_vectors: bool

    @property
    def weights_C(self) -> np.ndarray:
        """Of the checkpoints, summing to 1."""
        return checkpoint_weights(self.mean_learning_rates)

    def atoms(self) -> PairAtoms:
        """What any draw of the pairs makes its directions of."""
        target = self.target
        return PairAtoms(
            target.objective,
            self.pairs,
            self.weights_C,
            self.subtasks,
            dpo_beta=target.dpo_beta,
            normalize=target.normalize,
        )


def target_named(config: JobConfig, name: str) -> TargetConfig:
    """Return a target of the configuration.

    Raises:
        ConfigError: It has none of that name.
    """
    for target in config.targets:
        if target.name == name:
            return target
    raise ConfigError(f"no target is named {name!r}; targets are {', '.join(t.name for t in config.targets)}.")


def find_bank(
    workspace: Workspace | None, config: JobConfig, target: TargetConfig, pairs: Sequence[PreferencePair]
) -> StoredBank | str:
    """Return the newest bank of a target if it is of these pairs and settings, else the reason why there is none.

    Args:
        workspace: None where none was made yet.
        config: Of the job.
        target: One of its targets.
        pairs: The target's.

    Raises:
        AlteredFileError: A file differs from its manifest.
    """
    if not target.uses_gradients:
        return f"method {target.method} takes no gradients: no bank"
    if workspace is None:
        return "no workspace yet: `rose-ray bank CONFIG`"
    advice = "`rose-ray bank CONFIG` makes one"
    stage = last_stage(workspace, f"bank {target.name}")
    manifest = find_manifest(workspace, stage["folder"]) if stage else None
    if manifest is None:
        return f"no bank of {target.name} in {workspace.root.name}: {advice}"
    now = {
        "pairs": pairs_digest(pairs),
        "encoding": target.encoding,
        "max_tokens": config.model.max_tokens,
        "dtype": config.model.dtype,
        "quantized": config.model.quantized,
    }
    differing = [name for name, value in now.items() if manifest.made_from.get(name) != value]
    if differing:
        return f"{manifest.folder} was made with other {' and '.join(differing)}: {advice} as configured now"
    warmup = _warmup_of(workspace, manifest)
    if isinstance(warmup, str):
        return f"{warmup}: {advice}"
    names = [checkpoint["name"] for checkpoint in warmup.facts["checkpoints"]]
    records = [manifest.file(checkpoint_file(name)) for name in names]
    tables: list[pa.Table] = [workspace.read_table(record.path, record) for record in records]
    return StoredBank(
        target,
        manifest,
        warmup,
        tuple(names),
        tuple(checkpoint["mean_learning_rate"] for checkpoint in warmup.facts["checkpoints"]),
        tuple(stored_pair_gradients(table) for table in tables),
        tuple(tables[0]["subtask"].to_pylist()),
        has_pair_vectors(workspace, manifest),
    )


def needed_bank(
    workspace: Workspace, config: JobConfig, target: TargetConfig, pairs: Sequence[PreferencePair]
) -> StoredBank:
    """Return what `find_bank` does.

    Raises:
        ConfigError: As `check_gradients`.
        StoreError: There is none, or it holds no vectors of single pairs.
    """
    check_gradients(target)
    found = find_bank(workspace, config, target, pairs)
    if isinstance(found, str):
        raise StoreError(f"{found}.")
    if not found.has_pair_vectors:
        raise StoreError(
            f"target {target.name}: its basis holds one direction a subtask, so single pairs have no vectors. Set "
            "`gradients.exact_basis: pairs` and run `rose-ray bank CONFIG`."
        )
    return found


def check_gradients(target: TargetConfig) -> None:
    """Refuse a target that no bank serves.

    Raises:
        ConfigError: Its method takes no gradients.
    """
    if not target.uses_gradients:
        raise ConfigError(
            f"target {target.name}: method {target.method} takes no gradients, so it has no bank. Name a target of "
            f"method {', '.join(GRADIENT_METHODS)}."
        )


def _warmup_of(workspace: Workspace, bank: Manifest) -> Manifest | str:
    stage = last_stage(workspace, "warmup")
    warmup = find_manifest(workspace, stage["folder"]) if stage else None
    if warmup is None:
        return f"the warm-up of {bank.folder} is missing"
    if [each["adapter"] for each in warmup.facts["checkpoints"]] != bank.made_from["space"]["adapters"]:
        return f"{bank.folder} was made with another warm-up than {warmup.folder}"
    return warmup
