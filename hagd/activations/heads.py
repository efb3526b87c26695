"""Outputs of attention heads, read and replaced by hooks.

An attention block adds `Σ_h z_h W_O[h] + b_O` to the residual stream: the vector `z_h` that enters the output
projection is all that head h writes.

Shape legend: K layers asked for, B sequences, T positions, H heads, e width of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hagd.models.language_model import LanguageModel
from hagd.models.linear_parts import linear_attention_shape

Rewrite = Callable[[int, Tensor], Tensor]
"""(index of a layer among those asked for, its z `[B, T, H, e]`) → the z that is written instead; on `lm.device`."""


@contextmanager
def rewritten_heads(lm: LanguageModel, layers: Sequence[int], rewrite: Rewrite) -> Iterator[None]:
    """Within: the heads of `layers` write what `rewrite` makes of their outputs."""
    n_heads, _, _ = linear_attention_shape(lm)
    with ExitStack() as stack:
        for index, layer in enumerate(layers):

            def hook(_: nn.Module, inputs: tuple[Any, ...], index: int = index) -> tuple[Any, ...]:
                z = inputs[0].unflatten(-1, (n_heads, -1))
                return rewrite(index, z.to(lm.device)).to(z.device, z.dtype).flatten(-2), *inputs[1:]

            stack.callback(lm.attention_output(layer).register_forward_pre_hook(hook).remove)
        yield


@torch.no_grad()
def head_outputs(lm: LanguageModel, tokens: Tensor, layers: Sequence[int]) -> Tensor:
    """The outputs z of all heads of `layers` for `tokens` `[B, T]`: `[K, B, T, H, e]`, at least in float32."""
    found: list[Tensor] = []

    def record(_: int, z: Tensor) -> Tensor:
        found.append(z.to(torch.promote_types(z.dtype, torch.float32)))
        return z

    with rewritten_heads(lm, layers, record):
        lm.hidden(tokens)
    return torch.stack(found)
