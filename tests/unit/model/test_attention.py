"""Attention `auto`: which rows of which models go through matrix products, and what that changes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

import rose_ray.model.attention as attention
from rose_ray.config.model import ModelConfig
from rose_ray.kernels.causal_attention import SHORT_ROW
from rose_ray.model.attention import SHORT_ROWS, attention_that_runs
from rose_ray.model.base import load_base
from tests.tiny import ARCHITECTURES, save_base, tiny_config


def _load(base: str, dtype: str = "bfloat16", **settings: Any) -> Any:
    return load_base(ModelConfig(base=base, dtype=dtype, **settings)).eval()  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def processor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test runs the same on a processor without bfloat16 products: slower, but right."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})


def _ids(rows: int, length: int) -> Tensor:
    return torch.randint(5, 300, (rows, length), generator=torch.Generator().manual_seed(0))


@contextmanager
def _counting(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Lengths of the rows that go through the products, one a layer."""
    lengths: list[int] = []
    products = attention.causal_attention

    def counted(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        lengths.append(query.shape[2])
        return products(query, key, value, scale)

    with monkeypatch.context() as patch:
        patch.setattr(attention, "causal_attention", counted)
        yield lengths


@pytest.mark.parametrize("architecture", sorted(set(ARCHITECTURES) - {"mistral"}))
def test_short_rows_give_what_the_fused_operator_gives(
    architecture: str, base_of: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, ids = base_of(architecture), _ids(3, 21)
    exact = load_base(ModelConfig(base=base, dtype="float32"), dtype=torch.float64).eval()(ids).logits
    with _counting(monkeypatch) as lengths:
        made = _load(base)(ids).logits.double()
    fused = _load(base, attention="sdpa")(ids).logits.double()
    assert lengths == [21, 21]
    error, other = (float((each - exact).norm() / exact.norm()) for each in (made, fused))
    # two roundings of one model to 8 bits: neither is the nearer one by more than chance
    assert error < 1.5 * other


def test_only_bfloat16_on_a_cpu_is_touched(base_folder: str) -> None:
    assert _load(base_folder).config._attn_implementation == SHORT_ROWS
    for settings in ({"dtype": "float32"}, {"attention": "sdpa"}):
        assert _load(base_folder, **settings).config._attn_implementation == "sdpa"
    assert _load(base_folder, attention="eager").config._attn_implementation == "eager"


@pytest.mark.parametrize("capabilities", [{}, {"avx512_f": True, "avx512_bf16": False, "amx_bf16": False}])
def test_a_processor_without_bfloat16_products_keeps_the_fused_operator(
    capabilities: dict[str, bool], base_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert _load(base_folder).config._attn_implementation == "sdpa"
    assert attention_that_runs("auto", "cpu", torch.bfloat16) == "sdpa"


def test_what_runs_is_told_as_it_is() -> None:
    assert attention_that_runs("auto", "cpu", torch.bfloat16) == SHORT_ROWS
    assert attention_that_runs("auto", "cuda", torch.bfloat16) == "sdpa"
    assert attention_that_runs("auto", "cpu", torch.float32) == "sdpa"
    assert attention_that_runs("eager", "cpu", torch.bfloat16) == "eager"


def test_all_other_rows_take_the_fused_operator(
    tmp_path_factory: pytest.TempPathFactory, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config("llama", len(tokenizer), max_position_embeddings=SHORT_ROW + 8)
    base = save_base(tmp_path_factory.mktemp("long"), config, tokenizer)
    ids = _ids(2, SHORT_ROW + 1)
    packed = torch.cat([torch.arange(9), torch.arange(12)])[None]  # where places begin again, so does a sample
    hidden = torch.ones(2, 20, dtype=torch.long)
    hidden[0, :5] = 0
    cases: list[dict[str, Tensor]] = [
        {"input_ids": ids},
        {"input_ids": ids[:1, :21], "position_ids": packed},
        {"input_ids": ids[:, :20], "attention_mask": hidden},
        {"input_ids": ids[:, :1]},
    ]
    model, fused = _load(base), _load(base, attention="sdpa")
    for case in cases:
        with _counting(monkeypatch) as lengths:
            made = model(**case).logits
        assert lengths == []
        assert torch.equal(made, fused(**case).logits)


def test_a_window_shorter_than_the_row_takes_the_fused_operator(
    base_of: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    base = base_of("mistral")  # attends to 8 tokens
    model, fused = _load(base), _load(base, attention="sdpa")
    for length, layers in ((21, 0), (6, 2)):
        with _counting(monkeypatch) as lengths:
            made = model(_ids(2, length)).logits
        assert len(lengths) == layers
        if layers == 0:
            assert torch.equal(made, fused(_ids(2, length)).logits)
