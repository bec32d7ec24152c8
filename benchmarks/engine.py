"""Tokens per second of scoring against a plain LoRA step, for each projection, size, rank and width; peak memory.

python benchmarks/engine.py                    every part: half an hour on two cores
python benchmarks/engine.py --part projections --rounds 7
python benchmarks/engine.py --data ../shared   lengths of a real pool instead of drawn ones
"""

from __future__ import annotations

import argparse
import functools
import multiprocessing
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.models import SIZES, make_checkpoint, make_model, make_samples, pool_samples
from benchmarks.plain import full_logits_step, label_only_step
from benchmarks.timing import Pass, compare, write_results
from rose_ray.data.batches import length_batches, padding_fraction
from rose_ray.data.tokenize import Sample
from rose_ray.kernels.adam import AdamState, common_direction
from rose_ray.kernels.deflated import DeflatedProjection
from rose_ray.kernels.projection import Projection, make_projection
from rose_ray.kernels.span import SpanProjection
from rose_ray.model.layout import ParameterLayout, layout_of
from rose_ray.model.memory import memory_meter
from rose_ray.model.scoring import Batch, ScoringModel, pad_batch
from rose_ray.stages.directions import AdamMoments, DirectionSettings, batch_directions

BASELINE = "plain step, full logits"
LABEL_ONLY = "plain step, labels only"


Variant = tuple[str, torch.dtype, str, int]
"""Name, type of the base, projection, width."""


@dataclass(frozen=True)
class Setting:
    """One comparison: a size of model, a rank, batches, a device."""

    size: str
    rank: int
    tokens: int
    device: str
    data: str | None
    num_samples: int
    kernel: str = "torch"

    def batches(self) -> list[Batch]:
        """The samples, sorted by length and padded, as the engine batches them."""
        samples = self.samples()
        return [
            pad_batch([samples[i] for i in indices], device=self.device)
            for indices in length_batches([len(s.input_ids) for s in samples], self.tokens)
        ]

    def samples(self) -> list[Sample]:
        """Drawn, or of a real pool."""
        vocabulary = SIZES[self.size].vocabulary
        if self.data is None:
            return make_samples(self.num_samples, vocabulary)
        root = Path(self.data)
        return pool_samples(root / "data/pool/pool.jsonl.gz", root / "models/tiny-llama-4m", self.num_samples)


@functools.lru_cache(maxsize=3)
def shared_model(setting: Setting, dtype: torch.dtype, adapter: torch.dtype) -> nn.Module:
    """One model for all variants of these types: a large one fits a device once or twice, not twenty times."""
    return make_model(SIZES[setting.size], setting.rank, dtype, adapter=adapter, device=setting.device)


def plain(setting: Setting, dtype: torch.dtype, *, label_only: bool) -> Pass:
    """A training step's passes; its adapter is float32, as PEFT trains it."""
    model = shared_model(setting, dtype, torch.float32)
    batches = setting.batches()
    step = label_only_step if label_only else full_logits_step
    return lambda: step(model, batches)


def engine(setting: Setting, dtype: torch.dtype, projection: str, dim: int) -> Pass:
    """This project's pass: one forward and one backward, Adam and projection on the way."""
    module = shared_model(setting, dtype, dtype)
    layout = layout_of(module)
    checkpoint = make_checkpoint(module)
    moments = AdamMoments.of(checkpoint).to(torch.device(setting.device))
    projections = [each.to(setting.device) for each in _projections(projection, dim, layout, checkpoint)]
    settings = DirectionSettings("torch", "float16", setting.tokens, kernel=setting.kernel)  # type: ignore[arg-type]
    batches = setting.batches()

    def once() -> None:
        with closing(ScoringModel(module, setting.device)) as model:
            for batch in batches:
                batch_directions(model, batch, moments, layout, projections, settings)

    return once


def _projections(name: str, dim: int, layout: ParameterLayout, checkpoint: Any) -> list[Projection]:
    shapes = [(shape[0], shape[1]) for _, shape in layout.shapes]
    size = layout.num_parameters
    if name == "no projection":
        return []
    if name.startswith("exact"):
        basis = torch.nn.functional.normalize(torch.randn(int(name.split()[1]), size), dim=1)
        return [SpanProjection(basis, "random")]
    inner = make_projection(name.removesuffix(", deflated"), dim, 0, size, shapes=shapes)  # type: ignore[arg-type]
    if not name.endswith("deflated"):
        return [inner]
    state = AdamState(100, 0.9, 0.999, 1e-8)
    parts = [
        common_direction(checkpoint.exp_avg[key], checkpoint.exp_avg_sq[key], state, "torch")
        for key, _ in layout.shapes
    ]
    return [DeflatedProjection(inner, torch.cat([part.flatten() for part in parts if part is not None]))]


def compared(setting: Setting, variants: Sequence[Variant], rounds: int, baseline: torch.dtype) -> list[dict[str, Any]]:
    """Time variants beside both plain steps of a type; tokens per second count real tokens, padding left out."""
    passes: dict[str, Pass] = {
        BASELINE: plain(setting, baseline, label_only=False),
        LABEL_ONLY: plain(setting, baseline, label_only=True),
    }
    if baseline is torch.float32 and any(dtype is torch.bfloat16 for _, dtype, _, _ in variants):
        passes[f"{BASELINE}, bf16 base"] = plain(setting, torch.bfloat16, label_only=False)
    for name, dtype, projection, dim in variants:
        passes[name] = engine(setting, dtype, projection, dim)
    tokens = sum(len(sample.input_ids) for sample in setting.samples())
    rows = compare(passes, BASELINE, rounds=rounds, device=setting.device)
    label_only = next(row.seconds for row in rows if row.name == LABEL_ONLY)
    return [
        {
            "variant": row.name,
            "over plain step": row.ratio,
            "low": row.low,
            "high": row.high,
            "over label-only step": label_only / row.seconds,
            "tokens/s": tokens / row.seconds,
        }
        for row in rows
    ]


def peak_memory(setting: Setting, name: str, dtype: torch.dtype, projection: str, dim: int) -> dict[str, Any]:
    """Most bytes held during a second pass, above what is held between passes; in a process of its own."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        high, low = pool.apply(_peak, (setting, name, dtype, projection, dim))
    return {
        "variant": name,
        "peak MiB": high / 2**20,
        "between passes MiB": low / 2**20,
        "added MiB": (high - low) / 2**20,
    }


def _peak(setting: Setting, name: str, dtype: torch.dtype, projection: str, dim: int) -> tuple[int, int]:
    torch.set_num_threads(1)
    once = plain(setting, dtype, label_only=False) if name == BASELINE else engine(setting, dtype, projection, dim)
    meter = memory_meter(torch.device(setting.device))
    once()
    low = meter.peak_bytes(lambda: None)
    return meter.peak_bytes(once), low


def main() -> None:
    """Run the parts asked for and write one result file each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=["projections", "sizes", "ranks", "memory", "all"], default="all")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=2048, help="bound on rows times length of a batch")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--kernel", choices=["torch", "triton"], default="torch")
    parser.add_argument("--size", choices=list(SIZES), default="base")
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16"],
        default="float32",
        help="bfloat16: neither baseline nor variants in float32, for models that fit a device only so",
    )
    parser.add_argument("--data", help="folder with data/pool and models/tiny-llama-4m; only with --size base")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    bf16 = torch.bfloat16
    f32 = baseline = getattr(torch, options.dtype)

    def setting(size: str = options.size, rank: int = 64) -> Setting:
        return Setting(size, rank, options.tokens, options.device, options.data, options.samples, options.kernel)

    samples = setting().samples()
    lengths = [len(sample.input_ids) for sample in samples]
    padding = padding_fraction(lengths, length_batches(lengths, options.tokens))
    labelled = sum(sample.num_labelled_tokens for sample in samples) / sum(lengths)
    sections: dict[str, list[dict[str, Any]]] = {}
    if options.part in ("projections", "all"):
        variants = [("engine, no projection", f32, "no projection", 0)]
        for dim in (1024, 8192):
            for kind in ("sketch", "sketch, deflated", "factored"):
                variants.append((f"engine, {kind}, D {dim}", f32, kind, dim))
        variants += [(f"engine, exact {j}", f32, f"exact {j}", 0) for j in (1, 16, 64, 256)]
        variants += [("engine, rademacher, D 1024", f32, "rademacher", 1024)]
        variants += [("engine, sketch, deflated, D 1024, bf16", bf16, "sketch, deflated", 1024)]
        variants += [
            ("engine, sketch, D 8192, bf16", bf16, "sketch", 8192),
            ("engine, exact 16, bf16", bf16, "exact 16", 0),
        ]
        sections[f"projections: {options.size}, r 64"] = compared(setting(), variants, options.rounds, baseline)
    few = [
        ("engine, sketch, deflated, D 1024", f32, "sketch, deflated", 1024),
        ("engine, sketch, deflated, D 8192", f32, "sketch, deflated", 8192),
        ("engine, exact 16", f32, "exact 16", 0),
        ("engine, sketch, deflated, D 1024, bf16", bf16, "sketch, deflated", 1024),
        ("engine, exact 16, bf16", bf16, "exact 16", 0),
    ]
    if options.part in ("sizes", "all"):
        for size in ("small", "large"):
            sections[f"size: {size}, r 64"] = compared(setting(size), few, options.rounds, baseline)
    if options.part in ("ranks", "all"):
        for rank in (8, 128):
            sections[f"rank: {options.size}, r {rank}"] = compared(setting(rank=rank), few, options.rounds, baseline)
    if options.part in ("memory", "all"):
        measured = [(BASELINE, f32, "", 0), *few]
        sections[f"memory: {options.size}, r 64"] = [peak_memory(setting(), *each) for each in measured]
    facts = {
        "samples": len(samples),
        "tokens": sum(lengths),
        "labelled": round(labelled, 3),
        "batch tokens": options.tokens,
        "padding": round(padding, 4),
        "lengths": "real pool" if options.data else "log-normal",
        "kernel": options.kernel,
        "dtype": options.dtype,
    }
    name = f"engine-{options.size}-{options.part}" if options.part != "all" else f"engine-{options.size}"
    write_results(name, sections, facts, options.out)


if __name__ == "__main__":
    main()
