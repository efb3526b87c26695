"""Activations at a site, read by hooks; the model is not changed.

Shape legend: B sequences, T positions, d = d_model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hagd.errors import NumericalError
from hagd.models.language_model import LanguageModel

Site = Literal["mlp", "resid"]


class _AllCaptured(Exception):
    """Ends a forward pass whose remaining layers nobody needs."""


@torch.no_grad()
def capture(lm: LanguageModel, tokens: Tensor, site: Site, layers: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Inputs and outputs of a site, both `[len(layers), B, T, d]` in float32, for `tokens` `[B, T]`.

    `mlp`: what enters the MLP after its norm, and what it adds to the residual stream. `resid`: the residual
    stream after the layer, twice. Layers above the last one asked for are not computed.

    Raises:
        NumericalError: an activation is NaN or infinite; names the layer.
    """
    found: dict[int, tuple[Tensor, Tensor]] = {}

    def record(layer: int, x: Tensor, y: Tensor) -> None:
        found[layer] = (x.float(), y.float())
        if layer == layers[-1]:
            raise _AllCaptured

    with observe(lm, site, layers, record), suppress(_AllCaptured):
        lm.hidden(tokens)
    for layer, pair in found.items():
        if not all(bool(value.isfinite().all()) for value in pair):
            raise NumericalError(
                f"activations of {lm.name} at site {site}, layer {layer}: expected finite values, found NaN or "
                "infinity; check model.dtype (float16 overflows) and the weights"
            )
    inputs, outputs = zip(*(found[layer] for layer in layers), strict=True)
    return torch.stack(inputs), torch.stack(outputs)


@contextmanager
def observe(lm: LanguageModel, site: Site, layers: Sequence[int], record: Any) -> Iterator[None]:
    """Within: `record(layer, input, output)` is called for each layer of each forward pass."""
    handles = []
    for layer in layers:

        def hook(_: nn.Module, inputs: tuple[Any, ...], output: Any, layer: int = layer) -> None:
            y = output if isinstance(output, Tensor) else output[0]
            record(layer, inputs[0] if site == "mlp" else y, y)

        handles.append(site_module(lm, site, layer).register_forward_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def site_module(lm: LanguageModel, site: Site, layer: int) -> nn.Module:
    """The module whose output is the site's activation."""
    return lm.mlp(layer) if site == "mlp" else lm.layers[layer]
