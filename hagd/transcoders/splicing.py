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
    splices: Sequence[Sequence[int]],
    tokens: Tensor,
    targets: Tensor,
    keep: Tensor,
    means: Tensor,
) -> list[Spliced]:
    """The model with some layers replaced by their dictionaries, against itself, for each choice of layers.

    A batch of sequences goes through the model as it is once, and twice for each choice: with reconstructions and with
    means.

    Args:
        lm: the model; everything else is on its device.
        found: its dictionaries.
        splices: places in `found.transcoders` of the layers that are replaced together.
        tokens: `[B, T]`.
        targets: `[B, T, K]`, tokens any of which is right as the next one; PADDING if unused.
        keep: boolean `[B, T]`; replaced, and measured, at these positions.
        means: mean outputs `[L, d]` of the decomposed layers.
    """
    at_once = max(1, _POSITIONS // tokens.shape[1])
    divergences, losses, ablated_losses = ([0.0] * len(splices) for _ in range(3))
    clean_loss, count, n_targets = 0.0, 0, 0
    for start in range(0, len(tokens), at_once):
        rows = slice(start, start + at_once)
        ids, kept, target = tokens[rows], keep[rows], targets[rows][keep[rows]]
        clean = _log_probabilities(lm, ids)[kept]
        clean_loss -= float(_log_accepted(clean, target).sum())
        count += len(clean)
        n_targets += int((target != PADDING).any(-1).sum())
        for i, spliced in enumerate(splices):
            with _replaced(lm, found, spliced, kept, None):
                log_p = _log_probabilities(lm, ids)[kept]
            divergences[i] += float((clean.exp() * (clean - log_p)).sum())
            losses[i] -= float(_log_accepted(log_p, target).sum())
            with _replaced(lm, found, spliced, kept, means):
                log_p = _log_probabilities(lm, ids)[kept]
            ablated_losses[i] -= float(_log_accepted(log_p, target).sum())

    def mean(total: float) -> float:
        return total / n_targets if n_targets else float("nan")

    return [
        Spliced(divergence / max(count, 1), mean(loss), mean(clean_loss), mean(ablated_loss))
        for divergence, loss, ablated_loss in zip(divergences, losses, ablated_losses, strict=True)
    ]


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
    """Within: the outputs at the places `spliced` are their reconstructions, or `means`."""
    features: dict[int, Tensor] = {}
    handles = []
    sources = [i for i in range(max(spliced)) if found.transcoders[i].W_later] if means is None else []
    for index in sorted({*spliced, *sources}):

        def hook(_: nn.Module, inputs: tuple[Any, ...], output: Any, index: int = index) -> Any:
            y = output if isinstance(output, Tensor) else output[0]
            if means is None:
                x = (inputs[0] if found.site == "mlp" else y).to(lm.device)
                f = found.transcoders[index].encode(x)
                if index in sources:
                    features[index] = f
                if index not in spliced:
                    return output
                new = found.reconstruct(index, {**features, index: f}, x)
            else:
                new = means[index].expand_as(y)
            replaced = torch.where(keep[..., None].to(y.device), new.to(y.device, y.dtype), y)
            return replaced if isinstance(output, Tensor) else (replaced, *output[1:])

        handles.append(site_module(lm, found.site, found.transcoders[index].layer).register_forward_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
