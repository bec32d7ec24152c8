"""How much memory a step takes at its peak, how much there is, and whether an error says that it is used up."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from typing import Protocol

import torch

from rose_ray.errors import ResourceError

_CGROUP = "/sys/fs/cgroup"

_OUT_OF_MEMORY = re.compile(
    r"DefaultCPUAllocator: (can't allocate|not enough) memory"
    r"|\bCUDA (driver )?error: out of memory"  # the runtime, and the driver behind expandable segments
    r"|\bCU(BLAS|DNN|SOLVER)_STATUS_ALLOC_FAILED\b"  # workspaces that libraries of CUDA take beside torch's allocator
    r"|\bTriton Error \[CUDA\]: out of memory"  # a kernel being loaded
)
"""Texts of plain RuntimeErrors, in torch's or Triton's words. Other errors of CUDA have other cures."""


class MemoryMeter(Protocol):
    """Measures one device."""

    def peak_bytes(self, step: Callable[[], object]) -> int:
        """Run a step and return the most bytes that this process held meanwhile."""
        ...

    def available_bytes(self) -> int:
        """Return what this process could hold in all: what it holds now and what is free."""
        ...


def memory_meter(device: torch.device) -> MemoryMeter:
    """Return the meter of a device.

    Raises:
        ResourceError: Neither a CUDA device nor a Linux process whose memory can be read.
    """
    if device.type == "cuda":
        return CudaMeter(device)
    if not os.path.exists("/proc/self/status"):
        raise ResourceError(
            "gradients.max_batch_tokens: auto measures memory through /proc, which this machine lacks; set a number."
        )
    return ProcessMeter()


class CudaMeter:
    """Torch's own count of what it holds on a GPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def peak_bytes(self, step: Callable[[], object]) -> int:
        """See `MemoryMeter`."""
        torch.cuda.reset_peak_memory_stats(self.device)
        step()
        torch.cuda.synchronize(self.device)
        return torch.cuda.max_memory_allocated(self.device)

    def available_bytes(self) -> int:
        """See `MemoryMeter`."""
        free, _ = torch.cuda.mem_get_info(self.device)
        return int(free) + torch.cuda.memory_reserved(self.device)


class ProcessMeter:
    """The process's resident set, whose high-water mark Linux lets us set back."""

    def peak_bytes(self, step: Callable[[], object]) -> int:
        """See `MemoryMeter`."""
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
        step()
        return self._status("VmHWM")

    def available_bytes(self) -> int:
        """See `MemoryMeter`; the machine's or the container's, whichever is less."""
        with open("/proc/meminfo") as file:
            free = 1024 * int(re.findall(r"MemAvailable:\s+(\d+)", file.read())[0])
        limit, used = (_cgroup_number(name) for name in ("memory.max", "memory.current"))
        if limit is not None and used is not None:
            free = min(free, limit - used)
        return self._status("VmRSS") + free

    def _status(self, name: str) -> int:
        with open("/proc/self/status") as file:
            return 1024 * int(re.findall(rf"{name}:\s+(\d+)", file.read())[0])


def _cgroup_number(name: str) -> int | None:
    try:
        with open(f"{_CGROUP}/{name}") as file:
            text = file.read().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory is used up: torch's own exception for its GPU allocator, a text for everybody else."""
    return isinstance(error, torch.OutOfMemoryError) or _OUT_OF_MEMORY.search(str(error)) is not None
