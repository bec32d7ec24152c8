"""Tables on local disk, for what is read again soon and need not fit into memory.

A spool lies in the folder for temporary files (``TMPDIR``) without a name, so nothing stays when the process ends.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator

import pyarrow as pa


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
