"""Who holds the model: plain PyTorch, DeepSpeed's engine, ZeRO 3, ZeRO 3 with the parameters in host memory, a gang.

    python benchmarks/loaders.py --out results
    python benchmarks/loaders.py --size small --samples 16 --rounds 1

Every way has processes of its own, one, or for a gang two; they take turns (A B B A) with the same samples, and their
projected gradients are compared with those of the plain way. On a CPU, device and host are one memory: offloading shows
its price there, not its gain.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from benchmarks.models import SIZES, TARGETS, make_checkpoint, make_model, make_samples
from benchmarks.timing import write_results
from rose_ray.config.model import DeepSpeedConfig, LoraConfig, ModelConfig
from rose_ray.data.batches import deal_batches
from rose_ray.distributed.engine import ProcessGroup, free_port, load_scoring_model
from rose_ray.kernels.projection import make_projection
from rose_ray.model.layout import layout_of
from rose_ray.schemas import TOKENS
from rose_ray.stages.directions import DirectionSettings
from rose_ray.stages.features import shard_parts
from rose_ray.stages.tokens import read_samples

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Way:
    """How a model is held."""

    loader: str = "deepspeed"
    zero_stage: int = 0
    offload: str = "none"
    ranks: int = 1


WAYS = {
    "plain": Way("plain"),
    "engine": Way(),
    "ZeRO 3": Way(zero_stage=3),
    "ZeRO 3, parameters offloaded to the CPU": Way(zero_stage=3, offload="cpu"),
    "gang of 2": Way(zero_stage=3, ranks=2),
}


def work(options: argparse.Namespace) -> None:
    """One process of a way: a pass for every line that comes in, its CPU seconds back."""
    torch.set_num_threads(1)
    way, rank = WAYS[options.way], options.rank_number
    size = SIZES[options.size]
    dtype = getattr(torch, options.dtype)
    module = make_model(size, options.lora, dtype, adapter=torch.float32)
    layout, checkpoint = layout_of(module), make_checkpoint(module)
    del module
    deepspeed = DeepSpeedConfig(zero_stage=way.zero_stage, offload_parameters=way.offload)  # type: ignore[arg-type]
    model_config = ModelConfig(
        base=options.base,
        dtype=options.dtype,
        loader=way.loader,  # type: ignore[arg-type]
    )
    if way.loader != "plain":
        model_config = model_config.model_copy(update={"deepspeed": deepspeed})
    lora = LoraConfig(rank=options.lora, alpha=2.0 * options.lora, dropout=0.0, target_modules=TARGETS)
    group = ProcessGroup(rank, way.ranks, "127.0.0.1", options.port)
    model = load_scoring_model(model_config, lora, device="cpu", group=group)
    samples = make_samples(options.samples, size.vocabulary)
    settings = DirectionSettings("torch", "float32", options.tokens)
    shapes = [(shape[0], shape[1]) for _, shape in layout.shapes]
    projection = make_projection("sketch", 1024, 0, layout.num_parameters, shapes=shapes)
    dealt = deal_batches(samples, options.tokens, way.ranks)[rank] if way.ranks > 1 else None
    own = samples if dealt is None else [samples[place] for place in dealt.samples]
    own = read_samples(pa.Table.from_pylist([{"row_id": str(n), **s.__dict__} for n, s in enumerate(own)], TOKENS))

    def once(settings: DirectionSettings = settings) -> np.ndarray:
        parts = shard_parts(model, own, [checkpoint], layout, [[projection]], settings, dealt)
        return parts.columns[0][0].features_ND

    # Drawn moments have entries near 0, where Adam's quotient makes much of rounding: gradients are compared.
    features = once(DirectionSettings("sgd", "float32", options.tokens))
    places = range(len(samples)) if dealt is None else dealt.samples
    np.savez(options.out, features=features, places=np.array(places))
    for _ in sys.stdin:
        start = time.process_time()
        once()
        seconds = time.process_time() - start
        print(json.dumps({"seconds": seconds, "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}), flush=True)


class Workers:
    """The processes of one way."""

    def __init__(self, name: str, options: argparse.Namespace, folder: Path) -> None:
        self.ranks, port = WAYS[name].ranks, free_port()
        self.outs = [folder / f"{len(name)}-{name.replace(' ', '-')}-{rank}.npz" for rank in range(self.ranks)]
        passed = [f"--{key}={getattr(options, key)}" for key in ("size", "dtype", "lora", "samples", "tokens")]
        own = [f"--way={name}", f"--port={port}", f"--base={folder / 'base'}"]
        self.processes = [
            subprocess.Popen(
                [sys.executable, "-m", "benchmarks.loaders", *own, f"--rank-number={rank}", f"--out={out}", *passed],
                cwd=ROOT,
                env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu"},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=(folder / "log").open("ab"),
                text=True,
            )
            for rank, out in enumerate(self.outs)
        ]
        self.peak = 0
        self.once()  # loads; its time is not counted

    def once(self) -> float:
        """Run a pass and return the CPU seconds of all ranks."""
        for process in self.processes:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        told = [self._answer(process) for process in self.processes]
        self.peak = max([self.peak, *(each["peak"] for each in told)])
        return float(sum(each["seconds"] for each in told))

    def _answer(self, process: subprocess.Popen[str]) -> dict[str, Any]:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("{"):
                answer: dict[str, Any] = json.loads(line)
                return answer
        raise RuntimeError(f"{process.args!r}: ended with {process.wait()}")

    def features(self) -> np.ndarray:
        """Features of all samples, in their order."""
        parts = [np.load(out) for out in self.outs]
        places = np.concatenate([part["places"] for part in parts])
        features: np.ndarray = np.concatenate([part["features"] for part in parts])
        return features[np.argsort(places)]

    def stop(self) -> None:
        """End the processes."""
        for process in self.processes:
            process.kill()
            process.wait()


def compare_ways(options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Time all ways in turns; a row each."""
    size = SIZES[options.size]
    module: Any = make_model(size, options.lora, torch.float32, adapter=torch.float32)
    module.unload().save_pretrained(folder / "base")
    del module
    workers = {name: Workers(name, options, folder) for name in WAYS}
    seconds: dict[str, list[float]] = {name: [] for name in workers}
    for number in range(options.rounds):
        for name in list(workers)[:: 1 if number % 2 == 0 else -1]:
            seconds[name].append(workers[name].once())
    plain = workers["plain"].features()
    rows = []
    draw = random.Random(0)
    for name, each in workers.items():
        ratios = [base / own for base, own in zip(seconds["plain"], seconds[name], strict=True)]
        medians = sorted(statistics.median(draw.choices(ratios, k=len(ratios))) for _ in range(1000))
        error = np.abs(each.features() - plain).max() / np.linalg.norm(plain, axis=1).mean()
        rows.append(
            {
                "way": name,
                "ratio": statistics.median(ratios),
                "low": medians[50],
                "high": medians[949],
                "CPU seconds": statistics.median(seconds[name]),
                "peak MiB a process": each.peak / 1024,
                "gradients: largest difference / length": float(error),
            }
        )
        each.stop()
    return rows


def main() -> None:
    """Compare, or be one of the processes compared."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(SIZES), default="base")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--lora", type=int, default=64, help="rank of the adapter")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=2048, help="of a batch")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--way", choices=list(WAYS), help=argparse.SUPPRESS)
    for name, kind in (("--rank-number", int), ("--port", int), ("--base", str)):
        parser.add_argument(name, type=kind, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way:
        work(options)
        return
    torch.set_num_threads(1)  # as the processes compared have
    with tempfile.TemporaryDirectory() as folder:
        rows = compare_ways(options, Path(folder))
    facts = {key: getattr(options, key) for key in ("size", "dtype", "lora", "samples", "tokens", "rounds")}
    facts |= {"ways": {name: asdict(way) for name, way in WAYS.items()}}
    sections = {"CPU seconds of a pass, plain's over its own": rows}
    write_results(f"loaders-{options.size}", sections, facts, options.out or Path(tempfile.mkdtemp()))


if __name__ == "__main__":
    main()
