"""The sums of `hagd.transcoders.sparse.products` as compiled loops for a CPU (`cpu_products.c`), without gradient.

For float32. The same inputs always give the same bits there, whatever the number of threads. Pairs name rows of
matrices that there are: unlike torch's operators, nothing here looks for others.

Shape legend: s segments, n pairs, r rows of a matrix, d columns, B tokens, m features.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hagd.transcoders.sparse.cpu_library import call


def segment_sums(values: Tensor, rows: Tensor, starts: Tensor, matrix: Tensor) -> Tensor:
    """`out_i = Σ_p values_p matrix[rows_p]` over the pairs p of segment i: `[s, d]`.

    Arguments are those of `triton_products.segment_sums`.
    """
    (n_segments,), d = starts.shape, matrix.shape[1]
    out, matrix = matrix.new_empty(n_segments, d), _in_rows(matrix)
    pairs = *_pairs(values, rows, starts), n_segments, len(rows)
    call("segment_sums", *pairs, matrix, matrix.stride(0), d, out)
    return out


def long_segment_sums(values: Tensor, rows: Tensor, starts: Tensor, matrix: Tensor, n_parts: int = 1) -> Tensor:
    """As `segment_sums`, for segments with many rows each, which other segments have too; in a single part."""
    assert n_parts == parts_of()
    (n_segments,), (r, d) = starts.shape, matrix.shape
    out, matrix = matrix.new_empty(n_segments, d), _in_rows(matrix)
    pairs = *_pairs(values, rows, starts), n_segments, len(rows)
    call("long_segment_sums", *pairs, matrix, matrix.stride(0), r, d, out)
    return out


def value_sums(values: Tensor, starts: Tensor) -> Tensor:
    """Of each segment: `[s]` of values `[n]` and starts as in `segment_sums`."""
    out = values.new_empty(len(starts))
    call("value_sums", values.contiguous(), starts, len(starts), len(values), out)
    return out


def parts_of(*_: object) -> int:
    """Into how many parts of its rows a matrix is divided for `long_segment_sums`: more than one were no faster."""
    return 1


def segment_errors(
    values: Tensor, index: Tensor, offsets: Tensor, matrix: Tensor, bias: Tensor, target: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """`e_t = Σ_p values_p matrix[index_p] + bias − target_t` over the pairs p of token t, and what a derivative needs.

    Arguments are those of `triton_products.segment_errors`.

    Returns:
        `[B, d]`, the sum of its squares `[]`, and `e_t · matrix[index_p]` of all pairs `[n]`.
    """
    target, (n_tokens, d) = target.to(matrix.dtype), target.shape
    error, squared, products = target.new_empty(n_tokens, d), target.new_empty(n_tokens), torch.empty_like(values)
    target, matrix = _in_rows(target), _in_rows(matrix)
    given = matrix, matrix.stride(0), d, bias.contiguous(), target, target.stride(0)
    assert len(offsets) == n_tokens + 1
    call("segment_errors", *_pairs(values, index, offsets), n_tokens, *given, error, squared, products)
    return error, target.new_tensor(squared.numpy().sum()), products  # torch's sum of many depends on its threads


def row_dots(a: Tensor, index: Tensor, offsets: Tensor, matrix: Tensor) -> Tensor:
    """`out_p = a_t · matrix[index_p]` over the pairs p of token t: `[n]`.

    Arguments are those of `triton_products.row_dots`.
    """
    out = a.new_empty(len(index))
    a, matrix = _in_rows(a), _in_rows(matrix)
    assert len(offsets) == len(a) + 1
    _, index, offsets = _pairs(out, index, offsets)
    call("row_dots", a, a.stride(0), index, offsets, len(a), matrix, matrix.stride(0), matrix.shape[1], out)
    return out


def ordered_pairs(index: Tensor, offsets: Tensor, m: int) -> tuple[Tensor, Tensor, Tensor]:
    """Pairs by feature: their order `[n]`, their tokens `[n]`, and where each feature's start `[m]`.

    Args:
        index: int64 `[n]`, features.
        offsets: int64 `[B + 1]`; token t owns `index[offsets[t]:offsets[t + 1]]`.
        m: number of features.
    """
    _, index, offsets = _pairs(index, index, offsets)
    order, token, starts = torch.empty_like(index), torch.empty_like(index), offsets.new_zeros(m + 1)
    call("order_pairs", index, offsets, len(offsets) - 1, m, starts, order, token)
    return order, token, starts[:-1]


def _pairs(values: Tensor, rows: Tensor, starts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """With the numbers of each beside each other."""
    assert len(values) == len(rows) and rows.dtype == starts.dtype == torch.int64
    return values.contiguous(), rows.contiguous(), starts.contiguous()


def _in_rows(matrix: Tensor) -> Tensor:
    """With the numbers of a row beside each other."""
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()
