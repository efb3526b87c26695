"""The sums of `hagd.transcoders.sparse.products` as Triton kernels, without gradient.

Sums run in float32 (float64 for float64 tensors) and are rounded once. No kernel uses atomics, and the width of
`_sum_rows`' tiles does not order a sum: a column is summed by one thread whatever it is. So the same inputs always give
the same bits, and a resumed training repeats.

A program covers a few columns, and programs of the same columns are neighbours in the grid. They are few enough for
what the matrix has of them to fit a GPU's last-level cache, where gathers of rows then end.

Shape legend: s segments, n pairs, r rows of a matrix, d columns, B tokens.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import pad

_ROWS = 8
"""Of a tile of `_sum_rows`: their loads are in flight at once."""

_PIECE, _TAIL = 256, 16
"""A segment is split into pieces of this many pairs, or of this many times the mean length where that is more: then
the pieces need at most an eighth of the result's memory."""

_PAIRS, _COLUMNS, _SLAB = 16, 128, 256
"""Of `_dot_rows`: a tile of pairs × columns, and the columns of a program. These order its sums, so they are fixed."""

_SUM_TILES = ((1024, 4), (512, 2), (256, 1))
"""Columns and warps of a tile of `_sum_rows`; the widest is taken whose columns of the matrix the cache holds."""

_CACHED = 0.75
"""Share of the last-level cache that they may take."""


def segment_sums(values: Tensor, rows: Tensor, starts: Tensor, matrix: Tensor) -> Tensor:
    """`out_i = Σ_p values_p matrix[rows_p]` over the pairs p of segment i: `[s, d]`, in the wider of both dtypes.

    Args:
        values: `[n]`.
        rows: int64 `[n]`, of the matrix.
        starts: int64 `[s]`; a segment ends where the next one starts, the last one with the pairs.
        matrix: `[r, d]`.
    """
    out = _empty(len(starts), values, matrix)
    _launch_sums(out, values, rows, starts, _ends(starts, len(rows)), matrix)
    return out


def long_segment_sums(values: Tensor, rows: Tensor, starts: Tensor, matrix: Tensor) -> Tensor:
    """As `segment_sums`, for lengths with a heavy tail: long segments are summed in pieces, by many programs at once.

    A piece is an unrounded row of its own; the pieces of a segment are added up in order. How many there are is known
    on the device only, so launches are sized for the most that n pairs can make.
    """
    n = len(rows)
    size = max(_PIECE, _TAIL * n // len(starts))
    if n <= size:
        return segment_sums(values, rows, starts, matrix)
    ends = _ends(starts, n)
    length = ends - starts
    is_long = length > size
    last = torch.where(is_long, (length + size - 1) // size, 0).cumsum(0)
    first = pad(last[:-1], (1, 0))
    piece = torch.arange(2 * n // size, device=rows.device)
    segment = torch.searchsorted(last, piece, right=True)  # s past the last piece, where `pad` puts an empty segment
    piece_starts = pad(starts, (0, 1), value=n)[segment] + (piece - pad(first, (0, 1), value=-1)[segment]) * size
    piece_ends = torch.minimum(piece_starts + size, pad(ends, (0, 1), value=n)[segment])
    pieces = matrix.new_empty(len(piece), matrix.shape[1], dtype=_sum_dtype(matrix))
    _launch_sums(pieces, values, rows, piece_starts, piece_ends, matrix)

    out = _empty(len(starts), values, matrix)
    _launch_sums(out, values, rows, starts, torch.where(is_long, starts, ends), matrix)
    with torch.cuda.device_of(out):
        grid = len(piece), triton.cdiv(out.shape[1], 256)
        _sum_pieces[grid](out, pieces, segment, first, last, len(starts), out.shape[1], COLUMNS=256)
    return out


def row_dots(a: Tensor, index: Tensor, offsets: Tensor, matrix: Tensor) -> Tensor:
    """`out_p = a_t · matrix[index_p]` over the pairs p of token t: `[n]`, in `a`'s dtype.

    Args:
        a: `[B, d]`.
        index: int64 `[n]`, rows of the matrix.
        offsets: int64 `[B + 1]`; token t owns `index[offsets[t]:offsets[t + 1]]`.
        matrix: `[r, d]`.
    """
    n, d = len(index), matrix.shape[1]
    slabs = triton.cdiv(d, _SLAB)
    partial = a.new_empty(slabs, n, dtype=_sum_dtype(a))
    with torch.cuda.device_of(a):
        _dot_rows[(len(a), slabs)](
            partial,
            a.contiguous(),
            index,
            offsets,
            matrix.contiguous(),
            n,
            d,
            PAIRS=_PAIRS,
            COLUMNS=_COLUMNS,
            SLAB=_SLAB,
        )
    return partial.sum(0).to(a.dtype)


def _sum_dtype(matrix: Tensor) -> torch.dtype:
    return torch.promote_types(matrix.dtype, torch.float32)


def _ends(starts: Tensor, n: int) -> Tensor:
    return pad(starts[1:], (0, 1), value=n)


def _empty(n_rows: int, values: Tensor, matrix: Tensor) -> Tensor:
    return matrix.new_empty(n_rows, matrix.shape[1], dtype=torch.promote_types(values.dtype, matrix.dtype))


def _tile(matrix: Tensor) -> tuple[int, int]:
    """Columns and warps for gathers from a matrix."""
    room = _CACHED * _cache_bytes(matrix.device) / (len(matrix) * matrix.element_size())
    return next((tile for tile in _SUM_TILES if tile[0] <= room), _SUM_TILES[-1])


@cache
def _cache_bytes(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0


def _launch_sums(out: Tensor, values: Tensor, rows: Tensor, starts: Tensor, ends: Tensor, matrix: Tensor) -> None:
    columns, warps = _tile(matrix)
    with torch.cuda.device_of(out):
        _sum_rows[len(starts), triton.cdiv(out.shape[1], columns)](
            out,
            values.contiguous(),
            rows,
            starts,
            ends,
            matrix.contiguous(),
            matrix.shape[1],
            ROWS=_ROWS,
            COLUMNS=columns,
            num_warps=warps,
        )


@triton.jit  # type: ignore[untyped-decorator]
def _sum_rows(
    out: tl.tensor,
    values: tl.tensor,
    rows: tl.tensor,
    starts: tl.tensor,
    ends: tl.tensor,
    matrix: tl.tensor,
    d: tl.tensor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """Columns of one segment's sum; an empty one gets zeros."""
    segment = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < d
    end = tl.load(ends + segment)
    total = tl.zeros([COLUMNS], tl.float64 if matrix.dtype.element_ty == tl.float64 else tl.float32)
    for first in range(tl.load(starts + segment), end, ROWS):
        pair = first + tl.arange(0, ROWS)
        present = pair < end
        row = tl.load(rows + pair, mask=present, other=0)
        value = tl.load(values + pair, mask=present, other=0.0).to(total.dtype)
        tile = matrix + row[:, None] * d + column[None, :]
        entries = tl.load(tile, mask=present[:, None] & inside[None, :], other=0.0).to(total.dtype)
        total += tl.sum(value[:, None] * entries, 0)
    tl.store(out + segment * d + column, total, mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _sum_pieces(
    out: tl.tensor,
    pieces: tl.tensor,
    segment: tl.tensor,
    first: tl.tensor,
    last: tl.tensor,
    n_segments: tl.tensor,
    d: tl.tensor,
    COLUMNS: tl.constexpr,
) -> None:
    """Columns of a split segment's sum, by the program of its first piece."""
    piece = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < d
    own = tl.load(segment + piece)
    split = own < n_segments
    begin = tl.load(first + own, mask=split, other=-1)
    if begin == piece:
        total = tl.zeros([COLUMNS], pieces.dtype.element_ty)
        for each in range(begin, tl.load(last + own)):
            total += tl.load(pieces + each * d + column, mask=inside, other=0.0)
        tl.store(out + own * d + column, total, mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _dot_rows(
    partial: tl.tensor,
    a: tl.tensor,
    index: tl.tensor,
    offsets: tl.tensor,
    matrix: tl.tensor,
    n: tl.tensor,
    d: tl.tensor,
    PAIRS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SLAB: tl.constexpr,
) -> None:
    """Products of one token's pairs over one slab of columns: a row of `partial` `[slabs, n]`."""
    token = tl.program_id(0).to(tl.int64)
    slab = tl.program_id(1).to(tl.int64)
    end = tl.load(offsets + token + 1)
    for first in range(tl.load(offsets + token), end, PAIRS):
        pair = first + tl.arange(0, PAIRS)
        present = pair < end
        row = tl.load(index + pair, mask=present, other=0)
        total = tl.zeros([PAIRS, COLUMNS], partial.dtype.element_ty)
        for offset in tl.static_range(0, SLAB, COLUMNS):
            column = slab * SLAB + offset + tl.arange(0, COLUMNS)
            inside = column < d
            left = tl.load(a + token * d + column, mask=inside, other=0.0).to(total.dtype)
            tile = matrix + row[:, None] * d + column[None, :]
            right = tl.load(tile, mask=present[:, None] & inside[None, :], other=0.0).to(total.dtype)
            total += left[None, :] * right
        tl.store(partial + slab * n + pair, tl.sum(total, 1), mask=present)
