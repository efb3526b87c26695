"""Records of the transcoder stage.

Shape legend: d = d_model, m dictionary size, S slots.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hagd.activations.capture import Site
from hagd.models.records import ModelSample
from hagd.transcoders.sparse.selection import top_places

DENSITY_EDGES = tuple(-5 + 0.5 * i for i in range(11))
"""Edges of the histogram of log10 firing frequencies."""


@dataclass(frozen=True)
class Transcoder:
    """One layer's dictionary: `f = activation(W_enc x + b_enc)`, `ŷ = f W_dec + b_dec (+ x W_skip)`.

    arXiv 2601.12879, Eq. 1. The activation keeps the k largest pre-activations where positive (TopK), or every one
    above its feature's threshold (JumpReLU; BatchTopK with one threshold for all; ReLU with 0).

    Attributes:
        layer: the decomposed layer.
        k: active features a token, at most; None where `threshold` decides.
        W_enc: `[m, d]`. b_enc: `[m]`. W_dec: `[m, d]`. b_dec: `[d]`.
        threshold: `[m]`, or None for TopK.
        W_skip: `[d, d]`, the linear path beside the features, or None.
        W_later: decoders `[m, d]` into each later decomposed layer in turn; empty unless cross-layer.
    """

    layer: int
    k: int | None
    W_enc: Tensor
    b_enc: Tensor
    W_dec: Tensor
    b_dec: Tensor
    threshold: Tensor | None = None
    W_skip: Tensor | None = None
    W_later: tuple[Tensor, ...] = ()

    def to(self, device: torch.device) -> Transcoder:
        """The same on another device."""

        def moved(value: Tensor | None) -> Tensor | None:
            return None if value is None else value.to(device)

        return replace(
            self,
            W_enc=self.W_enc.to(device),
            b_enc=self.b_enc.to(device),
            W_dec=self.W_dec.to(device),
            b_dec=self.b_dec.to(device),
            threshold=moved(self.threshold),
            W_skip=moved(self.W_skip),
            W_later=tuple(decoder.to(device) for decoder in self.W_later),
        )

    def preactivations(self, x: Tensor) -> Tensor:
        """`[…, m]` of inputs `[…, d]`."""
        return x.to(self.W_enc.dtype) @ self.W_enc.T + self.b_enc

    def encode(self, x: Tensor) -> Tensor:
        """Features `[…, m]` of inputs `[…, d]`; none is negative."""
        pre = self.preactivations(x)
        if self.k is not None:
            return topk_relu(pre, self.k)
        assert self.threshold is not None
        return pre * (pre > self.threshold)

    def decode(self, f: Tensor) -> Tensor:
        """What features `[…, m]` and the bias write to the own layer: `[…, d]`."""
        return f @ self.W_dec + self.b_dec

    def skip(self, x: Tensor) -> Tensor:
        """What the linear path adds for inputs `[…, d]`; zeros without one."""
        x = x.to(self.W_dec.dtype)
        return torch.zeros_like(x) if self.W_skip is None else x @ self.W_skip


def topk_relu(pre: Tensor, k: int) -> Tensor:
    """Keep the k largest of the last dimension where positive, zero elsewhere."""
    index = top_places(pre, k)
    return torch.zeros_like(pre).scatter(-1, index, pre.gather(-1, index).relu())


@dataclass(frozen=True)
class LayerQuality:
    """How well one layer is decomposed, on tokens that did not train it; tokens of massive norm are left out.

    Attributes:
        layer: the layer.
        fvu: unexplained share of the variance of the output.
        l0: mean number of active features a token.
        dead: share of features that never fire.
        dense: share of features that fire on more than a tenth of the tokens.
        near_duplicates: share of features whose decoder row has a cosine above 0.9 with another one's.
        density: share of features by log10 firing frequency, in half decades from 1e-5 to 1.
        kl: divergence (nats a token) of the model's next-token distribution when this layer's output is replaced.
        loss_recovered: share of the next-token loss that the output at its mean costs and the dictionary brings back.
        fvu_by_slot: `fvu` by position slot, in the order of `TaskData.slot_names`; NaN where nothing is measured.
        prediction_r2: explained share of the next layer's features by the prediction head; NaN without one.
    """

    layer: int
    fvu: float
    l0: float
    dead: float
    dense: float
    near_duplicates: float
    density: tuple[float, ...]
    kl: float
    loss_recovered: float
    fvu_by_slot: tuple[float, ...]
    prediction_r2: float


@dataclass(frozen=True)
class TranscoderSet:
    """The dictionaries of a model.

    Attributes:
        model: name of the model that they were trained for.
        site: the decomposed site.
        transcoders: one a layer, ascending.
        quality: one a layer, same order; empty until measured.
        kl, loss_recovered: as for one layer, with all layers replaced at once.
        tokens_per_second, waiting: of their training, since it was last resumed: wall-clock rate, and the share of that
            time spent waiting for activations; NaN for dictionaries from elsewhere.
        trained_on: weights of that model; None where they were not recorded (other layouts, older results).
    """

    model: str
    site: Site
    transcoders: tuple[Transcoder, ...]
    quality: tuple[LayerQuality, ...] = ()
    kl: float = float("nan")
    loss_recovered: float = float("nan")
    tokens_per_second: float = float("nan")
    waiting: float = float("nan")
    trained_on: ModelSample | None = None

    @property
    def layers(self) -> tuple[int, ...]:
        """The decomposed layers."""
        return tuple(t.layer for t in self.transcoders)

    @property
    def m(self) -> int:
        """Dictionary size."""
        return int(self.transcoders[0].W_enc.shape[0])

    def to(self, device: torch.device) -> TranscoderSet:
        """The same on another device."""
        return replace(self, transcoders=tuple(t.to(device) for t in self.transcoders))

    def reconstruct(self, index: int, features: Sequence[Tensor] | Mapping[int, Tensor], x: Tensor) -> Tensor:
        """Output `[…, d]` of the layer at `index`.

        Args:
            index: place in `transcoders`.
            features: `[…, m]` by place, of this layer and of the earlier ones that have decoders into it.
            x: the layer's input `[…, d]`, which only a skip reads.
        """
        own = self.transcoders[index]
        out = own.decode(features[index])
        if own.W_skip is not None:
            out = out + own.skip(x)
        for source in range(index):
            later = self.transcoders[source].W_later
            if later:
                out = out + features[source] @ later[index - source - 1]
        return out
