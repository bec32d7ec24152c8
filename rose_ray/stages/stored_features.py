"""Feature tables as matrices, in the scale that a target asks for. Shapes: N rows."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from rose_ray.config.target import Normalization
from rose_ray.kernels.feature_matrix import FeatureMatrix

LEAST_OWN = 1e-5
"""Of a direction's squared length. Its common part is kept in float32, so what is left of 1 errs by 1e-7."""


def normalized_features(table: pa.Table, normalize: Normalization) -> FeatureMatrix:
    """Return features in the scale that ``normalize`` asks for.

    Stored features are projections divided by the exact length of what was projected, so ``exact`` is what is stored.
    Exact numbers stand behind the projected ones, as in the bank. ``own`` scales what is left beside the common
    direction to length 1; that direction's own number, the last, is for the bank's directions to leave out.
    """
    features = stored_features(table)
    return features.times(row_scales(table, features, normalize))


def row_scales(table: pa.Table, features: FeatureMatrix, normalize: Normalization) -> np.ndarray | None:
    """Return the factor of each row of stored features, float64 [N]; None where they stay as they are."""
    if normalize == "none":
        norms_N: np.ndarray = table["norm"].to_numpy()
        return norms_N
    if normalize == "own":
        own_N = 1.0 - features.last_N**2
        # A row with next to nothing of its own has no direction to compare, and float32 no digits of it: it scores 0.
        scales_N: np.ndarray = np.where(own_N > LEAST_OWN, 1.0 / np.sqrt(np.maximum(own_N, LEAST_OWN)), 0.0)
        return scales_N
    if normalize == "projected":
        with np.errstate(divide="ignore"):  # a row of zeros has no direction: its score is refused as not finite
            factors_N: np.ndarray = 1.0 / np.sqrt(features.squares())
        return factors_N
    return None


def stored_features(table: pa.Table) -> FeatureMatrix:
    """Return features as stored: codes of projected numbers, exact ones behind them."""
    dim = int(table.schema.metadata[b"dim"])
    return FeatureMatrix(
        _list_column(table, "feature") if dim else None,
        table["scale"].to_numpy() if "scale" in table.column_names else None,
        dim,
        _list_column(table, "exact") if "exact" in table.column_names else None,
    )


def _list_column(table: pa.Table, name: str) -> np.ndarray:
    width = table.schema.field(name).type.list_size
    stored = table[name].combine_chunks()
    values = (stored.chunk(0) if isinstance(stored, pa.ChunkedArray) else stored).flatten()
    column: np.ndarray = values.to_numpy(zero_copy_only=False).reshape(-1, width)
    return column
