"""Judges of two answers: a metric, a reward model, a causal language model. The endpoint has a module of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from rose_ray.config.judge import JudgeConfig
from rose_ray.config.model import ModelConfig
from rose_ray.data.conversation import Message
from rose_ray.data.tokenize import Sample, Tokeniser
from rose_ray.errors import JudgeError, ModelError, RowError
from rose_ray.evaluate.fine_tune import answer_logps
from rose_ray.kernels.rouge import rouge_l
from rose_ray.kernels.win_rate import Preference
from rose_ray.model.base import base_digest, load_base
from rose_ray.model.tokenizer import load_tokeniser, resolve_base

JUDGE_VERSION = 1
"""Raised whenever a judge would say something else of the same answers."""

QUESTION = """Two assistants answered the same request. Which answer serves the person better?

What matters, in this order: that it does what was asked, that it is right, that it is safe, that it is clear. Length \
is neither good nor bad. The order in which the answers are shown means nothing.

<request>
{prompt}
</request>

<answer A>
{first}
</answer A>

<answer B>
{second}
</answer B>

"""
"""What a judge is shown; how it has to reply follows."""

SPEAKERS = {"user": "User", "assistant": "Assistant", "system": "System", "tool": "Tool"}


@dataclass(frozen=True)
class Comparison:
    """Two answers to one prompt.

    Attributes:
        prompt: The conversation that is answered.
        first, second: In the order in which they are shown.
        reference: The chosen answer of the held-out pair.
    """

    prompt: tuple[Message, ...]
    first: str
    second: str
    reference: str = ""

    @property
    def question(self) -> str:
        """The comparison as text."""
        prompt = "\n\n".join(f"{SPEAKERS[message.role]}: {message.content}" for message in self.prompt)
        return QUESTION.format(prompt=prompt, first=self.first, second=self.second)


@dataclass(frozen=True)
class Ruling:
    """What a judge said.

    Attributes:
        preference: None where it gave no verdict.
        detail: Why not.
    """

    preference: Preference | None
    detail: str = ""


class Judge(Protocol):
    """Says which of two answers is better. Called from several threads at once where it is an endpoint."""

    def rule(self, comparison: Comparison) -> Ruling:
        """Judge one comparison in the order given."""
        ...


class ScoreJudge:
    """Prefers the answer of higher score; a margin below ``tie_margin``, or none, is a tie.

    Args:
        score: Of an answer to a prompt, given the reference.
        tie_margin: In units of the score.
    """

    def __init__(self, score: Callable[[tuple[Message, ...], str, str], float], tie_margin: float) -> None:
        self.score, self.tie_margin = score, tie_margin

    def rule(self, comparison: Comparison) -> Ruling:
        """Judge one comparison; the order cannot matter."""
        try:
            first, second = (
                self.score(comparison.prompt, answer, comparison.reference)
                for answer in (comparison.first, comparison.second)
            )
        except RowError as error:
            return Ruling(None, str(error))
        return Ruling(preference_of(first - second, self.tie_margin))


def preference_of(difference: float, tie_margin: float) -> Preference:
    """First where the difference is above 0, second where below, tie within the margin."""
    if abs(difference) <= tie_margin:
        return "tie"
    return "first" if difference > 0 else "second"


class LocalJudge:
    """A causal language model, asked as an endpoint is: the likelier of the answers A and B decides.

    Args:
        config: Its folder or hub name, and the margin of log-probability (nats) within which it is a tie.
        device: ``cpu`` or ``cuda``.
    """

    def __init__(self, config: JudgeConfig, device: str = "cpu") -> None:
        model = _model_config(config)
        self.name, self.tie_margin = config.name, config.tie_margin
        self.tokeniser: Tokeniser = load_tokeniser(model)
        self.model = load_base(model, device=device)

    def rule(self, comparison: Comparison) -> Ruling:
        """Judge one comparison in the order given."""
        prompt = [Message("user", comparison.question + "Reply with one letter, A or B.")]
        try:
            samples: list[Sample] = [self.tokeniser.encode_answer(prompt, letter) for letter in "AB"]
        except RowError as error:
            return Ruling(None, str(error))
        first, second = answer_logps(self.model, samples, 1 << 30).tolist()
        return Ruling(preference_of(first - second, self.tie_margin))


class RewardModel:
    """A sequence-classification model with one output: the reward of an answer.

    Args:
        config: Its folder or hub name.
        device: ``cpu`` or ``cuda``.

    Raises:
        ModelError: It cannot be loaded, or has more than one output.
    """

    def __init__(self, config: JudgeConfig, device: str = "cpu") -> None:
        from transformers import AutoModelForSequenceClassification

        model = _model_config(config)
        self.tokeniser = load_tokeniser(model)
        folder = resolve_base(model)
        try:
            loaded: Any = AutoModelForSequenceClassification.from_pretrained(
                folder, dtype=torch.float32, use_safetensors=True, output_loading_info=True
            )
        except (OSError, ValueError) as error:
            raise ModelError(f"judge {config.name}: cannot load {config.model} as a reward model: {error}") from error
        self.model, report = loaded
        lacking = sorted(map(str, report["missing_keys"]))
        if lacking or self.model.config.num_labels != 1:
            raise ModelError(
                f"judge {config.name}: {config.model} is no reward model: {self.model.config.num_labels} outputs, "
                f"weights missing from its files: {lacking[:3]}. Expected a sequence classifier with one output."
            )
        self.model.to(device).eval()
        self.device = device

    def score(self, prompt: tuple[Message, ...], answer: str, reference: str) -> float:
        """Return the reward of an answer. One at a time: what such a model reads as the end depends on padding.

        Raises:
            RowError: The answer begins beyond the longest sample, or is empty.
        """
        del reference
        sample = self.tokeniser.encode_answer(prompt, answer)
        with torch.no_grad():
            return float(self.model(input_ids=torch.tensor([sample.input_ids], device=self.device)).logits[0, 0])


def load_judge(config: JudgeConfig, device: str = "cpu") -> Judge:
    """Return a judge that works in this process.

    Raises:
        ModelError: Its model cannot be used.
        JudgeError: It is of another kind.
    """
    if config.kind == "rouge_l":
        return ScoreJudge(lambda prompt, answer, reference: rouge_l(answer, reference), config.tie_margin)
    if config.kind == "reward_model":
        return ScoreJudge(RewardModel(config, device).score, config.tie_margin)
    if config.kind == "local_model":
        return LocalJudge(config, device)
    raise JudgeError(f"judge {config.name}: kind {config.kind} does not judge texts in this process.")


def judge_identity(config: JudgeConfig) -> dict[str, Any]:
    """Return what a judge's verdicts depend on. Keys, budgets and time limits are no part of it.

    Raises:
        ModelError: A local model is not there, or has no weights.
    """
    identity: dict[str, Any] = {"version": JUDGE_VERSION, "kind": config.kind}
    if config.kind == "endpoint":
        asked = {"url": config.url, "model": config.model, "max_reply_tokens": config.max_reply_tokens}
        return {**identity, **asked, **({"extra_body": config.extra_body} if config.extra_body else {})}
    if config.model is not None:
        try:
            identity["model"] = base_digest(resolve_base(_model_config(config)))
        except ModelError as error:
            raise ModelError(f"judge {config.name}: {error}") from error
    return {**identity, "tie_margin": config.tie_margin}


def _model_config(config: JudgeConfig) -> ModelConfig:
    assert config.model is not None
    return ModelConfig(base=config.model, dtype="float32", max_tokens=_LONGEST)


_LONGEST = 1 << 20
"""Judges see answers whole; what their model cannot take, it says itself."""
