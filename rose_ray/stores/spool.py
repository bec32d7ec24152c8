"""Tables on local disk, for what is read again soon and need not fit into memory.

A spool lies in the folder for temporary files (``TMPDIR``) without a name, so nothing stays when the process ends.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator

import numpy as np
import pyarrow as pa

_LEAST_ROWS = 1 << 14
_MOST_SPOOLS = 128
"""Files held open at once."""

_WAITING_BYTES = 1 << 26


class Spool:
    """Tables of one schema, appended and then read in the same order.

    Attributes:
        schema: Of every table.
        num_rows: Appended so far.
    """

    def __init__(self, schema: pa.Schema) -> None:
        self.schema, self.num_rows = schema, 0
        self._file = tempfile.TemporaryFile(prefix="rose_ray-")  # noqa: SIM115 - closed by `close`
        self._writer = pa.ipc.new_stream(pa.PythonFile(self._file, mode="w"), schema)

    def __enter__(self) -> Spool:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def append(self, table: pa.Table) -> None:
        """Add a table.

        Raises:
            OSError: The disk is full.
        """
        self._writer.write_table(table.combine_chunks())
        self.num_rows += table.num_rows

    def read(self, num_rows: int) -> Iterator[pa.Table]:
        """Yield everything again, in tables of ``num_rows`` rows, the last one shorter. Nothing may follow."""
        self._writer.close()
        self._file.seek(0)
        waiting: list[pa.RecordBatch] = []
        num_waiting = 0
        for batch in pa.ipc.open_stream(pa.PythonFile(self._file, mode="r")):
            waiting.append(batch)
            num_waiting += batch.num_rows
            while num_waiting >= num_rows:
                table = pa.Table.from_batches(waiting, self.schema)
                yield table.slice(0, num_rows)
                waiting = table.slice(num_rows).to_batches()
                num_waiting -= num_rows
        if num_waiting:
            yield pa.Table.from_batches(waiting, self.schema)

    def close(self) -> None:
        """Give the disk space back."""
        self._file.close()


class PlacedSpool:
    """Rows that have places from 1 on, appended in any order and read in the order of their places.

    Args:
        schema: Of every table.
        column: Holds the place.
        num_rows: Of all tables; every place up to it occurs once.
    """

    def __init__(self, schema: pa.Schema, column: str, num_rows: int) -> None:
        self._schema, self._column = schema, column
        self._width = max(_LEAST_ROWS, -(-num_rows // _MOST_SPOOLS))
        self._spools = [Spool(schema) for _ in range(-(-num_rows // self._width))]
        self._waiting: list[pa.Table] = []
        self._num_bytes = 0

    def __enter__(self) -> PlacedSpool:
        return self

    def __exit__(self, *error: object) -> None:
        for spool in self._spools:
            spool.close()

    def append(self, table: pa.Table) -> None:
        """Add a table.

        Raises:
            OSError: The disk is full.
        """
        self._waiting.append(table)
        self._num_bytes += table.nbytes
        if self._num_bytes > _WAITING_BYTES:
            self._deal()

    def _deal(self) -> None:
        table = pa.concat_tables(self._waiting or [self._schema.empty_table()])
        spool_N = (table[self._column].to_numpy() - 1) // self._width
        for number in np.unique(spool_N):
            self._spools[number].append(table.filter(pa.array(spool_N == number)))
        self._waiting, self._num_bytes = [], 0

    def read(self) -> Iterator[pa.Table]:
        """Yield all rows in order, some thousands at a time. Nothing may follow."""
        self._deal()
        for spool in self._spools:
            yield from (table.sort_by(self._column) for table in spool.read(self._width))
