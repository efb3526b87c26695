"""Which features fire, without ever holding all pre-activations: tokens are encoded in chunks (`chunks.py`).

On a CUDA device `top_k` never waits for the device; the others do, since how many pairs they find decides shapes.

Shape legend: B tokens, m features, d = d_model, n active pairs.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from torch import Tensor

from hagd.config.transcoder import Selection
from hagd.transcoders.sparse.certain import certain_above, certain_top_k
from hagd.transcoders.sparse.chunks import by_chunks
from hagd.transcoders.sparse.device_kernels import large_on_cpu
from hagd.transcoders.sparse.products import gather_dot
from hagd.transcoders.sparse.support import Support
from hagd.transcoders.sparse.top_of_rows import top_of_rows, two_stage

_MORE, _LEAST_MORE = 4, 16
"""Features more than k that a product in eight bits chooses: this share of k, and the fewest."""

_WORTHWHILE = 512
"""Tokens from which measuring what bfloat16 takes from an encoder costs less than its faster product saves."""


@torch.no_grad()
def top_k(x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, by: Selection = "exact") -> tuple[Support, Tensor]:
    """The k largest pre-activations `x W_encᵀ + b_enc` of every token.

    Args:
        x: `[B, d]`.
        W_enc: `[m, d]`.
        b_enc: `[m]`.
        k: how many.
        by: how. `exact`: as a product in `x`'s precision ranks them, which on some CPUs is found without it
            (`certain.py`). `bfloat16`: as a product in bfloat16 does. `int8`: k and a quarter more, at least 16, as a
            product in eight bits ranks them, of which full precision chooses. `float8`: as a product in float8 does.

    Returns:
        The pairs, and their pre-activations `[B · k]` in `W_enc`'s precision; without gradient. Those that a product
        in a lower one ranked are computed again, unless `x` is in bfloat16 itself, as under autocast.
    """
    m = len(W_enc)
    match by:
        case "exact":
            values, index = _exact(x, W_enc, b_enc, k)
            return _constant_rows(index, m), values.flatten()
        case "bfloat16" | "float8":
            dtype = torch.bfloat16 if by == "bfloat16" else torch.float8_e4m3fn
            values, index = _top(x, W_enc, b_enc, k, dtype)
            support = _constant_rows(index, m)
            known = x.dtype == torch.bfloat16
            return support, values.flatten().to(W_enc.dtype) if known else gather_dot(x, support, W_enc, b_enc)
        case "int8":
            _, index = _top(x, W_enc, b_enc, min(m, k + max(_LEAST_MORE, k // _MORE)), torch.int8)
            pre = gather_dot(x, _constant_rows(index, m), W_enc, b_enc)
            values, best = top_of_rows(pre.view_as(index), k)
            return _constant_rows(index.gather(1, best), m), values.flatten()


@torch.no_grad()
def top_places(pre: Tensor, k: int) -> Tensor:
    """Places `[…, k]` of the k largest of the last dimension of `[…, m]`, in no particular order."""
    _, places = top_of_rows(pre.reshape(-1, pre.shape[-1]), k)
    return places.view(*pre.shape[:-1], k)


@torch.no_grad()
def above(x: Tensor, W_enc: Tensor, b_enc: Tensor, threshold: Tensor) -> tuple[Support, Tensor]:
    """All pre-activations above `threshold` (`[m]`, or one for all): the pairs and values `[n]`, without gradient."""
    if _bfloat16_saves_time(x, W_enc) and (found := certain_above(x, W_enc, b_enc, threshold)) is not None:
        return found
    chunks = by_chunks(x, W_enc, b_enc, x.dtype, partial(_above, threshold=threshold))
    counts, index, values = (torch.cat(parts) for parts in zip(*chunks, strict=True))
    return Support.of_counts(index, counts, len(W_enc)), values


def _above(pre: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of a chunk, in float32 or float64 on a CPU: how many each token has, the features, and their pre-activations."""
    n_tokens, m = pre.shape
    if pre.device.type == "cpu":  # NumPy is several times faster
        place = torch.from_numpy(np.flatnonzero(pre.numpy() > threshold.numpy()))
    else:
        place = (pre > threshold).flatten().nonzero()[:, 0]
    counts = torch.searchsorted(place, m * torch.arange(n_tokens + 1, device=pre.device)).diff()
    return counts, place % m, pre.flatten()[place]


@torch.no_grad()
def top_of_batch(x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int) -> tuple[Support, Tensor]:
    """The B · k largest positive pre-activations of the whole batch (BatchTopK, Bussmann et al. 2024).

    A bound from a few tokens lets most pairs be dropped unsorted; it is lowered until enough pass.
    """
    wanted = k * len(x)
    bound = batch_threshold(x[:: max(1, len(x) // 64)], W_enc, b_enc, min(len(W_enc), k + max(1, k // 2)))
    while True:
        support, values = above(x, W_enc, b_enc, bound)
        if len(values) >= wanted or bound == 0:
            break
        bound = (bound / 2).where((bound > 1e-6) & bound.isfinite(), 0.0)
    if len(values) <= wanted:
        return support, values
    keep = values.topk(wanted, sorted=False).indices.sort().values
    counts = torch.bincount(support.token[keep], minlength=len(x))
    return Support.of_counts(support.index[keep], counts, support.m), values[keep]


@torch.no_grad()
def batch_threshold(x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int) -> Tensor:
    """The pre-activation that B · k of all pairs reach; 0 where fewer are positive. Holds them all: for few tokens."""
    pre = torch.cat(list(by_chunks(x, W_enc, b_enc, x.dtype, Tensor.clone)))
    return pre.flatten().topk(k * len(x)).values[-1].clamp(min=0)


def _exact(x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Pre-activations and features `[B, k]`."""
    if not _bfloat16_saves_time(x, W_enc):
        return _top(x, W_enc, b_enc, k, x.dtype)
    values, index, left_open = certain_top_k(x, W_enc, b_enc, k)
    if left_open.any():
        values[left_open], index[left_open] = _top(x[left_open], W_enc, b_enc, k, x.dtype)
    return values, index


def _bfloat16_saves_time(x: Tensor, W_enc: Tensor) -> bool:
    return (
        large_on_cpu(W_enc)
        and len(x) >= _WORTHWHILE
        and x.dtype == W_enc.dtype == torch.float32
        and torch.backends.mkldnn.is_available()
        and torch.cpu._is_avx512_bf16_supported()
    )


def _top(x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Values and features `[B, k]` of the largest entries of the product in a precision."""
    small_on_cpu = W_enc.device.type == "cpu" and not large_on_cpu(W_enc)
    top = partial(two_stage if small_on_cpu else top_of_rows, k=k)
    values, index = (torch.cat(parts) for parts in zip(*by_chunks(x, W_enc, b_enc, dtype, top), strict=True))
    return values, index


def _constant_rows(index: Tensor, m: int) -> Support:
    n_tokens, k = index.shape
    return Support(index.flatten(), torch.arange(0, n_tokens * k + 1, k, device=index.device), m)
