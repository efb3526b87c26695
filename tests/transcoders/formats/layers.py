"""Random dictionaries, and what a layer means in the terms of the peers, token by token in double precision."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hagd.activations.capture import Site
from hagd.transcoders.records import Transcoder, TranscoderSet

D, M, K = 6, 10, 3
Activation = Literal["topk", "jumprelu", "relu"]
Array = NDArray[np.float64]


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    g = torch.Generator().manual_seed(1000 * seed + len(shape) + sum(shape))
    return torch.randn(*shape, generator=g).to(dtype)


def random_set(
    *,
    layers: tuple[int, ...] = (0, 1, 2),
    site: Site = "mlp",
    activation: Activation = "topk",
    skip: bool = False,
    cross_layer: bool = False,
    dtype: torch.dtype = torch.float32,
) -> TranscoderSet:
    """Dictionaries that nothing trained or measured."""
    thresholds = {"topk": None, "relu": torch.zeros(M, dtype=dtype), "jumprelu": 0.2 + draw(M, dtype=dtype).abs()}

    def build(place: int, layer: int) -> Transcoder:
        seed = 10 * place
        later = len(layers) - place - 1 if cross_layer else 0
        return Transcoder(
            layer=layer,
            k=K if activation == "topk" else None,
            W_enc=draw(M, D, seed=seed, dtype=dtype),
            b_enc=draw(M, seed=seed + 1, dtype=dtype),
            W_dec=draw(M, D, seed=seed + 2, dtype=dtype),
            b_dec=draw(D, seed=seed + 3, dtype=dtype),
            threshold=thresholds[activation],
            W_skip=draw(D, D, seed=seed + 4, dtype=dtype) if skip else None,
            W_later=tuple(draw(M, D, seed=seed + 5 + i, dtype=dtype) for i in range(later)),
        )

    return TranscoderSet("some-model", site, tuple(build(i, layer) for i, layer in enumerate(layers)))


def slow_layer(
    x: Tensor,
    *,
    W_enc: Tensor,
    b_enc: Tensor,
    W_dec: Tensor,
    b_dec: Tensor,
    less: Tensor | None = None,
    k: int | None = None,
    threshold: Tensor | None = None,
    W_skip: Tensor | None = None,
) -> tuple[Array, Array]:
    """Features `[n, m]` and reconstructions `[n, d]`.

    Args:
        x: `[n, d]`.
        W_enc: one row a feature. W_dec: one row a feature.
        less: what the encoder subtracts from its input.
        k: keep the k largest; else `threshold`, else all that are positive.
        W_skip: `[out, in]`.
    """
    w: dict[str, Any] = {"W_enc": W_enc, "b_enc": b_enc, "W_dec": W_dec, "b_dec": b_dec, "W_skip": W_skip}
    w = {name: None if value is None else value.double().numpy() for name, value in w.items()}
    features, outputs = np.zeros((len(x), len(W_enc))), np.zeros((len(x), W_dec.shape[1]))
    for t, token in enumerate(x.double().numpy()):
        read = token if less is None else token - less.double().numpy()
        pre = np.array([row @ read + b for row, b in zip(w["W_enc"], w["b_enc"], strict=True)])
        kept = np.argsort(-pre)[:k] if k is not None else range(len(pre))
        for j in kept:
            bound = 0.0 if threshold is None else max(float(threshold[j]), 0.0)
            features[t, j] = pre[j] if pre[j] > bound else 0.0
        outputs[t] = features[t] @ w["W_dec"] + w["b_dec"]
        if w["W_skip"] is not None:
            outputs[t] += w["W_skip"] @ token
    return features, outputs


def assert_means(found: Transcoder, x: Tensor, expected: tuple[Array, Array]) -> None:
    """`found` gives these features and reconstructions."""
    features = found.encode(x)
    outputs = found.decode(features) + found.skip(x)
    for value, wanted in zip((features, outputs), expected, strict=True):
        np.testing.assert_allclose(value.double().numpy(), wanted, rtol=1e-5, atol=1e-5)


def assert_same_bits(found: TranscoderSet, expected: TranscoderSet) -> None:
    """All fields and every tensor are the same."""
    assert (found.model, found.site, found.layers) == (expected.model, expected.site, expected.layers)
    for one, other in zip(found.transcoders, expected.transcoders, strict=True):
        assert one.k == other.k and len(one.W_later) == len(other.W_later)
        names = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold", "W_skip")
        pairs = [(getattr(one, name), getattr(other, name)) for name in names]
        for left, right in (*pairs, *zip(one.W_later, other.W_later, strict=True)):
            assert (left is None) == (right is None)
            if left is not None:
                assert left.dtype == right.dtype and torch.equal(left, right)
