"""What of a layer is left when attention patterns and norm scales are constants: matrices and biases.

`hagd.models.freezing` lets autograd find the same maps; these are for code that multiplies them itself.

Shape legend: T positions, d = d_model, H heads, K heads of keys and values, e width of a head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hagd.errors import ModelError
from hagd.models.freezing import rms_gain
from hagd.models.language_model import LanguageModel


@dataclass(frozen=True)
class LinearNorm:
    """A norm whose scale is a constant: `y = scale · (x − mean) · gain + bias`, without the mean for RMSNorm.

    Attributes:
        gain: `[d]`. bias: `[d]`.
        centred: whether the mean over the d entries is taken off.
        eps: added to the mean square.
    """

    gain: Tensor
    bias: Tensor
    centred: bool
    eps: float

    def scale(self, x: Tensor) -> Tensor:
        """The constant of inputs `[T, d]`: `[T]`."""
        centred = x - x.mean(-1, keepdim=True) if self.centred else x
        return torch.rsqrt(centred.pow(2).mean(-1) + self.eps)

    def transposed(self, g: Tensor) -> Tensor:
        """The gradient at the input for one `[…, d]` at the output, but for the scale of its position."""
        g = g * self.gain
        return g - g.mean(-1, keepdim=True) if self.centred else g

    def apply(self, x: Tensor, scale: Tensor) -> Tensor:
        """The output `[…, T, d]` for inputs `[…, T, d]` and scales `[T]`, without the bias."""
        centred = x - x.mean(-1, keepdim=True) if self.centred else x
        return centred * scale[:, None] * self.gain


@dataclass(frozen=True)
class LinearAttention:
    """The projections of values and outputs: with a constant pattern, all of attention that is left.

    Attributes:
        W_V: `[K, d, e]`. b_V: `[K, e]`. W_O: `[H, e, d]`. b_O: `[d]`.
    """

    W_V: Tensor
    b_V: Tensor
    W_O: Tensor
    b_O: Tensor


def linear_norm(module: nn.Module, dtype: torch.dtype) -> LinearNorm:
    """The linear part of a LayerNorm or of any family's RMSNorm."""
    weight: Any = module.weight
    if isinstance(module, nn.LayerNorm):
        bias = torch.zeros_like(weight) if module.bias is None else module.bias
        return LinearNorm(weight.detach().to(dtype), bias.detach().to(dtype), True, module.eps)
    eps = float(getattr(module, "variance_epsilon", getattr(module, "eps", 1e-6)))
    gain = rms_gain(module, weight.shape[-1], eps).detach().to(dtype)
    return LinearNorm(gain, torch.zeros_like(gain), False, eps)


def linear_attention_shape(lm: LanguageModel) -> tuple[int, int, int]:
    """H, K and e; weights need no values."""
    config: Any = lm.model.config
    heads = int(config.num_attention_heads)
    kv_heads = int(getattr(config, "num_key_value_heads", None) or heads)
    return heads, kv_heads, int(getattr(config, "head_dim", None) or lm.d_model // heads)


def linear_attention(lm: LanguageModel, layer: int, dtype: torch.dtype) -> LinearAttention:
    """The value and output projections of a layer."""
    output, output_bias = _matrix(lm.attention_output(layer), dtype)
    heads, _, e = linear_attention_shape(lm)
    value, value_bias = _projection(lm, layer, 2, dtype)
    W_O = output.unflatten(0, (heads, e)).contiguous()
    return LinearAttention(*(each.to(lm.device) for each in (value, value_bias, W_O, output_bias)))


@dataclass(frozen=True)
class LinearScores:
    """The projections of queries and keys, whose products are attention scores.

    Attributes:
        W_Q: `[H, d, e]`. b_Q: `[H, e]`. W_K: `[K, d, e]`. b_K: `[K, e]`.
        scaling: factor of the products.
    """

    W_Q: Tensor
    b_Q: Tensor
    W_K: Tensor
    b_K: Tensor
    scaling: float


def linear_scores(lm: LanguageModel, layer: int, dtype: torch.dtype) -> LinearScores:
    """The query and key projections of a layer.

    Raises:
        ModelError: queries and keys have norms of their own, so they are not linear.
    """
    attention: Any = lm.layers[layer].get_submodule(lm.adapter.attention)
    if getattr(attention, "q_norm", None) is not None:
        raise ModelError(
            f"graph.score: expected queries and keys that are linear, found norms of their own in {lm.name}; set "
            "graph.score=null"
        )
    query, query_bias = _projection(lm, layer, 0, dtype)
    key, key_bias = _projection(lm, layer, 1, dtype)
    scaling = float(getattr(attention, "scaling", None) or query.shape[-1] ** -0.5)
    query, query_bias, key, key_bias = (each.to(lm.device) for each in (query, query_bias, key, key_bias))
    return LinearScores(query, query_bias, key, key_bias, scaling)


def rotation(lm: LanguageModel, position: int, dtype: torch.dtype) -> Tensor:
    """What a position does to a head's queries and keys, `[e, e]` (row vectors times it); one where nothing rotates."""
    _, _, e = linear_attention_shape(lm)
    one = torch.eye(e, dtype=dtype, device=lm.device)
    if lm.adapter.rotary is None:
        return one
    angles: Any = lm.model.get_submodule(lm.adapter.rotary)
    cos, sin = (x[0, 0].to(one) for x in angles(one[None], torch.tensor([[position]], device=lm.device)))
    turned, rest = one[:, : len(cos)], one[:, len(cos) :]
    half = len(cos) // 2
    across = torch.cat([-turned[:, half:], turned[:, :half]], dim=1)
    return torch.cat([turned * cos + across * sin, rest], dim=1)


def _projection(lm: LanguageModel, layer: int, which: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Queries (0), keys (1) or values (2): weight `[heads, d, e]` and bias `[heads, e]`."""
    attention = lm.layers[layer].get_submodule(lm.adapter.attention)
    path = (lm.adapter.query, lm.adapter.key, lm.adapter.value)[which]
    weight, bias = _matrix(attention.get_submodule(path), dtype)
    heads, _, e = linear_attention_shape(lm)
    match lm.adapter.fused:
        case "thirds":
            weight, bias = weight.chunk(3, dim=1)[which], bias.chunk(3)[which]
        case "heads":
            weight = weight.unflatten(1, (heads, 3, e))[:, :, which].flatten(1)
            bias = bias.unflatten(0, (heads, 3, e))[:, which].flatten()
    return weight.unflatten(1, (-1, e)).transpose(0, 1).contiguous(), bias.unflatten(0, (-1, e)).contiguous()


def _matrix(module: nn.Module, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Weight `[in, out]` and bias `[out]` of a linear map; GPT-2's are stored that way round, others transposed."""
    weight: Any = module.weight
    weight = weight.detach().to(dtype)
    weight = weight.T if isinstance(module, nn.Linear) else weight
    bias: Any = getattr(module, "bias", None)
    return weight, weight.new_zeros(weight.shape[1]) if bias is None else bias.detach().to(dtype)
