"""Tables kept between calls, up to a number of bytes."""

from __future__ import annotations

from collections.abc import Callable, Hashable

from torch import Tensor

TABLE_CACHE_BYTES = 1 << 30
"""Default cap: the sketch keeps about 1 byte a parameter, so about 10**9 parameters."""

Table = tuple[Tensor, ...]


class TableCache:
    """Keeps the first tables that fit; later ones are made anew at each use. Pickles without its tables.

    Args:
        max_bytes: Cap on all tables together.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self._tables: dict[Hashable, Table] = {}

    def get(self, key: Hashable, make: Callable[[], Table]) -> Table:
        """Return the table of ``key``, made by ``make`` where it is not kept."""
        if key not in self._tables:
            table = make()
            num_bytes = sum(part.nbytes for part in table)
            if self.num_bytes + num_bytes > self.max_bytes:
                return table
            self.num_bytes += num_bytes
            self._tables[key] = table
        return self._tables[key]

    def __reduce__(self) -> tuple[type[TableCache], tuple[int]]:
        return TableCache, (self.max_bytes,)
