"""Activations at a site, read by hooks; the model is not changed.

Shape legend: L layers asked for, B sequences, T positions, d = d_model.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hagd.errors import NumericalError
from hagd.models.language_model import LanguageModel

Site = Literal["mlp", "resid"]

Visitor = Callable[[int, slice, Tensor, Tensor], None]
"""Called with the index of a layer among those asked for, which rows, and their input and output `[rows, T, d]`."""


class _AllCaptured(Exception):
    """Ends a forward pass whose remaining layers nobody needs."""


@torch.no_grad()
def capture(lm: LanguageModel, tokens: Tensor, site: Site, layers: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Inputs and outputs of a site, both `[L, B, T, d]` in float32, for `tokens` `[B, T]`.

    `mlp`: what enters the MLP after its norm, and what it adds to the residual stream. `resid`: the residual
    stream after the layer, twice (the same tensor). Layers above the last one asked for are not computed.

    Raises:
        NumericalError: an activation is NaN or infinite; names the layer.
    """
    x = torch.empty(len(layers), *tokens.shape, lm.d_model, device=tokens.device)
    y = x if site == "resid" else torch.empty_like(x)

    def copy(index: int, rows: slice, inputs: Tensor, outputs: Tensor) -> None:
        y[index, rows] = outputs.to(y.device)
        if site == "mlp":
            x[index, rows] = inputs.to(x.device)

    visit(lm, tokens, site, layers, copy)
    finite = torch.stack([x[i].isfinite().all() & y[i].isfinite().all() for i in range(len(layers))]).tolist()
    if not all(finite):  # one answer for all layers: a GPU is waited for once
        raise not_finite(lm, site, layers[finite.index(False)])
    return x, y


@torch.no_grad()
def visit(lm: LanguageModel, tokens: Tensor, site: Site, layers: Sequence[int], visitor: Visitor) -> None:
    """Run the model over `tokens` `[B, T]` up to the last of `layers` (ascending), handing each activation on.

    A model streamed by layers calls `visitor` for all rows of one layer, some rows at a time, before the next layer.
    What it is called with belongs to the model: copy what is to be kept.
    """
    seen = dict.fromkeys(layers, 0)
    index = {layer: i for i, layer in enumerate(layers)}

    def record(layer: int, x: Tensor, y: Tensor) -> None:
        rows = slice(seen[layer], seen[layer] + len(x))
        seen[layer] = rows.stop
        visitor(index[layer], rows, x, y)
        if layer == layers[-1] and rows.stop == len(tokens):
            raise _AllCaptured

    with observe(lm, site, layers, record), suppress(_AllCaptured):
        lm.hidden(tokens)


def not_finite(lm: LanguageModel, site: Site, layer: int) -> NumericalError:
    """The error for NaN or infinity at a layer."""
    return NumericalError(
        f"activations of {lm.name} at site {site}, layer {layer}: expected finite values, found NaN or "
        "infinity; check model.dtype (float16 overflows) and the weights"
    )


@contextmanager
def observe(lm: LanguageModel, site: Site, layers: Sequence[int], record: Any) -> Iterator[None]:
    """Within: `record(layer, input, output)` is called for each layer of each forward pass of this thread."""
    handles = []
    thread = threading.get_ident()
    for layer in layers:

        def hook(_: nn.Module, inputs: tuple[Any, ...], output: Any, layer: int = layer) -> None:
            if threading.get_ident() != thread:
                return
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
