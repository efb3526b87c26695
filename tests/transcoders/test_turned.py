"""Inputs in the basis of the encoder's rows."""

from __future__ import annotations

import pytest
import torch

from hagd.config.transcoder import TranscoderConfig
from hagd.transcoders.dictionary import Dictionary


@pytest.mark.parametrize("m", [64, 1024], ids=["torch's product", "oneDNN's product"])
@pytest.mark.parametrize("shape", [(8,), (5, 8), (2, 5, 8)], ids=str)
@pytest.mark.parametrize("differentiable", [False, True], ids=["alone", "with gradient"])
def test_turned_is_the_product_with_the_basis(m: int, shape: tuple[int, ...], differentiable: bool) -> None:
    g = torch.Generator().manual_seed(0)
    dictionary = Dictionary(TranscoderConfig(k=4, expansion=m // 8), 8, 1, g)
    basis = torch.linalg.qr(torch.randn(8, 8, generator=g))[0]
    dictionary.basis.copy_(basis)
    x = torch.randn(*shape, generator=g).requires_grad_(differentiable)
    turned = dictionary.turned(x)
    torch.testing.assert_close(turned.double(), x.double() @ basis.double(), rtol=1e-6, atol=1e-6)
    assert turned.requires_grad == differentiable
    if differentiable:
        turned.sum().backward()
        torch.testing.assert_close(x.grad, basis.sum(1).expand(shape), rtol=1e-6, atol=1e-6)
