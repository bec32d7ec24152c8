"""What pairs are made from is never scored on: files that are given as both are refused."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

from rose_ray.config.target import TargetConfig
from rose_ray.data.records import file_digest
from rose_ray.errors import ConfigError
from rose_ray.filesystem import Location, expand


def check_held_out(
    target: TargetConfig, held_out: Sequence[Location], *, key: str, splits: Collection[str] | None = None
) -> None:
    """Refuse held-out files that a target's pairs come from, by path or by content.

    A file may serve both where both sides name splits and these differ.

    Args:
        target: Its pairs.
        held_out: Files of test text or held-out pairs.
        key: Of the configuration that names them, for the message.
        splits: The only splits that are read of them.

    Raises:
        ConfigError: A file is on both sides; it is named.
    """
    for entry in target.pairs:
        own = entry.task.split if entry.task is not None else None
        if own is not None and splits is not None and own not in splits:
            continue
        for location, same in _shared(expand(entry.files), held_out):
            copy = "" if location.path == same.path else f", which holds the same bytes as {same.name}"
            of = f"split {own!r} of " if own is not None else ""
            raise ConfigError(
                f"target {target.name}: its pairs come from {of}{location.name}{copy}, and {key} names it as held out: "
                "what is measured there would say nothing. Take other files, or another split on either side."
            )


def _shared(mine: Sequence[Location], others: Sequence[Location]) -> Iterator[tuple[Location, Location]]:
    """Yield files of both sides that are the same; only those of one size are read."""
    sizes = {_size(other): other for other in others}
    digests = {}
    for location in mine:
        if (size := _size(location)) not in sizes:
            continue
        for other in others:
            if _size(other) != size:
                continue
            for each in (location, other):
                if each.path not in digests:
                    digests[each.path] = file_digest(each)
            if digests[location.path] == digests[other.path]:
                yield location, other


def _size(location: Location) -> int:
    return int(location.filesystem.get_file_info(location.path).size)
