"""Tokens per second of scoring against a plain LoRA step, for each projection, size, rank and width; peak memory.

python benchmarks/engine.py                    every part: half an hour on two cores
python benchmarks/engine.py --part projections --rounds 7
python benchmarks/engine.py --part sizes --sizes 1b 7b --dtypes bfloat16 --device cuda
python benchmarks/engine.py --only "engine, sketch" "engine, exact 16"
python benchmarks/engine.py --data ../shared   lengths of a real pool instead of drawn ones

On CUDA every sketch and exact variant stands there twice, with the kernels of torch and with the fused one of Triton.
"""

from __future__ import annotations

import argparse
import functools
import gc
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.models import SIZES, make_checkpoint, make_model, make_samples, pool_samples, shared_direction
from benchmarks.plain import full_logits_step, label_only_step
from benchmarks.timing import ROUNDS, Pass, Prepared, ratio, time_in_turns, write_results
from benchmarks.variants import Variant, a_few, every_projection, short_name, with_kernels
from rose_ray.data.batches import length_batches, padding_fraction
from rose_ray.data.tokenize import Sample
from rose_ray.kernels.deflated import DeflatedProjection
from rose_ray.kernels.projection import Projection, make_projection
from rose_ray.kernels.span import SpanProjection
from rose_ray.model.attention import SHORT_ROWS, attention_that_runs
from rose_ray.model.batch import Batch, pad_batch
from rose_ray.model.layout import ParameterLayout, layout_of
from rose_ray.model.memory import memory_meter
from rose_ray.model.scoring import ScoringModel
from rose_ray.stages.directions import AdamMoments, DirectionSettings, batch_directions

BASELINE = "plain step, full logits"
LABEL_ONLY = "plain step, labels only"
ROOM = 1.25
"""What a pass may take beside what is held, over what the plain step took: an allocator's pieces leave gaps."""

Section = tuple[str, "Setting", list["Variant"]]


@dataclass(frozen=True)
class Setting:
    """One comparison: a size of model, a rank, batches, a device."""

    size: str
    rank: int
    tokens: int
    device: str
    data: str | None
    num_samples: int

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


@functools.lru_cache(maxsize=4)
def shared_model(setting: Setting, dtype: torch.dtype, adapter: torch.dtype, short_rows: bool) -> nn.Module:
    """One model for all variants of these types: a large one fits a device once or twice, not twenty times."""
    size = SIZES[setting.size]
    return make_model(size, setting.rank, dtype, adapter=adapter, device=setting.device, short_rows=short_rows)


@functools.lru_cache(maxsize=2)
def shared_moments(setting: Setting, module: nn.Module) -> AdamMoments:
    """One optimizer's moments for all variants of a model, on its device."""
    return AdamMoments.of(make_checkpoint(module)).to(torch.device(setting.device))


def free_all() -> None:
    """Let go of what the last section's variants shared."""
    shared_model.cache_clear()
    shared_moments.cache_clear()
    gc.collect()  # a model's modules refer to one another
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def plain(setting: Setting, dtype: torch.dtype, *, label_only: bool) -> Pass:
    """A training step's passes, its adapter float32, as PEFT trains it; label-only, with the engine's attention."""
    model = shared_model(setting, dtype, torch.float32, label_only and _has_short_rows(setting, dtype))
    batches = setting.batches()
    step = label_only_step if label_only else full_logits_step
    return lambda: step(model, batches)


def engine(setting: Setting, variant: Variant) -> Pass:
    """This project's pass: one forward and one backward, Adam and projection on the way."""
    module = _scored_model(setting, variant.dtype)
    layout = layout_of(module)
    batches = setting.batches()

    def scoring(run: Callable[[ScoringModel, Batch], object]) -> Pass:
        def once(model: ScoringModel) -> None:
            model.load_adapter(model.weights)
            for batch in batches:
                run(model, batch)

        @contextmanager
        def around() -> Iterator[Pass]:
            ways = {"merge_adapter": variant.merge_adapter, "skip_unread": variant.skip_unread}
            with closing(ScoringModel(module, setting.device, **ways)) as model:
                yield functools.partial(once, model)

        return Prepared(around)

    if variant.projection == "dropped":
        return scoring(lambda model, batch: model.backward_per_sample(batch, "mean_loss", lambda name, grads_BOI: None))
    moments = shared_moments(setting, module)
    projections = _projections(variant, layout, moments, setting.device)
    settings = DirectionSettings("torch", "float16", setting.tokens, kernel=variant.kernel)

    return scoring(lambda model, batch: batch_directions(model, batch, moments, layout, projections, settings))


def _scored_model(setting: Setting, dtype: torch.dtype) -> nn.Module:
    return shared_model(setting, dtype, dtype, _has_short_rows(setting, dtype))


def _has_short_rows(setting: Setting, dtype: torch.dtype) -> bool:
    return attention_that_runs("auto", setting.device, dtype) == SHORT_ROWS


def _projections(variant: Variant, layout: ParameterLayout, moments: AdamMoments, device: str) -> list[Projection]:
    name, dim = variant.projection, variant.dim
    shapes = [(shape[0], shape[1]) for _, shape in layout.shapes]
    size = layout.num_parameters
    if name == "no projection":
        return []
    if name.startswith("exact"):  # made where it stays: the host may not hold it, nor the device twice
        basis = torch.randn(int(name.split()[1]), size, device=device)
        return [SpanProjection(basis.div_(torch.linalg.vector_norm(basis, dim=1, keepdim=True)), "random")]
    inner = make_projection(name.removesuffix(", deflated"), dim, 0, size, shapes=shapes)  # type: ignore[arg-type]
    if not name.endswith("deflated"):
        return [inner.to(device)]
    common_P = shared_direction(layout, moments.exp_avg, moments.exp_avg_sq, moments.state)
    return [DeflatedProjection(inner.to(device), common_P)]


def compared(
    setting: Setting, variants: Sequence[Variant], rounds: int, baseline: torch.dtype
) -> tuple[list[dict[str, Any]], list[str]]:
    """Time variants beside both plain steps of their types; tokens per second count real tokens, padding left out.

    Returns:
        A row a variant, and a line for each that the device has no room for.
    """
    plains = [Variant(BASELINE, baseline), Variant(LABEL_ONLY, baseline)]
    for dtype in {each.dtype for each in variants} - {baseline}:
        plains += [Variant(f"{each}, {short_name(dtype)} base", dtype) for each in (BASELINE, LABEL_ONLY)]
    passes = {each.name: plain(setting, each.dtype, label_only=each.name.startswith(LABEL_ONLY)) for each in plains}
    meter = memory_meter(torch.device(setting.device))
    room = ROOM * (meter.peak_bytes(passes[BASELINE]) - meter.peak_bytes(lambda: None))
    left_out = []
    for variant in variants:
        module = _scored_model(setting, variant.dtype)
        held = variant.basis_bytes(layout_of(module).num_parameters)
        free = meter.available_bytes() - meter.peak_bytes(lambda: None)
        if held and held + room > free:
            held_gib, room_gib, free_gib = (size / 2**30 for size in (held, room, free))
            sizes = f"{held_gib:.1f} GiB of basis and {room_gib:.1f} of a pass do not fit into {free_gib:.1f}"
            left_out.append(f"{variant.name}: {sizes}")
            print(f"left out: {left_out[-1]}", flush=True)
            continue
        passes[variant.name] = engine(setting, variant)
    tokens = sum(len(sample.input_ids) for sample in setting.samples())
    seconds = time_in_turns(passes, BASELINE, rounds=rounds, device=setting.device)
    dtypes = {each.name: each.dtype for each in (*plains, *variants)}
    label_only = {dtypes[name]: each for name, each in seconds.items() if name.startswith(LABEL_ONLY)}
    rows = []
    for name, each in seconds.items():
        plainly = ratio(name, seconds[BASELINE], each)
        labelled = ratio(name, label_only[dtypes.get(name, baseline)], each)
        rows.append(
            {
                "variant": name,
                "over plain step": plainly.ratio,
                "low": plainly.low,
                "high": plainly.high,
                "over label-only step of its type": labelled.ratio,
                "its low": labelled.low,
                "its high": labelled.high,
                "tokens/s": tokens / plainly.seconds,
                ROUNDS: each,
            }
        )
    return rows, left_out


def peak_memory(setting: Setting, variant: Variant) -> dict[str, Any]:
    """Most bytes held during a second pass, above what is held between passes; in a process of its own."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        high, low = pool.apply(_peak, (setting, variant))
    return {
        "variant": variant.name,
        "peak MiB": high / 2**20,
        "between passes MiB": low / 2**20,
        "added MiB": (high - low) / 2**20,
    }


def _peak(setting: Setting, variant: Variant) -> tuple[int, int]:
    torch.set_num_threads(1)
    once = engine(setting, variant) if variant.projection else plain(setting, variant.dtype, label_only=False)
    meter = memory_meter(torch.device(setting.device))
    once()
    low = meter.peak_bytes(lambda: None)
    return meter.peak_bytes(once), low


def result_name(options: argparse.Namespace) -> str:
    """What sets a run apart from others of its day: size, part, device, kernels, type, and a label if one is given."""
    sizes = options.sizes if options.part == "sizes" else [options.size]
    kernels = "+".join(options.kernels)
    parts = ["engine", *sizes, options.part, options.device, kernels, "+".join(options.dtypes), options.label]
    return "-".join(part for part in parts if part)


def parsed() -> argparse.Namespace:
    """The command's options, with what follows from one another filled in."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=["projections", "sizes", "ranks", "memory", "all"], default="all")
    parser.add_argument("--rounds", type=int, default=8, help="even: each order as often")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=2048, help="bound on rows times length of a batch")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument(
        "--kernels", nargs="+", choices=["torch", "triton"], help="taking turns; both on cuda, torch on the cpu"
    )
    parser.add_argument("--only", nargs="+", help="variants to time beside the plain steps, by name or its beginning")
    parser.add_argument("--size", choices=list(SIZES), help="of every part; base, and for sizes see there")
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), help="of the part sizes: --size, or small and large")
    parser.add_argument(
        "--dtypes",
        nargs="+",
        choices=["float32", "bfloat16"],
        default=["float32", "bfloat16"],
        help="the first is the baseline's; bfloat16 alone for models that fit a device only so",
    )
    parser.add_argument("--data", help="folder with data/pool and models/tiny-llama-4m; only with --size base")
    parser.add_argument("--label", help="end of the result's name, where two runs of a day differ in something else")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    options.sizes = options.sizes or ([options.size] if options.size else ["small", "large"])
    options.size = options.size or "base"
    options.kernels = options.kernels or (["torch", "triton"] if options.device == "cuda" else ["torch"])
    names = {each.name for _, _, variants in sections_of(options, None) for each in variants}
    unknown = [each for each in options.only or [] if not any(f"{name},".startswith(f"{each},") for name in names)]
    if unknown:
        parser.error(f"--only: {unknown} begin no name of a variant; there are {sorted(names)}")
    return options


def sections_of(options: argparse.Namespace, only: Sequence[str] | None) -> list[Section]:
    """What to compare, or to weigh, section by section."""
    dtypes = [getattr(torch, name) for name in options.dtypes]

    def setting(size: str = options.size, rank: int = 64) -> Setting:
        return Setting(size, rank, options.tokens, options.device, options.data, options.samples)

    few = with_kernels(a_few(dtypes), options.kernels)
    made: list[Section] = []
    if options.part in ("projections", "all"):
        every = with_kernels(every_projection(dtypes), options.kernels)
        made.append((f"projections: {options.size}, r 64", setting(), every))
    if options.part in ("sizes", "all"):
        made += [(f"size: {size}, r 64", setting(size), few) for size in options.sizes]
    if options.part in ("ranks", "all"):
        made += [(f"rank: {options.size}, r {rank}", setting(rank=rank), few) for rank in (8, 128)]
    if options.part in ("memory", "all"):
        made.append((f"memory: {options.size}, r 64", setting(), few))
    return [(title, where, [each for each in variants if each.wanted(only)]) for title, where, variants in made]


def main() -> None:
    """Run the parts asked for and write one result file."""
    options = parsed()
    torch.set_num_threads(1)
    baseline = getattr(torch, options.dtypes[0])
    sections: dict[str, list[dict[str, Any]]] = {}
    left_out: list[str] = []
    for title, setting, variants in sections_of(options, options.only):
        if title.startswith("memory"):
            plains = [Variant(BASELINE, baseline)]
            plains += [
                Variant(f"{BASELINE}, {short_name(d)} base", d) for d in {v.dtype for v in variants} - {baseline}
            ]
            sections[title] = [peak_memory(setting, each) for each in (*plains, *variants)]
            continue
        sections[title], lines = compared(setting, variants, options.rounds, baseline)
        left_out += [f"{title}: {line}" for line in lines]
        free_all()
    samples = Setting(options.size, 64, options.tokens, options.device, options.data, options.samples).samples()
    lengths = [len(sample.input_ids) for sample in samples]
    facts = {
        "samples": len(samples),
        "rounds": options.rounds,
        "tokens": sum(lengths),
        "labelled": round(sum(sample.num_labelled_tokens for sample in samples) / sum(lengths), 3),
        "batch tokens": options.tokens,
        "padding": round(padding_fraction(lengths, length_batches(lengths, options.tokens)), 4),
        "lengths": "real pool" if options.data else "log-normal",
        "device": options.device,
        "kernels": options.kernels,
        "dtypes": options.dtypes,
        "left out": left_out or "nothing",
    }
    write_results(result_name(options), sections, facts, options.out)


if __name__ == "__main__":
    main()
