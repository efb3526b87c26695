"""The k largest of each row as Triton kernels: the k groups of columns with the largest maxima contain them.

Numbers are compared as integers of the same order, whose k-th largest a binary search over bits finds. A wide row is
read once, for the maxima of neighbours; the search then runs in registers over the groups, and over the members of k of
them. Of entries that are the same, those with the lowest columns are taken: of groups with the same maximum the first.

Shape legend: c rows, m columns, G groups.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BITS = {torch.bfloat16: 16, torch.float16: 16, torch.float32: 32}

_DIRECT = 2**12
"""Columns that are searched without groups."""

_WIDEST = 2**13
"""Entries that a search holds in registers."""

_A_WARP, _MOST_WARPS = 512, 8
"""Of them, how many a warp holds, unless that takes more warps; with more of these a few registers spilled."""

_TILE = 2**13
"""Entries whose groups a program of `_maxima` takes."""


def can_hold(pre: Tensor, k: int) -> bool:
    """Whether rows of `[c, m]` are of a kind that `top_of_rows` takes."""
    size = group_size(pre.shape[1], k)
    return pre.dtype in _BITS and max(triton.cdiv(pre.shape[1], size), triton.next_power_of_2(k) * size) <= _WIDEST


def group_size(m: int, k: int) -> int:
    """Columns of a group, 1 where there are few: about as many groups as members of k of them."""
    return 1 if m <= _DIRECT else triton.next_power_of_2(int((m / k) ** 0.5) + 1) // 2


def top_of_rows(pre: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Values and columns `[c, k]` of the k largest of each row of `[c, m]`, columns ascending; NaN is the largest."""
    (n_rows, m), bits, size = pre.shape, _BITS[pre.dtype], group_size(pre.shape[1], k)
    pre = pre.contiguous()
    values = pre.new_empty(n_rows, k)
    columns = torch.empty(n_rows, k, dtype=torch.long, device=pre.device)
    groups = columns  # not read where a group is a column
    with torch.cuda.device_of(pre):
        if size > 1:
            groups = _top_groups(pre, k, size, bits)
        searched = m if size == 1 else k * size
        block = triton.next_power_of_2(searched)
        _top_of_row[(n_rows,)](
            values, columns, pre, groups, m, searched, k, SIZE=size, BLOCK=block, BITS=bits, num_warps=warps_of(block)
        )
    return values, columns


def warps_of(block: int) -> int:
    """Warps of a search among `block` entries."""
    return max(1, min(_MOST_WARPS, block // _A_WARP))


def _top_groups(pre: Tensor, k: int, size: int, bits: int) -> Tensor:
    """Int32 `[c, k]`, ascending."""
    n_rows, m = pre.shape
    n_groups = triton.cdiv(m, size)
    ranks = torch.empty(n_rows, n_groups, dtype=torch.int16 if bits == 16 else torch.int32, device=pre.device)
    tile = _TILE // size
    _maxima[n_rows, triton.cdiv(n_groups, tile)](ranks, pre, m, n_groups, GROUPS=tile, SIZE=size, BITS=bits)
    groups = torch.empty(n_rows, k, dtype=torch.int32, device=pre.device)
    block = triton.next_power_of_2(n_groups)
    _top_of_ranks[(n_rows,)](groups, ranks, n_groups, k, BLOCK=block, BITS=bits, num_warps=warps_of(block))
    return groups


@triton.jit  # type: ignore[untyped-decorator]
def _rank(entry: tl.tensor, inside: tl.tensor, BITS: tl.constexpr) -> tl.tensor:
    """Integers in the order of the entries; those outside are the least."""
    highest: tl.constexpr = 2 ** (BITS - 1) - 1
    bits = entry.to(tl.int16 if BITS == 16 else tl.int32, bitcast=True).to(tl.int32)
    rank = tl.where(bits < 0, bits ^ highest, bits)  # all bits of negative numbers but the sign turn round
    wide = entry.to(tl.float32)
    return tl.where(inside, tl.where(wide != wide, highest, rank), -highest - 1)


@triton.jit  # type: ignore[untyped-decorator]
def _chosen(rank: tl.tensor, k: tl.tensor, BITS: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """Which entries are the k largest, and which place among these each of them has."""
    kth = tl.where(tl.sum((rank >= 0).to(tl.int32)) >= k, 0, -(2 ** (BITS - 1)))
    for place in tl.static_range(BITS - 1):
        higher = kth + (1 << (BITS - 2 - place))
        kth = tl.where(tl.sum((rank >= higher).to(tl.int32)) >= k, higher, kth)
    larger, same = rank > kth, rank == kth
    missing = k - tl.sum(larger.to(tl.int32))
    counted = tl.cumsum(larger.to(tl.int32) + (same.to(tl.int32) << 16))  # both in one, since blocks are short
    n_same = counted >> 16
    return larger | (same & (n_same <= missing)), (counted & 0xFFFF) + tl.minimum(n_same, missing) - 1


@triton.jit  # type: ignore[untyped-decorator]
def _maxima(
    ranks: tl.tensor,
    pre: tl.tensor,
    m: tl.tensor,
    n_groups: tl.tensor,
    GROUPS: tl.constexpr,
    SIZE: tl.constexpr,
    BITS: tl.constexpr,
) -> None:
    """Of a row's groups of SIZE columns, as integers."""
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    column = group[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    rank = _rank(tl.load(pre + row * m + column, mask=column < m, other=0.0), column < m, BITS)
    tl.store(ranks + row * n_groups + group, tl.max(rank, 1).to(ranks.dtype.element_ty), mask=group < n_groups)


@triton.jit  # type: ignore[untyped-decorator]
def _top_of_ranks(
    groups: tl.tensor, ranks: tl.tensor, n: tl.tensor, k: tl.tensor, BLOCK: tl.constexpr, BITS: tl.constexpr
) -> None:
    """Places of the k largest of a row of integers."""
    row = tl.program_id(0).to(tl.int64)
    group = tl.arange(0, BLOCK)
    rank = tl.load(ranks + row * n + group, mask=group < n, other=-(2 ** (BITS - 1))).to(tl.int32)
    chosen, place = _chosen(rank, k, BITS)
    tl.store(groups + row * k + place, group, mask=chosen)


@triton.jit  # type: ignore[untyped-decorator]
def _top_of_row(
    values: tl.tensor,
    columns: tl.tensor,
    pre: tl.tensor,
    groups: tl.tensor,
    m: tl.tensor,
    n: tl.tensor,
    k: tl.tensor,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    BITS: tl.constexpr,
) -> None:
    """Values and columns of the k largest among the members of k groups; with SIZE 1 among all n columns."""
    row = tl.program_id(0).to(tl.int64)
    member = tl.arange(0, BLOCK)
    column = member
    if SIZE > 1:
        column = tl.load(groups + row * k + member // SIZE, mask=member < n, other=0) * SIZE + member % SIZE
    inside = (member < n) & (column < m)
    entry = tl.load(pre + row * m + column, mask=inside, other=0.0)
    chosen, place = _chosen(_rank(entry, inside, BITS), k, BITS)
    tl.store(values + row * k + place, entry, mask=chosen)
    tl.store(columns + row * k + place, column.to(tl.int64), mask=chosen)
