"""Is one side ahead more often than chance has it?"""

from __future__ import annotations

from math import comb

from rose_ray.errors import NumericsError


def sign_test(num_ahead: int, num_other: int) -> float:
    """Return the two-sided p value of the sign test: how often a fair coin is at least as uneven.

    Ties are left out by the caller. 1 where there is nothing to count.

    Raises:
        NumericsError: A count is negative.
    """
    if num_ahead < 0 or num_other < 0:
        raise NumericsError(f"counts are {num_ahead} and {num_other}; expected 0 or more")
    total = num_ahead + num_other
    tail = sum(comb(total, number) for number in range(max(num_ahead, num_other), total + 1))
    return float(min(1.0, 2 * tail / 2**total))
