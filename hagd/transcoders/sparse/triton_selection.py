"""The k largest of each row as a Triton kernel, which holds the row in registers.

Numbers are compared as integers of the same order, whose k-th largest a binary search over bits finds: with 16 bits in
16 counts of the row. Of entries that are the same, those with the lowest columns are taken.

Shape legend: c rows, m columns.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BITS = {torch.bfloat16: 16, torch.float16: 16, torch.float32: 32}

_WIDEST = 2**15
"""Columns; compiled for twice as many, the kernel spills registers."""

_A_WARP, _WARPS = 2048, 4
"""Columns of a warp, and the fewest warps."""

_PART = 2048
"""Columns that are written at once; so many that nothing spills."""


def can_hold(pre: Tensor) -> bool:
    """Whether rows of `[c, m]` are of a kind that `top_of_rows` takes."""
    return pre.dtype in _BITS and pre.shape[1] <= _WIDEST


def warps_of(block: int) -> int:
    """Warps of a program that holds `block` columns."""
    return max(_WARPS, block // _A_WARP)


def top_of_rows(pre: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Values and columns `[c, k]` of the k largest of each row of `[c, m]`, columns ascending; NaN is the largest."""
    values = pre.new_empty(len(pre), k)
    columns = torch.empty(len(pre), k, dtype=torch.long, device=pre.device)
    block = triton.next_power_of_2(pre.shape[1])
    with torch.cuda.device_of(pre):
        _top_of_row[(len(pre),)](
            values,
            columns,
            pre.contiguous(),
            pre.shape[1],
            k,
            BLOCK=block,
            PART=min(block, _PART),
            BITS=_BITS[pre.dtype],
            num_warps=warps_of(block),
        )
    return values, columns


@triton.jit  # type: ignore[untyped-decorator]
def _keys(entry: tl.tensor, inside: tl.tensor, BITS: tl.constexpr) -> tl.tensor:
    """Integers in the order of the entries; those outside are the least."""
    highest: tl.constexpr = 2 ** (BITS - 1) - 1
    bits = entry.to(tl.int16 if BITS == 16 else tl.int32, bitcast=True).to(tl.int32)
    key = tl.where(bits < 0, bits ^ highest, bits)  # all bits of negative numbers but the sign turn round
    wide = entry.to(tl.float32)
    return tl.where(inside, tl.where(wide != wide, highest, key), -highest - 1)


@triton.jit  # type: ignore[untyped-decorator]
def _top_of_row(
    values: tl.tensor,
    columns: tl.tensor,
    pre: tl.tensor,
    m: tl.tensor,
    k: tl.tensor,
    BLOCK: tl.constexpr,
    PART: tl.constexpr,
    BITS: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    whole = tl.arange(0, BLOCK)
    key = _keys(tl.load(pre + row * m + whole, mask=whole < m, other=0.0), whole < m, BITS)
    kth = tl.where(tl.sum((key >= 0).to(tl.int32)) >= k, 0, -(2 ** (BITS - 1)))
    for place in tl.static_range(BITS - 1):
        higher = kth + (1 << (BITS - 2 - place))
        kth = tl.where(tl.sum((key >= higher).to(tl.int32)) >= k, higher, kth)
    missing = k - tl.sum((key > kth).to(tl.int32))

    # Read again, from the cache: with what is chosen all of a row does not fit the registers.
    n_same = 0
    target = row * k - 1
    for first in range(0, m, PART):
        part = first + tl.arange(0, PART)
        entry = tl.load(pre + row * m + part, mask=part < m, other=0.0)
        ranks = _keys(entry, part < m, BITS)
        same = ranks == kth
        chosen = (ranks > kth) | (same & (n_same + tl.cumsum(same.to(tl.int32)) <= missing))
        at = target + tl.cumsum(chosen.to(tl.int32))
        tl.store(values + at, entry, mask=chosen)
        tl.store(columns + at, part.to(tl.int64), mask=chosen)
        n_same += tl.sum(same.to(tl.int32))
        target += tl.sum(chosen.to(tl.int32))
