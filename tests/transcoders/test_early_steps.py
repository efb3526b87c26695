"""Matrices that move during the backward pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hagd.config.transcoder import Optimiser
from hagd.transcoders import module
from hagd.transcoders.initialise import initialise
from hagd.transcoders.module import TranscoderTraining
from hagd.transcoders.objective import Scaling, StackedTranscoders
from hagd.transcoders.sparse import chunks
from tests.transcoders.slow import settings

LAYERS, TOKENS, D = 3, 64, 8

CASES: dict[str, dict[str, Any]] = {
    "tied head": {},
    "low-rank head, skip": {"prediction_head": "low_rank", "skip": True},
    "dense head": {"prediction_head": "dense"},
    "no head": {"lambda_prediction": 0},
    "cross-layer": {"cross_layer": True},
    "jumprelu": {"activation": "jumprelu"},
}


def training(optimiser: Optimiser = "adam", **changes: Any) -> tuple[TranscoderTraining, Any]:
    """A training and its optimiser."""
    config = settings(**{"expansion": 8, "steps": 6, "batch_size": TOKENS, "optimiser": optimiser, **changes})
    scaling = Scaling(torch.zeros(LAYERS, 1, D), torch.ones(LAYERS, 1, 1))
    stacked = StackedTranscoders(config, LAYERS, D, seed=0)
    initialise(stacked, *tokens(0))
    made = TranscoderTraining(stacked, scaling, scaling)
    return made, made.configure_optimizers()


def tokens(step: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(step)
    x = torch.randn(LAYERS, TOKENS, D, generator=g)
    return x, (x @ torch.randn(D, D, generator=torch.Generator().manual_seed(99))).relu()


def run(made: TranscoderTraining, configured: Any, first: int = 0, end: int = 6) -> dict[str, Tensor]:
    for step in range(first, end):
        made.training_step(tokens(step), step)["loss"].backward()
        configured["optimizer"].step()
        configured["lr_scheduler"]["scheduler"].step()
        made.on_train_batch_end()
    return {name: value.clone() for name, value in made.stacked.state_dict().items()}


@pytest.mark.parametrize("large", [False, True], ids=["small", "large"])
@pytest.mark.parametrize("optimiser", ["adam", "adafactor"])
@pytest.mark.parametrize("case", list(CASES))
def test_the_weights_are_the_same_to_the_bit(
    case: str, optimiser: Optimiser, large: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if large:
        monkeypatch.setattr(chunks, "_LARGE", 1)
    early = run(*training(optimiser, **CASES[case]))
    monkeypatch.setattr(module, "rank_and_world", lambda: (0, 2))  # several processes wait for each other's gradients
    late = run(*training(optimiser, **CASES[case]))
    start = training(optimiser, **CASES[case])[0].stacked.state_dict()
    for name, value in late.items():
        assert torch.equal(early[name], value), name
    assert not torch.equal(late["layers.0.W_enc"], start["layers.0.W_enc"])


def test_a_training_that_was_stored_goes_on_the_same() -> None:
    expected = run(*training())
    stopped, configured = training()
    half = run(stopped, configured, end=3)
    resumed, again = training()
    resumed.stacked.load_state_dict(half)
    again["optimizer"].load_state_dict(configured["optimizer"].state_dict())
    again["lr_scheduler"]["scheduler"].load_state_dict(configured["lr_scheduler"]["scheduler"].state_dict())
    for name, value in run(resumed, again, first=3).items():
        assert torch.equal(value, expected[name]), name


def test_no_two_matrices_have_gradients_at_once() -> None:
    made, _ = training(skip=True)
    matrices = {name: each for name, each in made.stacked.named_parameters() if name.endswith(("W_enc", "W_dec"))}
    held: list[int] = []
    for matrix in matrices.values():
        matrix.register_post_accumulate_grad_hook(
            lambda _: held.append(sum(each.grad is not None for each in matrices.values()))
        )
    made.training_step(tokens(0), 0)["loss"].backward()
    assert held == [0] * 2 * LAYERS, "the matrix' own gradient is gone when the next hook is called"
    assert all(each.grad is None for each in matrices.values())
    assert all(dictionary.b_enc.grad is not None for dictionary in made.stacked.dictionaries)


def test_an_end_leaves_no_optimiser_behind() -> None:
    made, configured = training()
    made.on_fit_end()
    before = made.stacked.dictionaries[0].W_enc.detach().clone()
    made.training_step(tokens(0), 0)["loss"].backward()
    assert made.stacked.dictionaries[0].W_enc.grad is not None
    assert torch.equal(made.stacked.dictionaries[0].W_enc, before)
    assert not configured["optimizer"].state
