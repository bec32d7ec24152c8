"""Batches one after another under a bound of tokens; a batch that does not fit into memory is halved."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch

from rose_ray.data.batches import length_batches
from rose_ray.data.tokenize import Sample
from rose_ray.failpoints import failpoint_number
from rose_ray.model.batch import Batch, pack_batch, pad_batch
from rose_ray.model.memory import is_out_of_memory

logger = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass
class Halvings:
    """How often batches were halved."""

    number: int = 0


_counts: list[Halvings] = []


@contextmanager
def counted_halvings() -> Iterator[Halvings]:
    """Count the halvings of all runners of this process meanwhile: methods make their own out of sight."""
    count = Halvings()
    _counts.append(count)
    try:
        yield count
    finally:
        _counts.remove(count)


class HalvingRunner:
    """Hands samples out in batches of like length.

    Args:
        device: Where batches go.
        max_batch_tokens: Bound on rows times longest row.
        packing: Rows end to end instead of padded.

    Attributes:
        num_positions: Positions that went through the model so far, padding included.
        num_halvings: How often a batch was halved.
        max_batch_tokens: The bound, lowered with every halving.
        too_large: Samples that did not fit alone, and the error.
    """

    def __init__(self, device: torch.device, max_batch_tokens: int, *, packing: bool = False) -> None:
        self.device, self.packing = device, packing
        self.num_positions = self.num_halvings = 0
        self.max_batch_tokens = max_batch_tokens
        self.too_large: dict[int, str] = {}

    def batches(self, samples: Sequence[Sample], compute: Callable[[Batch], T]) -> Iterator[tuple[list[int], T]]:
        """Yield the numbers of each batch's samples and what it gives. Samples that do not fit alone are left out.

        Such a one is tried again after all others.
        """
        put_off = set[int]()
        lengths = [len(sample.input_ids) for sample in samples]
        waiting = length_batches(lengths, self.max_batch_tokens)[::-1]
        while waiting:
            indices = waiting.pop()
            if (size := len(indices) * lengths[indices[0]]) > self.max_batch_tokens and len(indices) > 1:
                middle = len(indices) // 2  # made before the bound was lowered
                waiting += [indices[middle:], indices[:middle]]
                continue
            result, error = self.attempt(samples, indices, compute)
            if result is not None:
                self.num_positions += sum(lengths[i] for i in indices) if self.packing else size
                yield indices, result
            elif len(indices) == 1 and indices[0] not in put_off and indices[0] not in self.too_large:
                put_off.add(indices[0])  # others that share the device may have let go of it by the end
                waiting.insert(0, indices)
            elif len(indices) == 1:
                self.too_large[indices[0]] = f"{lengths[indices[0]]} tokens alone: {error}"
            else:
                self.num_halvings += 1
                for count in _counts:
                    count.number += 1
                self.max_batch_tokens = max(1, size // 2)
                logger.warning(f"{len(indices)} rows of {size // len(indices)} tokens did not fit into memory: halved")
                waiting.append(indices)

    def attempt(
        self, samples: Sequence[Sample], indices: Sequence[int], compute: Callable[[Batch], T]
    ) -> tuple[T | None, str]:
        """Run one batch: what it gives, or None and the error where memory does not hold it."""
        # The except clause ends before the next try: its traceback would keep the batch's tensors alive.
        make_batch = pack_batch if self.packing else pad_batch
        try:
            batch = make_batch([samples[i] for i in indices], device=self.device)
            _check_room(len(indices) * max(len(samples[i].input_ids) for i in indices))
            return compute(batch), ""
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            message = str(error).split("\n", 1)[0]
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return None, message


def _check_room(num_positions: int) -> None:
    most = failpoint_number("out_of_memory")
    if most is not None and num_positions > most:
        raise torch.OutOfMemoryError(f"a failpoint leaves room for {most} positions")
