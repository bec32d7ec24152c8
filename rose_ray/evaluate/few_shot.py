"""Few-shot examples are there to be learned from: nothing is measured on them."""

from __future__ import annotations

import re
from collections.abc import Sequence

from rose_ray.data.tasks.files import FEWSHOT
from rose_ray.data.tasks.rows import TaskRow
from rose_ray.errors import DataError

_TO_LEARN_FROM = ("dev", "train", "auxiliary_train")
"""Splits that are few-shot examples in some sets (MMLU) and the test in others (TyDiQA): measured on where named."""

_FILES = {
    re.compile(r"few[-_ ]?shot[^/:]*(?:\.(?:tar\.gz|tgz|tar):.*|$)", re.IGNORECASE | re.DOTALL): "its name says so",
    re.compile(r"_dev\.csv(?:\.gz|\.zst)?$", re.IGNORECASE): "MMLU's dev files are the examples of its prompts",
    re.compile(r"(?:^|[/:])cot-prompts/", re.IGNORECASE): "the cot-prompts of BIG-Bench Hard are worked examples",
}
"""Names of files that hold nothing but few-shot examples, whatever split their rows name; of an archive, its own name
or its member's."""


def check_file_is_a_test(file: str, what: str) -> None:
    """Refuse a file whose name says that it holds few-shot examples.

    Args:
        file: Its name; of a member of an archive, ``ARCHIVE:MEMBER``.
        what: Measures on it, for the message.

    Raises:
        DataError: It does.
    """
    for name, reason in _FILES.items():
        if name.search(file):
            raise DataError(
                f"{what}: {file} holds few-shot examples ({reason}): what models are shown, or targets are made from, "
                "is no test. Take the set's test file."
            )


def check_rows_are_a_test(rows: Sequence[TaskRow], what: str, *, is_named: bool, setting: str) -> None:
    """Refuse labelled rows that are few-shot examples, or may be and were not asked for by their split.

    Args:
        rows: That are measured on.
        what: Measures on them, for the message.
        is_named: Whether the configuration names their splits; if not, all rows are of one.
        setting: How it would, with ``{}`` for the split, for the message.

    Raises:
        DataError: They are; the first is named.
    """
    for file in dict.fromkeys(row.file for row in rows):
        check_file_is_a_test(file, what)
    for row in rows:
        if row.split == FEWSHOT:
            raise DataError(f"{what}: {row.where} is a few-shot example and no test. Take the set's test rows.")
    if not is_named and rows[0].split in _TO_LEARN_FROM:
        raise DataError(
            f"{what}: {rows[0].where} is of split {rows[0].split!r}, which may be few-shot examples and not a test. "
            f"Take another file, or set `{setting.format(rows[0].split)}` to measure on it all the same."
        )
