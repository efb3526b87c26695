"""Two processes that each hold half of every weight (FSDP2), or half of the layers, reach what one reaches alone."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from hagd.config.transcoder import TranscoderConfig
from hagd.training.processes import dividing_layers
from hagd.transcoders import sharded
from hagd.transcoders.divided import DividedTraining
from hagd.transcoders.initialise import initialise
from hagd.transcoders.joint import JointTraining
from hagd.transcoders.module import TranscoderTraining
from hagd.transcoders.objective import Scaling, StackedTranscoders
from hagd.transcoders.sharded import ShardedTraining
from tests.processes import WORLD, in_processes

LAYERS, TOKENS, D, STEPS = 3, 32, 8, 6
CASES: dict[str, dict[str, Any]] = {
    "tied": {},
    "dense": {"prediction_head": "dense"},
    "low rank": {"prediction_head": "tied_low_rank", "head_negatives": 20, "head_rank": 4},
    "no head": {"lambda_prediction": 0.0},
    "skip, jumprelu": {"activation": "jumprelu", "skip": True, "lambda_sparsity": 0.1},
    "cross-layer": {"cross_layer": True},
}


def settings(case: str) -> TranscoderConfig:
    """AuxK works from the second step on."""
    common = {"k": 4, "expansion": 5, "steps": STEPS, "batch_size": TOKENS, "dead_fraction": 0.1}
    return TranscoderConfig(**{**common, **CASES[case]})


def tokens() -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    x = torch.randn(LAYERS, STEPS * TOKENS, D, generator=g)
    return x, (x @ torch.randn(LAYERS, D, D, generator=g)).relu()


def trainer_on(device: torch.device) -> Any:
    """What a module asks of its trainer."""
    return SimpleNamespace(strategy=SimpleNamespace(root_device=device), global_step=0)


def started(config: TranscoderConfig, kind: type[TranscoderTraining]) -> Any:
    """A training on these tokens; all of them start it."""
    x, y = tokens()
    scalings = Scaling.of(x), Scaling.of(y)
    if issubclass(kind, JointTraining):
        module = kind(config, 0, *scalings, (x, y))
        module.trainer = trainer_on(torch.device("cpu"))
        module.configure_model()
        return module
    stacked = StackedTranscoders(config, LAYERS, D, seed=0)
    initialise(stacked, scalings[0](x), scalings[1](y))
    return kind(stacked, *scalings)


def steps(module: TranscoderTraining, share: slice, after_backward: Callable[[], None] = lambda: None) -> Any:
    """Train; returns the optimiser."""
    x, y = tokens()
    configured = module.configure_optimizers()
    optimiser, schedule = configured["optimizer"], configured["lr_scheduler"]["scheduler"]
    for step in range(STEPS):
        rows = range(step * TOKENS, (step + 1) * TOKENS)[share]
        module.training_step(
            (x[:, rows.start : rows.stop : rows.step], y[:, rows.start : rows.stop : rows.step]), step
        )["loss"].backward()
        after_backward()
        optimiser.step()
        optimiser.zero_grad()
        schedule.step()
    return optimiser


def in_group(work: Callable[[int], Any], folder: Path) -> list[Any]:
    """What `work(rank)` returns in each of two processes that know each other."""

    def run(rank: int) -> Any:
        dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=WORLD)
        result = work(rank)
        dist.destroy_process_group()
        return result

    return in_processes(run, folder)


@pytest.mark.filterwarnings("ignore:.*returned a view tensor")
@pytest.mark.parametrize(
    "case", [pytest.param(name, marks=[pytest.mark.slow] * (name in ("dense", "low rank"))) for name in CASES]
)
@pytest.mark.parametrize("kind", [ShardedTraining, DividedTraining])
def test_two_processes_train_what_one_trains(tmp_path: Path, kind: type[JointTraining], case: str) -> None:
    config = settings(case)
    if config.cross_layer and kind is DividedTraining:
        pytest.skip("refused by the configuration")

    def work(rank: int) -> dict[str, Tensor]:
        shares_tokens = kind is ShardedTraining
        with nullcontext() if shares_tokens else dividing_layers():
            module = started(config, kind)
            steps(module, slice(rank, None, WORLD) if shares_tokens else slice(None))
        return dict(module.whole().state_dict())

    one = started(config, TranscoderTraining)
    before = {name: value.clone() for name, value in one.stacked.state_dict().items()}
    steps(one, slice(None))
    first, second = in_group(work, tmp_path)
    assert one.stacked.dead().any()  # else AuxK is not tested
    for name, expected in one.stacked.state_dict().items():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], expected, rtol=1e-3, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")
    assert (first["layers.0.W_dec"] - before["layers.0.W_dec"]).abs().max() > 1e-3


def test_own_layers_start_alike_whatever_the_default_device(tmp_path: Path) -> None:
    """Lightning builds them with the accelerator as default device."""
    config, (x, y) = settings("tied"), tokens()

    def work(rank: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        module = DividedTraining(config, 0, Scaling.of(x), Scaling.of(y), (x, y))
        with torch.device("meta"):
            module.configure_model()
        return module.stacked.state_dict(), started(config, DividedTraining).stacked.state_dict()

    for found, expected in in_group(work, tmp_path):
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_parts_are_on_the_device_of_the_trainer(monkeypatch: pytest.MonkeyPatch) -> None:
    """To which Lightning moves the module only when it is built."""

    class Asked(Exception):
        pass

    def asked(device: str, shape: tuple[int, ...]) -> None:
        raise Asked(device, shape)

    monkeypatch.setattr(dist, "get_world_size", lambda: 4)
    monkeypatch.setattr(sharded, "init_device_mesh", asked)
    x, y = tokens()
    module = ShardedTraining(settings("tied"), 0, Scaling.of(x), Scaling.of(y), (x, y))
    module.trainer = trainer_on(torch.device("cuda", 1))
    with pytest.raises(Asked) as found:
        module.configure_model()
    assert found.value.args == ("cuda", (4,))


class Observed(ShardedTraining):
    """Notes which layers' weights are whole in this process whenever a layer's turn comes, forwards and backwards."""

    def configure_model(self) -> None:
        super().configure_model()
        self.whole_layers: list[list[int]] = []
        layer = self.stacked._layer

        def observed(dictionary: Any, i: int, *inputs: Any) -> Any:
            self.note()
            terms = layer(dictionary, i, *inputs)
            terms.codes.values.register_hook(lambda _: self.note())
            return terms

        self.stacked._layer = observed  # type: ignore[method-assign]

    def note(self) -> None:
        """Gathered weights are plain tensors."""
        whole = [i for i, d in enumerate(self.stacked.dictionaries) if not isinstance(d.W_enc, DTensor)]
        self.whole_layers.append(whole)


def test_no_process_holds_the_whole_at_any_time(tmp_path: Path) -> None:
    config = settings("tied")

    def work(rank: int) -> dict[str, Any]:
        module = started(config, Observed)
        parts: list[bool] = []

        def all_are_parts() -> None:
            parts.append(all(isinstance(p, DTensor) and isinstance(p.grad, DTensor) for p in module.parameters()))

        optimiser = steps(module, slice(rank, None, WORLD), all_are_parts)
        state = [value for entry in optimiser.state.values() for value in entry.values() if value.ndim]
        return {
            "weights": sum(p.to_local().numel() for p in module.parameters()),
            "moments": sum(value.to_local().numel() for value in state),
            "rows": [tuple(d.W_enc.to_local().shape) for d in module.stacked.dictionaries],
            "whole": module.whole_layers,
            "parts": parts,
        }

    total = sum(p.numel() for p in started(config, TranscoderTraining).parameters())
    found = in_group(work, tmp_path)
    assert sum(each["weights"] for each in found) == total
    for each in found:
        assert each["weights"] == total / WORLD and each["moments"] == 2 * total / WORLD
        assert each["rows"] == [(5 * D // WORLD, D)] * LAYERS  # features are what is divided
        assert all(each["parts"]) and len(each["parts"]) == STEPS
        assert len(each["whole"]) == 2 * LAYERS * STEPS
        forwards = [each["whole"][2 * LAYERS * s : 2 * LAYERS * s + LAYERS] for s in range(STEPS)]
        assert forwards == [[[0], [1], [2]]] * STEPS
        # Backwards the next layer's weights may be on their way already.
        assert all(len(whole) <= 2 for whole in each["whole"])
