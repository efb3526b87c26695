"""Matrices that move during the backward pass."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from pytorch_lightning import Trainer
from pytorch_lightning.plugins import MixedPrecision
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hagd.config.run import TrainerConfig
from hagd.config.transcoder import Optimiser
from hagd.training.fit import fit
from hagd.training.loader import StepLoader
from hagd.transcoders import module
from hagd.transcoders.initialise import initialise
from hagd.transcoders.module import TranscoderTraining
from hagd.transcoders.objective import Scaling, StackedTranscoders
from hagd.transcoders.sparse import device_kernels
from tests.processes import in_processes
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


@pytest.mark.parametrize(("optimiser", "large"), [("adam", False), ("adam", True), ("adafactor", True)])
@pytest.mark.parametrize("case", list(CASES))
def test_the_weights_are_the_same_to_the_bit(
    case: str, optimiser: Optimiser, large: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if large:
        monkeypatch.setattr(device_kernels, "_LARGE", 1)
    moving = training(optimiser, **CASES[case])
    assert len(moving[0]._early) >= 2 * LAYERS
    early = run(*moving)
    monkeypatch.setattr(module, "rank_and_world", lambda: (0, 2))  # several processes wait for each other's gradients
    waiting = training(optimiser, **CASES[case])
    assert not waiting[0]._early
    late = run(*waiting)
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


class Matrices(TorchDispatchMode):
    """The most tensors of a matrix' size, made within, that were alive at once."""

    def __init__(self, size: int, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.size, self.most = size, 0
        self._known = {each.data_ptr() for each in known}
        self._alive: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        strided = isinstance(out, Tensor) and out.layout == torch.strided
        if strided and out.untyped_storage().nbytes() == 4 * self.size:
            self._alive.add(out.untyped_storage())
            self.most = max(self.most, len({each.data_ptr() for each in self._alive} - self._known))
        return out


def test_gradients_are_not_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of all layers' matrices would be six."""
    monkeypatch.setattr(device_kernels, "_LARGE", 1)
    most = {}
    for early in (True, False):
        monkeypatch.setattr(module, "rank_and_world", lambda early=early: (0, 1 if early else 2))
        made, configured = training(lambda_prediction=0, aux_weight=0, expansion=16)
        run(made, configured, end=1)  # with state in the optimiser
        loss = made.training_step(tokens(1), 1)["loss"]
        moments = [value for state in configured["optimizer"].state.values() for value in state.values()]
        known = (*made.stacked.parameters(), *moments)
        with Matrices(made.stacked.dictionaries[0].W_enc.numel(), known) as matrices:
            loss.backward()
        most[early] = matrices.most
        held = [name for name, each in made.stacked.named_parameters() if each.ndim == 2 and each.grad is not None]
        assert len(held) == (0 if early else 2 * LAYERS)
        assert all(dictionary.b_enc.grad is not None for dictionary in made.stacked.dictionaries)
    assert most[True] <= 2 < 2 * LAYERS <= most[False]


@pytest.mark.parametrize("strategy", ["auto", "ddp"])
def test_a_process_alone_trains_the_same_however_it_is_started(
    strategy: Literal["auto", "ddp"], tmp_path: Path
) -> None:
    """DDP brings gradients back that a hook took away."""
    expected = run(*training())

    def work(_: int) -> list[str]:
        found, _ = training()
        fit(found, StepLoader(tokens, 6), TrainerConfig(strategy=strategy), 6, tmp_path / "c")
        return [name for name, each in found.stacked.state_dict().items() if not torch.equal(each, expected[name])]

    assert in_processes(work, tmp_path, world=1) == [[]]


def test_a_scale_is_taken_off_before_anything_moves() -> None:
    """As with `trainer.precision=16-mixed` on a GPU, which skips steps whose gradients overflow."""
    made, _ = training()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**126)
    plugin = MixedPrecision("16-mixed", "cpu", scaler=scaler)
    settings = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(max_steps=1, accelerator="cpu", plugins=[plugin], enable_model_summary=False, **settings)
    trainer.fit(made, StepLoader(tokens, 1))
    assert not made._early and scaler.get_scale() < 2.0**126
    assert all(each.isfinite().all() for each in made.stacked.parameters())


def test_a_second_optimiser_takes_over() -> None:
    made, first = training()
    again = made.configure_optimizers()
    run(made, again, end=2)
    assert not any(each.ndim == 2 and each in first["optimizer"].state for each in made.stacked.parameters())
    expected, configured = training()
    for name, value in run(expected, configured, end=2).items():
        assert torch.equal(value, made.stacked.state_dict()[name]), name


def test_an_error_in_a_step_leaves_the_optimiser_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    made, configured = training()
    groups = configured["optimizer"].param_groups

    def failing(*_: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(configured["optimizer"], "step", failing)
    with pytest.raises(MemoryError):
        made.training_step(tokens(0), 0)["loss"].backward()
    assert configured["optimizer"].param_groups is groups


def test_an_end_leaves_no_optimiser_behind() -> None:
    made, configured = training()
    made.on_fit_end()
    before = made.stacked.dictionaries[0].W_enc.detach().clone()
    made.training_step(tokens(0), 0)["loss"].backward()
    assert made.stacked.dictionaries[0].W_enc.grad is not None
    assert torch.equal(made.stacked.dictionaries[0].W_enc, before)
    assert not configured["optimizer"].state
