"""Weights in: base model, adapter, checkpoints, and the layout of the adapter's parameters."""
