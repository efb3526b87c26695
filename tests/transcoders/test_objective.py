"""Eq. 4 and the gradients of every parameter against the NumPy reimplementation, in double precision."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hagd.config.transcoder import TranscoderConfig
from hagd.transcoders import objective
from hagd.transcoders.objective import Scaling, StackedTranscoders
from hagd.transcoders.sparse import device_kernels
from tests.transcoders.slow import (
    LAYERS,
    TOKENS,
    Array,
    D,
    Nudge,
    Slow,
    arrays,
    dense,
    random_stacked,
    random_tokens,
    settings,
    slow_losses,
)

CASES: dict[str, dict[str, Any]] = {
    "topk, tied": {},
    "topk, tied and low rank": {"prediction_head": "tied_low_rank"},
    "topk, low rank": {"prediction_head": "low_rank"},
    "topk, dense": {"prediction_head": "dense"},
    "topk, bfloat16": {"selection": "bfloat16"},
    "topk, skip": {"skip": True},
    "topk, cross-layer": {"cross_layer": True},
    "batch topk, tied": {"activation": "batch_topk"},
    "batch topk, dense, everything": {
        "activation": "batch_topk",
        "skip": True,
        "cross_layer": True,
        "prediction_head": "dense",
    },
    "relu, tied": {"activation": "relu"},
    "relu, low rank, cross-layer": {"activation": "relu", "prediction_head": "low_rank", "cross_layer": True},
    "jumprelu, tied": {"activation": "jumprelu"},
    "jumprelu, low rank, skip": {"activation": "jumprelu", "prediction_head": "low_rank", "skip": True},
    "jumprelu, tied and low rank, everything": {
        "activation": "jumprelu",
        "prediction_head": "tied_low_rank",
        "skip": True,
        "cross_layer": True,
    },
    "no prediction": {"lambda_prediction": 0.0},
    "no auxiliary": {"aux_weight": 0.0},
    "no sparsity": {"lambda_sparsity": 0.0},
}
EVERY_CASE = pytest.mark.parametrize("case", list(CASES))


def with_dead_features(stacked: StackedTranscoders, x: Tensor) -> None:
    """Four features of the first layer, more than AuxK looks at, and one of the last: long silent, and they stay so.

    But for ReLU, where nothing is positive and silent, they can explain something.
    """
    for layer, n_dead in ((0, 4), (2, 1)):
        dictionary = stacked.dictionaries[layer]
        features = idle_features(stacked, layer, x)[:n_dead]
        if dictionary.config.activation in ("relu", "jumprelu"):
            features = torch.tensor([7, 3, 11, 2])[:n_dead]
        with torch.no_grad():
            if dictionary.log_threshold is not None:
                dictionary.log_threshold[features] = 2.0
            elif dictionary.config.activation == "relu":
                dictionary.b_enc[features] -= 9.0
        stacked.silent[layer, features] = 100 + torch.arange(n_dead, dtype=torch.float64)


def idle_features(stacked: StackedTranscoders, layer: int, x: Tensor) -> Tensor:
    """Those that fire on none of `x`, the most nearly firing ones first."""
    dictionary = stacked.dictionaries[layer]
    highest = (dictionary.turned(x[layer]) @ dictionary.W_enc.T + dictionary.b_enc).amax(0).detach()
    idle = (dense(dictionary.encode(x[layer])) == 0).all(0)
    return highest.where(idle, -torch.inf).sort(descending=True).indices[: int(idle.sum())]


def slow(stacked: StackedTranscoders, x: Tensor, y: Tensor) -> Slow:
    """Of weights whose `silent` does not count this batch yet."""
    w = arrays(stacked)
    features = slow_losses(w, stacked.config, x.numpy(), y.numpy(), np.zeros_like(w["silent"])).f
    return slow_losses(w, stacked.config, x.numpy(), y.numpy(), silence(w["silent"], features))


def silence(before: Array, features: list[Array]) -> Array:
    fired = np.array([(f > 0).any(0) for f in features])
    return np.where(fired, 0, before + len(features[0]))


@pytest.fixture(params=["small", "large"])
def either_size(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dictionaries of the tests count as small ones, or as large ones, which are computed in other ways."""
    if request.param == "large":
        monkeypatch.setattr(device_kernels, "_LARGE", 1)


@EVERY_CASE
@pytest.mark.usefixtures("either_size")
def test_losses_are_those_of_the_slow_implementation(case: str) -> None:
    stacked, (x, y) = random_stacked(settings(**CASES[case])), random_tokens()
    with_dead_features(stacked, x)
    expected = slow(stacked, x, y)
    for codes, f in zip(stacked.encode(x), expected.f, strict=True):
        np.testing.assert_allclose(dense(codes).numpy(), f, atol=1e-12)
        assert codes.l0.item() == pytest.approx((f > 0).sum() / TOKENS)
    for target, recon, miss in zip(y, stacked.decode(stacked.encode(x), x)[0], expected.miss, strict=True):
        np.testing.assert_allclose((target - recon).detach().numpy(), miss, atol=1e-12)
    found = stacked.losses(x, y, 0)
    for name, value in expected.terms.items():
        assert getattr(found, name).item() == pytest.approx(value, rel=1e-6 if name == "l0" else 1e-9), name
    assert stacked.dead().sum(1).tolist() == [4, 0, 1]
    assert (found.prediction > 0) == (case != "no prediction")
    assert (found.auxiliary > 0) == (case != "no auxiliary")


@EVERY_CASE
@pytest.mark.usefixtures("either_size")
def test_gradients_are_finite_differences(case: str) -> None:
    """Of every parameter, with the prediction's energy and the auxiliary residual held constant.

    Thresholds have no other gradient than the straight-through one, which has a test of its own.
    """
    stacked, (x, y) = random_stacked(settings(**CASES[case])), random_tokens()
    with_dead_features(stacked, x)
    held = slow(stacked, x, y)
    stacked.losses(x, y, 0).total.backward()
    w, step, rng = arrays(stacked), 1e-5, np.random.default_rng(0)
    for name, parameter in stacked.named_parameters():
        if name.endswith("log_threshold"):
            continue
        assert parameter.grad is not None, name
        values, gradient = w[name], parameter.grad.numpy()
        assert np.abs(gradient).max() > 1e-3, name
        for direction in directions(values.shape, rng):
            ends = []
            for sign in (1, -1):
                w[name] = values + sign * step * direction
                ends.append(slow_losses(w, stacked.config, x.numpy(), y.numpy(), w["silent"], held).terms["total"])
            slope = float((gradient * direction).sum())
            assert (ends[0] - ends[1]) / (2 * step) == pytest.approx(slope, rel=1e-6, abs=1e-8), name
        w[name] = values


def directions(shape: tuple[int, ...], rng: np.random.Generator) -> Iterator[Array]:
    """Two that move every entry, six that move a single one."""
    for _ in range(2):
        yield rng.normal(size=shape) / np.sqrt(np.prod(shape))
    for j in rng.permutation(int(np.prod(shape)))[:6]:
        yield np.eye(1, int(np.prod(shape)), j).reshape(shape)


@pytest.mark.parametrize("case", [case for case in CASES if case.startswith("jumprelu")])
def test_thresholds_get_the_straight_through_gradient(case: str) -> None:
    """`∂f/∂θ = −θ/ε · 1[|z − θ| < ε/2]` and `∂L0/∂θ = −1/ε · 1[|z − θ| < ε/2]` a token (Rajamanoharan et al. 2024,
    Eqs. 11–12); what the loss makes of a moved feature or L0 is measured by moving it."""
    config = settings(**CASES[case])
    stacked, (x, y) = random_stacked(config), random_tokens()
    with_dead_features(stacked, x)
    held = slow(stacked, x, y)
    stacked.losses(x, y, 0).total.backward()
    w, step = arrays(stacked), 1e-5

    def derivative(layer: int, place: tuple[int, int] | None) -> float:
        ends = []
        for sign in (1, -1):
            nudge = Nudge(np.zeros_like(np.array(held.f)), np.zeros(LAYERS))
            if place is None:
                nudge.l0[layer] = sign * step
            else:
                nudge.f[layer, *place] = sign * step
            found = slow_losses(w, config, x.numpy(), y.numpy(), w["silent"], held, nudge)
            ends.append(found.terms["total"])
        return (ends[0] - ends[1]) / (2 * step)

    for i, dictionary in enumerate(stacked.dictionaries):
        theta, eps = np.exp(w[f"layers.{i}.log_threshold"]), config.bandwidth
        near = np.abs(held.pre[i] - theta) < eps / 2
        assert (near & (held.f[i] > 0)).any() and (near & (held.f[i] == 0)).any()
        expected = -near.sum(0) / eps / TOKENS * derivative(i, None)
        for t, j in np.argwhere(near):
            expected[j] -= theta[j] / eps * derivative(i, (t, j))
        assert dictionary.log_threshold is not None and dictionary.log_threshold.grad is not None
        np.testing.assert_allclose(dictionary.log_threshold.grad, theta * expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("n_dead", [1, 2, 3, 9])
def test_aux_k_takes_the_oldest_eighth_and_twice_k_of_it(k: int, n_dead: int) -> None:
    config = settings(k=k, expansion=8, lambda_prediction=0.0, lambda_sparsity=0.0)
    stacked, (x, y) = random_stacked(config, n_layers=1), random_tokens(n_layers=1)
    ages = 100 + torch.arange(n_dead, dtype=torch.float64) * 5 % 11
    stacked.silent[0, idle_features(stacked, 0, x)[:n_dead]] = ages
    expected = slow(stacked, x, y)
    found = stacked.losses(x, y, 0)
    assert stacked.dead().sum() == n_dead
    assert found.auxiliary.item() == pytest.approx(expected.terms["auxiliary"], rel=1e-9)
    found.auxiliary.backward()
    gradient = stacked.dictionaries[0].W_enc.grad
    assert gradient is not None, "the encoder of dead features is trained"
    moved = set(gradient.abs().sum(1).nonzero()[:, 0].tolist())
    assert moved and moved <= set(stacked.silent[0].topk(min(n_dead, 4)).indices.tolist())


def test_one_layer_has_nothing_to_predict() -> None:
    stacked = random_stacked(settings(), n_layers=1)
    losses = stacked.losses(*random_tokens(n_layers=1), 0)
    assert losses.prediction == 0 and losses.total.isfinite()


@pytest.mark.parametrize(
    ("changes", "n_layers", "handed_on", "expected"),
    [
        ({"lambda_prediction": 0.0}, 2, False, True),
        ({}, 1, False, True),
        ({}, 2, False, False),
        ({}, 2, True, False),
        ({"lambda_prediction": 0.0, "skip": True}, 2, False, False),
        ({"lambda_prediction": 0.0, "cross_layer": True}, 2, False, False),
    ],
)
def test_decoder_and_error_are_one_where_nothing_else_reads_what_is_written(
    changes: dict[str, Any], n_layers: int, handed_on: bool, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(objective, "fuses", lambda operand: True)  # as on a CUDA device
    config = TranscoderConfig.model_validate({"k": 2, "expansion": 2, **changes})
    own, following = (range(1), lambda codes, written: written.sum()) if handed_on else (None, None)
    stacked = StackedTranscoders(config, n_layers, 4, seed=0, own=own, following=following)
    assert stacked._only_the_error_is_read(stacked.dictionaries[0]) == expected


@pytest.mark.parametrize("activation", ["topk", "batch_topk", "jumprelu", "relu"])
def test_silence_is_counted_in_tokens(activation: str) -> None:
    stacked = random_stacked(settings(activation=activation, aux_weight=0.0, bandwidth=1.5))
    with torch.no_grad():
        for dictionary in stacked.dictionaries:
            dictionary.b_enc -= 1.0
    expected = np.zeros((LAYERS, stacked.dictionaries[0].m))
    for seed in range(6):
        x, y = random_tokens(seed)
        expected = silence(expected, slow(stacked, x, y).f)
        stacked.losses(x, y, 0)
        assert np.array_equal(stacked.silent.numpy(), expected)
    assert expected.max() >= 2 * TOKENS and (expected == 0).any()
    stacked.silent[0, 0], stacked.silent[0, 1] = 50, 51  # half of 10 steps of 10 tokens
    assert stacked.dead()[0, :2].tolist() == [False, True]


def test_batch_topk_follows_the_smallest_kept_pre_activation() -> None:
    stacked = random_stacked(settings(activation="batch_topk"))
    expected = np.zeros(LAYERS)
    for seed in range(4):
        x, y = random_tokens(seed)
        smallest = np.array([f[f > 0].min() for f in slow(stacked, x, y).f])
        expected = smallest if seed == 0 else 0.99 * expected + 0.01 * smallest
        stacked.losses(x, y, 0)
        found = [dictionary.threshold_mean.item() for dictionary in stacked.dictionaries]
        assert found == pytest.approx(expected.tolist(), rel=1e-9)


def test_the_same_seed_gives_the_same_start() -> None:
    config = settings(prediction_head="tied_low_rank", skip=True, cross_layer=True)
    one, same, other = (StackedTranscoders(config, LAYERS, D, seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(one[name], same[name]) for name in one)
    for name in ("layers.0.W_enc", "layers.2.W_dec", "heads.1.down"):
        assert not torch.equal(one[name], other[name]), name
    assert not torch.equal(one["layers.0.W_enc"], one["layers.1.W_enc"])


def test_scaled_activations_have_norm_root_d() -> None:
    x = 3 + 5 * random_tokens()[0]
    scaled = Scaling.of(x)(x)
    torch.testing.assert_close(scaled.mean(1), torch.zeros(LAYERS, D, dtype=torch.float64))
    torch.testing.assert_close(scaled.norm(dim=-1).mean(1), torch.full((LAYERS,), D**0.5, dtype=torch.float64))


class Largest(TorchDispatchMode):
    """Counts the entries of the largest dense tensor that any operation makes, forward or backward."""

    def __init__(self) -> None:
        super().__init__()
        self.entries = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for each in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(each, Tensor) and each.layout == torch.strided:
                self.entries = max(self.entries, each.numel())
        return out


@pytest.mark.parametrize("activation", ["topk", "batch_topk", "jumprelu"])
@pytest.mark.parametrize("head", ["tied", "low_rank"])
def test_no_tensor_of_tokens_times_features_is_made(activation: str, head: str) -> None:
    """Forward, one chunk at a time is encoded; backward, nothing that large exists."""
    n_tokens, chunk = 2048, 512
    config = settings(
        activation=activation, prediction_head=head, expansion=64, bandwidth=0.05, head_negatives=16, skip=True
    )
    stacked, (x, y) = random_stacked(config, n_layers=2), random_tokens(n_layers=2, n=n_tokens)
    m = stacked.dictionaries[0].m
    for dictionary in stacked.dictionaries:
        dictionary.start_at(x[0])
    stacked.silent[:] = 1e4
    saved: list[int] = []

    def save(tensor: Tensor) -> Tensor:
        saved.append(tensor.numel())
        return tensor

    with Largest() as forward, torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        losses = stacked.losses(x, y, 0)
    assert losses.auxiliary > 0 and stacked.dead().any()
    assert chunk * m <= forward.entries < n_tokens * m
    assert max(saved) < n_tokens * m / 4
    with Largest() as backward:
        losses.total.backward()
    assert n_tokens <= backward.entries < n_tokens * m / 4


@pytest.mark.parametrize("case", ["topk, tied", "jumprelu, tied and low rank, everything"])
def test_training_in_single_precision_follows_double(case: str) -> None:
    config = settings(**CASES[case])
    x, y = random_tokens(n=64)
    ends = []
    for dtype in (torch.float32, torch.float64):
        stacked = random_stacked(config, dtype=dtype)
        optimiser = torch.optim.Adam(stacked.parameters(), lr=3e-3)
        for _ in range(20):
            optimiser.zero_grad()
            losses = stacked.losses(x.to(dtype), y.to(dtype), 0)
            losses.total.backward()
            optimiser.step()
        ends.append(losses)
    assert ends[0].total.item() == pytest.approx(ends[1].total.item(), rel=1e-3)
    with torch.no_grad():
        start = random_stacked(config).losses(x, y, 0)
    assert ends[1].total < 0.9 * start.total
