"""Measurements: this engine and its rivals."""
