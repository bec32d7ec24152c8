"""Reward-oriented selection of instruction-tuning data on a Ray cluster."""

__version__ = "0.1.0"
