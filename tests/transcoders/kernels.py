"""Running Triton kernels on a CUDA device or in the interpreter, and compiling them without either."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"


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
