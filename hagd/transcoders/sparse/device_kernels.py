"""Which kernels a device runs: Triton's on a CUDA device, compiled loops for large dictionaries on a CPU, else none, so
that torch's operators do."""

from __future__ import annotations

import importlib
import importlib.util
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from hagd.transcoders.sparse import cpu_products, cpu_selection
from hagd.transcoders.sparse.cpu_library import library

_LARGE = 1024
"""Features, from which what rounds otherwise is worth its while: on a CPU other libraries than torch's first choice
multiply, sum and select. With fewer it saves milliseconds a thousand steps, and earlier results are kept to the bit."""


def large(weight: Tensor) -> bool:
    """Whether a matrix `[m, d]` has so many features that speed counts for more than earlier results' bits."""
    return len(weight) >= _LARGE


def large_on_cpu(weight: Tensor) -> bool:
    """The same, on a CPU."""
    return weight.device.type == "cpu" and large(weight)


@cache
def triton_kernels(name: str) -> ModuleType | None:
    """The module of this package with Triton kernels for `name`, where Triton is installed."""
    if importlib.util.find_spec("triton") is None:
        return None
    return importlib.import_module(f"hagd.transcoders.sparse.triton_{name}")


def product_kernels(m: int, *operands: Tensor) -> ModuleType | None:
    """Those for sums over the active pairs of m features."""
    if operands[0].is_cuda:
        return triton_kernels("products")
    return cpu_products if compiled(m, *operands) and all(each.dtype == torch.float32 for each in operands) else None


def compiled(m: int, *operands: Tensor) -> bool:
    """Whether compiled loops are there for what belongs to m features."""
    return m >= _LARGE and all(each.device.type == "cpu" for each in operands) and library() is not None


def selection_kernels(pre: Tensor, k: int) -> ModuleType | None:
    """Those for the k largest of each row of `[c, m]`."""
    if pre.is_cuda:
        kernels = triton_kernels("selection")
        return kernels if kernels is not None and kernels.can_hold(pre, k) else None
    return cpu_selection if cpu_selection.can_hold(pre) and compiled(pre.shape[1], pre) else None
