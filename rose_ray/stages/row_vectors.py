"""The vectors that a selection compares rows by, read from where a run has left them."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rose_ray.errors import StoreError
from rose_ray.kernels.feature_matrix import FeatureMatrix
from rose_ray.stages.candidates import Scores
from rose_ray.stages.diversity import ReadVectors
from rose_ray.stages.pool import skipped_rows
from rose_ray.stages.select import shards_of
from rose_ray.stages.stored_features import stored_features
from rose_ray.stores.features import checkpoint_file
from rose_ray.stores.manifest import Manifest
from rose_ray.stores.read_ahead import depth_for, read_ahead
from rose_ray.stores.shards import FEATURES, find_receipt
from rose_ray.stores.workspace import Workspace


@dataclass(frozen=True)
class VectorSource:
    """Where rows' vectors lie.

    Attributes:
        kind, key: Of the artefacts, one a shard: features, or values of a method.
        file: The one of a shard's files that holds them.
        made_of: Folders that they and what they came from lie in.
    """

    kind: str
    key: str
    file: str
    made_of: tuple[str, ...]

    def identity(self) -> dict[str, Any]:
        """Return what says which vectors they are."""
        return {"kind": self.kind, "key": self.key, "file": self.file}


def gradient_vectors(scores: Manifest) -> VectorSource:
    """Return a gradient target's features at its last checkpoint. ``scores``: of its score table."""
    features = scores.facts["features"]
    return VectorSource(FEATURES, features["key"], checkpoint_file(features["checkpoints"][-1]), ())


def vector_reader(workspace: Workspace, pool: Manifest, scores: Scores, source: VectorSource) -> ReadVectors:
    """Return what reads vectors of scored rows by their positions, a shard at a time.

    It raises StoreError where a shard has none, AlteredFileError where a file differs from its record.
    """
    skipped = skipped_rows(workspace, pool)

    def read(shard: str, wanted: pa.Table) -> tuple[np.ndarray, FeatureMatrix]:
        receipt = find_receipt(workspace, source.kind, source.key, shard, skipped.get(shard, []))
        if receipt is None:
            raise StoreError(f"shard {shard} lacks the vectors of selection.diversity. Run `rose-ray run` again.")
        record = receipt.file(source.file)
        stored = workspace.read_table(record.path, record)
        places = pc.index_in(wanted["row_id"], value_set=stored["row_id"])
        found = stored.take(places.drop_null())
        vectors = stored_features(found) if source.kind == FEATURES else _values(found)
        return wanted["position"].to_numpy()[places.is_valid().to_numpy()], vectors

    def read_all(positions: np.ndarray) -> Iterator[tuple[np.ndarray, FeatureMatrix]]:
        rows = scores.rows(positions, ["row_id", "shard"]).append_column("position", pa.array(positions))
        fullest = max(entry["num_rows"] for entry in pool.facts["shards"])
        depth = depth_for(fullest * _ROW_BYTES)
        return read_ahead((functools.partial(read, *each) for each in shards_of(rows)), depth)

    return read_all


_ROW_BYTES = 1 << 14
"""What a vector takes as it is read: 4,096 numbers of a state, 8,192 of a feature in float16; signs take less."""


def _values(table: pa.Table) -> FeatureMatrix:
    width = table.schema.field("values").type.list_size
    return FeatureMatrix(pc.list_flatten(table["values"]).to_numpy().reshape(-1, width), None, width)
