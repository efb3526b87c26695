"""The dictionaries as a Lightning module."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import SingleDeviceStrategy
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils.hooks import RemovableHandle

from hagd.training.loss_watch import BY_PART
from hagd.training.own_layers import OwnLayersStrategy
from hagd.training.processes import rank_and_world
from hagd.transcoders.objective import Scaling, StackedTranscoders
from hagd.transcoders.optimisers import build_optimiser

_RATE_AT = 2**14
"""Dictionary size whose peak rate is `learning_rate`; it falls with √m (Gao et al. 2024)."""

_SHORTEST = 1e-3


class TranscoderTraining(pl.LightningModule):
    """Minimises Eq. 4 (`StackedTranscoders.losses`) with Adam; warm-up, constant rate, linear decay.

    Args:
        stacked: the dictionaries; None: set later.
        x_scaling: of the inputs of all layers.
        y_scaling: of the outputs.
        layers: their numbers in the model, for messages; None: from 0 up.
    """

    x_mean: Tensor
    x_scale: Tensor
    y_mean: Tensor
    y_scale: Tensor

    stacked: StackedTranscoders

    def __init__(
        self,
        stacked: StackedTranscoders | None,
        x_scaling: Scaling,
        y_scaling: Scaling,
        layers: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.layers = range(len(x_scaling.mean)) if layers is None else layers
        self._early: list[RemovableHandle] = []
        if stacked is not None:
            self.stacked = stacked
        for name, value in (
            ("x_mean", x_scaling.mean),
            ("x_scale", x_scaling.scale),
            ("y_mean", y_scaling.mean),
            ("y_scale", y_scaling.scale),
        ):
            self.register_buffer(name, value)

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the own layers."""
        return tuple(f"layer {self.layers[i]}" for i in self.stacked.own)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """One step on raw tokens `[L, B, d]` twice."""
        own = slice(self.stacked.own.start, self.stacked.own.stop)
        scalings = (Scaling(self.x_mean[own], self.x_scale[own]), Scaling(self.y_mean[own], self.y_scale[own]))
        losses = self.stacked.losses(batch[0][own], batch[1][own], self.global_step, scalings)
        return {
            "loss": losses.total,
            BY_PART: losses.fvu_by_layer,
            "fvu": losses.fvu.detach(),
            "prediction": losses.prediction.detach(),
            "sparsity": losses.sparsity.detach(),
            "l0": losses.l0.detach(),
            "dead": self.stacked.dead().float().mean(),
        }

    def on_train_batch_end(self, *_: Any) -> None:
        """Gradients go before the next step's forward pass; Lightning would hold them until its end."""
        self.zero_grad()

    def configure_optimizers(self) -> Any:
        """The optimiser and its schedule, a function of the step alone."""
        config = self.stacked.config
        peak = config.learning_rate * (_RATE_AT / self.stacked.dictionaries[0].m) ** 0.5
        optimiser = build_optimiser(config, _groups(self.stacked, peak))
        self._stop_stepping_early()
        if self._gradients_are_final():
            self._step_early(optimiser)

        def rate(step: int) -> float:
            rising = (step + 1) / max(config.warmup_fraction * config.steps, 1)
            falling = (config.steps - step) / max(config.decay_fraction * config.steps, 1)
            return min(1.0, rising, max(falling, 0.0))

        schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, rate)
        return {"optimizer": optimiser, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _gradients_are_final(self) -> bool:
        """Whether what the backward pass gives is what the optimiser takes: no process averages it, as DDP does even
        when it is alone, and no scale is taken off, as from float16 on a GPU."""
        trainer = self._trainer
        if trainer is None:
            return rank_and_world()[1] == 1
        alone = isinstance(trainer.strategy, SingleDeviceStrategy | OwnLayersStrategy)
        return alone and getattr(trainer.precision_plugin, "scaler", None) is None

    def _step_early(self, optimiser: torch.optim.Optimizer) -> None:
        """Every matrix moves, and its gradient goes, as soon as the backward pass has all of it."""
        for i, group in enumerate(optimiser.param_groups):
            if len(group["params"]) == 1 and group["params"][0].ndim == 2:
                hook = partial(_step_alone, optimiser, i)
                self._early.append(group["params"][0].register_post_accumulate_grad_hook(hook))

    def on_fit_end(self) -> None:
        """The optimiser goes with its trainer."""
        self._stop_stepping_early()

    def _stop_stepping_early(self) -> None:
        while self._early:
            self._early.pop().remove()


def _step_alone(optimiser: torch.optim.Optimizer, i: int, matrix: Tensor) -> None:
    groups = optimiser.param_groups  # others after the optimiser's state was loaded
    optimiser.param_groups = groups[i : i + 1]
    try:
        optimiser.step()
    finally:
        optimiser.param_groups = groups
    matrix.grad = None


def _groups(stacked: StackedTranscoders, peak: float) -> list[dict[str, Any]]:
    """Parameters and their peak rates: Adam moves all entries equally far, so that matrices whose rows start short
    (a transcoder's decoder) would move by too large a share of themselves. Prediction heads keep the configured rate:
    with that of small dictionaries some trainings diverged."""
    decoders = stacked.config.decoder_rate
    matrices = [pair for each in stacked.dictionaries for pair in ((each.W_enc, 1.0), (each.W_dec, decoders))]
    known = {id(matrix) for matrix, _ in matrices}
    heads = {id(parameter) for parameter in stacked.heads.parameters()}
    others = [parameter for parameter in stacked.parameters() if id(parameter) not in known | heads]
    groups: list[dict[str, Any]] = [{"params": others, "lr": peak}]
    if heads:
        groups.append({"params": list(stacked.heads.parameters()), "lr": stacked.config.learning_rate})
    for matrix, factor in matrices:
        lengths = matrix.detach().norm(dim=1)
        lengths = lengths.full_tensor() if isinstance(lengths, DTensor) else lengths
        length = max(float(lengths.mean()), _SHORTEST)
        groups.append({"params": [matrix], "lr": peak * factor * length ** (1 / 3)})
    return groups
