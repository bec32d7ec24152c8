"""The one place that reads PyTorch's own files: tensors and plain values come through, code does not."""

from __future__ import annotations

import os
import pickle
import re
import zipfile
from collections.abc import Sequence
from typing import Any

import torch

from rose_ray.errors import StoreError

_NAMED_GLOBAL = re.compile(r"GLOBAL ([\w.]+)")


def load_pickled(path: str, classes: Sequence[type] = ()) -> Any:
    """Return what a ``.pt`` or ``.bin`` file holds, on the CPU; nothing in it is run.

    Args:
        path: Local file. Tensors of the zip format stay on the disk until they are used.
        classes: What it may hold besides tensors, containers and plain values.

    Raises:
        StoreError: The file is missing or unreadable, or names anything else.
    """
    if not os.path.isfile(path):
        raise StoreError(f"{path}: no such file.")
    try:
        with torch.serialization.safe_globals(list(classes)):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        found = sorted(set(_NAMED_GLOBAL.findall(str(error))))
        if found:
            raise StoreError(
                f"{path}: names {', '.join(found)}; expected tensors, containers and plain values only. "
                "It was not run, and the file is refused: save the optimizer's plain state_dict()."
            ) from error
        raise _unreadable(path, error) from error
    except Exception as error:  # a damaged file makes torch raise many unrelated types
        raise _unreadable(path, error) from error


def _unreadable(path: str, error: Exception) -> StoreError:
    return StoreError(f"{path}: not a readable PyTorch file ({type(error).__name__}: {str(error).splitlines()[0:1]}).")
