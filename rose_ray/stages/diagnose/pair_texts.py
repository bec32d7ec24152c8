"""What the texts of a target's pairs say by themselves, without a model."""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from rose_ray.data.preferences import PreferencePair
from rose_ray.data.similarity import similarity
from rose_ray.data.words import words
from rose_ray.kernels.sign_test import sign_test
from rose_ray.stages.diagnose.findings import Finding, Severity


@dataclass(frozen=True)
class TextLimits:
    """From where on a check speaks.

    Attributes:
        similarity: Sides whose words match to this part, or more, are near-identical.
        length_ratio: Median ratio of the longer side's length to the shorter one's.
        longer_share: Share of pairs in which the same side is the longer one.
        subtask_pairs: Fewest pairs of a subtask.
    """

    similarity: float = 0.9
    length_ratio: float = 2.0
    longer_share: float = 0.75
    subtask_pairs: int = 3


CHANCE = 0.05
"""A share that a fair coin reaches more often than this is not spoken of."""


def text_findings(pairs: Sequence[PreferencePair], limits: TextLimits) -> Iterator[Finding]:
    """Yield what the texts of one target's pairs show; pairs that a run would refuse may be among them."""
    yield from _sides(pairs, limits)
    yield from _repeats(pairs)
    yield from _subtasks(pairs, limits)
    usable = [pair for pair in pairs if pair.chosen.strip() and pair.rejected.strip()]
    counts = {pair.pair_id: (len(pair.chosen), len(pair.rejected)) for pair in usable}
    yield from length_findings(counts, "characters", limits)


def _sides(pairs: Sequence[PreferencePair], limits: TextLimits) -> Iterator[Finding]:
    empty, equal, same_words, near = [], [], [], {}
    for pair in pairs:
        if not pair.chosen.strip() or not pair.rejected.strip():
            empty.append(pair.pair_id)
        elif pair.chosen.strip() == pair.rejected.strip():
            equal.append(pair.pair_id)
        else:
            chosen, rejected = words(pair.chosen), words(pair.rejected)
            if chosen == rejected:
                same_words.append(pair.pair_id)
            elif (found := similarity(chosen, rejected, limits.similarity)) >= limits.similarity:
                near[pair.pair_id] = found
    total = len(pairs)
    if empty:
        message = f"{len(empty)} of {total} pairs have an empty side"
        yield Finding("empty_side", "error", message, "Remove or mend them: a run refuses them.", tuple(empty))
    if equal:
        message = f"{len(equal)} of {total} pairs have equal sides"
        yield Finding("identical_sides", "error", message, "Remove or mend them: a run refuses them.", tuple(equal))
    if same_words:
        message = f"{len(same_words)} of {total} pairs differ in case, punctuation or white space alone"
        advice = "Keep them only if that is what the target is about: their direction is formatting."
        yield Finding("same_words", "warning", message, advice, tuple(same_words))
    if near:
        ids = tuple(sorted(near, key=lambda pair_id: -near[pair_id]))
        message = f"{len(near)} of {total} pairs have sides whose words match to {limits.similarity:.0%} or more"
        advice = "Look whether the few words that differ are what you mean; each counts as much as any other pair."
        yield Finding("near_identical_sides", "warning", message, advice, ids, {"similarity": near})


def _repeats(pairs: Sequence[PreferencePair]) -> Iterator[Finding]:
    counted = Counter(pair.pair_id for pair in pairs)
    repeated = tuple(name for name, times in counted.items() if times > 1)
    if repeated:
        advice = "Give every pair an id of its own, or remove the repeated ones: a run refuses them."
        yield Finding("repeated_ids", "error", f"{len(repeated)} ids stand more than once", advice, repeated)
    by_prompt: dict[_Words, dict[tuple[_Words, _Words], list[str]]] = defaultdict(lambda: defaultdict(list))
    for pair in pairs:
        prompt, chosen, rejected = (tuple(words(text)) for text in (pair.raw_prompt, pair.chosen, pair.rejected))
        by_prompt[prompt][chosen, rejected].append(pair.pair_id)
    same = [ids for answers in by_prompt.values() for ids in answers.values() if len(set(ids)) > 1]
    if same:
        advice = "Keep one of each: a repeated pair counts as often as it stands."
        yield _grouped("duplicate_pairs", "warning", f"{len(same)} pairs stand under several ids", advice, same)
    opposed = [
        [*ids, *answers[rejected, chosen]]
        for answers in by_prompt.values()
        for (chosen, rejected), ids in list(answers.items())
        if chosen < rejected and (rejected, chosen) in answers
    ]
    if opposed:
        message = f"{len(opposed)} pairs stand the other way round as well: same prompt, sides swapped"
        advice = "Decide which answer is better: together they ask for nothing."
        yield _grouped("contradicting_pairs", "error", message, advice, opposed)
    several = [
        [pair_id for ids in answers.values() for pair_id in ids]
        for answers in by_prompt.values()
        if len({frozenset(sides) for sides in answers}) > 1
    ]
    if several:
        advice = "Fine where wanted: such a prompt counts as often as it has pairs."
        yield _grouped("repeated_prompts", "note", f"{len(several)} prompts have several pairs", advice, several)


_Words = tuple[str, ...]


def _grouped(check: str, severity: Severity, message: str, advice: str, groups: Sequence[Sequence[str]]) -> Finding:
    ids = tuple(dict.fromkeys(pair_id for group in groups for pair_id in group))
    return Finding(check, severity, message, advice, ids, {"groups": [list(group) for group in groups]})


def _subtasks(pairs: Sequence[PreferencePair], limits: TextLimits) -> Iterator[Finding]:
    counts = Counter(pair.subtask for pair in pairs)
    small = {name: count for name, count in counts.items() if count < limits.subtask_pairs}
    if small:
        ids = tuple(sorted(small, key=lambda name: small[name]))
        message = f"{len(small)} of {len(counts)} subtasks have fewer than {limits.subtask_pairs} pairs"
        advice = "Add pairs, or join subtasks: what is particular to one pair decides there. See `rose-ray shots`."
        yield Finding("small_subtask", "warning", message, advice, ids, {"pairs": small})


def length_findings(counts: Mapping[str, tuple[int, int]], unit: str, limits: TextLimits) -> Iterator[Finding]:
    """Say how the lengths of the sides differ.

    Args:
        counts: By pair, the lengths of the chosen and of the rejected side, at least 1.
        unit: What was counted, in the plural.
        limits: From where on it is a warning.
    """
    if not counts:
        return
    ratios = {pair_id: chosen / rejected for pair_id, (chosen, rejected) in counts.items()}
    longer = sum(ratio > 1 for ratio in ratios.values())
    shorter = sum(ratio < 1 for ratio in ratios.values())
    median = statistics.median(ratios.values())
    spread = statistics.median(max(ratio, 1 / ratio) for ratio in ratios.values())
    one_sided = max(longer, shorter) >= limits.longer_share * len(ratios) and sign_test(longer, shorter) < CHANCE
    message = (
        f"the chosen side is the longer one in {longer} of {len(ratios)} pairs; median ratio of chosen to rejected "
        f"{median:.2f}, of the longer to the shorter one {spread:.2f} ({unit})"
    )
    numbers = {"chosen_longer": longer, "chosen_shorter": shorter, "median_ratio": median, "ratio": ratios}
    if not one_sided and spread < limits.length_ratio:
        yield Finding("lengths", "note", message, "Nothing to do: the sides are alike in length.", (), numbers)
        return
    ids = sorted(ratios, key=lambda pair_id: -max(ratios[pair_id], 1 / ratios[pair_id]))
    unlike = tuple(each for each in ids if max(ratios[each], 1 / ratios[each]) >= limits.length_ratio)
    advice = (
        "Summed log-probabilities favour the longer side: compare with `objective: rose_simpo` or `rose_balanced`, or "
        "choose pairs of like length."
    )
    yield Finding("lengths", "warning", message, advice, unlike, numbers)
