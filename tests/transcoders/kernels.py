"""Running Triton kernels on a CUDA device or in the interpreter, compiling them without either, and their operands."""

from __future__ import annotations

import os
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from hagd.transcoders.sparse import products
from hagd.transcoders.sparse.support import Support
from tests.transcoders.test_products import PAIRS, random_pairs

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"

WIDE = 300  # more than one slab of columns, and no multiple of a tile
ROUNDING = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2**-7 if INTERPRETED else 2**-8}
"""Relative; the interpreter cuts float32 to bfloat16 off, a GPU rounds to the nearest."""


def on_a_device(test: Any) -> Any:
    """A test that runs on a CUDA device, or in a process whose kernels are interpreted."""
    runs = INTERPRETED or torch.cuda.is_available()
    return pytest.mark.gpu(pytest.mark.skipif(not runs, reason="no CUDA device, and no interpreter")(test))


def compiled(kernel: Any, pointers: dict[str, str], sizes: tuple[str, ...], warps: int, **tile: int) -> dict[str, Any]:
    """All stages of a kernel compiled for an H100, from its intermediate form to machine code."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = pointers | dict.fromkeys(sizes, "i32")
    aligned = {(i,): [["tt.divisibility", 16]] for i in range(len(signature))}
    source = ASTSource(kernel, signature | dict.fromkeys(tile, "constexpr"), constexprs=tile, attrs=aligned)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps}).asm


def triton_products_everywhere(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The products of `DEVICE` run as these Triton kernels."""
    from hagd.transcoders.sparse import triton_products

    monkeypatch.setattr(products, "product_kernels", lambda m, *operands: triton_products)
    return triton_products


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(DEVICE, dtype)


def pairs(pattern: str, dtype: torch.dtype) -> tuple[Support, Tensor, Tensor]:
    """A support, values `[n]`, and both as a dense float64 matrix `[B, m]`."""
    support, values, _ = random_pairs(0, *PAIRS[pattern])
    support = Support(support.index.to(DEVICE), support.offsets.to(DEVICE), support.m)
    values = values.to(DEVICE, dtype)
    dense = torch.zeros(support.n_tokens, support.m, dtype=torch.float64, device=DEVICE)
    dense[support.token, support.index] = values.double()
    return support, values, dense


def assert_rounded(found: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), exact, rtol=ROUNDING[dtype], atol=min(ROUNDING[dtype], 1e-5))
