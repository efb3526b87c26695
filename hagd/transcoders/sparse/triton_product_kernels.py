"""The Triton kernels that `hagd.transcoders.sparse.triton_products` launches.

Shape legend: s segments, n pairs, d columns.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit  # type: ignore[untyped-decorator]
def sum_rows(
    out: tl.tensor,
    values: tl.tensor,
    rows: tl.tensor,
    starts: tl.tensor,
    ends: tl.tensor,
    matrix: tl.tensor,
    d: tl.tensor,
    ADD: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """Columns of one segment's sum, zeros if it is empty; added to what is there already, or instead of it."""
    segment = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    begin, end = tl.load(starts + segment), tl.load(ends + segment)
    total = tl.zeros([COLUMNS], tl.float64 if matrix.dtype.element_ty == tl.float64 else tl.float32)
    if ADD:
        total += tl.load(out + segment * d + column, mask=column < d, other=0.0)
    total = _with_rows(total, values, rows, begin, end, matrix, column, d, ROWS)
    tl.store(out + segment * d + column, total, mask=column < d)


@triton.jit  # type: ignore[untyped-decorator]
def error_rows(
    error: tl.tensor,
    squared: tl.tensor,
    values: tl.tensor,
    rows: tl.tensor,
    offsets: tl.tensor,
    matrix: tl.tensor,
    bias: tl.tensor,
    target: tl.tensor,
    d: tl.tensor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """Columns of one token's sum, plus the bias, minus the target; and the sum of their squares."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < d
    total = tl.load(bias + column, mask=inside, other=0.0) - tl.load(
        target + token * d + column, mask=inside, other=0.0
    )
    begin, end = tl.load(offsets + token), tl.load(offsets + token + 1)
    total = _with_rows(total, values, rows, begin, end, matrix, column, d, ROWS)
    tl.store(error + token * d + column, total.to(error.dtype.element_ty), mask=inside)
    tl.store(squared + token * tl.num_programs(1) + tl.program_id(1), tl.sum(tl.where(inside, total * total, 0.0)))


@triton.jit  # type: ignore[untyped-decorator]
def _with_rows(
    total: tl.tensor,
    values: tl.tensor,
    rows: tl.tensor,
    begin: tl.tensor,
    end: tl.tensor,
    matrix: tl.tensor,
    column: tl.tensor,
    d: tl.tensor,
    ROWS: tl.constexpr,
) -> tl.tensor:
    """`total` plus the columns of what the pairs from `begin` to `end` sum to."""
    inside = column < d
    for first in range(begin, end, ROWS):
        pair = first + tl.arange(0, ROWS)
        present = pair < end
        row = tl.load(rows + pair, mask=present, other=0)
        value = tl.load(values + pair, mask=present, other=0.0).to(total.dtype)
        tile = matrix + row[:, None] * d + column[None, :]
        entries = tl.load(tile, mask=present[:, None] & inside[None, :], other=0.0).to(total.dtype)
        total += tl.sum(value[:, None] * entries, 0)
    return total


@triton.jit  # type: ignore[untyped-decorator]
def sum_values(out: tl.tensor, values: tl.tensor, starts: tl.tensor, ends: tl.tensor, BLOCK: tl.constexpr) -> None:
    """Sum of one segment's values."""
    segment = tl.program_id(0)
    end = tl.load(ends + segment)
    total = tl.zeros([BLOCK], tl.float64 if values.dtype.element_ty == tl.float64 else tl.float32)
    for first in range(tl.load(starts + segment), end, BLOCK):
        pair = first + tl.arange(0, BLOCK)
        total += tl.load(values + pair, mask=pair < end, other=0.0).to(total.dtype)
    tl.store(out + segment, tl.sum(total))


@triton.jit  # type: ignore[untyped-decorator]
def sum_pieces(
    out: tl.tensor,
    pieces: tl.tensor,
    segment: tl.tensor,
    first: tl.tensor,
    last: tl.tensor,
    n_segments: tl.tensor,
    d: tl.tensor,
    ADD: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """Columns of a split segment's sum, by the program of its first piece; added or not, as in `sum_rows`."""
    piece = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < d
    own = tl.load(segment + piece)
    split = own < n_segments
    begin = tl.load(first + own, mask=split, other=-1)
    if begin == piece:
        total = tl.zeros([COLUMNS], pieces.dtype.element_ty)
        if ADD:
            total += tl.load(out + own * d + column, mask=inside, other=0.0)
        for each in range(begin, tl.load(last + own)):
            total += tl.load(pieces + each * d + column, mask=inside, other=0.0)
        tl.store(out + own * d + column, total, mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def dot_rows(
    partial: tl.tensor,
    a: tl.tensor,
    index: tl.tensor,
    offsets: tl.tensor,
    matrix: tl.tensor,
    n: tl.tensor,
    d: tl.tensor,
    PAIRS: tl.constexpr,
    SLAB: tl.constexpr,
) -> None:
    """Products of one token's pairs over one slab of columns: a row of `partial` `[slabs, n]`."""
    token = tl.program_id(0).to(tl.int64)
    slab = tl.program_id(1).to(tl.int64)
    column = slab * SLAB + tl.arange(0, SLAB)
    inside = column < d
    left = tl.load(a + token * d + column, mask=inside, other=0.0).to(partial.dtype.element_ty)
    end = tl.load(offsets + token + 1)
    for first in range(tl.load(offsets + token), end, PAIRS):
        pair = first + tl.arange(0, PAIRS)
        present = pair < end
        row = tl.load(index + pair, mask=present, other=0)
        tile = matrix + row[:, None] * d + column[None, :]
        right = tl.load(tile, mask=present[:, None] & inside[None, :], other=0.0).to(left.dtype)
        tl.store(partial + slab * n + pair, tl.sum(left[None, :] * right, 1), mask=present)
