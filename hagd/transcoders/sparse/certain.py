"""The k largest pre-activations, or all above a threshold, in full precision from a product in bfloat16, which newer
CPUs make twice as fast.

Of rows rounded to x̃ and w̃, `x·w − x̃·w̃ = (x − x̃)·w + x̃·(w − w̃)`. So the rounded product is off by no more than
`‖x − x̃‖‖w‖ + ‖x̃‖‖w − w̃‖` (Cauchy and Schwarz). A feature whose largest possible pre-activation is below the k-th
largest of the least possible ones is not among the k largest, nor is one whose largest possible one is below a
threshold above it; the others, fewer than 2 k on ordinary tokens, are computed in full. What is found is what the
product in full precision would find, up to its own rounding. That does not hold for norms below 1e-19, whose squares
float32 loses: then features can be missed.

Shape legend: B tokens, c tokens of a chunk, m features, d = d_model, n pairs.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hagd.transcoders.sparse.chunks import linear, packed
from hagd.transcoders.sparse.cpu_selection import possible_top, top_of_segments
from hagd.transcoders.sparse.device_kernels import compiled
from hagd.transcoders.sparse.products import gather_dot
from hagd.transcoders.sparse.support import Support
from hagd.transcoders.sparse.top_of_rows import kth_largest, least_maximum, padded

_MOST = 8
"""Times k features of a token that are looked at; where more are possible, as on outliers, it is left open."""

_WORTHWHILE = 0.5
"""Share of the first tokens that have to be decided for the others to be looked at."""

_MOST_SHARE = 16
"""Where more than one in so many pairs of a chunk can be above a threshold by a token's largest error, computing
them costs what the faster product saves."""

_STORED = np.float32(2**-8)
"""What storing a bfloat16 changes it by, relative; twice what rounding to the nearest does."""

_SUMMED = np.float32(2**-24)
"""What adding a product to a float32 sum changes it by, relative."""

_CHUNK = 256
"""Tokens at a time."""

_ROWS = 256
"""Of the encoder, whose errors are measured at a time."""


class _Encoder(NamedTuple):
    """An encoder in bfloat16.

    Attributes:
        weight: `[m, d]`, packed. bias: `[m]`.
        norms: of its rows, `[m]`. errors: norms of what rounding took from them. bias_errors: the same of the bias.
    """

    weight: Tensor
    bias: Tensor
    norms: NDArray[np.float32]
    errors: NDArray[np.float32]
    bias_errors: NDArray[np.float32]


def certain_top_k(x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of float32 matrices on a CPU, without gradient.

    Args:
        x: `[B, d]`.
        W_enc: `[m, d]`.
        b_enc: `[m]`.
        k: how many.

    Returns:
        Pre-activations and features `[B, k]`, and which tokens `[B]` were left open: their rows mean nothing. They
        are those with NaN or infinities, with fewer than k features surely above zero, and with too many candidates;
        where they are many among the first, as with a feature of outlying norm, all later ones too.
    """
    encoder = _rounded(W_enc, b_enc)
    first, *others = x.split(_CHUNK)
    parts = [_possible(first, encoder, k)]
    if (parts[0][1] > 0).mean() >= _WORTHWHILE:
        parts += [_possible(chunk, encoder, k) for chunk in others]
    features, counts = _joined(parts)
    counts = torch.cat([counts, counts.new_zeros(len(x) - len(counts))])
    # The support is not kept: its pairs by feature are needed here alone.
    pre = gather_dot(x, Support.of_counts(features, counts, len(W_enc)), W_enc, b_enc)
    if compiled(len(W_enc), pre):
        chosen = top_of_segments(pre, counts, k)
    else:
        chosen = torch.from_numpy(_top_of_segments(pre.numpy(), counts.numpy(), k))
    decided = counts > 0
    values, index = x.new_zeros(len(x), k), torch.zeros(len(x), k, dtype=torch.long)
    values[decided] = pre.index_select(0, chosen).view(-1, k)
    index[decided] = features.index_select(0, chosen).view(-1, k)
    return values, index, ~decided


def certain_above(x: Tensor, W_enc: Tensor, b_enc: Tensor, threshold: Tensor) -> tuple[Support, Tensor] | None:
    """Of float32 matrices on a CPU, without gradient.

    Args:
        x: `[B, d]`.
        W_enc: `[m, d]`.
        b_enc: `[m]`.
        threshold: `[m]`, or one for all.

    Returns:
        All pairs above it and their pre-activations `[n]`. None where something is not finite, or where too many can
        be above, so that nothing is saved: with thresholds near zero, outlying features and, where each feature has a
        threshold, outlying tokens (which no training gets).
    """
    if not (threshold > 0).any():
        return None
    encoder = _rounded(W_enc, b_enc)
    parts = []
    for chunk in x.split(_CHUNK):
        if (part := _possibly_above(chunk, encoder, threshold.numpy())) is None:
            return None
        parts.append(part)
    features, counts = _joined(parts)
    support = Support.of_counts(features, counts, len(W_enc))
    pre = gather_dot(x, support, W_enc, b_enc)
    above = pre > threshold.expand(len(W_enc)).index_select(0, features)
    counts = torch.bincount(support.token[above], minlength=len(x))
    return Support.of_counts(features[above], counts, len(W_enc)), pre[above]


@np.errstate(invalid="ignore")  # bounds that are not finite are refused
def _possibly_above(
    x: Tensor, encoder: _Encoder, threshold: NDArray[np.float32]
) -> tuple[NDArray[np.int64], NDArray[np.int64]] | None:
    """Features `[n]` of a chunk that can be above the threshold, token after token, and how many each token has."""
    pre, error, length = _product(x, encoder)
    off = _most_off(encoder, error, length)
    off = off.max() if threshold.ndim else off[:, None]  # a chunk's largest where there is a threshold a feature
    # What is stored of a number above this is not below what `_bits` leaves of it: both keep the order.
    bound = threshold - (1 + _STORED) * off
    if not np.isfinite(bound).all():
        return None
    bits = np.where(bound > 0, _bits(bound), np.iinfo(np.int16).min)  # all, where a bound says nothing
    found = np.flatnonzero(pre.view(torch.int16).numpy() >= bits)
    if len(found) * _MOST_SHARE > pre.numel():
        return None
    row, feature = np.divmod(found, pre.shape[1])
    value = pre.view(-1).index_select(0, torch.from_numpy(found)).float().numpy()
    off = _off(encoder, feature, error[row], length[row], value)
    possible = value + off > (threshold[feature] if threshold.ndim else threshold)
    return feature[possible], np.bincount(row[possible], minlength=len(x))


def _joined(parts: list[tuple[NDArray[np.int64], NDArray[np.int64]]]) -> tuple[Tensor, Tensor]:
    """Features and counts of all chunks; empties the list."""
    features, counts = (torch.from_numpy(np.concatenate(part)) for part in zip(*parts, strict=True))
    parts.clear()
    return features, counts


def _rounded(W_enc: Tensor, b_enc: Tensor) -> _Encoder:
    weight, bias = W_enc.bfloat16(), b_enc.bfloat16()
    both = zip(W_enc.split(_ROWS), weight.split(_ROWS), strict=True)
    errors = torch.cat([(rows - low.float()).norm(dim=1) for rows, low in both])
    norms = torch.cat([rows.norm(dim=1) for rows in W_enc.split(_ROWS)])
    return _Encoder(packed(weight, _CHUNK), bias, norms.numpy(), errors.numpy(), (b_enc - bias.float()).abs().numpy())


@np.errstate(invalid="ignore")  # comparisons with NaN leave a token open
def _possible(x: Tensor, encoder: _Encoder, k: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Features `[n]` that can be among the k largest of a chunk, token after token, and how many each token has; none
    where it is left open."""
    pre, error, length = _product(x, encoder)
    if compiled(pre.shape[1], pre):
        most_off = _most_off(encoder, error, length)
        of_columns = encoder.norms, encoder.errors, encoder.bias_errors
        return possible_top(pre, k, (error, length, most_off), of_columns, float(_STORED), _MOST * k)
    ranks = pre.view(torch.int16)  # where positive, integers of the same order, which NumPy and torch are faster with
    reached = torch.from_numpy(least_maximum(ranks, k)).view(torch.bfloat16).float().numpy()
    off = _most_off(encoder, error, length)
    bound = reached - 2 * (1 + 4 * _STORED) * off - 4 * _STORED * np.abs(reached)
    found = np.flatnonzero(ranks.numpy() >= _bits(bound)[:, None])
    counts = np.diff(np.searchsorted(found, pre.shape[1] * np.arange(len(x) + 1)))
    decided = (bound > 0) & (counts <= _MOST * k)
    row = np.repeat(np.arange(len(x)), counts)
    if not decided.all():
        found, row, counts = found[decided[row]], row[decided[row]], counts * decided
    feature = found - pre.shape[1] * row
    value = pre.view(-1).index_select(0, torch.from_numpy(found)).float().numpy()
    off = _off(encoder, feature, error[row], length[row], value)
    possible = value + off >= np.repeat(_kth_of_segments(value - off, counts, k), counts)
    return feature[possible], np.bincount(row[possible], minlength=len(x))


def _product(x: Tensor, encoder: _Encoder) -> tuple[Tensor, NDArray[np.float32], NDArray[np.float32]]:
    """The rounded pre-activations `[c, m]`, norms `[c]` of what rounding took from `x`, and of what it left."""
    low = x.bfloat16()
    length = low.float().norm(dim=1).numpy()
    error = (x - low.float()).norm(dim=1).numpy() + x.shape[1] * _SUMMED * length
    return linear(low, encoder.weight, encoder.bias), error, length


def _most_off(encoder: _Encoder, error: NDArray[np.float32], length: NDArray[np.float32]) -> NDArray[np.float32]:
    """What any of a token's rounded pre-activations can be off by before it is stored, `[c]`."""
    most: NDArray[np.float32] = error * encoder.norms.max() + length * encoder.errors.max()
    return most + encoder.bias_errors.max()


def _off(
    encoder: _Encoder,
    feature: NDArray[np.int64],
    error: NDArray[np.float32],
    length: NDArray[np.float32],
    value: NDArray[np.float32],
) -> NDArray[np.float32]:
    """What rounded pre-activations `[n]` can be off by, given what `_product` says of their tokens."""
    off: NDArray[np.float32] = error * encoder.norms[feature] + length * encoder.errors[feature]
    off += encoder.bias_errors[feature] + _STORED * np.abs(value)
    return off


def _bits(bound: NDArray[np.float32]) -> NDArray[np.int16]:
    """Of the bfloat16 towards zero."""
    return (bound.astype(np.float32).view(np.int32) >> 16).astype(np.int16)


def _kth_of_segments(values: NDArray[np.float32], counts: NDArray[np.int64], k: int) -> NDArray[np.float32]:
    """The k-th largest of each of consecutive segments."""
    return kth_largest(padded(values, counts, k), k)


def _top_of_segments(values: NDArray[np.float32], counts: NDArray[np.int64], k: int) -> NDArray[np.int64]:
    """Places of the k largest of each segment that is not empty, ascending; NaN is the largest, and of entries that
    are the same the first are taken."""
    values = np.where(np.isnan(values), np.inf, values)
    bound = np.repeat(_kth_of_segments(values, counts, k), counts)
    chosen = values >= bound
    if chosen.sum() > k * (counts > 0).sum():
        larger, last = values > bound, np.cumsum(counts) - 1
        same = chosen & ~larger
        before = np.concatenate([[0], np.cumsum(same)])[last + 1 - counts]
        wanted = k - np.add.reduceat(np.append(larger, 0), last + 1 - counts) * (counts > 0)
        chosen = larger | same & (np.cumsum(same) - np.repeat(before, counts) <= np.repeat(wanted, counts))
    return np.flatnonzero(chosen)
