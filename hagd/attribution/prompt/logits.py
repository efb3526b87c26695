"""The logits that a prompt's graph explains: what they read along, and their weights.

Shape legend: k logit nodes, V vocabulary, d = d_model, T positions, H heads, e width of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hagd.attribution.heads import gradients_at_heads
from hagd.attribution.prompt.trace import Trace
from hagd.models.language_model import LanguageModel

DIFFERENCE = -1
"""Stands for a vocabulary index in the node of a difference of two logits."""


@dataclass(frozen=True)
class LogitTargets:
    """Logit nodes at the last position.

    Attributes:
        tokens: int64 `[k]`, vocabulary indices, or DIFFERENCE.
        vectors: `[k, d]`, combinations of rows of the unembedding. bias: `[k]`, the same of its bias.
        weights: `[k]`, shares in what is explained: probabilities of the tokens, or 1 for a difference.
        probabilities: `[k]`, of the tokens; of a difference: of its first token.
    """

    tokens: Tensor
    vectors: Tensor
    bias: Tensor
    weights: Tensor
    probabilities: Tensor

    def __len__(self) -> int:
        return len(self.tokens)


def likely(lm: LanguageModel, run: Trace, most: int, probability: float) -> LogitTargets:
    """The most likely tokens: as few as reach `probability` together, at most `most`."""
    share, tokens = run.logits.softmax(-1).topk(min(most, len(run.logits)))
    needed = int(torch.searchsorted(share.cumsum(0), probability)) + 1
    return given(lm, run, tokens[:needed].tolist())


def given(lm: LanguageModel, run: Trace, tokens: Sequence[int]) -> LogitTargets:
    """Some tokens' logits, each minus the mean over the vocabulary, which changes no probability."""
    weight, bias = _unembedding(lm, run)
    chosen = torch.tensor(list(tokens), device=weight.device)
    share = run.logits.softmax(-1)[chosen]
    mean = weight.mean(0, dtype=torch.promote_types(weight.dtype, run.dtype))
    vectors = weight[chosen].to(run.dtype) - mean.to(run.dtype)
    return LogitTargets(chosen, vectors, bias[chosen] - bias.mean(), share, share)


def difference(lm: LanguageModel, run: Trace, token: int, other: int) -> LogitTargets:
    """One node: the logit of `token` minus that of `other`."""
    weight, bias = _unembedding(lm, run)
    return LogitTargets(
        torch.tensor([DIFFERENCE], device=weight.device),
        (weight[token] - weight[other]).to(run.dtype)[None],
        (bias[token] - bias[other])[None],
        torch.ones(1, dtype=run.dtype, device=weight.device),
        run.logits.softmax(-1)[token][None],
    )


def head_directions(lm: LanguageModel, run: Trace, logits: LogitTargets) -> dict[int, Tensor]:
    """Layer → `u` `[T, H, e]`, what heads that are nodes are read along; empty without them.

    The gradient of the weighted sum of `logits` at the heads' outputs, in the clean run with nothing frozen.
    """
    along = logits.weights @ logits.vectors

    def metric() -> Tensor:
        return lm.hidden(run.tokens[None])[0, -1].to(along.device, run.dtype) @ along

    found = gradients_at_heads(lm, tuple(run.heads), metric)
    return {layer: u[0].to(run.dtype) for layer, u in found.items()}


def _unembedding(lm: LanguageModel, run: Trace) -> tuple[Tensor, Tensor]:
    module: Any = lm.unembedding
    weight = module.weight.detach()
    bias = weight.new_zeros(len(weight)) if module.bias is None else module.bias.detach()
    return weight.to(run.tokens.device), bias.to(run.tokens.device, run.dtype)
