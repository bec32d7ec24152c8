"""Feature tables back to matrices, in the scale that a target asks for.

Shapes: N rows, D numbers of a feature.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from rose_ray.config.target import Normalization
from rose_ray.kernels.quantization import dequantize

LEAST_OWN = 1e-5
"""Of a direction's squared length. Its common part is kept in float32, so what is left of 1 errs by 1e-7."""


def normalized_features(table: pa.Table, normalize: Normalization) -> np.ndarray:
    """Return features [N, D] in the scale that ``normalize`` asks for.

    Stored features are projections divided by the exact length of what was projected, so ``exact`` is what is stored.
    Exact numbers stand behind the projected ones, as in the bank. ``own`` scales what is left beside the common
    direction to length 1; that direction's own number, the last, is for the bank's directions to leave out.
    """
    features_ND = stored_features(table)
    scales_N = row_scales(table, features_ND, normalize)
    return features_ND if scales_N is None else features_ND * scales_N[:, None]


def row_scales(table: pa.Table, features_ND: np.ndarray, normalize: Normalization) -> np.ndarray | None:
    """Return the factor of each row of stored features [N, D], float64 [N]; None where they stay as they are."""
    if normalize == "none":
        norms_N: np.ndarray = table["norm"].to_numpy()
        return norms_N
    if normalize == "own":
        own_N = 1.0 - features_ND[:, -1].astype(np.float64) ** 2
        # A row with next to nothing of its own has no direction to compare, and float32 no digits of it: it scores 0.
        scales_N: np.ndarray = np.where(own_N > LEAST_OWN, 1.0 / np.sqrt(np.maximum(own_N, LEAST_OWN)), 0.0)
        return scales_N
    if normalize == "projected":
        with np.errstate(divide="ignore"):  # a row of zeros has no direction: its score is refused as not finite
            factors_N: np.ndarray = 1.0 / np.linalg.norm(features_ND.astype(np.float64), axis=1)
        return factors_N
    return None


def stored_features(table: pa.Table) -> np.ndarray:
    """Return features [N, D] as stored, float32: projected numbers, then exact ones."""
    dim = int(table.schema.metadata[b"dim"])
    parts = []
    if dim:
        codes = _list_column(table, "feature")
        scales_N = table["scale"].to_numpy() if "scale" in table.column_names else None
        parts.append(dequantize(codes, scales_N, dim))
    if "exact" in table.column_names:
        parts.append(_list_column(table, "exact").astype(np.float32))
    features_ND: np.ndarray = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)
    return features_ND


def _list_column(table: pa.Table, name: str) -> np.ndarray:
    width = table.schema.field(name).type.list_size
    stored = table[name].combine_chunks()
    values = (stored.chunk(0) if isinstance(stored, pa.ChunkedArray) else stored).flatten()
    column: np.ndarray = values.to_numpy(zero_copy_only=False).reshape(-1, width)
    return column
