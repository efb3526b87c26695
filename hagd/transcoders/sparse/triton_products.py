"""The sums of `hagd.transcoders.sparse.products` as Triton kernels, without gradient.

Sums run in float32 (float64 for float64 tensors) and are rounded once. No kernel uses atomics, and tiles depend on
nothing but sizes and the device. So the same inputs always give the same bits there, and a resumed training repeats.

A program covers a few columns, and programs of the same columns are neighbours in the grid. They are few enough for
what the matrix has of them to fit a GPU's last-level cache, where gathers of rows then end.

Shape legend: s segments, n pairs, r rows of a matrix, d columns, B tokens.
"""

from __future__ import annotations

import math
from functools import cache
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from torch.nn.functional import pad

from hagd.transcoders.sparse import triton_product_kernels as kernels

_PIECE, _TAIL = 256, 16
"""A segment is split into pieces of this many pairs, or of this many times the mean length where that is more: then
the pieces need at most an eighth of the result's memory."""

_PAIRS, _SLAB = 16, 256
"""Of `dot_rows`: pairs that are loaded at once, and columns of a program."""


class _Tile(NamedTuple):
    """Columns of a program of `sum_rows`, and rows that are loaded at once."""

    columns: int
    rows: int


_SUM_TILES = (_Tile(256, 8), _Tile(128, 16))
"""The first is taken whose columns of the matrix the cache holds. A single warp runs it: wider programs of more warps
were slower on an H200."""

_CACHED = 0.5
"""Share of the last-level cache that they may take: there are two halves, and both hold what all programs read."""

_LEAST_PAIRS = 32
"""Of a segment on average, which make up for adding the sums of one more part."""

_VALUES = 256
"""That are summed at once."""


def segment_sums(values: Tensor, rows: Tensor, starts: Tensor, matrix: Tensor) -> Tensor:
    """`out_i = Σ_p values_p matrix[rows_p]` over the pairs p of segment i: `[s, d]`, in the wider of both dtypes.

    Args:
        values: `[n]`.
        rows: int64 `[n]`, of the matrix.
        starts: int64 `[s]`; a segment ends where the next one starts, the last one with the pairs.
        matrix: `[r, d]`.
    """
    out = _empty(len(starts), values, matrix)
    _launch_sums(out, values, rows, starts, _ends(starts, len(rows)), matrix, _tile(matrix), add=False)
    return out


def long_segment_sums(values: Tensor, rows: Tensor, starts: Tensor, matrix: Tensor, n_parts: int = 1) -> Tensor:
    """As `segment_sums`, for lengths with a heavy tail: long segments are summed in pieces, by many programs at once.

    A piece is an unrounded row of its own; the pieces of a segment are added up in order. How many there are is known
    on the device only, so those of each part are launched for the most that all n pairs can make.

    Args:
        values: `[n]`.
        rows: int64 `[n]`, of the matrix.
        starts: int64 `[s · n_parts]`; sums of each part of the segments are added up, one part after another.
        matrix: `[r, d]`.
        n_parts: of each segment.
    """
    n, n_segments = len(rows), len(starts) // n_parts
    size = max(_PIECE, _TAIL * n // n_segments)
    out = matrix.new_empty(n_segments, matrix.shape[1], dtype=_sum_dtype(matrix))
    parts = zip(starts.split(n_segments), _ends(starts, n).split(n_segments), strict=True)
    for part, (begins, ends) in enumerate(parts):
        operands = out, values, rows, begins, ends, matrix, _tile(matrix, n_parts)
        if n > size:
            _launch_pieces(*operands, add=part > 0, size=size)
        else:
            _launch_sums(*operands, add=part > 0)
    return out.to(torch.promote_types(values.dtype, matrix.dtype))


def value_sums(values: Tensor, starts: Tensor) -> Tensor:
    """Of each segment: `[s]` of values `[n]` and starts as in `segment_sums`."""
    out = values.new_empty(len(starts))
    with torch.cuda.device_of(out):
        kernels.sum_values[(len(starts),)](out, values.contiguous(), starts, _ends(starts, len(values)), BLOCK=_VALUES)
    return out


def parts_of(matrix: Tensor, n_pairs: int, n_segments: int) -> int:
    """Into how many consecutive parts of its rows a matrix is divided, so that the cache holds what a wide tile has of
    one, as long as segments stay long."""
    slab = len(matrix) * _SUM_TILES[0].columns * matrix.element_size()
    wanted = math.ceil(slab / (_CACHED * max(1, _cache_bytes(matrix.device))))
    return max(1, min(wanted, n_pairs // (_LEAST_PAIRS * n_segments)))


def segment_errors(
    values: Tensor, index: Tensor, offsets: Tensor, matrix: Tensor, bias: Tensor, target: Tensor
) -> tuple[Tensor, Tensor, None]:
    """`e_t = Σ_p values_p matrix[index_p] + bias − target_t` over the pairs p of token t, and the sum of its squares.

    Args:
        values: `[n]`.
        index: int64 `[n]`, rows of the matrix.
        offsets: int64 `[B + 1]`; token t owns `index[offsets[t]:offsets[t + 1]]`.
        matrix: `[m, d]`.
        bias: `[d]`.
        target: `[B, d]`.

    Returns:
        `[B, d]` in the matrix' precision, `[]` of what was not rounded to it, and nothing more: kernels that made
        `e_t · matrix[index_p]` too, as `cpu_products` does, were slower.
    """
    columns, at_once = _tile(matrix)
    d = matrix.shape[1]
    grid = len(target), triton.cdiv(d, columns)
    error = torch.empty_like(target, dtype=matrix.dtype, memory_format=torch.contiguous_format)
    squared = target.new_empty(grid)
    with torch.cuda.device_of(target):
        kernels.error_rows[grid](
            error,
            squared,
            values.contiguous(),
            index,
            offsets,
            matrix.contiguous(),
            bias,
            target.contiguous(),
            d,
            ROWS=at_once,
            COLUMNS=columns,
            num_warps=1,
        )
    return error, squared.sum(), None


def row_dots(a: Tensor, index: Tensor, offsets: Tensor, matrix: Tensor) -> Tensor:
    """`out_p = a_t · matrix[index_p]` over the pairs p of token t: `[n]`, not rounded.

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
        kernels.dot_rows[(len(a), slabs)](
            partial,
            a.contiguous(),
            index,
            offsets,
            matrix.contiguous(),
            n,
            d,
            PAIRS=_PAIRS,
            SLAB=_SLAB,
            num_warps=1,
        )
    return partial.sum(0)


def _sum_dtype(matrix: Tensor) -> torch.dtype:
    return torch.promote_types(matrix.dtype, torch.float32)


def _ends(starts: Tensor, n: int) -> Tensor:
    return pad(starts[1:], (0, 1), value=n)


def _empty(n_rows: int, values: Tensor, matrix: Tensor) -> Tensor:
    return matrix.new_empty(n_rows, matrix.shape[1], dtype=torch.promote_types(values.dtype, matrix.dtype))


def _tile(matrix: Tensor, n_parts: int = 1) -> _Tile:
    """For gathers from a part of a matrix."""
    room = n_parts * _CACHED * _cache_bytes(matrix.device) / (len(matrix) * matrix.element_size())
    return next((tile for tile in _SUM_TILES if tile.columns <= room), _SUM_TILES[-1])


@cache
def _cache_bytes(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0


def _launch_pieces(
    out: Tensor,
    values: Tensor,
    rows: Tensor,
    starts: Tensor,
    ends: Tensor,
    matrix: Tensor,
    tile: _Tile,
    *,
    add: bool,
    size: int,
) -> None:
    n = len(rows)
    length = ends - starts
    is_long = length > size
    last = torch.where(is_long, (length + size - 1) // size, 0).cumsum(0)
    first = pad(last[:-1], (1, 0))
    piece = torch.arange(2 * n // size, device=rows.device)
    segment = torch.searchsorted(last, piece, right=True)  # s past the last piece, where `pad` puts an empty segment
    piece_starts = pad(starts, (0, 1), value=n)[segment] + (piece - pad(first, (0, 1), value=-1)[segment]) * size
    piece_ends = torch.minimum(piece_starts + size, pad(ends, (0, 1), value=n)[segment])
    pieces = matrix.new_empty(len(piece), matrix.shape[1], dtype=_sum_dtype(matrix))
    _launch_sums(pieces, values, rows, piece_starts, piece_ends, matrix, tile, add=False)
    _launch_sums(out, values, rows, starts, torch.where(is_long, starts, ends), matrix, tile, add=add)
    with torch.cuda.device_of(out):
        grid = len(piece), triton.cdiv(out.shape[1], 256)
        kernels.sum_pieces[grid](out, pieces, segment, first, last, len(starts), out.shape[1], ADD=add, COLUMNS=256)


def _launch_sums(
    out: Tensor, values: Tensor, rows: Tensor, starts: Tensor, ends: Tensor, matrix: Tensor, tile: _Tile, *, add: bool
) -> None:
    columns, at_once = tile
    d = matrix.shape[1]
    with torch.cuda.device_of(out):
        kernels.sum_rows[len(starts), triton.cdiv(d, columns)](
            out,
            values.contiguous(),
            rows,
            starts,
            ends,
            matrix.contiguous(),
            d,
            ADD=add,
            ROWS=at_once,
            COLUMNS=columns,
            num_warps=1,
        )
