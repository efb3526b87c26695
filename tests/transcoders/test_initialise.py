"""The start of a training against closed forms in NumPy, in double precision."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hagd.transcoders.initialise import initialise
from hagd.transcoders.objective import StackedTranscoders
from tests.transcoders.slow import LAYERS, D, dense, settings

N = 300
ACTIVATIONS = ("topk", "batch_topk", "jumprelu", "relu")


def related(seed: int = 1, d: int = D) -> tuple[Tensor, Tensor]:
    """Outputs that are a linear map of the inputs and something else beside."""
    g = torch.Generator().manual_seed(seed)
    x, other = torch.randn(2, LAYERS, N, d, generator=g, dtype=torch.float64)
    y = x @ torch.randn(LAYERS, d, d, generator=g, dtype=torch.float64) + x.abs() + 0.1 * other
    return x, y


def started(x: Tensor, y: Tensor, **changes: Any) -> StackedTranscoders:
    stacked = StackedTranscoders(settings(**changes), LAYERS, x.shape[2], seed=0).double().requires_grad_(False)
    initialise(stacked, x, y)
    return stacked


def test_the_skip_is_ridge_regression() -> None:
    """Least squares with d more observations, of nothing from √(λ · mean squared input)."""
    x, y = related()
    stacked = started(x, y, skip=True)
    for i, dictionary in enumerate(stacked.dictionaries):
        ridge = 1e-2 * (x[i] ** 2).sum(0).mean().item()
        a = np.concatenate([x[i].numpy(), np.sqrt(ridge) * np.eye(D)])
        b = np.concatenate([y[i].numpy(), np.zeros((D, D))])
        expected = np.linalg.lstsq(a, b, rcond=None)[0]
        assert dictionary.W_skip is not None
        np.testing.assert_allclose(dictionary.W_skip.numpy(), expected, rtol=1e-9, atol=1e-12)
        plain = np.linalg.lstsq(x[i].numpy(), y[i].numpy(), rcond=None)[0]
        assert np.abs(plain - expected).max() > 1e-3


def test_encoders_read_principal_axes() -> None:
    x, y = related()
    for i, dictionary in enumerate(started(x, y).dictionaries):
        turned = dictionary.turned(x[i])
        covariance = turned.T @ turned / N
        expected = np.linalg.eigvalsh(x[i].numpy().T @ x[i].numpy() / N)
        np.testing.assert_allclose(covariance.numpy(), np.diag(expected), atol=1e-12)
        assert covariance.diagonal().max() > 1.05 * covariance.diagonal().min()
        torch.testing.assert_close(dictionary.basis @ dictionary.basis.T, torch.eye(D, dtype=torch.float64))


@pytest.mark.parametrize("skip", [False, True])
def test_half_of_an_encoder_row_reads_a_direction_of_the_output(skip: bool) -> None:
    """`w = normalise(normalise(A r) + r)`, A the ridge regression, r the random row; with a skip the row is random."""
    x, y = related()
    fresh = StackedTranscoders(settings(), LAYERS, D, seed=0).double()
    for i, dictionary in enumerate(started(x, y, skip=skip).dictionaries):
        rows = fresh.dictionaries[i].W_enc.detach().numpy()
        expected = rows
        if not skip:
            gram = x[i].numpy().T @ x[i].numpy()
            ridge = 1e-2 * np.trace(gram) / D * np.eye(D)
            a = np.linalg.inv(gram + ridge) @ x[i].numpy().T @ y[i].numpy()
            read = rows @ a.T
            read = read / np.linalg.norm(read, axis=1, keepdims=True) @ dictionary.basis.numpy()
            expected = (read + rows) / np.linalg.norm(read + rows, axis=1, keepdims=True)
            assert np.abs(expected - rows).max() > 0.1
        np.testing.assert_allclose(dictionary.W_enc.numpy(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("cross_layer", [False, True])
def test_decoder_rows_point_where_the_rest_is(activation: str, skip: bool, cross_layer: bool) -> None:
    """Along the mean of what the skip leaves over, where they fire; with the scale of least squares."""
    x, y = related()
    x[1] = x[1].abs()  # so that some features of one layer never fire
    fresh = StackedTranscoders(settings(), LAYERS, D, seed=0).double()
    stacked = started(x, y, activation=activation, skip=skip, cross_layer=cross_layer)
    recon = stacked.decode(stacked.encode(x), x)[0]
    idle = 0
    for i, dictionary in enumerate(stacked.dictionaries):
        rest = y[i] - (x[i] @ dictionary.W_skip if dictionary.W_skip is not None else 0)
        written = recon[i] - (y[i] - rest)
        assert float(((rest - written) * written).sum()) == pytest.approx(0, abs=1e-8)
        assert (rest - written).square().sum() < 0.99 * rest.square().sum()
        f = dense(dictionary.encode(x[i]))
        own, later = dictionary.W_dec[:, :D], dictionary.W_dec[:, D:]
        assert later.shape[1] == (D * (LAYERS - 1 - i) if cross_layer else 0) and not later.any()
        directions = f.T @ rest / f.square().sum(0).clamp(min=1e-12)[:, None]
        fires = (f > 0).any(0)
        scale = (own[fires] * directions[fires]).sum() / directions[fires].square().sum()
        assert scale > 0
        torch.testing.assert_close(own[fires], scale * directions[fires], rtol=1e-6, atol=1e-9)
        before = fresh.dictionaries[i].W_dec[~fires]
        if len(before):
            cosine = torch.cosine_similarity(own[~fires], before, dim=1)
            torch.testing.assert_close(cosine, torch.ones_like(cosine))
        idle += len(before)
        assert stacked.power[i].item() == pytest.approx(y[i].square().sum(1).mean().item())
    assert idle or activation == "relu"


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_an_autoencoder_starts_tied(activation: str) -> None:
    x, _ = related()
    fresh = StackedTranscoders(settings(), LAYERS, D, seed=0).double()
    stacked = started(x, x.clone(), activation=activation)
    recon = stacked.decode(stacked.encode(x), x)[0]
    for i, dictionary in enumerate(stacked.dictionaries):
        variances = np.maximum(np.linalg.eigvalsh(x[i].numpy().T @ x[i].numpy()), 0)
        rows = fresh.dictionaries[i].W_enc.detach().numpy() * (variances / variances.mean()) ** 0.25
        rows = torch.from_numpy(rows / np.linalg.norm(rows, axis=1, keepdims=True))
        torch.testing.assert_close(dictionary.W_dec, rows @ dictionary.basis.T)
        scale = (dictionary.W_enc * rows).sum(1)
        assert scale[0] > 0
        torch.testing.assert_close(dictionary.W_enc, scale[0] * rows)
        energy = float(recon[i].square().sum())
        # rounding decides on which side of a JumpReLU threshold the one pair lies that it was read off
        slack = 5e-3 if activation == "jumprelu" else 1e-10
        assert float(((x[i] - recon[i]) * recon[i]).sum()) == pytest.approx(0, abs=slack * energy)
        assert (x[i] - recon[i]).square().sum() < x[i].square().sum()


@pytest.mark.parametrize("activation", ["jumprelu", "relu"])
@pytest.mark.parametrize("autoencoder", [False, True])
@pytest.mark.parametrize("k", [1, 4, 7])
def test_without_a_k_as_many_fire_at_the_start(activation: str, autoencoder: bool, k: int) -> None:
    x, y = related(d=6)
    stacked = started(x, x.clone() if autoencoder else y, activation=activation, k=k)
    for i, dictionary in enumerate(stacked.dictionaries):
        codes = dictionary.encode(x[i])
        assert codes.l0.item() == pytest.approx(k, abs=1.5 / N), "one of all pairs is the bound itself"
        if dictionary.log_threshold is not None:
            assert dictionary.log_threshold.unique().numel() == 1 and not dictionary.b_enc.any()


def test_thresholds_stay_positive() -> None:
    """Where fewer pairs are positive than wanted."""
    x, y = related()
    stacked = started(x, y, activation="jumprelu", k=15)
    for dictionary in stacked.dictionaries:
        assert dictionary.thresholds().tolist() == pytest.approx([1e-3] * dictionary.m)


def test_layers_without_variance_start_finite() -> None:
    x, y = torch.zeros(2, LAYERS, 20, D, dtype=torch.float64)
    for skip in (False, True):
        stacked = started(x + 1e-9, y, skip=skip)
        assert all(value.isfinite().all() for value in stacked.state_dict().values())
        assert stacked.losses(x, y, 0).total.isfinite()
