from __future__ import annotations

import importlib.util

import pytest
import torch

from hagd.config.transcoder import Optimiser, TranscoderConfig
from hagd.errors import ConfigError
from hagd.transcoders.initialise import initialise
from hagd.transcoders.module import TranscoderTraining
from hagd.transcoders.objective import Scaling, StackedTranscoders


def train(optimiser: Optimiser, steps: int = 40) -> tuple[float, float, int]:
    """Unexplained variance at the start and at the end, and the bytes of the optimiser's state."""
    config = TranscoderConfig(k=4, expansion=4, optimiser=optimiser, steps=steps, batch_size=256, learning_rate=0.01)
    g = torch.Generator().manual_seed(0)
    x = torch.randn(1, 256, 16, generator=g)
    y = (x @ torch.randn(16, 16, generator=g)).relu()
    x_scaling, y_scaling = Scaling.of(x), Scaling.of(y)
    stacked = StackedTranscoders(config, 1, 16, seed=0)
    initialise(stacked, x_scaling(x), y_scaling(y))
    module = TranscoderTraining(stacked, x_scaling, y_scaling)
    configured = module.configure_optimizers()
    fvu = []
    for step in range(steps):
        losses = module.training_step((x, y), step)
        configured["optimizer"].zero_grad()
        losses["loss"].backward()
        configured["optimizer"].step()
        configured["lr_scheduler"]["scheduler"].step()
        fvu.append(float(losses["fvu"]))
    states = configured["optimizer"].state.values()
    stored = sum(v.nbytes for state in states for v in state.values() if isinstance(v, torch.Tensor))
    return fvu[0], fvu[-1], stored


def test_both_optimisers_explain_more_and_adafactor_keeps_less() -> None:
    adam, adafactor = train("adam"), train("adafactor")
    for start, end, _ in (adam, adafactor):
        assert end < 0.8 * start
    assert adafactor[2] < 0.1 * adam[2]


@pytest.mark.parametrize(("optimiser", "decoder_rate"), [("adam", 1.0), ("adam", 3.0), ("adafactor", 1.0)])
def test_a_matrix_with_shorter_rows_moves_less(optimiser: Optimiser, decoder_rate: float) -> None:
    """And those of a dictionary with a 256th of 2¹⁴ features move sixteen times the configured rate."""
    config = TranscoderConfig.model_validate(
        {"k": 4, "expansion": 4, "steps": 100, "warmup_fraction": 0.0, "learning_rate": 3e-3 / 16}
        | {"optimiser": optimiser, "decoder_rate": decoder_rate}
    )
    stacked = StackedTranscoders(config, 1, 16, seed=0)
    (dictionary,) = stacked.dictionaries
    with torch.no_grad():
        dictionary.W_dec.mul_(1 / 8)  # rows of norm 1 before
    scaling = Scaling(torch.zeros(1, 1, 16), torch.ones(1, 1, 1))
    optimizer = TranscoderTraining(stacked, scaling, scaling).configure_optimizers()["optimizer"]
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(stacked.parameters()))
    before = {name: value.detach().clone() for name, value in dictionary.named_parameters()}
    for parameter in stacked.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    moved = {name: float((before[name] - value.detach()).mean()) for name, value in dictionary.named_parameters()}
    expected = {"W_enc": 3e-3, "b_enc": 3e-3, "b_dec": 3e-3, "W_dec": 1.5e-3 * decoder_rate}
    assert moved == pytest.approx(expected, rel=1e-4)


def test_prediction_heads_keep_the_configured_rate() -> None:
    config = TranscoderConfig(k=4, expansion=4, steps=100, warmup_fraction=0.0, learning_rate=1e-4)
    stacked = StackedTranscoders(config, 2, 16, seed=0)
    scaling = Scaling(torch.zeros(2, 1, 16), torch.ones(2, 1, 1))
    optimizer = TranscoderTraining(stacked, scaling, scaling).configure_optimizers()["optimizer"]
    before = [value.detach().clone() for value in stacked.heads.parameters()]
    for parameter in stacked.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert before
    for old, new in zip(before, stacked.heads.parameters(), strict=True):
        torch.testing.assert_close(old - new, torch.full_like(old, 1e-4), rtol=1e-2, atol=1e-7)


@pytest.mark.skipif(importlib.util.find_spec("torchao") is not None, reason="torchao is installed")
def test_eight_bits_need_their_package() -> None:
    with pytest.raises(ConfigError, match=r"transcoder\.optimiser=adam8bit: expected the package torchao.*optim8bit"):
        train("adam8bit", steps=1)
