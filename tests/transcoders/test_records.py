from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hagd.transcoders.records import Transcoder, topk_relu
from tests.builders import VARIANTS, random_model, random_transcoders
from tests.reference import encode, skipped, written_features


@given(seed=st.integers(0, 10_000), m=st.integers(1, 9), data=st.data())
@settings(max_examples=60, deadline=None)
def test_topk_keeps_the_largest_positive_entries(seed: int, m: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(1, m))
    pre = torch.randn(2, 3, m, generator=torch.Generator().manual_seed(seed))
    f = topk_relu(pre, k)
    for found, row in zip(f.reshape(-1, m).tolist(), pre.reshape(-1, m).tolist(), strict=True):
        kept = sorted(row, reverse=True)[:k]
        assert found == [value if value in kept and value > 0 else 0.0 for value in row]


@pytest.mark.parametrize("shape", [(0, 16), (3, 1, 16), (2, 2048)])
def test_topk_is_that_of_torch_whatever_the_shape(shape: tuple[int, ...]) -> None:
    """Columns in stages or at once; in bfloat16 many are the same, of which any may be kept."""
    for dtype in (torch.float32, torch.bfloat16):
        pre = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
        f = topk_relu(pre, 5)
        assert f.shape == pre.shape and f.dtype == dtype
        torch.testing.assert_close(f.topk(5).values, pre.topk(5).values.relu(), rtol=0, atol=0)
        assert torch.equal(f[f != 0], pre[f != 0])


def test_gradients_reach_active_features_only() -> None:
    pre = torch.tensor([[3.0, -1.0, 2.0, 1.0]], requires_grad=True)
    topk_relu(pre, 2).sum().backward()
    assert pre.grad is not None and pre.grad.tolist() == [[1.0, 0.0, 1.0, 0.0]]


def test_encode_and_decode_are_equation_1() -> None:
    (transcoder, *_) = random_transcoders(random_model(), dtype=torch.float64).transcoders
    x = torch.randn(4, 3, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    f = transcoder.encode(x)
    torch.testing.assert_close(f, encode(transcoder, x))
    assert transcoder.k == 4 and ((f > 0).sum(-1) <= 4).all() and (f >= 0).all()
    explicit = transcoder.b_dec.expand(4, 3, 16).clone()
    for j in range(12):
        explicit += f[..., j, None] * transcoder.W_dec[j]
    torch.testing.assert_close(transcoder.decode(f), explicit)


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_a_set_reconstructs_layer_by_layer(variant: str) -> None:
    found = random_transcoders(random_model(n_layers=3), dtype=torch.float64, **VARIANTS[variant])
    g = torch.Generator().manual_seed(0)
    x = [torch.randn(4, 2, 16, generator=g, dtype=torch.float64) for _ in range(3)]
    features = [transcoder.encode(each) for transcoder, each in zip(found.transcoders, x, strict=True)]
    for i, transcoder in enumerate(found.transcoders):
        torch.testing.assert_close(features[i], encode(transcoder, x[i]))
        expected = written_features(found, i, features) + skipped(transcoder, x[i]) + transcoder.b_dec
        torch.testing.assert_close(found.reconstruct(i, features, x[i]), expected)
        torch.testing.assert_close(found.reconstruct(i, features[: i + 1], x[i]), expected)
        assert transcoder.skip(x[i]).any() == ("skip" in VARIANTS[variant])


def test_a_feature_at_its_threshold_does_not_fire() -> None:
    eye, zeros = torch.eye(3), torch.zeros(3)
    transcoder = Transcoder(0, None, eye, zeros, eye, zeros, threshold=torch.tensor([0.5, 0.0, 2.0]))
    x = torch.tensor([[0.5, 0.0, 2.0], [0.6, 0.1, 1.9], [-1.0, -1.0, 2.1]])
    expected = [[0.0, 0.0, 0.0], [0.6, 0.1, 0.0], [0.0, 0.0, 2.1]]
    torch.testing.assert_close(transcoder.encode(x), torch.tensor(expected))


@pytest.mark.parametrize("variant", ["topk", "everything"])
def test_inputs_of_another_precision_are_converted(variant: str) -> None:
    (transcoder, *_) = random_transcoders(random_model(), **VARIANTS[variant]).transcoders
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert torch.equal(transcoder.encode(x), transcoder.encode(x.float()))
    assert torch.equal(transcoder.skip(x), transcoder.skip(x.float()))


def test_a_perfect_dictionary_has_no_error() -> None:
    """Orthonormal features, sparse non-negative codes: encoding with the same rows finds the codes back."""
    g = torch.Generator().manual_seed(0)
    rows = torch.linalg.qr(torch.randn(16, 16, generator=g, dtype=torch.float64)).Q
    shift = torch.randn(16, generator=g, dtype=torch.float64)
    perfect = Transcoder(0, 3, rows, -(rows @ shift), rows, shift)
    f = torch.zeros(50, 16, dtype=torch.float64)
    for row in f:
        row[torch.randperm(16, generator=g)[:3]] = 0.1 + torch.rand(3, generator=g, dtype=torch.float64)
    torch.testing.assert_close(perfect.encode(perfect.decode(f)), f)


@pytest.mark.parametrize("layers", [None, (1,), (0, 2)])
def test_a_set_knows_its_layers_and_its_size(layers: tuple[int, ...] | None) -> None:
    found = random_transcoders(random_model(n_layers=3), layers=layers, m=10)
    assert found.layers == (layers or (0, 1, 2)) and found.m == 10
