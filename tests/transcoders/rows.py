"""Rows of which the k largest are hard to tell, and what has to be found in them."""

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


def assert_largest(values: Tensor, columns: Tensor, pre: Tensor, k: int) -> None:
    """Of `rows`, as torch finds them."""
    kept = values.sort(descending=True, dim=1).values
    torch.testing.assert_close(kept, pre.topk(k).values, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(values, pre.gather(1, columns), rtol=0, atol=0, equal_nan=True)
    assert (columns.diff(dim=1) > 0).all(), "each once, in order"
    assert columns[2].tolist() == list(range(k)), "the first of those that are the same"
