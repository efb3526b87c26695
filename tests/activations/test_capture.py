from __future__ import annotations

import pytest
import torch

from hagd.activations.capture import Site, capture, observe
from hagd.config.model import Architecture
from hagd.errors import NumericalError
from tests.builders import ARCHITECTURES, VOCABULARY, random_model
from tests.reference import run

TOKENS = torch.randint(VOCABULARY, (4, 5), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_hand_wired_model_is_the_real_one(architecture: Architecture) -> None:
    lm = random_model(architecture, n_layers=3, length=5)
    with torch.no_grad():
        torch.testing.assert_close(run(lm, TOKENS).logits, lm.model(TOKENS).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_captured_values_are_those_of_the_hand_wired_model(architecture: Architecture) -> None:
    lm = random_model(architecture, n_layers=3, length=5)
    expected = run(lm, TOKENS)
    x, y = capture(lm, TOKENS, "mlp", (0, 2))
    torch.testing.assert_close(x, torch.stack([expected.mlp_in[0], expected.mlp_in[2]]))
    torch.testing.assert_close(y, torch.stack([expected.mlp_out[0], expected.mlp_out[2]]))
    torch.testing.assert_close(y[0], lm.mlp(0)(x[0]))
    x, y = capture(lm, TOKENS, "resid", (1, 2))
    torch.testing.assert_close(x, torch.stack([expected.resid[1], expected.resid[2]]))
    assert torch.equal(x, y)


def test_half_precision_activations_come_as_float32() -> None:
    lm = random_model(dtype=torch.bfloat16)
    assert all(side.dtype == torch.float32 for side in capture(lm, TOKENS[:, :3], "mlp", (0, 1)))


@pytest.mark.parametrize("site", ["mlp", "resid"])
def test_the_model_is_left_as_it_was(site: Site) -> None:
    lm = random_model(length=5)
    before = lm.hidden(TOKENS)
    weights = {name: value.clone() for name, value in lm.model.state_dict().items()}
    capture(lm, TOKENS, site, (0,))
    assert torch.equal(lm.hidden(TOKENS), before)
    assert all(torch.equal(value, weights[name]) for name, value in lm.model.state_dict().items())
    assert not any(module._forward_hooks for module in lm.model.modules())


@pytest.mark.parametrize("site", ["mlp", "resid"])
def test_layers_above_the_last_one_are_not_computed(site: Site) -> None:
    lm = random_model(n_layers=3, length=5)
    calls: list[int] = []
    with observe(lm, "mlp", range(3), lambda layer, x, y: calls.append(layer)):
        capture(lm, TOKENS, site, (0, 1))
    assert calls == [0, 1]


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_values_that_are_not_finite_are_refused(value: float) -> None:
    lm = random_model(length=5)
    with torch.no_grad():
        lm.mlp(1).c_proj.weight[0, 0] = value
    assert capture(lm, TOKENS, "mlp", (0,))[0].isfinite().all()
    with pytest.raises(NumericalError, match="site mlp, layer 1"):
        capture(lm, TOKENS, "mlp", (0, 1))
    assert not any(module._forward_hooks for module in lm.model.modules())
