"""A model on a benchmark: numbers an item, and what they mean.

Shapes: V pairs, N items.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import logsigmoid

from rose_ray.config.target import PairInput, TargetConfig
from rose_ray.data.conversation import Message
from rose_ray.data.tasks.answers import final_answer, normalized_answer
from rose_ray.data.tokenize import Sample, Tokeniser
from rose_ray.errors import AccountingError, DataError, NonFiniteError, RowError
from rose_ray.evaluate.benchmarks import Benchmark
from rose_ray.evaluate.fine_tune import answer_logps, pair_logps
from rose_ray.evaluate.generate import greedy_answers
from rose_ray.kernels.losses import dpo_margin
from rose_ray.stages.bank import EncodedPair, encode_pairs

if TYPE_CHECKING:
    from peft import PeftModel

MEASURE_VERSION = 1
"""Raised whenever the same model and benchmark would give other numbers."""

HIGHER_IS_BETTER = {
    "margin": True,
    "accuracy": True,
    "dpo_loss": False,
    "ce_chosen": False,
    "length_normalised_loss": False,
    "choice_accuracy": True,
    "exact_match": True,
    "win_rate": True,
    "length_controlled_win_rate": True,
}
"""Every measure, and which way is better."""

Item = dict[str, Any]


def encoded_benchmark_pairs(benchmark: Benchmark, tokeniser: Tokeniser) -> list[EncodedPair]:
    """Tokenise both sides of a benchmark's pairs.

    Raises:
        PairError: Pairs that cannot be used, listed.
    """
    # For its encoding and its name in messages, which may be more than a path allows: "own pairs of X".
    config = TargetConfig(name="benchmark", pairs=[PairInput(files=["-"])]).model_copy(update={"name": benchmark.name})
    return encode_pairs(benchmark.pairs, tokeniser, config)


def measure(model: PeftModel, tokeniser: Tokeniser, benchmark: Benchmark, *, max_batch_tokens: int) -> list[Item]:
    """Return a JSON-ready item for every item of a benchmark, in its order.

    ======================  ==========================================================================================
    pairs                   ``item_id``, ``subtask``, ``logp_chosen``, ``logp_rejected`` (sums, nats),
                            ``tokens_chosen``, ``tokens_rejected`` (answer tokens, the end token included)
    multiple_choice         ``item_id``, ``subtask``, ``logps`` (of each option), ``gold``
    exact_match             ``item_id``, ``subtask``, ``answer``, ``correct``
    answers                 ``item_id``, ``answer``
    ======================  ==========================================================================================

    Raises:
        DataError: Items that do not fit into ``model.max_tokens``, listed.
        NonFiniteError: A log-probability is NaN or infinite.
    """
    measured = {
        "pairs": _measure_pairs,
        "multiple_choice": _measure_choices,
        "exact_match": _measure_exact,
        "answers": _answer,
    }
    return measured[benchmark.kind](model, tokeniser, benchmark, max_batch_tokens)


def _measure_pairs(model: PeftModel, tokeniser: Tokeniser, benchmark: Benchmark, bound: int) -> list[Item]:
    pairs = encoded_benchmark_pairs(benchmark, tokeniser)
    logps_V2 = pair_logps(model, [(pair.chosen, pair.rejected) for pair in pairs], bound)
    _check_finite(logps_V2, [pair.pair_id for pair in pairs], benchmark)
    return [
        {
            "item_id": pair.pair_id,
            "subtask": pair.subtask,
            "logp_chosen": chosen,
            "logp_rejected": rejected,
            "tokens_chosen": pair.chosen.num_labelled_tokens,
            "tokens_rejected": pair.rejected.num_labelled_tokens,
        }
        for pair, (chosen, rejected) in zip(pairs, logps_V2.tolist(), strict=True)
    ]


def _measure_choices(model: PeftModel, tokeniser: Tokeniser, benchmark: Benchmark, bound: int) -> list[Item]:
    samples: list[Sample] = []
    problems = []
    for question in benchmark.questions:
        try:
            prompt = [Message("user", question.text)]
            samples += [tokeniser.encode_answer(prompt, option) for option in question.options]
        except RowError as error:
            problems.append(f"{question.item_id}: {error}")
    if problems:
        raise DataError(
            f"evaluation task {benchmark.name}: {len(problems)} of {len(benchmark.questions)} questions cannot be "
            f"asked: {'; '.join(problems[:20])}. Raise `model.max_tokens`, or take them out."
        )
    logps = answer_logps(model, samples, bound)
    sizes = [len(question.options) for question in benchmark.questions]
    parts = logps.split(sizes)
    _check_finite(torch.stack([part.sum() for part in parts]), [q.item_id for q in benchmark.questions], benchmark)
    return [
        {"item_id": q.item_id, "subtask": q.subtask, "logps": part.tolist(), "gold": q.gold}
        for q, part in zip(benchmark.questions, parts, strict=True)
    ]


def _measure_exact(model: PeftModel, tokeniser: Tokeniser, benchmark: Benchmark, bound: int) -> list[Item]:
    settings = dict(benchmark.settings)
    prompts = [tokeniser.encode_prompt([Message("user", question.text)]) for question in benchmark.questions]
    new = settings["max_new_tokens"]
    answers = greedy_answers(model, tokeniser, prompts, max_new_tokens=new, max_batch_tokens=bound)
    return [
        {
            "item_id": question.item_id,
            "subtask": question.subtask,
            "answer": answer,
            "correct": is_correct(answer, question.answers, settings["extract"]),
        }
        for question, answer in zip(benchmark.questions, answers, strict=True)
    ]


def _answer(model: PeftModel, tokeniser: Tokeniser, benchmark: Benchmark, bound: int) -> list[Item]:
    prompts = [tokeniser.encode_prompt(pair.prompt, pair.tools) for pair in benchmark.pairs]
    new = dict(benchmark.settings)["max_new_tokens"]
    answers = greedy_answers(model, tokeniser, prompts, max_new_tokens=new, max_batch_tokens=bound)
    return [{"item_id": p.pair_id, "answer": answer} for p, answer in zip(benchmark.pairs, answers, strict=True)]


def _check_finite(values: torch.Tensor, ids: Sequence[str], benchmark: Benchmark) -> None:
    bad = [ids[i] for i in (~torch.isfinite(values.reshape(len(ids), -1)).all(1)).nonzero().flatten().tolist()]
    if bad:
        raise NonFiniteError(
            f"evaluation {benchmark.name}: log-probabilities of {len(bad)} items are NaN or infinite: {bad[:20]}. "
            "Look at the model and its training's learning rate."
        )


_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def is_correct(answer: str, known: Sequence[str], extract: str) -> bool:
    """Whether an answer is one of the known ones.

    Args:
        answer: The model's.
        known: Right answers, in the same form.
        extract: ``text`` compares without case, punctuation and runs of white space; ``final`` what each concludes
            (`final_answer`), in the form in which targets compare answers; ``last_number`` the last number of each,
            behind ``####`` where that stands.
    """
    if extract == "final":
        return _concluded(answer) in set(map(_concluded, known))
    if extract == "last_number":
        number = _last_number(answer)
        return number is not None and any(number == _last_number(each) for each in known)
    return _plain(answer) in {_plain(each) for each in known}


def _concluded(text: str) -> str:
    return normalized_answer(final_answer(text))


def _last_number(text: str) -> float | None:
    found = _NUMBER.findall(text.rpartition("####")[2])
    return float(found[-1].replace(",", "")) if found else None


def _plain(text: str) -> str:
    kept = "".join(" " if unicodedata.category(c)[0] == "P" else c for c in unicodedata.normalize("NFKC", text))
    # An answer that is nothing but signs is compared by them.
    return " ".join((kept if kept.strip() else text).casefold().split())


def pair_values(
    items: Sequence[Item], reference: Sequence[Item], *, dpo_beta: float, length_normalised_beta: float
) -> dict[str, NDArray[np.float64]]:
    """Measures of every pair, [V] each.

    ``margin`` M = dpo_beta ((logp_w - logref_w) - (logp_l - logref_l)), ``dpo_loss`` -log sigmoid(M) and ``accuracy``
    (1 where M > 0, 0.5 where it is 0, as it is for the untrained model) with the untrained model as reference
    (arXiv:2305.18290); ``ce_chosen``, the token-mean cross-entropy of the chosen answer;
    ``length_normalised_loss`` -log sigmoid(beta (logp_w / n_w - logp_l / n_l)), without a reference (SimPO,
    arXiv:2405.14734, no target margin). ``length_difference``: tokens of the chosen less those of the rejected answer.

    Args:
        items: Of the model.
        reference: Of the untrained one, of the same pairs.
        dpo_beta, length_normalised_beta: As above.

    Raises:
        AccountingError: The two hold other pairs.
    """
    if [item["item_id"] for item in items] != [item["item_id"] for item in reference]:
        raise AccountingError("a model and the untrained one were measured on other pairs; run the evaluation again.")

    def column(name: str, of: Sequence[Item] = items) -> torch.Tensor:
        return torch.tensor([item[name] for item in of], dtype=torch.float64)

    logp_w, logp_l = column("logp_chosen"), column("logp_rejected")
    tokens_w, tokens_l = column("tokens_chosen"), column("tokens_rejected")
    margin = dpo_margin(logp_w, logp_l, column("logp_chosen", reference), column("logp_rejected", reference), dpo_beta)
    normalised = length_normalised_beta * (logp_w / tokens_w - logp_l / tokens_l)
    values = {
        "margin": margin,
        "accuracy": (margin > 0).double() + 0.5 * (margin == 0).double(),
        "dpo_loss": -logsigmoid(margin),
        "ce_chosen": -logp_w / tokens_w,
        "length_normalised_loss": -logsigmoid(normalised),
        "length_difference": tokens_w - tokens_l,
    }
    return {name: value.numpy() for name, value in values.items()}


def question_values(items: Sequence[Item]) -> dict[str, NDArray[np.float64]]:
    """``choice_accuracy`` (the gold option's log-probability is highest; shared with ties) or ``exact_match``, [N]."""
    if items and "correct" in items[0]:
        return {"exact_match": np.array([float(item["correct"]) for item in items])}
    return {"choice_accuracy": np.array([_chosen_share(item) for item in items])}


def _chosen_share(item: Mapping[str, Any]) -> float:
    highest = max(item["logps"])
    best = [place for place, logp in enumerate(item["logps"]) if logp == highest]
    return 1 / len(best) if item["gold"] in best else 0.0
