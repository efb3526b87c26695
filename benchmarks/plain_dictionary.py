"""What a trained dictionary is worth, read off its plain weights alone: the same code for every contender.

Shape legend: n tokens, N sequences, T positions, d = d_model, m dictionary size, k active features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from captured import Captured, SitePlace
from safetensors.torch import load_file
from torch import Tensor, nn

from hagd.activations.capture import site_module
from hagd.models.language_model import LanguageModel

_CHUNK = 2048
_SEQUENCES = 8


@dataclass(frozen=True)
class PlainDictionary:
    """`y = W_decᵀ f + b_dec + W_skip x` with `f = TopK(relu(W_enc x + b_enc))`, raw inputs to raw outputs."""

    W_enc: Tensor
    b_enc: Tensor
    W_dec: Tensor
    b_dec: Tensor
    W_skip: Tensor | None
    k: int

    @classmethod
    def load(cls, path: Path, k: int) -> PlainDictionary:
        """From a training's file of weights."""
        weights = load_file(path)
        return cls(
            **{name: weights[name] for name in ("W_enc", "b_enc", "W_dec", "b_dec")}, W_skip=weights.get("W_skip"), k=k
        )

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Values (zero where the pre-activation is negative) and indices `[n, k]` of the top k features."""
        values, index = torch.addmm(self.b_enc, x, self.W_enc.T).topk(self.k, dim=-1)
        return values.relu(), index

    def __call__(self, x: Tensor) -> Tensor:
        """The reconstruction `[n, d]`."""
        values, index = self.encode(x)
        y = nn.functional.embedding_bag(index, self.W_dec, per_sample_weights=values, mode="sum") + self.b_dec
        return y if self.W_skip is None else y + x @ self.W_skip.T


@dataclass(frozen=True)
class Explained:
    """On held-out tokens.

    Attributes:
        fvu: squared errors over squared deviations from the mean, both summed over tokens and dimensions.
        l0: mean number of features above zero a token.
        dead: share of features that are above zero on no token.
    """

    fvu: float
    l0: float
    dead: float


@torch.no_grad()
def explained(dictionary: PlainDictionary, tokens: Captured) -> Explained:
    """How well a dictionary explains `tokens`."""
    missed = sum(
        float((tokens.y[i : i + _CHUNK] - dictionary(tokens.x[i : i + _CHUNK])).square().sum(dtype=torch.float64))
        for i in range(0, len(tokens.x), _CHUNK)
    )
    spread = float((tokens.y - tokens.y.mean(0)).square().sum(dtype=torch.float64))
    counts = firing_counts(dictionary, tokens.x)
    return Explained(missed / spread, float(counts.sum()) / len(tokens.x), float((counts == 0).float().mean()))


@torch.no_grad()
def firing_counts(dictionary: PlainDictionary, x: Tensor) -> Tensor:
    """`[m]`: on how many tokens of `x` `[n, d]` each feature is above zero."""
    counts = torch.zeros(len(dictionary.W_enc), dtype=torch.long)
    for i in range(0, len(x), _CHUNK):
        values, index = dictionary.encode(x[i : i + _CHUNK])
        counts += index[values > 0].bincount(minlength=len(counts))
    return counts


@torch.no_grad()
def cross_entropy(lm: LanguageModel, tokens: Tensor, scored: int = 1) -> Tensor:
    """Cross entropies `[N, T − scored]` in nats of `tokens` `[N, T]` from `scored` on, given the tokens before."""
    parts = []
    for part in tokens.split(_SEQUENCES):
        logits = lm.unembedding(lm.hidden(part[:, :-1])[:, scored - 1 :]).float()
        parts.append(nn.functional.cross_entropy(logits.transpose(1, 2), part[:, scored:], reduction="none"))
    return torch.cat(parts)


@contextmanager
def spliced(
    lm: LanguageModel, place: SitePlace, limits: Captured, replace: Callable[[Tensor], Tensor]
) -> Iterator[None]:
    """Within: the activation at `place` is `replace(x)` of its input, but for massive tokens, which stay."""

    def hook(_: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
        y = output if isinstance(output, Tensor) else output[0]
        x = inputs[0] if place.site == "mlp" else y
        massive = (x.norm(dim=-1) > limits.x_limit) | (y.norm(dim=-1) > limits.y_limit)
        new = torch.where(massive[..., None], y, replace(x.flatten(0, 1)).view_as(y))
        return new if isinstance(output, Tensor) else (new, *output[1:])

    handle = site_module(lm, place.site, place.layer).register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
