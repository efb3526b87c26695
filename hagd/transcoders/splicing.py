"""A model that runs on reconstructions: the site's output replaced by what the dictionaries make of its input.

Shape legend: B sequences, T positions, K accepted tokens, n kept positions, d = d_model, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hagd.activations.capture import site_module
from hagd.models.language_model import LanguageModel
from hagd.tasks.records import PADDING
from hagd.transcoders.records import TranscoderSet

_POSITIONS = 1024
"""Positions whose logits are held at a time."""


class Spliced(NamedTuple):
    """What a model loses when reconstructions stand in for the outputs of layers, means in nats a token.

    Attributes:
        kl: divergence from the model's next-token distribution, over all replaced positions.
        loss: cross entropy of the next token (`−log P(any accepted)`), over the replaced positions that have a target.
        clean_loss: of the model as it is. ablated_loss: with the outputs' means: what no dictionary would give.
    """

    kl: float
    loss: float
    clean_loss: float
    ablated_loss: float

    @property
    def recovered(self) -> float:
        """`(ablated − spliced) / (ablated − clean)` loss; NaN where ablation does no harm."""
        harm = self.ablated_loss - self.clean_loss
        return (self.ablated_loss - self.loss) / harm if harm > 0 else float("nan")


@torch.no_grad()
def splice(
    lm: LanguageModel,
    found: TranscoderSet,
    spliced: Sequence[int],
    tokens: Tensor,
    targets: Tensor,
    keep: Tensor,
    means: Tensor,
) -> Spliced:
    """The model with some layers replaced by their dictionaries, against itself.

    Args:
        lm: the model; everything else is on its device.
        found: its dictionaries.
        spliced: places in `found.transcoders` of the layers that are replaced.
        tokens: `[B, T]`.
        targets: `[B, T, K]`, tokens any of which is right as the next one; PADDING if unused.
        keep: boolean `[B, T]`; replaced, and measured, at these positions.
        means: mean outputs `[L, d]` of the decomposed layers.
    """
    at_once = max(1, _POSITIONS // tokens.shape[1])
    divergence, losses, count, n_targets = 0.0, [0.0, 0.0, 0.0], 0, 0
    for start in range(0, len(tokens), at_once):
        rows = slice(start, start + at_once)
        ids, kept, target = tokens[rows], keep[rows], targets[rows][keep[rows]]
        clean = _log_probabilities(lm, ids)[kept]
        with _replaced(lm, found, spliced, kept, None):
            reconstructed = _log_probabilities(lm, ids)[kept]
        with _replaced(lm, found, spliced, kept, means):
            ablated = _log_probabilities(lm, ids)[kept]
        divergence += float((clean.exp() * (clean - reconstructed)).sum())
        for i, log_p in enumerate((reconstructed, clean, ablated)):
            losses[i] -= float(_log_accepted(log_p, target).sum())
        count += len(clean)
        n_targets += int((target != PADDING).any(-1).sum())
    loss, clean_loss, ablated_loss = (total / n_targets if n_targets else float("nan") for total in losses)
    return Spliced(divergence / max(count, 1), loss, clean_loss, ablated_loss)


def _log_probabilities(lm: LanguageModel, tokens: Tensor) -> Tensor:
    positions = torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape)
    return lm.logits_at(tokens, positions).float().log_softmax(-1)


def _log_accepted(log_p: Tensor, target: Tensor) -> Tensor:
    """Log-probabilities of the targets `[n, K]`, of those rows of `log_p` `[n, V]` that have one."""
    rows = (target != PADDING).any(-1)
    log_p, target = log_p[rows], target[rows]
    return log_p.gather(1, target.clamp(min=0)).masked_fill(target == PADDING, -torch.inf).logsumexp(1)


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
