"""Forward passes that start at the first decomposed layer.

Nothing below it is ever patched, so the residual stream that enters it depends on the tokens alone: it is computed
once a sequence and read back afterwards.

Shape legend: B sequences, T positions, d = d_model.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hagd.activations.capture import capture
from hagd.models.language_model import LanguageModel
from hagd.patching.replaced_forward import forward_as

_AT_ONCE = 64
_LIMIT_MB = 1024
"""Kept residual streams above this size are forgotten and computed again when needed."""


class Prefix:
    """What enters layer `first`, by sequence.

    Attributes:
        first: the lowest layer that a forward pass has to compute.
    """

    def __init__(self, lm: LanguageModel, first: int) -> None:
        self.first = first
        self._lm = lm
        self._entering: dict[bytes, Tensor] = {}
        self._bytes = 0

    @contextmanager
    def resumed(self, tokens: Tensor) -> Iterator[None]:
        """Within: forward passes of `tokens` `[B, T]`, and of nothing else, compute layers from `first` up only."""
        if self.first == 0:
            yield
            return
        entering = self._read(tokens)

        def enter(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
            return entering.to(inputs[0].device), *inputs[1:]

        with ExitStack() as stack:
            for layer in self._lm.layers[: self.first]:
                stack.enter_context(forward_as(layer, _unchanged))
            stack.callback(self._lm.layers[self.first].register_forward_pre_hook(enter).remove)
            yield

    def _read(self, tokens: Tensor) -> Tensor:
        """`[B, T, d]`."""
        keys = [row.tobytes() for row in tokens.cpu().numpy()]
        if self._bytes > _LIMIT_MB * 2**20:
            self._entering, self._bytes = {}, 0
        missing = list({key: i for i, key in enumerate(keys) if key not in self._entering}.values())
        for start in range(0, len(missing), _AT_ONCE):
            rows = missing[start : start + _AT_ONCE]
            found = capture(self._lm, tokens[rows], "resid", (self.first - 1,))[1][0].to(self._lm.model.dtype)
            for row, value in zip(rows, found, strict=True):
                self._entering[keys[row]] = value.clone()
                self._bytes += value.nbytes
        return torch.stack([self._entering[key] for key in keys])


def _unchanged(hidden: Tensor, *_: Any, **__: Any) -> Tensor:
    return hidden
