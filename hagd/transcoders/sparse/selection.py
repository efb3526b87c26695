"""Which features fire, without ever holding all pre-activations: tokens are encoded in chunks, on a CPU in its cache.

On a CUDA device `top_k` never waits for the device; the others do, since how many pairs they find decides shapes.

Shape legend: B tokens, c tokens of a chunk, m features, d = d_model, n active pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from types import ModuleType
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from hagd.transcoders.sparse.products import Support, gather_dot, triton_kernels

R = TypeVar("R")

_CHUNK = 512
"""Tokens of a chunk on a CPU."""

_ONEDNN_CHUNK = 256
"""The same where oneDNN multiplies: 512 were little faster and held twice as much."""

_CHUNK_BYTES = 2**28
"""Of a chunk's pre-activations on any other device: no cache holds a useful chunk there, and each chunk reads W_enc
again and costs a dozen launches, so a chunk is as large as memory spares. Reasoned, not measured."""

_GROUPS = (16, 8, 4, 2)

_DIRECT = 512
"""Columns that NumPy partitions about as fast as it would their group maxima."""

_LARGE = 1024
"""Features, from which on a CPU other libraries than torch's first choice multiply and select. With fewer they save
milliseconds a thousand steps, and torch's own keep earlier results to the bit."""


@torch.no_grad()
def top_k(x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, dtype: torch.dtype) -> tuple[Support, Tensor]:
    """The k largest pre-activations `x W_encᵀ + b_enc` of every token.

    Args:
        x: `[B, d]`.
        W_enc: `[m, d]`.
        b_enc: `[m]`.
        k: how many.
        dtype: of the dense product that ranks features. Where it is not `x`'s own, the pre-activations of the k
            features are computed again in `x`'s.

    Returns:
        The pairs, and their pre-activations `[B · k]` in `x`'s precision; without gradient.
    """
    m = len(W_enc)
    small_on_cpu = W_enc.device.type == "cpu" and not _large_on_cpu(W_enc)
    top = partial(_two_stage if small_on_cpu else _top_of_rows, k=k)
    values, index = (torch.cat(parts) for parts in zip(*_by_chunks(x, W_enc, b_enc, dtype, top), strict=True))
    if dtype != x.dtype:
        values = _rescored(x, W_enc, b_enc, index)
    return _constant_rows(index, m), values.flatten()


@torch.no_grad()
def top_places(pre: Tensor, k: int) -> Tensor:
    """Places `[…, k]` of the k largest of the last dimension of `[…, m]`, in no particular order."""
    _, places = _top_of_rows(pre.reshape(-1, pre.shape[-1]), k)
    return places.view(*pre.shape[:-1], k)


@torch.no_grad()
def above(x: Tensor, W_enc: Tensor, b_enc: Tensor, threshold: Tensor) -> tuple[Support, Tensor]:
    """All pre-activations above `threshold` (`[m]`, or one for all): the pairs and values `[n]`, without gradient."""

    def found(pre: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        chosen = pre > threshold
        place = _nonzero(chosen)
        return chosen.sum(1), place % pre.shape[1], pre.flatten()[place]

    chunks = zip(*_by_chunks(x, W_enc, b_enc, x.dtype, found), strict=True)
    counts, index, values = (torch.cat(parts) for parts in chunks)
    offsets = torch.cat([torch.zeros(1, dtype=torch.long, device=x.device), counts.cumsum(0)])
    return Support(index, offsets, len(W_enc)), values


@torch.no_grad()
def top_of_batch(x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int) -> tuple[Support, Tensor]:
    """The B · k largest positive pre-activations of the whole batch (BatchTopK, Bussmann et al. 2024).

    A bound from a few tokens lets most pairs be dropped unsorted; it is lowered until enough pass.
    """
    wanted = k * len(x)
    bound = batch_threshold(x[:: max(1, len(x) // 64)], W_enc, b_enc, min(len(W_enc), k + k // 2))
    while True:
        support, values = above(x, W_enc, b_enc, bound)
        if len(values) >= wanted or bound == 0:
            break
        bound = (bound / 2).where(bound > 1e-6, 0.0)
    if len(values) <= wanted:
        return support, values
    keep = values.topk(wanted, sorted=False).indices.sort().values
    counts = torch.bincount(support.token[keep], minlength=len(x))
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return Support(support.index[keep], offsets, support.m), values[keep]


@torch.no_grad()
def batch_threshold(x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int) -> Tensor:
    """The pre-activation that B · k of all pairs reach; 0 where fewer are positive. Holds them all: for few tokens."""
    pre = torch.cat(list(_by_chunks(x, W_enc, b_enc, x.dtype, Tensor.clone)))
    return pre.flatten().topk(k * len(x)).values[-1].clamp(min=0)


def _by_chunks(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, dtype: torch.dtype, found: Callable[[Tensor], R]
) -> Iterator[R]:
    """`found` of the pre-activations `[c, m]` of each chunk, which it may not keep: the next one's may replace them."""
    x, weight, bias = x.to(dtype), W_enc.to(dtype), b_enc.to(dtype)
    if _large_on_cpu(weight) and dtype == torch.float32 and torch.backends.mkldnn.is_available():
        # What torch takes for float32 by itself is slower on AMD's processors.
        for chunk in x.split(_ONEDNN_CHUNK):
            yield found(torch.ops.mkldnn._linear_pointwise(chunk, weight, bias, "none", [], ""))
        return
    size = _CHUNK if x.device.type == "cpu" else max(1, _CHUNK_BYTES // (len(weight) * x.element_size()))
    buffer = x.new_empty(min(size, len(x)), len(weight))
    for chunk in x.split(size):
        yield found(torch.addmm(bias, chunk, weight.T, out=buffer[: len(chunk)]))


def _large_on_cpu(weight: Tensor) -> bool:
    return weight.device.type == "cpu" and len(weight) >= _LARGE


def _top_of_rows(pre: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Values and places `[c, k]` of the k largest of each row."""
    if (kernels := _kernels(pre)) is not None:
        return kernels.top_of_rows(pre, k)
    return _partitioned(pre, k) if pre.device.type == "cpu" else _two_stage(pre, k)


def _kernels(pre: Tensor) -> ModuleType | None:
    """The Triton kernel, where it can run and hold these rows."""
    kernels = triton_kernels("selection") if pre.is_cuda else None
    return kernels if kernels is not None and kernels.can_hold(pre) else None


def _two_stage(pre: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Exact top k of each row: the k groups with the largest maxima contain the top k."""
    size = _group_size(pre.shape[1], k, _GROUPS[1:])
    if size == 1:
        return pre.topk(k, dim=-1, sorted=False)
    chosen = _maxima(pre, size).topk(k, dim=-1, sorted=False).indices
    values, place = _members(pre, size, chosen).topk(k, dim=-1, sorted=False)
    return values, _column(place, chosen, pre.shape[1] // size)


def _partitioned(pre: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """As `_two_stage`, in as many stages as there are, on a CPU."""
    size = 1 if pre.shape[1] <= _DIRECT else _group_size(pre.shape[1], k, _GROUPS)
    if size == 1:
        place = _largest(pre, k)
        return pre.gather(1, place), place
    chosen = _largest(_maxima(pre, size), k)
    values, place = _partitioned(_members(pre, size, chosen), k)
    return values, _column(place, chosen, pre.shape[1] // size)


def _group_size(m: int, k: int, sizes: Sequence[int]) -> int:
    return next((size for size in sizes if m % size == 0 and m // size >= 2 * k), 1)


def _maxima(pre: Tensor, size: int) -> Tensor:
    """Of groups, each of `size` columns that lie m / size apart: `[c, m / size]`."""
    return pre.view(len(pre), size, -1).amax(1)


def _members(pre: Tensor, size: int, chosen: Tensor) -> Tensor:
    """All columns `[c, size · k]` of the chosen groups `[c, k]`."""
    return pre.view(len(pre), size, -1).gather(2, chosen[:, None].expand(-1, size, -1)).flatten(1)


def _column(place: Tensor, chosen: Tensor, n_groups: int) -> Tensor:
    """Where the places among `_members` lie among all columns."""
    k = chosen.shape[1]
    member = place // k
    return chosen.gather(1, place - member * k) + member * n_groups


def _largest(pre: Tensor, k: int) -> Tensor:
    """Places `[c, k]` of the k largest of each row; NumPy finds the k-th several times faster than torch on a CPU."""
    n, distinct = pre.shape[1], pre
    if pre.dtype == torch.bfloat16 and n <= 2**16:  # ties are the rule: places go into the bits that it leaves free
        distinct = pre.float()
        distinct.view(torch.int32).bitwise_or_(torch.arange(n, dtype=torch.int32))
    values = distinct.to(torch.promote_types(distinct.dtype, torch.float32)).numpy()
    kth = np.partition(values, n - k, axis=1)[:, n - k, None]
    found = np.flatnonzero(values >= kth)
    if len(found) != len(pre) * k:  # ties, or NaN
        return pre.topk(k, dim=-1, sorted=False).indices
    return torch.from_numpy(found).view(len(pre), k) - n * torch.arange(len(pre))[:, None]


def _rescored(x: Tensor, W_enc: Tensor, b_enc: Tensor, index: Tensor) -> Tensor:
    support = _constant_rows(index, len(W_enc))
    return gather_dot(x, support, W_enc, b_enc).view_as(index)


def _constant_rows(index: Tensor, m: int) -> Support:
    n_tokens, k = index.shape
    return Support(index.flatten(), torch.arange(0, n_tokens * k + 1, k, device=index.device), m)


def _nonzero(mask: Tensor) -> Tensor:
    """Flat places of the few True entries; NumPy finds them several times faster than torch on a CPU."""
    if mask.device.type == "cpu":
        return torch.from_numpy(np.flatnonzero(mask.numpy()))
    return mask.flatten().nonzero()[:, 0]
