"""What `engine.py` times beside the plain steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from rose_ray.kernels.direction_sums import KernelKind

DROPPED = "engine, gradients dropped"
"""One forward and one backward pass with every per-sample gradient formed, and thrown away: what the others take
beyond this follows the backward pass."""


@dataclass(frozen=True)
class Variant:
    """One pass to time.

    Attributes:
        name: In the table.
        dtype: Of base and, in the engine, adapter.
        projection: Its name, ``exact N`` among them, with ``, deflated`` or without; "" for a plain step, ``dropped``
            for no work behind the gradients.
        dim: Its width.
        kernel: Of the work behind the gradients.
        merge_adapter: As jobs have it, where the type allows it; each pass merges anew, which a job does once a shard.
        skip_unread: As jobs have it.
    """

    name: str
    dtype: torch.dtype
    projection: str = ""
    dim: int = 0
    kernel: KernelKind = "torch"
    merge_adapter: bool = True
    skip_unread: bool = True

    def wanted(self, only: Sequence[str] | None) -> bool:
        """Whether it was asked for, by its whole name or by what stands before one of its commas."""
        return not only or any(f"{self.name},".startswith(f"{each},") for each in only)

    def basis_bytes(self, num_parameters: int) -> int:
        """Bytes of the vectors of P numbers that its projection holds."""
        rows = int(self.projection.split()[1]) if self.projection.startswith("exact") else 0
        return 4 * num_parameters * (rows + self.projection.endswith("deflated"))


def every_projection(dtypes: Sequence[torch.dtype]) -> list[Variant]:
    """The variants of the part `projections`, those that hold most last."""
    baseline = dtypes[0]
    made = [Variant(DROPPED, baseline, "dropped"), Variant("engine, no projection", baseline, "no projection")]
    for dim in (1024, 8192):
        for kind in ("sketch", "sketch, deflated", "factored"):
            made.append(Variant(f"engine, {kind}, D {dim}", baseline, kind, dim))
    default = Variant("engine, sketch, deflated, D 16384", baseline, "sketch, deflated", 16384)
    made.append(default)
    made.append(replace(default, name=f"{default.name}, adapter apart", merge_adapter=False))
    made.append(replace(default, name=f"{default.name}, every state", skip_unread=False))
    made += [Variant(f"engine, rademacher, D {dim}", baseline, "rademacher", dim) for dim in (1024, 8192)]
    further = (DROPPED, "engine, sketch, deflated, D 1024", "engine, sketch, D 8192", "engine, exact 16")
    exact = [Variant(f"engine, exact {j}", baseline, f"exact {j}") for j in (1, 16, 64, 256)]
    return made + _in_further(dtypes, made + exact, further) + exact


def a_few(dtypes: Sequence[torch.dtype]) -> list[Variant]:
    """The variants of the other parts."""
    default = Variant("engine, sketch, deflated, D 8192", dtypes[0], "sketch, deflated", 8192)
    made = [
        Variant(DROPPED, dtypes[0], "dropped"),
        Variant("engine, sketch, deflated, D 1024", dtypes[0], "sketch, deflated", 1024),
        default,
        replace(default, name=f"{default.name}, adapter apart", merge_adapter=False),
        replace(default, name=f"{default.name}, every state", skip_unread=False),
        Variant("engine, exact 16", dtypes[0], "exact 16"),
    ]
    return made + _in_further(dtypes, made, (DROPPED, "engine, sketch, deflated, D 1024", "engine, exact 16"))


def _in_further(dtypes: Sequence[torch.dtype], variants: Sequence[Variant], names: tuple[str, ...]) -> list[Variant]:
    chosen = [each for each in variants if each.name in names]
    return [replace(each, name=f"{each.name}, {short_name(d)}", dtype=d) for d in dtypes[1:] for each in chosen]


def with_kernels(variants: Sequence[Variant], kernels: Sequence[KernelKind]) -> list[Variant]:
    """Each variant once a kernel that has it; Triton's, where a job may set it, right behind torch's."""
    made = []
    for each in variants:
        fused = each.projection.startswith(("sketch", "exact", "no projection"))
        if "torch" in kernels or not fused:
            made.append(each)
        if "triton" in kernels and fused:
            made.append(replace(each, name=f"{each.name}, triton", kernel="triton"))
    return made


def short_name(dtype: torch.dtype) -> str:
    """As it stands in a table."""
    return {torch.float32: "float32", torch.bfloat16: "bf16"}[dtype]
