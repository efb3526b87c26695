"""Records of the transcoder stage.

Shape legend: d = d_model, m dictionary size, S slots.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hagd.activations.capture import Site


@dataclass(frozen=True)
class Transcoder:
    """One layer's dictionary: `f = TopK(ReLU(W_enc x + b_enc), k)`, `ŷ = f W_dec + b_dec` (arXiv 2601.12879, Eq. 1).

    Attributes:
        layer: the decomposed layer.
        k: active features a token, at most.
        W_enc: `[m, d]`. b_enc: `[m]`. W_dec: `[m, d]`. b_dec: `[d]`.
    """

    layer: int
    k: int
    W_enc: Tensor
    b_enc: Tensor
    W_dec: Tensor
    b_dec: Tensor

    def encode(self, x: Tensor) -> Tensor:
        """Features `[…, m]` of inputs `[…, d]`; at most k are non-zero, none is negative."""
        return topk_relu(x.to(self.W_enc.dtype) @ self.W_enc.T + self.b_enc, self.k)

    def decode(self, f: Tensor) -> Tensor:
        """Reconstructed output `[…, d]` of features `[…, m]`."""
        return f @ self.W_dec + self.b_dec


def topk_relu(pre: Tensor, k: int) -> Tensor:
    """Keep the k largest of the last dimension where positive, zero elsewhere."""
    values, index = pre.topk(k, dim=-1)
    return torch.zeros_like(pre).scatter(-1, index, values.relu())


@dataclass(frozen=True)
class LayerQuality:
    """How well one layer is decomposed, on prompts that did not train it.

    Attributes:
        layer: the layer.
        fvu: unexplained share of the variance of the output.
        l0: mean number of active features a token.
        dead: share of features that never fire on the training tokens of the measurement.
        fvu_by_slot: the same by position slot, in the order of `TaskData.slot_names`.
        prediction_r2: explained share of the next layer's features by the prediction head; NaN for the last.
    """

    layer: int
    fvu: float
    l0: float
    dead: float
    fvu_by_slot: tuple[float, ...]
    prediction_r2: float


@dataclass(frozen=True)
class TranscoderSet:
    """The dictionaries of a model.

    Attributes:
        model: name of the model that they were trained for.
        site: the decomposed site.
        transcoders: one a layer, ascending.
        quality: one a layer, same order.
    """

    model: str
    site: Site
    transcoders: tuple[Transcoder, ...]
    quality: tuple[LayerQuality, ...]

    @property
    def layers(self) -> tuple[int, ...]:
        """The decomposed layers."""
        return tuple(t.layer for t in self.transcoders)

    @property
    def m(self) -> int:
        """Dictionary size."""
        return int(self.transcoders[0].W_enc.shape[0])
