"""What many tests share: small things that need neither network nor Ray, and the one local Ray for those that do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.tiny import byte_level_tokenizer, make_pair_rows, make_pool_rows, save_base, tiny_config

ROOT = Path(__file__).parent
_FIGURE = "figure"
_NEED_RAY = ("distributed", "e2e", "chaos")
"""Folders whose tests need a cluster, or what those that do have made."""


@pytest.hookimpl(tryfirst=True)  # xdist reads the marks in the same hook
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Say what has to run in one process, where there are several: all that needs Ray, and any other file's tests.

    What needs Ray comes first: it takes longest.
    """
    for item in items:
        item.add_marker(pytest.mark.xdist_group("ray" if _needs_ray(item) else str(item.path)))
    items.sort(key=lambda item: not _needs_ray(item))


def _needs_ray(item: pytest.Item) -> bool:
    folder = item.path.relative_to(ROOT).parts[0]
    cluster = "ray_cluster" in getattr(item, "fixturenames", ()) or item.get_closest_marker("ray") is not None
    return folder in _NEED_RAY or cluster


@pytest.fixture
def say_figure(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Keep a measured figure for the end of the tests' output, whether they pass or not."""
    return lambda text: request.node.user_properties.append((_FIGURE, text))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print what `say_figure` kept."""
    reports = [report for part in terminalreporter.stats.values() for report in part]
    figures = [
        text
        for report in reports
        if getattr(report, "when", None) == "call"
        for name, text in report.user_properties
        if name == _FIGURE
    ]
    if figures:
        terminalreporter.section("figures")
        for figure in figures:
            terminalreporter.write_line(figure)


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)  # tiny tensors: handing them to threads costs more than the sums


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """See `local_ray`."""
    from tests.distributed.session import local_ray

    with local_ray():
        yield


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """See `byte_level_tokenizer`."""
    return byte_level_tokenizer()


@pytest.fixture(scope="session")
def base_of(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Callable[[str], str]:
    """Folder of a tiny base model of a given architecture, made when it is first asked for."""

    @cache
    def make(architecture: str) -> str:
        folder = tmp_path_factory.mktemp(architecture)
        return save_base(folder, tiny_config(architecture, len(tokenizer)), tokenizer)

    return make


@pytest.fixture(scope="session")
def base_folder(base_of: Callable[[str], str]) -> str:
    """Folder of the tiny Llama."""
    return base_of("llama")


@pytest.fixture(scope="session")
def wide_base_of(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Callable[[str], str]:
    """Folder of a base model whose layers all read a multiple of 64 numbers, as NF4 wants it on the CPU."""

    @cache
    def make(architecture: str) -> str:
        config = tiny_config(architecture, len(tokenizer), hidden_size=64, intermediate_size=128, head_dim=16)
        return save_base(tmp_path_factory.mktemp(f"wide-{architecture}"), config, tokenizer)

    return make


@pytest.fixture(scope="session")
def wide_base(wide_base_of: Callable[[str], str]) -> str:
    """Folder of the wide Llama."""
    return wide_base_of("llama")


@pytest.fixture(scope="session")
def pool_rows() -> list[dict[str, Any]]:
    """24 records of a pool."""
    return make_pool_rows(24)


@pytest.fixture(scope="session")
def pair_rows() -> list[dict[str, Any]]:
    """6 records of preference pairs."""
    return make_pair_rows(6)
