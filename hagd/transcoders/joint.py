"""Trainings of which every process holds a part; the stack is built once the processes know each other."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from hagd.config.transcoder import TranscoderConfig
from hagd.transcoders.module import TranscoderTraining
from hagd.transcoders.objective import Scaling, StackedTranscoders


class JointTraining(TranscoderTraining, ABC):
    """`TranscoderTraining` of this process's part. `configure_model` builds it, which Lightning calls in every process.

    Args:
        config: of the dictionaries.
        seed: of their first weights.
        x_scaling: of the inputs of all layers.
        y_scaling: of the outputs.
        initial: raw tokens `[L, B, d]` twice, from which the weights start.
        layers: their numbers in the model; None: from 0 up.
    """

    def __init__(
        self,
        config: TranscoderConfig,
        seed: int,
        x_scaling: Scaling,
        y_scaling: Scaling,
        initial: tuple[Tensor, Tensor],
        layers: Sequence[int] | None = None,
    ) -> None:
        super().__init__(None, x_scaling, y_scaling, layers)
        self._config = config
        self._seed = seed
        self._initial = initial

    @abstractmethod
    def whole(self) -> StackedTranscoders:
        """The stack of all layers on the CPU, in every process."""

    def start_tokens(self, layers: range) -> tuple[Tensor, Tensor]:
        """Scaled inputs and targets `[L, B, d]` from which some layers start."""
        own = slice(layers.start, layers.stop)
        x, y = self._initial
        return (
            Scaling(self.x_mean[own].cpu(), self.x_scale[own].cpu())(x[own]),
            Scaling(self.y_mean[own].cpu(), self.y_scale[own].cpu())(y[own]),
        )

    def stack(self, **parts: Any) -> StackedTranscoders:
        """A new stack with these settings and `parts` (`own`, `previous`, `following`, `built`)."""
        n_layers, _, d = self.x_mean.shape
        return StackedTranscoders(self._config, n_layers, d, self._seed, **parts)
