"""One YAML, checked strictly before anything runs."""

from rose_ray.config.job import JobConfig
from rose_ray.config.load import load_config, parse_config

__all__ = ["JobConfig", "load_config", "parse_config"]
