"""Rows in: reading files, conversations, preference pairs, and what a model sees of them."""
