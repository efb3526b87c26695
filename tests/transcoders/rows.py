"""Rows of which the k largest are hard to tell."""

from __future__ import annotations

import torch
from torch import Tensor


def rows(m: int, dtype: torch.dtype) -> Tensor:
    """Distinct, of few numbers, constant, of signed zeros, infinite, and with NaN of either sign here or everywhere."""
    pre = torch.randn(8, m, generator=torch.Generator().manual_seed(m))
    pre[1] = pre[1].round()
    pre[2] = -3
    pre[3] = torch.where(pre[3] > 0, 0.0, -0.0)
    pre[4, ::3], pre[4, 1::3] = torch.inf, -torch.inf
    pre[5, m // 2] = torch.nan
    pre[6], pre[7] = torch.nan, -torch.tensor(torch.nan)
    return pre.to(dtype)
