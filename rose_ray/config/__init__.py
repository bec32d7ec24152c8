"""One YAML, checked strictly before anything runs."""

from rose_ray.config.load import load_config, parse_config
from rose_ray.config.models import JobConfig

__all__ = ["JobConfig", "load_config", "parse_config"]
