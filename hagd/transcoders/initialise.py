"""Start of a training from data: most of the first hundred steps done in closed form.

Shape legend: L layers, B tokens, d = d_model, m dictionary size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hagd.transcoders.dictionary import Dictionary
from hagd.transcoders.objective import StackedTranscoders
from hagd.transcoders.sparse.products import sum_by_feature

_RIDGE = 1e-2
"""Of the mean squared input; what the skip is shrunk by."""


@torch.no_grad()
def initialise(stacked: StackedTranscoders, x: Tensor, y: Tensor) -> None:
    """Start all layers of `stacked` from scaled tokens `x`, `y` `[L, B, d]`."""
    for i, dictionary in enumerate(stacked.dictionaries):
        stacked.power[i] = start(dictionary, x[i], y[i])


@torch.no_grad()
def start(dictionary: Dictionary, x: Tensor, y: Tensor) -> Tensor:
    """Set skip, thresholds and decoder from scaled tokens `x`, `y` `[B, d]`; returns the power of `y`.

    The skip is the ridge regression of y on x. Where x and y are the same (an autoencoder), the decoder is the
    encoder's transpose and the features are scaled by least squares. Else decoder row j points along the mean of what
    the skip leaves over on the tokens on which j fires. Layers written to from afar start at nothing.
    """
    if dictionary.W_skip is not None:
        dictionary.W_skip.copy_(_ridge(x, y))
    target = y - dictionary.constant(x)
    dictionary.W_dec[:, dictionary.d :] = 0
    if torch.equal(x, y):
        _tie(dictionary, x)
    else:
        dictionary.start_at(x)
        _correlate(dictionary, x, target)
    return (y.square().sum() / len(y)).clamp(min=1e-12)


def _ridge(x: Tensor, y: Tensor) -> Tensor:
    """`[d, d]` that maps `x` to `y` with least squares."""
    gram = x.T @ x
    gram.diagonal().add_(_RIDGE * gram.diagonal().mean())
    return torch.linalg.solve(gram, x.T @ y)


def _tie(dictionary: Dictionary, x: Tensor) -> None:
    own = dictionary.W_dec[:, : dictionary.d]
    own.copy_(dictionary.W_enc)
    dictionary.start_at(x)
    recon = dictionary.write(dictionary.encode(x))[0]
    scale = ((recon * x).sum() / recon.square().sum().clamp(min=1e-12)).clamp(min=1e-6)
    dictionary.W_enc.mul_(scale)
    dictionary.b_enc.mul_(scale)
    if dictionary.log_threshold is not None:
        dictionary.log_threshold.add_(scale.log())


def _correlate(dictionary: Dictionary, x: Tensor, target: Tensor) -> None:
    own = dictionary.W_dec[:, : dictionary.d]
    codes = dictionary.encode(x)
    energy = torch.zeros_like(dictionary.b_enc).index_add_(0, codes.support.index, codes.values.square())[:, None]
    rows = sum_by_feature(codes.values, codes.support, target) / energy.clamp(min=1e-6)
    own.copy_(torch.where(energy > 0, rows, own * rows.norm(dim=-1).mean()))
    recon = dictionary.write(codes)[0]
    own.mul_((recon * target).sum() / recon.square().sum().clamp(min=1e-6))
