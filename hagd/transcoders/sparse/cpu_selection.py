"""The k largest of each row as compiled loops for a CPU (`cpu_top_of_rows.h`).

Shape legend: c rows, m columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hagd.transcoders.sparse.cpu_library import call_by_rows

_FUNCTIONS = {torch.float32: "top_of_rows_float32", torch.bfloat16: "top_of_rows_bfloat16"}


def can_hold(pre: Tensor) -> bool:
    """Whether rows are of a kind that `top_of_rows` takes."""
    return pre.dtype in _FUNCTIONS


def top_of_rows(pre: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Values and columns `[c, k]` of the k largest of each row of `[c, m]`, columns ascending; NaN is the largest."""
    n_rows, m = pre.shape
    pre = pre if pre.stride(1) == 1 else pre.contiguous()
    values, columns = pre.new_empty(n_rows, k), torch.empty(n_rows, k, dtype=torch.long)
    groups = -(-m // _group_size(m, k))
    call_by_rows(_FUNCTIONS[pre.dtype], n_rows, pre, pre.stride(0), m, k, groups, values, columns)
    return values, columns


def _group_size(m: int, k: int) -> int:
    """A power of two, about as many groups as members of k of them."""
    return 2 ** (int((m / k) ** 0.5).bit_length() - 1)
