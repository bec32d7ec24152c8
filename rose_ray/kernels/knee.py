"""The knee of a curve: the budget from which more rows bring little.

Shapes: none; a handful of points.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from rose_ray.errors import ShapeError

SMALLEST_RISE = 1e-9
"""A point counts as above the chord from here on, in units of the curve's whole rise: rounding is below it."""


def knee(budgets: Sequence[float], values: Sequence[float], *, higher_is_better: bool = True) -> int | None:
    """Return the place of the knee, or None where the curve has none.

    Budgets are put on a logarithmic axis and both axes are scaled to [0, 1]; the knee is the point that lies highest
    above the straight line from the smallest budget to the best value (Satopaa et al. 2011, "Finding a kneedle in a
    haystack", without smoothing). Points behind the best one are left out: a curve that falls again has its best there.
    None where no point lies above the line, where the smallest budget is best, or with fewer than three points left.

    Args:
        budgets: Rising, above 0.
        values: One each, finite.
        higher_is_better: False for losses.

    Raises:
        ShapeError: Not one value per budget, or budgets that do not rise from above 0.
    """
    if len(budgets) != len(values) or any(b <= 0 for b in budgets) or list(budgets) != sorted(set(budgets)):
        raise ShapeError(f"budgets {list(budgets)} with {len(values)} values; expected rising budgets, a value each")
    gains = [value if higher_is_better else -value for value in values]
    best = max(range(len(gains)), key=lambda place: (gains[place], -place), default=0)
    if best < 2:
        return None
    left, right = math.log(budgets[0]), math.log(budgets[best])
    rises = [
        (gains[place] - gains[0]) / (gains[best] - gains[0]) - (math.log(budgets[place]) - left) / (right - left)
        for place in range(best + 1)
    ]
    highest = max(range(best + 1), key=lambda place: (rises[place], -place))
    return highest if rises[highest] > SMALLEST_RISE else None
