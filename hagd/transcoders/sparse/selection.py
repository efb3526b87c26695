"""Which features fire, without ever holding all pre-activations: tokens are encoded in chunks, on a CPU in its cache.

On a CUDA device `top_k` never waits for the device; the others do, since how many pairs they find decides shapes.

Shape legend: B tokens, c tokens of a chunk, m features, d = d_model, n active pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from types import ModuleType
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
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

_LEAST_NAN = 0xFF80
"""Of the bits of a bfloat16, minus infinity: what is more is NaN with a sign, which as an integer would be negative."""

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
    """As `_two_stage` on a CPU: what is less than the k-th largest of the groups' maxima is not among the top k."""
    size = 1 if pre.shape[1] <= _DIRECT else _group_size(pre.shape[1], k, _GROUPS)
    place = _largest(pre, k) if size == 1 else _largest_of(_candidates(pre, size, k), pre, k)
    return pre.gather(1, place), place


def _candidates(pre: Tensor, size: int, k: int) -> NDArray[np.int64]:
    """Flat places of the entries that reach the k-th largest of the groups' maxima, ascending."""
    # As integers positive bfloat16 numbers keep their order, and NumPy and torch are several times faster.
    ranks = pre.view(torch.int16) if pre.dtype == torch.bfloat16 else pre
    maxima = _maxima(ranks, size).numpy()
    place = maxima.shape[1] - k
    bound = np.partition(maxima, place, axis=1)[:, place, None]
    if pre.dtype == torch.bfloat16:
        if bound.min() < 0 or ranks.numpy().view(np.uint16).max() > _LEAST_NAN:
            return _candidates(pre.float(), size, k)
    elif (nan := np.isnan(maxima).any(axis=1)).any():
        bound[nan] = np.inf  # too few candidates, so that torch selects, which keeps NaN
    return np.flatnonzero(ranks.numpy() >= bound)


def _largest_of(found: NDArray[np.int64], pre: Tensor, k: int) -> Tensor:
    """Places `[c, k]` of the k largest of each row, among candidates at flat places in ascending order."""
    n_rows, n = pre.shape
    starts = np.searchsorted(found, n * np.arange(n_rows))
    counts = np.diff(starts, append=len(found))
    if counts.min() < k:  # NaN
        return _places(found[:0], pre, k)
    rank = np.arange(len(found)) - np.repeat(starts, counts)
    values = _distinct(pre.view(-1).index_select(0, torch.from_numpy(found)), torch.from_numpy(rank))
    rows = np.full((n_rows, counts.max()), -np.inf, values.dtype)
    rows[np.arange(rows.shape[1]) < counts[:, None]] = values
    return _places(found[values >= np.repeat(_kth_largest(rows, k), counts)], pre, k)


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
    values = _distinct(pre, torch.arange(pre.shape[1]))
    return _places(np.flatnonzero(values >= _kth_largest(values, k)[:, None]), pre, k)


def _distinct(values: Tensor, place: Tensor) -> NDArray[Any]:
    """Values for NumPy. Those of bfloat16, where ties are the rule, get their places into the bits that it leaves."""
    wide = values.to(torch.promote_types(values.dtype, torch.float32))
    if values.dtype == torch.bfloat16:
        wide.view(torch.int32).bitwise_or_(place.clamp(max=0xFFFF).to(torch.int32))
    return wide.numpy()


def _kth_largest(rows: NDArray[Any], k: int) -> NDArray[Any]:
    """Of each row."""
    place = rows.shape[1] - k
    return np.partition(rows, place, axis=1)[:, place]


def _places(found: NDArray[np.int64], pre: Tensor, k: int) -> Tensor:
    """Places `[c, k]` of flat places; torch's own in rows where ties or NaN make them more or fewer than k."""
    n_rows, n = pre.shape
    if len(found) == n_rows * k:
        return torch.from_numpy(found).view(n_rows, k) - n * torch.arange(n_rows)[:, None]
    row = found // n
    counted = np.bincount(row, minlength=n_rows) == k
    places = torch.empty(n_rows, k, dtype=torch.long)
    places[torch.from_numpy(counted)] = torch.from_numpy((found - n * row)[counted[row]]).view(-1, k)
    uncounted = torch.from_numpy(~counted)
    places[uncounted] = pre[uncounted].topk(k, dim=-1, sorted=False).indices
    return places


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
