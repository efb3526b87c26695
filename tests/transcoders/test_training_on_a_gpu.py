"""Trainings whose steps run on a CUDA device; run with `pytest -m gpu`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from hagd.activations.collect import collect
from hagd.activations.plan import Sequences
from hagd.activations.shards import ActivationShards
from hagd.config.activations import ActivationsConfig
from hagd.config.run import TrainerConfig
from hagd.config.transcoder import Selection, TranscoderConfig
from hagd.transcoders import module
from hagd.transcoders.module import TranscoderTraining
from hagd.transcoders.objective import Scaling, StackedTranscoders
from hagd.transcoders.sparse import device_kernels
from hagd.transcoders.training import train_transcoders
from tests.builders import VOCABULARY, random_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.filterwarnings("ignore:Synchronization debug mode"),
]


@contextmanager
def no_waiting() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("heads", [0.0, 0.1], ids=["alone", "heads"])
@pytest.mark.parametrize(("selection", "half"), [("bfloat16", False), ("bfloat16", True), ("float8", True)])
def test_a_step_never_waits(heads: float, selection: Selection, half: bool) -> None:
    """Not for its reading of how many features are dead either, which is above zero here."""
    config = TranscoderConfig.model_validate(
        {"k": 4, "expansion": 16, "selection": selection, "lambda_prediction": heads, "head_negatives": 16}
        | {"dead_fraction": 1e-6}
    )
    stacked = StackedTranscoders(config, 2, 32, seed=0).cuda()
    optimiser = torch.optim.Adam(stacked.parameters(), lr=1e-3, fused=True)
    x, y = torch.randn(2, 2, 256, 32, device="cuda")

    def step(number: int) -> torch.Tensor:
        with torch.autocast("cuda", torch.bfloat16, enabled=half):
            losses = stacked.losses(x, y, number)
        optimiser.zero_grad()
        losses.total.backward()
        optimiser.step()
        return losses.auxiliary.detach()

    for number in range(3):  # compiles and tunes the kernels; allocates
        step(number)
    with no_waiting():
        auxiliary = [step(number) for number in range(3, 6)]
    assert all(value > 0 for value in auxiliary)


@pytest.mark.parametrize("selection", get_args(Selection))
def test_autocast_turns_inputs_in_its_precision_where_the_selection_rounds_them(selection: Selection) -> None:
    config = TranscoderConfig.model_validate({"k": 4, "expansion": 16, "selection": selection})
    (dictionary,) = StackedTranscoders(config, 1, 32, seed=0).cuda().dictionaries
    x = torch.randn(8, 32, device="cuda")
    assert dictionary.turned(x).dtype == torch.float32
    with torch.autocast("cuda", torch.bfloat16):
        rounded = selection in ("bfloat16", "float8")
        assert dictionary.turned(x).dtype == (torch.bfloat16 if rounded else torch.float32)


def stepping(
    selection: Selection, heads: float, processes: int, monkeypatch: pytest.MonkeyPatch
) -> tuple[TranscoderTraining, Any]:
    """A training of dictionaries that count as large, and what makes its next step."""
    monkeypatch.setattr(device_kernels, "_LARGE", 1)
    monkeypatch.setattr(module, "rank_and_world", lambda: (0, processes))
    settings = {"k": 4, "expansion": 16, "head_negatives": 16, "dead_fraction": 1e-6, "steps": 20}
    config = TranscoderConfig.model_validate({**settings, "selection": selection, "lambda_prediction": heads})
    scaling = Scaling(torch.zeros(2, 1, 32), torch.ones(2, 1, 1))
    training = TranscoderTraining(StackedTranscoders(config, 2, 32, seed=0), scaling, scaling).cuda()
    configured = training.configure_optimizers()
    x, y = torch.randn(2, 2, 256, 32, generator=torch.Generator().manual_seed(0)).cuda()

    def step() -> None:
        training.training_step((x, y), 0)["loss"].backward()
        configured["optimizer"].step()
        configured["lr_scheduler"]["scheduler"].step()
        training.on_train_batch_end()

    return training, step


@pytest.mark.parametrize("heads", [0.0, 0.1], ids=["alone", "heads"])
@pytest.mark.parametrize("selection", get_args(Selection))
def test_matrices_that_move_early_never_wait_and_move_the_same(
    selection: Selection, heads: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[dict[str, Tensor]] = []
    for processes in (1, 2):  # of which several wait for each other's gradients
        training, step = stepping(selection, heads, processes, monkeypatch)
        assert len(training._early) == (4 if processes == 1 else 0)
        for _ in range(3):  # compiles and tunes the kernels; allocates
            step()
        with no_waiting():
            for _ in range(3):
                step()
        found.append(training.stacked.state_dict())
    for name, value in found[0].items():
        assert torch.equal(value, found[1][name]), name


@pytest.fixture
def activations(tmp_path: Path) -> ActivationShards:
    g = torch.Generator().manual_seed(0)
    tokens = torch.randint(VOCABULARY, (300, 32), generator=g)
    config = ActivationsConfig(storage="memory", memory_mb=16, buffer_tokens=4000)
    return collect(random_model(length=32), [Sequences(tokens)], "mlp", (0, 1), config, folder=tmp_path, seed=0)


def test_batches_on_a_gpu_are_those_of_the_cpu(activations: ActivationShards) -> None:
    for step in range(30):  # over the borders of shards and epochs
        for here, there in zip(
            activations.batch(step, 500), activations.batch(step, 500, device=torch.device("cuda")), strict=True
        ):
            assert there.is_cuda and torch.equal(here, there.cpu())


def test_a_training_on_a_gpu_is_that_on_the_cpu(activations: ActivationShards, tmp_path: Path) -> None:
    """Up to rounding, which Adam spreads."""
    config = TranscoderConfig.model_validate({"k": 4, "expansion": 4, "steps": 60, "batch_size": 256})

    def trained(accelerator: str) -> float:
        trainer = TrainerConfig(accelerator=accelerator)
        done = train_transcoders(config, (0, 1), activations, 0, trainer, tmp_path / accelerator)
        assert all(each.W_enc.device.type == "cpu" for each in done.transcoders)
        first, (x, y) = done.transcoders[0], activations.sample(4000)
        lost = (first.decode(first.encode(x[0])) - y[0]).square().sum() / (y[0] - y[0].mean(0)).square().sum()
        return float(lost)

    assert trained("gpu") == pytest.approx(trained("cpu"), rel=0.02)
