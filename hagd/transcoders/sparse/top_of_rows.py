"""The k largest of each row: by Triton kernels on a CUDA device, by compiled loops or NumPy's partition on a CPU, else
in two stages.

Shape legend: c rows, m columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hagd.transcoders.sparse.device_kernels import selection_kernels

_GROUPS = (16, 8, 4, 2)

_DIRECT = 512
"""Columns that NumPy partitions about as fast as it would their group maxima."""

_LEAST_NAN = 0xFF80
"""Of the bits of a bfloat16, minus infinity: what is more is NaN with a sign, which as an integer would be negative."""


def top_of_rows(pre: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Values and places `[c, k]` of the k largest of each row."""
    if (kernels := selection_kernels(pre, k)) is not None:
        return kernels.top_of_rows(pre, k)
    return _partitioned(pre, k) if pre.device.type == "cpu" else two_stage(pre, k)


def two_stage(pre: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Exact top k of each row: the k groups with the largest maxima contain the top k."""
    size = _group_size(pre.shape[1], k, _GROUPS[1:])
    if size == 1:
        return pre.topk(k, dim=-1, sorted=False)
    chosen = _maxima(pre, size).topk(k, dim=-1, sorted=False).indices
    values, place = _members(pre, size, chosen).topk(k, dim=-1, sorted=False)
    return values, _column(place, chosen, pre.shape[1] // size)


def _partitioned(pre: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """As `two_stage` on a CPU: what is less than the k-th largest of the groups' maxima is not among the top k."""
    size = 1 if pre.shape[1] <= _DIRECT else _group_size(pre.shape[1], k, _GROUPS)
    place = _largest(pre, k) if size == 1 else _largest_of(_candidates(pre, size, k), pre, k)
    return pre.gather(1, place), place


def least_maximum(ranks: Tensor, k: int) -> NDArray[Any]:
    """Of each row of `[c, m]`: the k-th largest of its groups' maxima, which the k largest reach."""
    return np.ascontiguousarray(kth_largest(_maxima(ranks, _group_size(ranks.shape[1], k, _GROUPS)).numpy(), k))


def _candidates(pre: Tensor, size: int, k: int) -> NDArray[np.int64]:
    """Flat places of the entries that reach the k-th largest of the groups' maxima, ascending."""
    # As integers positive bfloat16 numbers keep their order, and NumPy and torch are several times faster.
    ranks = pre.view(torch.int16) if pre.dtype == torch.bfloat16 else pre
    maxima = _maxima(ranks, size).numpy()
    bound = kth_largest(maxima, k)[:, None]
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
    bound = kth_largest(padded(values, counts, k), k)
    return _places(found[values >= np.repeat(bound, counts)], pre, k)


def padded(values: NDArray[Any], counts: NDArray[np.int64], least: int) -> NDArray[Any]:
    """Consecutive segments as rows that end in minus infinity, at least `least` columns wide."""
    rows = np.full((len(counts), max(least, counts.max())), -np.inf, values.dtype)
    rows[np.arange(rows.shape[1]) < counts[:, None]] = values
    return rows


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
    return _places(np.flatnonzero(values >= kth_largest(values, k)[:, None]), pre, k)


def _distinct(values: Tensor, place: Tensor) -> NDArray[Any]:
    """Values for NumPy. Those of bfloat16, where ties are the rule, get their places into the bits that it leaves."""
    wide = values.to(torch.promote_types(values.dtype, torch.float32))
    if values.dtype == torch.bfloat16:
        wide.view(torch.int32).bitwise_or_(place.clamp(max=0xFFFF).to(torch.int32))
    return wide.numpy()


def kth_largest(rows: NDArray[Any], k: int) -> NDArray[Any]:
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
