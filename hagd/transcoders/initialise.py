"""Start of a training from data: most of the first hundred steps done in closed form.

Shape legend: L layers, B tokens, d = d_model, m dictionary size.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from hagd.transcoders.dictionary import Dictionary
from hagd.transcoders.objective import StackedTranscoders
from hagd.transcoders.sparse.products import sum_by_feature

_RIDGE = 1e-2
"""Of the mean squared input; what regressions are shrunk by."""

_FLATTEST = 1e-4
"""Of the mean variance; what a direction counts for at least."""


@torch.no_grad()
def initialise(stacked: StackedTranscoders, x: Tensor, y: Tensor) -> None:
    """Start all layers of `stacked` from scaled tokens `x`, `y` `[L, B, d]`."""
    for i, dictionary in enumerate(stacked.dictionaries):
        stacked.power[i] = start(dictionary, x[i], y[i])


@torch.no_grad()
def start(dictionary: Dictionary, x: Tensor, y: Tensor) -> Tensor:
    """Set all weights from scaled tokens `x`, `y` `[B, d]`, the encoder's rows beginning with the random ones that are
    there; returns the power of `y`.

    The skip is the ridge regression of y on x. Where x and y are the same (an autoencoder), rows lean towards
    directions of large variance, the decoder is the encoder's transpose and the features are scaled by least squares.
    Else half of an encoder row reads, through the ridge regression, a random direction of y, unless the skip does;
    decoder row j points along the mean of what the skip leaves over on the tokens on which j fires. Layers written to
    from afar start at nothing.
    """
    variances, axes = torch.linalg.eigh(x.T @ x / len(x))
    dictionary.basis.copy_(axes)
    linear = None if torch.equal(x, y) else _ridge(x, y)
    if dictionary.W_skip is not None and linear is not None:
        dictionary.W_skip.copy_(linear)
    target = y - dictionary.constant(x)
    dictionary.W_dec[:, dictionary.d :] = 0
    if linear is None:
        dictionary.W_enc.copy_(normalize(dictionary.W_enc * _spread(variances)))
        _tie(dictionary, x)
    else:
        if dictionary.W_skip is None:
            read = normalize(dictionary.W_enc @ linear.T)
            dictionary.W_enc.copy_(normalize(dictionary.turned(read) + dictionary.W_enc))
        dictionary.start_at(x)
        _correlate(dictionary, x, target)
    return (y.square().sum() / len(y)).clamp(min=1e-12)


def _ridge(x: Tensor, y: Tensor) -> Tensor:
    """`[d, d]` that maps `x` to `y` with least squares."""
    gram = x.T @ x
    gram.diagonal().add_(_RIDGE * gram.diagonal().mean())
    return torch.linalg.solve(gram, x.T @ y)


def _spread(variances: Tensor) -> Tensor:
    """Fourth roots of relative variances `[d]`: halfway, in powers, from rows that know nothing to drawn data."""
    return (variances / variances.mean().clamp(min=1e-12)).clamp(min=_FLATTEST) ** 0.25


def _tie(dictionary: Dictionary, x: Tensor) -> None:
    own = dictionary.W_dec[:, : dictionary.d]
    own.copy_(dictionary.W_enc @ dictionary.basis.T)
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
