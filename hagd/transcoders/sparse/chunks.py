"""Dense pre-activations of a few tokens at a time, so that all of them are never held; on a CPU they stay in its cache.

Shape legend: B tokens, c tokens of a chunk, m features, d = d_model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from hagd.transcoders.sparse.device_kernels import large_on_cpu, triton_kernels

R = TypeVar("R")

_CHUNK = 512
"""Tokens of a chunk on a CPU."""

_CACHED_CHUNK = 256
"""The same where pre-activations take four bytes and another library than torch's first choice multiplies: 512 were
little faster and held twice as much."""

_CHUNK_BYTES = 2**28
"""Of a chunk's pre-activations on any other device: no cache holds a useful chunk there, and each chunk reads W_enc
again and costs a dozen launches. Chunks of two and four times as many bytes were slower on an H200."""

_LARGEST = 127
"""Of eight bits with a sign."""

_ROWS_ON_CUDA, _MULTIPLE_ON_CUDA = 17, 8
"""The fewest rows that CUDA multiplies as integers of eight bits, and what the other sizes have to be multiples of."""

_FLOAT8, _FLOAT8_MULTIPLE, _FLOAT8_CAPABILITY = torch.float8_e4m3fn, 16, (8, 9)
"""What sizes have to be multiples of in float8, and the first GPUs that multiply it."""

_ROWS = 512
"""Of a matrix, rounded at a time."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x Wᵀ + b` on a CPU, without gradient: by oneDNN where it can, since what torch takes by itself is slower on
    AMD's processors, in float32 much, in bfloat16 (with the same bits) a little."""
    if x.dtype == weight.dtype and _one_dnn_multiplies(x.dtype):
        product: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return product
    return torch.nn.functional.linear(x, weight, bias)


def packed(weight: Tensor, n_rows: int) -> Tensor:
    """A matrix `[m, d]` as oneDNN wants it for `linear` with so many rows; else each call packs it again."""
    if not _one_dnn_multiplies(weight.dtype):
        return weight
    arranged: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, n_rows)
    return arranged


def _one_dnn_multiplies(dtype: torch.dtype) -> bool:
    if not torch.backends.mkldnn.is_available():
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def by_chunks(x: Tensor, W_enc: Tensor, b_enc: Tensor, dtype: torch.dtype, found: Callable[[Tensor], R]) -> Iterator[R]:
    """`found` of the pre-activations `[c, m]` of each chunk, which it may not keep: the next one's may replace them.

    Args:
        x: `[B, d]`.
        W_enc: `[m, d]`.
        b_enc: `[m]`.
        dtype: of the product. In `int8` what it gives is float32, and rounded in both matrices but not in the bias; in
            `float8_e4m3fn` it is bfloat16.
        found: what is done with them.
    """
    if dtype == torch.int8:
        yield from _in_eight_bits(x, W_enc, b_enc, found)
        return
    if dtype == _FLOAT8:
        yield from _in_float8(x, W_enc, b_enc, found)
        return
    x, weight, bias = x.to(dtype), W_enc.to(dtype), b_enc.to(dtype)
    if large_on_cpu(weight) and _one_dnn_multiplies(dtype):
        size = _CACHED_CHUNK if dtype == torch.float32 else _CHUNK
        if weight is not W_enc:  # a copy, which the packed one replaces
            weight = packed(weight, size)
        for chunk in x.split(size):
            yield found(linear(chunk, weight, bias))
        return
    size = _CHUNK if x.device.type == "cpu" else _off_cpu(len(weight), x.element_size())
    buffer = x.new_empty(min(size, len(x)), len(weight))
    for chunk in x.split(size):
        yield found(torch.addmm(bias, chunk, weight.T, out=buffer[: len(chunk)]))


def _in_eight_bits(x: Tensor, W_enc: Tensor, b_enc: Tensor, found: Callable[[Tensor], R]) -> Iterator[R]:
    """A scale a row, and one a column that makes the columns of both matrices equally large (SmoothQuant, Xiao et al.
    2023): along the principal axes of the inputs those of `x` are very different."""
    columns, m = _evening(x, W_enc), len(W_enc)
    parts = [_to_eight_bits(rows * columns) for rows in W_enc.split(_ROWS)]
    weight, unit = (torch.cat(part) for part in zip(*parts, strict=True))
    weight = _padded(weight, -m % _MULTIPLE_ON_CUDA)
    for chunk in x.split(_CACHED_CHUNK if x.device.type == "cpu" else _off_cpu(m, 8)):  # as integers and as float32
        rows, length = _to_eight_bits(chunk / columns)
        rows = _padded(rows, max(0, _ROWS_ON_CUDA - len(rows)))
        pre = torch._int_mm(rows, weight.T)[: len(chunk), :m].float().mul_(unit.T)
        yield found(torch.addcmul(b_enc.float(), pre, length, out=pre))


def _in_float8(x: Tensor, W_enc: Tensor, b_enc: Tensor, found: Callable[[Tensor], R]) -> Iterator[R]:
    """A scale a row. Columns that are 10⁴ times smaller than others in one matrix and larger in the other lose their
    precision: nothing evens them, as in eight bits."""
    m, d = W_enc.shape
    native = _multiplies_float8(x)
    more = (0, -d % _FLOAT8_MULTIPLE, 0, -m % _FLOAT8_MULTIPLE)
    weight, unit = to_float8(pad(W_enc, more) if any(more) else W_enc)
    weight = weight if native else weight.bfloat16()  # which holds what float8 does
    bias = pad(b_enc, (0, more[3])).bfloat16()
    for chunk in x.split(_CHUNK if x.device.type == "cpu" else _off_cpu(m, 2 if native else 12)):
        rows, length = to_float8(pad(chunk, more[:2]) if more[1] else chunk)
        if native:
            pre = torch._scaled_mm(
                rows, weight.T, scale_a=length, scale_b=unit.T, bias=bias, out_dtype=bias.dtype, use_fast_accum=True
            )
        else:
            product = (rows.bfloat16() @ weight.T).float()
            pre = torch.addcmul(bias.float(), product.mul_(unit.T), length).bfloat16()
        yield found(pre[:, :m])


def _multiplies_float8(operand: Tensor) -> bool:
    return operand.is_cuda and torch.cuda.get_device_capability(operand.device) >= _FLOAT8_CAPABILITY


def to_float8(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows in float8, and the length `[rows, 1]` of a unit."""
    if _multiplies_float8(rows) and (kernels := triton_kernels("float8")) is not None:
        return kernels.to_float8(rows)
    largest = torch.linalg.vector_norm(rows, ord=torch.inf, dim=1, keepdim=True, dtype=torch.float32)
    unit = (largest / torch.finfo(_FLOAT8).max).clamp(min=torch.finfo(torch.float32).tiny)
    return (rows / unit).to(_FLOAT8), unit


def _padded(matrix: Tensor, rows: int) -> Tensor:
    """With as many rows of nothing, and as many columns as make their number a multiple."""
    return pad(matrix, (0, -matrix.shape[1] % _MULTIPLE_ON_CUDA, 0, rows))


def _evening(x: Tensor, W_enc: Tensor) -> Tensor:
    """`[d]`; what a column of `W_enc` is multiplied with and one of `x` is divided by. From all of `x`, since a column
    that few tokens use would be the only one that is left of them, and a sample of `W_enc`; a token or a feature that
    is not finite shall be the only one to show it."""
    some = W_enc[:: max(1, len(W_enc) // _ROWS)].float().square().mean(0)
    every = torch.stack([rows.float().square().sum(0) for rows in x.split(_ROWS)]).sum(0) / len(x)
    least = torch.finfo(torch.float32).tiny ** 0.5
    columns = ((every + least) / (some + least)) ** 0.25
    return columns.where(columns.isfinite(), 1)


def _to_eight_bits(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows in eight bits, and the length `[rows, 1]` of a unit."""
    unit = (rows.abs().amax(1, keepdim=True).float() / _LARGEST).clamp(min=torch.finfo(torch.float32).tiny)
    return (rows / unit).round_().to(torch.int8), unit


def _off_cpu(m: int, element_size: int) -> int:
    """Tokens of a chunk."""
    return max(1, _CHUNK_BYTES // (m * element_size))
