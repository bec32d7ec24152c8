"""``python -m rose_ray``: the same as the ``rose-ray`` command."""

from rose_ray.cli import app

app()
