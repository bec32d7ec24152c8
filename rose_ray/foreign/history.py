"""What transformers' Trainer writes beside a checkpoint about its course: ``trainer_state.json``."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass

from rose_ray.errors import StoreError

HISTORY_FILE = "trainer_state.json"
_ROUNDING = 1e-6
"""Epochs are logged as step over steps: a whole one may come out a little above or below."""


@dataclass(frozen=True)
class History:
    """Where a training stood.

    Attributes:
        step: Updates taken.
        epoch: Number of the epoch that the checkpoint ends or lies in, from 1.
        mean_learning_rate: Mean of the rates logged in that epoch, else of all; None where none was logged.
        where: What the mean is over, for people.
    """

    step: int
    epoch: int
    mean_learning_rate: float | None
    where: str


def read_history(folder: str) -> History | None:
    """Read a checkpoint's course; None where there is no such file.

    Raises:
        StoreError: The file cannot be understood.
    """
    path = os.path.join(folder, HISTORY_FILE)
    if not os.path.isfile(path):
        return None
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
        step, epoch = int(content["global_step"]), max(1, math.ceil(float(content["epoch"]) - _ROUNDING))
        logged = [(float(line["epoch"]), float(line["learning_rate"])) for line in content["log_history"] if
                  "learning_rate" in line and int(line["step"]) <= step]  # fmt: skip
    except (ValueError, TypeError, KeyError) as error:
        raise StoreError(f"{path}: not the state of a Trainer ({type(error).__name__}: {error}).") from error
    own = [rate for when, rate in logged if epoch - 1 + _ROUNDING < when <= epoch + _ROUNDING]
    rates = own or [rate for _, rate in logged]
    where = f"mean of {len(rates)} logged in {f'epoch {epoch}' if own else 'the whole training'}"
    return History(step, epoch, sum(rates) / len(rates) if rates else None, where)
