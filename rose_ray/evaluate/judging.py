"""Judging one model's answers against another's: both orders, kept part by part, so that nothing is asked twice."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from rose_ray.config.judge import JudgeConfig
from rose_ray.data.preferences import PreferencePair
from rose_ray.errors import AccountingError, JudgeError
from rose_ray.evaluate.judges import Comparison, Judge, preference_of
from rose_ray.evaluate.measures import Item
from rose_ray.kernels.win_rate import both_orders_score
from rose_ray.stores.manifest import artefact_key, commit_artefact, find_manifest, read_manifest
from rose_ray.stores.workspace import FileRecord, Workspace

VERDICTS_FOLDER = "evaluation/verdicts"
_PART = "part-"


def verdict_folder(identity: Mapping[str, Any], ours: str, theirs: str) -> tuple[str, dict[str, Any]]:
    """Return where verdicts lie, and what they are made from.

    Args:
        identity: Of the judge.
        ours, theirs: Folders of what is compared: answers, or numbers; or ``chosen``.
    """
    made_from = {"stage": "evaluation_verdicts", "judge": dict(identity), "ours": ours, "theirs": theirs}
    return f"{VERDICTS_FOLDER}/{artefact_key(made_from)}", made_from


def judge_answers(
    workspace: Workspace,
    config: JudgeConfig,
    judge: Judge,
    pairs: Sequence[PreferencePair],
    ours: Sequence[Item],
    theirs: Sequence[Item],
    folder: str,
    made_from: dict[str, Any],
    after_batch: Callable[[], None] | None = None,
) -> str:
    """Judge answers to the same prompts in both orders, those without a verdict yet, and return the folder.

    A verdict has ``item_id``, ``ours_first``, ``ours_second`` (preferences in the order shown), ``score`` (1 won in
    both orders, 0.5 tied or split, 0 lost; None without a verdict), ``length_difference`` (characters, ours less
    theirs) and ``detail``. Verdicts are written after every ``parallel`` of them, also where one of them fails.

    Args:
        workspace: Held by the caller.
        config: Of the judge.
        judge: Asked by ``parallel`` threads.
        pairs: Whose prompts were answered.
        ours, theirs: Answers in the order of the pairs.
        folder, made_from: From `verdict_folder`.
        after_batch: Called when ``parallel`` comparisons were asked about, before their verdicts are written.

    Raises:
        AccountingError: The answers are to other prompts.
        JudgeError: The judge stopped, or gave no verdict too often; what was judged is kept.
    """
    started = time.monotonic()
    if find_manifest(workspace, folder) is not None:
        return folder
    ids = [pair.pair_id for pair in pairs]
    if any([item["item_id"] for item in items] != ids for items in (ours, theirs)):
        raise AccountingError("answers and prompts differ; run `rose-ray evaluate` again.")
    parts, done = _parts(workspace, folder)
    waiting = [i for i, item_id in enumerate(ids) if item_id not in done]
    for start in range(0, len(waiting), config.parallel):
        batch = waiting[start : start + config.parallel]
        verdicts, failure = _judge_batch(config, judge, [(pairs[i], ours[i], theirs[i]) for i in batch])
        if after_batch is not None:
            after_batch()
        if verdicts:
            parts.append(_write_part(workspace, folder, len(parts), verdicts))
            done |= {verdict["item_id"]: verdict for verdict in verdicts}
        if failure is not None:
            raise failure
        _check_usable(config, list(done.values()), len(ids))
    counts = {"items": len(done), "unusable": sum(v["score"] is None for v in done.values())}
    commit_artefact(
        workspace,
        "evaluation_verdicts",
        made_from,
        parts,
        counts,
        {"judge": config.name},
        started=started,
        folder=folder,
    )
    return folder


def _judge_batch(
    config: JudgeConfig, judge: Judge, batch: Sequence[tuple[PreferencePair, Item, Item]]
) -> tuple[list[Item], JudgeError | None]:
    with ThreadPoolExecutor(config.parallel) as pool:
        asked = [pool.submit(judge_pair, judge, *each) for each in batch]
    verdicts: list[Item] = []
    failure: JudgeError | None = None
    for each in asked:
        error = each.exception()
        if error is None:
            verdicts.append(each.result())
        elif isinstance(error, JudgeError):
            failure = failure or error
        else:
            raise error
    return verdicts, failure


def judge_pair(judge: Judge, pair: PreferencePair, ours: Item, theirs: Item) -> Item:
    """Judge one prompt's answers in both orders; equal answers are a tie that nobody is asked about.

    Raises:
        JudgeError: The judge stopped.
    """
    mine, other = ours["answer"], theirs["answer"]
    verdict = {"item_id": pair.pair_id, "length_difference": len(mine) - len(other), "detail": ""}
    if mine == other:
        return {**verdict, "ours_first": "tie", "ours_second": "tie", "score": 0.5}
    first = judge.rule(Comparison(pair.prompt, mine, other, pair.chosen))
    second = judge.rule(Comparison(pair.prompt, other, mine, pair.chosen))
    score = None
    if first.preference is not None and second.preference is not None:
        score = both_orders_score(first.preference, second.preference)
    return {
        **verdict,
        "ours_first": first.preference,
        "ours_second": second.preference,
        "score": score,
        "detail": first.detail or second.detail,
    }


def judge_numbers(
    workspace: Workspace,
    config: JudgeConfig,
    ours: Sequence[Item],
    theirs: Sequence[Item],
    folder: str,
    made_from: dict[str, Any],
) -> str:
    """Compare cross-entropies of the chosen answers, token-mean, lower wins, and return the folder of the verdicts.

    Args:
        workspace, config, folder, made_from: As in `judge_answers`.
        ours, theirs: Items of ``pairs`` benchmarks.

    Raises:
        AccountingError: They are of other pairs.
    """
    started = time.monotonic()
    if find_manifest(workspace, folder) is not None:
        return folder
    verdicts = []
    for mine, other in zip(ours, theirs, strict=True):
        if mine["item_id"] != other["item_id"]:
            raise AccountingError("two models were measured on other pairs; run `rose-ray evaluate` again.")
        gain = (mine["logp_chosen"] - other["logp_chosen"]) / mine["tokens_chosen"]
        preference = preference_of(gain, config.tie_margin)
        swapped = preference_of(-gain, config.tie_margin)
        verdicts.append(
            {
                "item_id": mine["item_id"],
                "length_difference": 0,  # both are asked about the same text
                "detail": "",
                "ours_first": preference,
                "ours_second": swapped,
                "score": both_orders_score(preference, swapped),
            }
        )
    files = [_write_part(workspace, folder, 0, verdicts)]
    counts = {"items": len(verdicts), "unusable": 0}
    commit_artefact(
        workspace,
        "evaluation_verdicts",
        made_from,
        files,
        counts,
        {"judge": config.name},
        started=started,
        folder=folder,
    )
    return folder


def read_verdicts(workspace: Workspace, folder: str) -> list[Item]:
    """Return the verdicts of a finished judging, by item id: the last of those that were asked for again.

    Raises:
        StoreError: They are not there, or altered.
    """
    last: dict[str, Item] = {}
    for file in sorted(read_manifest(workspace, folder).files, key=lambda file: file.path):
        last |= _by_item(workspace.read(file.path, file))
    return [last[item_id] for item_id in sorted(last)]


def _check_usable(config: JudgeConfig, verdicts: Sequence[Item], total: int) -> None:
    unusable = [verdict for verdict in verdicts if verdict["score"] is None]
    if len(unusable) > config.max_unusable * total:
        shown = "; ".join(f"{verdict['item_id']}: {verdict['detail']}" for verdict in unusable[:3])
        raise JudgeError(
            f"judge {config.name}: {len(unusable)} of {len(verdicts)} comparisons so far have no verdict, above "
            f"max_unusable {config.max_unusable:g} of {total}: {shown}. What was judged is kept; look at the judge's "
            "model, or raise `max_unusable`."
        )


def _parts(workspace: Workspace, folder: str) -> tuple[list[FileRecord], dict[str, Item]]:
    """What an earlier judging of the same left: parts written whole, one after the other, and their verdicts.

    What got none is asked again: else a judge that stopped for nonsense would never recover.
    """
    records: list[FileRecord] = []
    done: dict[str, Item] = {}
    for path in workspace.list_folder(folder):
        if path.rpartition("/")[2].startswith(_PART) and path.endswith(".jsonl"):
            data = workspace.read(path)
            records.append(workspace.write(path, data))  # the same bytes, for their record
            done |= _by_item(data)
    return records, {item_id: verdict for item_id, verdict in done.items() if verdict["score"] is not None}


def _by_item(part: bytes) -> dict[str, Item]:
    return {verdict["item_id"]: verdict for verdict in map(json.loads, part.decode().splitlines())}


def _write_part(workspace: Workspace, folder: str, number: int, verdicts: Sequence[Item]) -> FileRecord:
    text = "".join(json.dumps(verdict, ensure_ascii=False) + "\n" for verdict in verdicts)
    return workspace.write(f"{folder}/{_PART}{number:05d}.jsonl", text.encode(), num_rows=len(verdicts))
