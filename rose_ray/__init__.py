"""Reward-oriented selection of instruction-tuning data on a Ray cluster.

The names in ``__all__`` are the library (docs/library.md). They load torch when first used, and never Ray.
"""

from typing import TYPE_CHECKING

__version__ = "0.1.0"

__all__ = ["AdamMoments", "AdamState", "Features", "GradientEngine"]

if TYPE_CHECKING:
    from rose_ray.engine import AdamMoments, AdamState, Features, GradientEngine
else:  # hidden from type checkers, which would take any name for an attribute

    def __getattr__(name):
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from rose_ray import engine

        return getattr(engine, name)
