"""What an unfinished training goes on from: weights and moments by name, and how far it came.

``resume/latest.json`` in the warm-up's folder names the newest state. It is written after the state and replaced as a
whole, so that a training that dies at any moment leaves the old one or the new one. Batches, learning rates and dropout
masks follow from the number of updates alone; nothing else has to be remembered.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import safetensors.torch
from torch import Tensor

from rose_ray.errors import AlteredFileError
from rose_ray.stores.manifest import damaged_files
from rose_ray.stores.workspace import FileRecord, Workspace

_FOLDER, _POINTER = "resume", "latest.json"


@dataclass(frozen=True)
class SavedState:
    """A training's place.

    Attributes:
        samples: SHA-256 of the samples it trains on.
        num_updates: Steps taken.
        loss_sum: Of the unfinished epoch's samples so far, nats.
        epochs: An entry per finished epoch, as ``training.json`` holds them.
        file: Weights and moments.
    """

    samples: str
    num_updates: int
    loss_sum: float
    epochs: list[dict[str, Any]]
    file: FileRecord


def save_state(
    workspace: Workspace,
    folder: str,
    samples: FileRecord,
    tensors: dict[str, dict[str, Tensor]],
    num_updates: int,
    loss_sum: float,
    epochs: list[dict[str, Any]],
) -> None:
    """Write the state of a training whose artefact is ``folder``; the one before goes once this one is whole."""
    name = f"update-{num_updates}"
    flat = {f"{kind}.{key}": tensor.contiguous() for kind, named in tensors.items() for key, tensor in named.items()}
    file = workspace.write(f"{folder}/{_FOLDER}/{name}/state.safetensors", safetensors.torch.save(flat))
    state = SavedState(samples.sha256, num_updates, loss_sum, epochs, file)
    workspace.write_json(f"{folder}/{_FOLDER}/{_POINTER}", asdict(state))
    for path in workspace.list_folder(f"{folder}/{_FOLDER}"):
        if path.rsplit("/", 1)[-1] not in (name, _POINTER):
            workspace.delete_folder(path)


def find_state(workspace: Workspace, folder: str, samples: FileRecord) -> SavedState | None:
    """Return where an unfinished training of these samples stopped, or None where there is none.

    Raises:
        AlteredFileError: Its files are not as it left them.
    """
    pointer = f"{folder}/{_FOLDER}/{_POINTER}"
    if not workspace.exists(pointer):
        return None
    content = workspace.read_json(pointer)
    try:
        state = SavedState(**{**content, "file": FileRecord(**content["file"])})
        files = [state.file, *(FileRecord(**record) for epoch in state.epochs for record in epoch["files"])]
    except (KeyError, TypeError) as error:
        raise AlteredFileError(
            f"{pointer}: not the place of a training ({error}). Delete {folder}, run again."
        ) from error
    if state.samples != samples.sha256:
        return None
    damaged = damaged_files(workspace, files)
    if damaged:
        raise AlteredFileError(
            f"{damaged[0]}: missing or cut short, but the unfinished warm-up needs it. Delete {folder} and run again."
        )
    return state


def read_tensors(workspace: Workspace, state: SavedState) -> dict[str, dict[str, Tensor]]:
    """Return ``adapter``, ``exp_avg`` and ``exp_avg_sq``, each by parameter name.

    Raises:
        AlteredFileError: The file differs from its record.
    """
    tensors: dict[str, dict[str, Tensor]] = {}
    for key, tensor in safetensors.torch.load(workspace.read(state.file.path, state.file)).items():
        kind, _, name = key.partition(".")
        tensors.setdefault(kind, {})[name] = tensor
    return tensors


def forget_state(workspace: Workspace, folder: str) -> None:
    """Remove what a finished training no longer needs."""
    workspace.delete_folder(f"{folder}/{_FOLDER}")
