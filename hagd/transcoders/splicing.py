"""A model that runs on reconstructions: the site's output replaced by what the dictionaries make of its input.

Shape legend: B sequences, T positions, d = d_model, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hagd.activations.capture import site_module
from hagd.models.language_model import LanguageModel
from hagd.transcoders.records import TranscoderSet

_POSITIONS = 1024
"""Positions whose logits are held at a time."""


@torch.no_grad()
def spliced_divergence(
    lm: LanguageModel, found: TranscoderSet, spliced: Sequence[int], tokens: Tensor, keep: Tensor, means: Tensor
) -> tuple[float, float]:
    """Mean KL divergence in nats from the model's next-token distribution.

    Args:
        lm: the model; everything else is on its device.
        found: its dictionaries.
        spliced: places in `found.transcoders` of the layers that are replaced.
        tokens: `[B, T]`.
        keep: boolean `[B, T]`; replaced, and measured, at these positions.
        means: mean outputs `[L, d]` of the decomposed layers.

    Returns:
        With reconstructions in place of the outputs, and with the outputs' means: what no dictionary would give.
    """
    at_once = max(1, _POSITIONS // tokens.shape[1])
    totals, count = [0.0, 0.0], 0
    for start in range(0, len(tokens), at_once):
        ids, kept = tokens[start : start + at_once], keep[start : start + at_once]
        clean = _log_probabilities(lm, ids)[kept]
        for i, ablated in enumerate((False, True)):
            with _replaced(lm, found, spliced, kept, means if ablated else None):
                other = _log_probabilities(lm, ids)[kept]
            totals[i] += float((clean.exp() * (clean - other)).sum())
        count += len(clean)
    return totals[0] / max(count, 1), totals[1] / max(count, 1)


def _log_probabilities(lm: LanguageModel, tokens: Tensor) -> Tensor:
    positions = torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape)
    return lm.logits_at(tokens, positions).float().log_softmax(-1)


@contextmanager
def _replaced(
    lm: LanguageModel, found: TranscoderSet, spliced: Sequence[int], keep: Tensor, means: Tensor | None
) -> Iterator[None]:
    features: list[Tensor] = []
    handles = []
    for index, transcoder in enumerate(found.transcoders):

        def hook(_: nn.Module, inputs: tuple[Any, ...], output: Any, index: int = index) -> Any:
            y = output if isinstance(output, Tensor) else output[0]
            x = inputs[0] if found.site == "mlp" else y
            features[index:] = [found.transcoders[index].encode(x)]
            if index not in spliced:
                return output
            new = found.reconstruct(index, features, x) if means is None else means[index].expand_as(y)
            replaced = torch.where(keep[..., None], new.to(y.dtype), y)
            return replaced if isinstance(output, Tensor) else (replaced, *output[1:])

        handles.append(site_module(lm, found.site, transcoder.layer).register_forward_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
