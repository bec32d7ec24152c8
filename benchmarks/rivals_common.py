"""What every rival's process needs: one model, its samples and moments, the plain step, and a clock.

Imports torch, transformers and peft alone, so that it runs in a rival's own environment too.

Shapes: N samples, B batch, S tokens, P adapter parameters, D numbers of a feature.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, log_softmax
from transformers import LlamaConfig, LlamaForCausalLM

from rose_ray.data.batches import length_batches

VOCABULARY = 8192
MAX_TOKENS = 512
IGNORED = -100

FORWARD_BACKWARD, ADAM, PROJECTION, REST = "forward+backward", "adam", "projection", "rest"


@dataclass(frozen=True)
class Tokens:
    """One sample: ids, and which of them carry loss."""

    input_ids: list[int]
    loss_mask: list[bool]

    @property
    def labels(self) -> list[int]:
        """Ids, or -100 where there is no loss."""
        return [token if labelled else IGNORED for token, labelled in zip(self.input_ids, self.loss_mask, strict=True)]


@dataclass(frozen=True)
class Padded:
    """A batch padded on the right: [B, S] each."""

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor


def make_tokens(number: int, seed: int = 0) -> list[Tokens]:
    """Return samples of about 155 tokens (log-normal, at most 512), the later half labelled."""
    drawn = random.Random(seed)
    lengths = [min(MAX_TOKENS, max(16, round(drawn.lognormvariate(4.8, 0.75)))) for _ in range(number)]
    return [
        Tokens([drawn.randrange(VOCABULARY) for _ in range(size)], [place >= size // 2 for place in range(size)])
        for size in lengths
    ]


def pad(samples: Sequence[Tokens]) -> Padded:
    """Pad samples to the longest."""
    size = max(len(sample.input_ids) for sample in samples)

    def rows(values: list[list[int]], fill: int) -> Tensor:
        return torch.tensor([row + [fill] * (size - len(row)) for row in values])

    return Padded(
        rows([sample.input_ids for sample in samples], 0),
        rows([[1] * len(sample.input_ids) for sample in samples], 0),
        rows([sample.labels for sample in samples], IGNORED),
    )


def make_model(rank: int = 64) -> nn.Module:
    """Return a Llama of random weights with LoRA on q, k, v, o, its B matrices not zero; the same at every call."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=4096,
        attn_implementation="sdpa",  # type: ignore[call-arg]  # taken by the class it derives from
        use_cache=False,
    )
    lora = LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"], task_type="CAUSAL_LM"
    )
    model: nn.Module = get_peft_model(LlamaForCausalLM(config), lora)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)
    return model.eval()


@dataclass
class Problem:
    """The one task all rivals do."""

    num_samples: int
    dim: int
    max_batch_tokens: int = 2048
    samples: list[Tokens] = field(init=False)
    indices: list[list[int]] = field(init=False)
    model: nn.Module = field(init=False)

    def __post_init__(self) -> None:
        self.samples = make_tokens(self.num_samples)
        self.indices = length_batches([len(sample.input_ids) for sample in self.samples], self.max_batch_tokens)
        self.model = make_model()

    @cached_property
    def batches(self) -> list[Padded]:
        """The samples by ``indices``."""
        return [pad([self.samples[i] for i in batch]) for batch in self.indices]

    @cached_property
    def parameters(self) -> dict[str, nn.Parameter]:
        """Adapter parameters by module name, in the order of the flat vector."""
        ends = (".lora_A.default", ".lora_B.default")
        return {name: module.weight for name, module in self.model.named_modules() if name.endswith(ends)}

    @property
    def num_parameters(self) -> int:
        """P."""
        return sum(parameter.numel() for parameter in self.parameters.values())

    @cached_property
    def moments(self) -> tuple[Tensor, Tensor]:
        """Adam's m and v as flat vectors [P], of the size that LoRA training leaves."""
        generator = torch.Generator().manual_seed(1)
        return (
            1e-4 * torch.randn(self.num_parameters, generator=generator),
            (1e-4 * torch.randn(self.num_parameters, generator=generator)).square(),
        )

    def split(self, flat_P: Tensor) -> dict[str, Tensor]:
        """Cut a flat vector into the parameters' shapes."""
        parts = flat_P.split([parameter.numel() for parameter in self.parameters.values()])
        return {
            name: part.view(parameter.shape)
            for (name, parameter), part in zip(self.parameters.items(), parts, strict=True)
        }

    def reference_gradient(self, index: int) -> Tensor:
        """Return one sample's gradient [P] of its token-mean loss by plain autograd, logits in float64."""
        one = pad([self.samples[index]])
        logits_SV = self.model(input_ids=one.input_ids).logits[0, :-1].double()
        targets_S = one.labels[0, 1:]
        kept_S = targets_S != IGNORED
        logps_T = log_softmax(logits_SV[kept_S], dim=-1).gather(1, targets_S[kept_S].unsqueeze(1))
        grads = torch.autograd.grad(-logps_T.mean(), list(self.parameters.values()))
        return torch.cat([grad.flatten() for grad in grads])

    def gradient_error(self, gradients: Callable[[Sequence[int]], Tensor], number: int = 6) -> float:
        """Return the largest relative error of a rival's raw gradients over a few samples.

        Args:
            gradients: Takes sample numbers that may share a batch, gives [B, P].
            number: How many samples, of the last batch.
        """
        shared = self.indices[-1][:number]
        found_BP = gradients(shared)
        errors = [relative_error(row, self.reference_gradient(i)) for row, i in zip(found_BP, shared, strict=True)]
        return float(torch.tensor(errors).max())  # keeps a NaN

    def plain_step(self) -> None:
        """The price of training: full logits, summed loss of the labelled positions, backward into the adapter."""
        for batch in self.batches:
            logits = self.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
            loss = cross_entropy(
                logits[:, :-1].float().flatten(0, 1),
                batch.labels[:, 1:].flatten(),
                ignore_index=IGNORED,
                reduction="sum",
            )
            loss.backward()
            self.model.zero_grad(set_to_none=True)


def with_eager_attention(model: nn.Module) -> Any:
    """Return a copy whose attention is written out: vmap has no rule for torch's fused one on a CPU."""
    made: Any = copy.deepcopy(model)
    made.get_base_model().set_attn_implementation("eager")
    return made


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Length of the difference over the length expected."""
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).norm() / expected.norm())


class Clock:
    """CPU seconds of this process by part."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Add what runs inside to a part."""
        start = time.process_time()
        try:
            yield
        finally:
            self.seconds[name] += time.process_time() - start


Pass = Callable[[Clock], object]


GRADIENT_BOUND = 1e-5
"""Of the relative error of raw gradients: float32 sums in another order are within a tenth of it."""


@dataclass(frozen=True)
class Rival:
    """One way to do the task.

    Attributes:
        name: Short.
        note: What it holds, regenerates, or leaves out.
        run: One pass over all samples.
        gradient_error: Largest relative error of its raw gradients against autograd.
        checks: Further relative errors.
    """

    name: str
    note: str
    run: Pass
    gradient_error: float | None = None
    checks: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """A line of the table.

    Attributes:
        rate: Median over rounds of the plain step's time over the rival's; above 1 is faster.
        low, high: 90 % bootstrap interval of that median.
        seconds, plain_seconds: Median CPU seconds of a pass.
        parts: Median CPU seconds of each part, and ``rest``.
    """

    name: str
    note: str
    rate: float
    low: float
    high: float
    seconds: float
    plain_seconds: float
    parts: Mapping[str, float]
    gradient_error: float | None
    checks: Mapping[str, float]
    rates: Sequence[float]


def measure(rival: Rival, plain: Callable[[], object], rounds: int) -> Row:
    """Time a rival and the plain step in turns, A B B A; both run once before.

    Raises:
        SystemExit: Its gradients are others than autograd's: it does not do the task.
    """
    if rival.gradient_error is not None and not rival.gradient_error <= GRADIENT_BOUND:  # NaN is not
        raise SystemExit(
            f"{rival.name}: gradients differ from autograd's by {rival.gradient_error:.1e} of their length"
        )
    rival.run(Clock())
    plain()
    pairs: list[tuple[float, float]] = []
    clocks: list[Clock] = []
    for number in range(rounds):
        clocks.append(clock := Clock())
        first, second = (plain, lambda: rival.run(clock)) if number % 2 == 0 else (lambda: rival.run(clock), plain)
        times = _timed(first), _timed(second)
        pairs.append(times if number % 2 == 0 else times[::-1])
    rates = [plain_time / time_ for plain_time, time_ in pairs]
    draw = random.Random(0)
    medians = sorted(statistics.median(draw.choices(rates, k=rounds)) for _ in range(1000))
    names = list(clocks[0].seconds)
    parts = {name: statistics.median(clock.seconds[name] for clock in clocks) for name in names}
    if parts:
        parts[REST] = statistics.median(
            time_ - sum(clock.seconds.values()) for (_, time_), clock in zip(pairs, clocks, strict=True)
        )
    return Row(
        rival.name,
        rival.note,
        statistics.median(rates),
        medians[50],
        medians[949],
        statistics.median(time_ for _, time_ in pairs),
        statistics.median(plain_time for plain_time, _ in pairs),
        parts,
        rival.gradient_error,
        dict(rival.checks),
        rates,
    )


def _timed(once: Callable[[], object]) -> float:
    start = time.process_time()
    once()
    return time.process_time() - start


def parser(description: str) -> argparse.ArgumentParser:
    """Options that every process has."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--dim", type=int, choices=(1024, 8192), default=1024, help="numbers of a feature")
    made.add_argument("--rounds", type=int, default=8, help="even: each order as often")
    made.add_argument("--samples", type=int, default=96, help="the fewer, the more padding: 19 %% at 48, 11 %% at 96")
    made.add_argument("--batch-tokens", type=int, default=2048, help="bound on rows times longest row")
    made.add_argument("--only", nargs="*", default=None, help="names of rivals")
    made.add_argument("--threads", type=int, default=1)
    return made


def wanted(name: str, only: Sequence[str] | None) -> bool:
    """Whether a rival was asked for, by its name or the start of it."""
    return not only or any(name.startswith(each) for each in only)


def run_runner(make: Callable[[Problem, argparse.Namespace], Iterator[Rival]], options: argparse.Namespace) -> None:
    """Measure a rival library's variants in its own process and write rows as JSON to ``options.json``."""
    torch.set_num_threads(options.threads)
    problem = Problem(options.samples, options.dim, options.batch_tokens)
    rows = [measure(rival, problem.plain_step, options.rounds) for rival in make(problem, options)]
    Path(options.json).write_text(json.dumps([asdict(row) for row in rows]))


def row_of(fields: Mapping[str, Any]) -> Row:
    """Return a row from a runner's JSON."""
    return Row(**fields)
