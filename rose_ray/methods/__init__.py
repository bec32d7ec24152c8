"""Selectors that score rows by themselves, under one interface: see `rose_ray.methods.interface`."""
