"""The mathematics: pure functions on tensors and arrays.

Nothing here reads a file, a clock, the environment or a global random state, and nothing imports beyond
torch, numpy, the standard library and ``rose_ray.errors``. Tensor names end in their shape, one capital per
axis; each module lists the capitals it uses.
"""
