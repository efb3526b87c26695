"""Records on raw activations against the module on scaled ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hagd.transcoders.objective import Scaling
from hagd.transcoders.records import TranscoderSet
from hagd.transcoders.training import export
from tests.transcoders.slow import LAYERS, D, dense, random_stacked, random_tokens, settings

VARIANTS: dict[str, dict[str, Any]] = {
    "topk": {},
    "batch topk": {"activation": "batch_topk"},
    "jumprelu": {"activation": "jumprelu"},
    "relu": {"activation": "relu"},
    "skip": {"skip": True},
    "cross-layer": {"cross_layer": True},
    "everything": {"activation": "jumprelu", "skip": True, "cross_layer": True},
}


def raw_tokens(n: int = 40) -> tuple[Tensor, Tensor]:
    """Every layer with its own mean and size."""
    x, y = random_tokens(n=n)
    size = torch.tensor([5.0, 0.5, 20.0], dtype=torch.float64)[:, None, None]
    return 3 + size * x, 0.01 * y / size - 2 * size


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_records_work_on_raw_activations(variant: str) -> None:
    x, y = raw_tokens()
    stacked = random_stacked(settings(**VARIANTS[variant]))
    x_scaling, y_scaling = Scaling.of(x), Scaling.of(y)
    scaled = x_scaling(x)
    for i, dictionary in enumerate(stacked.dictionaries):
        dictionary.threshold_mean.fill_(0.3 + 0.1 * i if variant == "batch topk" else 0.0)
    exported = export(stacked, x_scaling, y_scaling, (1, 4, 6))
    found = TranscoderSet("tiny", "mlp", exported, ())
    assert found.layers == (1, 4, 6)
    features = [transcoder.encode(x[i]) for i, transcoder in enumerate(exported)]
    codes = stacked.encode(scaled)
    for i, (transcoder, dictionary) in enumerate(zip(exported, stacked.dictionaries, strict=True)):
        assert transcoder.k == (2 if stacked.config.activation == "topk" else None)
        assert (transcoder.W_skip is not None) == stacked.config.skip
        assert len(transcoder.W_later) == (LAYERS - 1 - i if stacked.config.cross_layer else 0)
        expected = dense(codes[i])
        if variant == "batch topk":  # what a token keeps no longer depends on the others
            pre = scaled[i] @ (dictionary.W_enc @ dictionary.basis.T).T + dictionary.b_enc
            expected = pre * (pre > 0.3 + 0.1 * i)
            assert transcoder.threshold is not None and transcoder.threshold.shape == (dictionary.m,)
        torch.testing.assert_close(features[i], expected.detach(), rtol=1e-9, atol=1e-9)
    recon = reconstruction(stacked, scaled, features) / y_scaling.scale + y_scaling.mean
    for i in range(LAYERS):
        torch.testing.assert_close(found.reconstruct(i, features, x[i]), recon[i].detach(), rtol=1e-9, atol=1e-9)
    if variant != "batch topk":
        for i, whole in enumerate(stacked.decode(codes, scaled)[0]):
            torch.testing.assert_close(recon[i], whole / y_scaling.scale[i] + y_scaling.mean[i])


def reconstruction(stacked: Any, scaled: Tensor, features: list[Tensor]) -> Tensor:
    """`[L, B, d]` in scaled units, decoder by decoder."""
    out = []
    for i in range(LAYERS):
        recon = stacked.dictionaries[i].b_dec.expand(scaled.shape[1], D)
        if stacked.config.skip:
            recon = recon + scaled[i] @ stacked.dictionaries[i].W_skip
        for source in range(i + 1) if stacked.config.cross_layer else [i]:
            columns = slice((i - source) * D, (i - source + 1) * D)
            recon = recon + features[source] @ stacked.dictionaries[source].W_dec[:, columns]
        out.append(recon)
    return torch.stack(out)


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_records_are_apart_from_the_module(variant: str) -> None:
    """Training on does not change them, and nothing in them asks for a gradient."""
    x, y = raw_tokens()
    stacked = random_stacked(settings(**VARIANTS[variant]))
    scaling = (Scaling.of(x), Scaling.of(y))
    exported = export(stacked, *scaling, (0, 1, 2))
    before = [transcoder.encode(x[i]) for i, transcoder in enumerate(exported)]
    with torch.no_grad():
        for value in stacked.state_dict().values():
            value.add_(1)
    for i, transcoder in enumerate(exported):
        assert torch.equal(transcoder.encode(x[i]), before[i])
        for name, value in vars(transcoder).items():
            for each in value if isinstance(value, tuple) else (value,):
                if isinstance(each, Tensor):
                    assert not each.requires_grad, name


def test_batch_topk_keeps_k_a_token_on_average_after_training() -> None:
    """With the threshold that it has followed, on tokens that it has not seen."""
    stacked = random_stacked(settings(activation="batch_topk", k=3))
    for seed in range(20):
        stacked.losses(*random_tokens(seed, n=1000), 0)
    one = Scaling(torch.zeros(LAYERS, 1, D).double(), torch.ones(LAYERS, 1, 1).double())
    x, _ = random_tokens(99, n=1000)
    for i, transcoder in enumerate(export(stacked, one, one, (0, 1, 2))):
        assert float((transcoder.encode(x[i]) > 0).sum(1).double().mean()) == pytest.approx(3, rel=0.1)
