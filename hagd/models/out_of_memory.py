"""Which errors say that there is not enough memory: torch, NumPy and CUDA's libraries each have their own."""

from __future__ import annotations

import torch

_SAID = ("DefaultCPUAllocator", "ALLOC_FAILED")
"""By errors of no class of their own: of torch on a CPU, and of CUDA's libraries."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on a CPU or on a device."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(said in str(error) for said in _SAID)
