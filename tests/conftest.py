"""What many tests share: small things that need neither network nor Ray, and the one local Ray for those that do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

from tests.tiny import byte_level_tokenizer, make_pair_rows, make_pool_rows, save_base, tiny_config

ROOT = Path(__file__).parents[1]
_RAY = "ray"
_FIGURE = "figure"
_NEED_RAY = ("distributed", "e2e", "chaos")
"""Folders whose tests need a cluster, or what those that do have made."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let what needs Ray come first: it takes longest, and one process runs all of it."""
    items.sort(key=lambda item: _scope(item.nodeid) != _RAY)


class _RayInOneProcess(LoadScopeScheduling):
    """Where several processes share the tests, a file's stay together, and so does all that needs Ray."""

    def _split_scope(self, nodeid: str) -> str:
        return _scope(nodeid)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> LoadScopeScheduling:
    """See `_RayInOneProcess`."""
    return _RayInOneProcess(config, log)


def _scope(nodeid: str) -> str:
    file = nodeid.partition("::")[0]
    return _RAY if _needs_ray(file) else file


@cache
def _needs_ray(file: str) -> bool:
    path = ROOT / file
    return path.relative_to(ROOT / "tests").parts[0] in _NEED_RAY or "mark.ray" in path.read_text(encoding="utf-8")


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
