"""Looks at a target: its pairs, the directions they make, and whether these can be trusted."""
