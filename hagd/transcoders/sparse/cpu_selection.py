"""Which entries are the largest as compiled loops for a CPU (`cpu_selection.c`).

Shape legend: c rows, m columns.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hagd.transcoders.sparse.cpu_library import call

_FUNCTIONS = {torch.float32: "top_of_rows_float32", torch.bfloat16: "top_of_rows_bfloat16"}


def can_hold(pre: Tensor) -> bool:
    """Whether rows are of a kind that `top_of_rows` takes."""
    return pre.dtype in _FUNCTIONS


def top_of_rows(pre: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Values and columns `[c, k]` of the k largest of each row of `[c, m]`, columns ascending; NaN is the largest."""
    (n_rows, m), k = pre.shape, _at_most(k, pre)
    pre = pre if pre.stride(1) == 1 else pre.contiguous()
    values, columns = pre.new_empty(n_rows, k), torch.empty(n_rows, k, dtype=torch.long)
    call(_FUNCTIONS[pre.dtype], pre, n_rows, pre.stride(0), m, k, _groups(m, k), values, columns)
    return values, columns


def top_of_segments(values: Tensor, counts: Tensor, k: int) -> Tensor:
    """Places of the k largest of each of consecutive segments, ascending; NaN is the largest, 0.0 is larger than -0.0,
    and of numbers that are the same the first are taken.

    Args:
        values: float32 `[n]`.
        counts: int64 `[s]`, of each segment: none, or k and more.
        k: how many.
    """
    chosen = torch.zeros(len(values), dtype=torch.uint8)
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    call("top_of_segments", values.contiguous(), offsets, len(counts), k, chosen)
    return torch.from_numpy(np.flatnonzero(chosen.numpy()))


def possible_top(
    pre: Tensor,
    k: int,
    of_rows: Sequence[NDArray[np.float32]],
    of_columns: Sequence[NDArray[np.float32]],
    stored: float,
    most: int,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Columns `[n]` that can be among the k largest of each row of rounded numbers, row after row, and how many each
    row has; none where it is left open, as `hagd.transcoders.sparse.certain` says.

    Args:
        pre: bfloat16 `[c, m]`.
        k: how many.
        of_rows: `[c]` three times: what rounding took from a row, what it left, and what any column is off by at most.
        of_columns: `[m]` three times: norm of a feature, what rounding took from it, and from its bias.
        stored: what storing a number changes it by, relative.
        most: columns of a row that are looked at.
    """
    (n_rows, m), k = pre.shape, _at_most(k, pre)
    columns, counts = torch.empty(n_rows, most, dtype=torch.long), torch.empty(n_rows, dtype=torch.long)
    known = [torch.from_numpy(np.ascontiguousarray(each)) for each in (*of_rows, *of_columns)]
    sizes = n_rows, m, k, _groups(m, k)
    call("possible_top", pre.contiguous(), *sizes, *known, stored, most, columns, counts)
    kept = columns.numpy()[np.arange(most) < counts.numpy()[:, None]]
    return kept, counts.numpy()


def _at_most(k: int, pre: Tensor) -> int:
    if not 1 <= k <= pre.shape[1]:
        raise ValueError(f"of {pre.shape[1]} columns the {k} largest are asked for")
    return k


def _groups(m: int, k: int) -> int:
    """Into how many columns are divided: about as many as members of k groups, and no fewer than k."""
    return -(-m // 2 ** (int((m / k) ** 0.5).bit_length() - 1))
