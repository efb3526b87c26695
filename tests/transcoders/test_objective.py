"""Eq. 4 against a NumPy reimplementation, token by token, in double precision."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from hagd.config.stages import TranscoderConfig
from hagd.transcoders.objective import Scaling, StackedTranscoders
from hagd.transcoders.training import export

LAYERS, TOKENS, D = 3, 7, 4
Array = NDArray[np.float64]


def settings(**changes: Any) -> TranscoderConfig:
    return TranscoderConfig(
        **{
            "k": 2,
            "expansion": 3,
            "lambda_prediction": 0.3,
            "lambda_sparsity": 0.2,
            "aux_weight": 0.5,
            "steps": 10,
            "batch_size": 10,
            "dead_fraction": 0.5,
            **changes,
        }
    )


def random_stacked(config: TranscoderConfig, n_layers: int = LAYERS, seed: int = 0) -> StackedTranscoders:
    stacked = StackedTranscoders(config, n_layers, D, seed).double()
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in stacked.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=g, dtype=torch.float64))
    return stacked


def random_tokens(seed: int = 1, n_layers: int = LAYERS) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(n_layers, TOKENS, D, generator=g, dtype=torch.float64) for _ in range(2))  # type: ignore[return-value]


def arrays(stacked: StackedTranscoders) -> dict[str, Array]:
    return {name: value.detach().numpy().copy() for name, value in stacked.state_dict().items()}


def top(row: Array, k: int) -> Array:
    out = np.zeros_like(row)
    for j in np.argsort(-row)[:k]:
        out[j] = max(row[j], 0.0)
    return out


def slow_losses(
    w: dict[str, Array], config: TranscoderConfig, x: Array, y: Array, dead: Array, held: dict[str, Any] | None = None
) -> tuple[dict[str, float], dict[str, Any]]:
    """Terms of Eq. 4, and what no gradient flows through; `held` gives the latter from elsewhere."""
    n_layers, n_tokens, d = x.shape
    pre = np.array([[w["W_enc"][i] @ x[i, t] + w["b_enc"][i, 0] for t in range(n_tokens)] for i in range(n_layers)])
    f = np.array([[top(row, config.k) for row in layer] for layer in pre])
    miss = np.array(
        [[y[i, t] - f[i, t] @ w["W_dec"][i] - w["b_dec"][i, 0] for t in range(n_tokens)] for i in range(n_layers)]
    )
    length = np.sqrt((w["W_dec"] ** 2).sum(-1))
    energy = [sum(((f[i, t] * length[i]) ** 2).sum() for t in range(n_tokens)) for i in range(n_layers)]
    constants = {"miss": miss, "energy": energy} if held is None else held
    power = [(y[i] ** 2).sum() for i in range(n_layers)]
    fvu = [(miss[i] ** 2).sum() / power[i] for i in range(n_layers)]
    sparsity = sum(np.abs(f[i] * length[i]).sum() / (n_tokens * np.sqrt(config.k * d)) for i in range(n_layers))
    prediction = 0.0
    for i in range(n_layers - 1 if config.lambda_prediction > 0 else 0):
        for t in range(n_tokens):
            if config.prediction_head == "tied":
                moved = f[i, t] @ w["W_dec"][i] @ w["head_map"][i] + w["head_bias"][i, 0]
                guess = np.maximum(w["W_enc"][i + 1] @ moved + w["b_enc"][i + 1, 0], 0)
            else:
                guess = np.maximum(f[i, t] @ w["head_map"][i] + w["head_bias"][i, 0], 0)
            prediction += (((f[i + 1, t] - guess) * length[i + 1]) ** 2).sum() / constants["energy"][i + 1]
    auxiliary = 0.0
    k_aux = min(2 * config.k, int(dead.sum(-1).max()))
    for i in range(n_layers if config.aux_weight > 0 and dead.any() else 0):
        for t in range(n_tokens):
            revived = top(np.where(dead[i], pre[i, t], -np.inf), k_aux)
            auxiliary += ((constants["miss"][i, t] - revived @ w["W_dec"][i]) ** 2).sum() / power[i]
    total = (
        sum(fvu)
        + config.lambda_prediction * prediction
        + config.lambda_sparsity * sparsity
        + config.aux_weight * auxiliary
    )
    terms = {"total": total, "fvu": sum(fvu) / n_layers, "prediction": prediction, "sparsity": sparsity}
    return {**terms, "auxiliary": auxiliary}, constants


CASES = {
    "tied": {},
    "dense": {"prediction_head": "dense"},
    "no prediction": {"lambda_prediction": 0.0},
    "no auxiliary": {"aux_weight": 0.0},
    "no sparsity": {"lambda_sparsity": 0.0},
}


def with_dead_features(stacked: StackedTranscoders) -> Array:
    """Some features of two layers long silent; not those that fire now."""
    stacked.silent[0, ::2] = 1000
    stacked.silent[2, 5] = 1000
    fired = (stacked.encode(random_tokens()[0]) > 0).any(1)
    return ((stacked.silent > 50) & ~fired).numpy()


@pytest.mark.parametrize("case", list(CASES))
def test_losses_are_those_of_the_slow_implementation(case: str) -> None:
    config = settings(**CASES[case])
    stacked, (x, y) = random_stacked(config), random_tokens()
    dead = with_dead_features(stacked)
    assert dead[0].any() and not dead[1].any()
    found = stacked.losses(x, y)
    expected, _ = slow_losses(arrays(stacked), config, x.numpy(), y.numpy(), dead)
    for name, value in expected.items():
        assert getattr(found, name).item() == pytest.approx(value, rel=1e-9), name
    assert (found.prediction > 0) == (case != "no prediction")
    assert (found.auxiliary > 0) == (case != "no auxiliary")


@pytest.mark.parametrize("case", ["tied", "dense"])
def test_gradients_are_finite_differences(case: str) -> None:
    """Of every parameter, with the prediction's energy and the auxiliary residual held constant."""
    config = settings(**CASES[case])
    stacked, (x, y) = random_stacked(config), random_tokens()
    dead = with_dead_features(stacked)
    stacked.losses(x, y).total.backward()
    w = arrays(stacked)
    _, held = slow_losses(w, config, x.numpy(), y.numpy(), dead)
    step = 1e-6
    rng = np.random.default_rng(0)
    for name, parameter in stacked.named_parameters():
        assert parameter.grad is not None, name
        values, gradient = w[name].reshape(-1), parameter.grad.numpy().reshape(-1)
        assert np.abs(gradient).max() > 1e-3, name
        for j in rng.permutation(values.size)[:40]:
            ends = []
            for sign in (1, -1):
                values[j] += sign * step
                ends.append(slow_losses(w, config, x.numpy(), y.numpy(), dead, held)[0]["total"])
                values[j] -= sign * step
            assert (ends[0] - ends[1]) / (2 * step) == pytest.approx(gradient[j], rel=1e-5, abs=1e-7), (name, j)


def test_one_layer_has_nothing_to_predict() -> None:
    stacked = random_stacked(settings(), n_layers=1)
    losses = stacked.losses(*random_tokens(n_layers=1))
    assert losses.prediction == 0 and losses.total.isfinite()


def test_silence_is_counted_in_tokens() -> None:
    config = settings(aux_weight=0.0)
    stacked = random_stacked(config)
    batches = [random_tokens(seed) for seed in range(6)]
    expected = np.zeros((LAYERS, 12))
    for x, y in batches:
        stacked.losses(x, y)
        fired = (stacked.encode(x) > 0).any(1).numpy()
        expected = np.where(fired, 0, expected + TOKENS)
    assert np.array_equal(stacked.silent.numpy(), expected)
    assert expected.max() >= 2 * TOKENS and (expected == 0).any()
    stacked.silent[0, 0], stacked.silent[0, 1] = 50, 51  # half of 10 steps of 10 tokens
    assert stacked.dead()[0, :2].tolist() == [False, True]


def test_the_same_seed_gives_the_same_start() -> None:
    one, same, other = (StackedTranscoders(settings(), LAYERS, D, seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["W_enc"], other["W_enc"])


def test_the_initial_decoder_fits_the_data() -> None:
    stacked = StackedTranscoders(settings(), LAYERS, D, seed=0).double()
    g = torch.Generator().manual_seed(1)
    x = torch.randn(LAYERS, 200, D, generator=g, dtype=torch.float64)
    x[1] = x[1].abs()  # so that some features of one layer never fire
    y = x @ torch.randn(LAYERS, D, D, generator=g, dtype=torch.float64)
    stacked.requires_grad_(False)
    before = stacked.W_dec.clone()
    stacked.initialise(x, y)
    f = stacked.encode(x)
    reconstruction = stacked.decode(f)
    for i in range(LAYERS):
        assert float(((y[i] - reconstruction[i]) * reconstruction[i]).sum()) == pytest.approx(0, abs=1e-8)
        for j in range(12):
            mean = (f[i, :, j, None] * y[i]).sum(0)
            old, new = before[i, j], stacked.W_dec[i, j]
            direction = mean if (f[i, :, j] > 0).any() else old
            assert torch.cosine_similarity(direction, new, dim=0).item() == pytest.approx(1, abs=1e-9)
    assert (f[1] == 0).all(0).any()
    assert all((y[i] - reconstruction[i]).pow(2).sum() < y[i].pow(2).sum() for i in range(LAYERS))


def test_scaled_activations_have_norm_root_d() -> None:
    x = 3 + 5 * random_tokens()[0]
    scaled = Scaling.of(x)(x)
    torch.testing.assert_close(scaled.mean(1), torch.zeros(LAYERS, D, dtype=torch.float64))
    torch.testing.assert_close(scaled.norm(dim=-1).mean(1), torch.full((LAYERS,), D**0.5, dtype=torch.float64))


def test_exported_weights_work_on_raw_activations() -> None:
    x, y = random_tokens()
    x, y = 3 + 5 * x, 0.01 * y - 2
    stacked = random_stacked(settings())
    x_scaling, y_scaling = Scaling.of(x), Scaling.of(y)
    exported = export(stacked, x_scaling, y_scaling, (1, 4, 6))
    assert [t.layer for t in exported] == [1, 4, 6] and all(t.k == 2 for t in exported)
    f = stacked.encode(x_scaling(x))
    scaled = stacked.decode(f)
    for i, transcoder in enumerate(exported):
        torch.testing.assert_close(transcoder.encode(x[i]), f[i])
        expected = scaled[i] / y_scaling.scale[i] + y_scaling.mean[i]
        torch.testing.assert_close(transcoder.decode(transcoder.encode(x[i])), expected)
        assert not transcoder.W_enc.requires_grad and not transcoder.b_dec.requires_grad
