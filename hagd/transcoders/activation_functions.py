"""The four ways in which pre-activations become sparse features, on the pairs that can be non-zero.

TopK (Gao et al. 2024), BatchTopK (Bussmann et al. 2024), JumpReLU (Rajamanoharan et al. 2024) and ReLU, whose
sparsity is the work of the L1 term alone.

Shape legend: n pairs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class JumpReLU(torch.autograd.Function):
    """`z · 1[z > θ]` with the straight-through gradient of θ (a rectangle of width `bandwidth` around it)."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        """`z`, `threshold`: `[n]`."""
        ctx.save_for_backward(z, threshold)
        ctx.bandwidth = bandwidth
        return z * (z > threshold)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        z, threshold = ctx.saved_tensors
        near = (z - threshold).abs() < ctx.bandwidth / 2
        return gradients[0] * (z > threshold), -gradients[0] * near * threshold / ctx.bandwidth, None


class Step(torch.autograd.Function):
    """`1[z > θ]`, summed over features the L0 norm; the same straight-through gradient of θ, none of z."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        """`z`, `threshold`: `[n]`."""
        ctx.save_for_backward(z, threshold)
        ctx.bandwidth = bandwidth
        return (z > threshold).to(z.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor, None]:
        z, threshold = ctx.saved_tensors
        near = (z - threshold).abs() < ctx.bandwidth / 2
        return None, -gradients[0] * near / ctx.bandwidth, None
