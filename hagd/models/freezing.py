"""The frozen linear model: attention patterns and norm scales held at their clean values.

With both frozen and every MLP replaced by constants and features, the residual stream is linear in what is
written to it, so gradients are exact *direct* effects (`docs/architecture.md`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hagd.models.language_model import LanguageModel

_FROZEN = "hagd_frozen"


@contextmanager
def frozen_linear(lm: LanguageModel) -> Iterator[None]:
    """Within: gradients flow through values and outputs of attention only, and norms are linear maps.

    Forward values do not change; only the backward pass does.
    """
    with ExitStack() as stack:
        stack.enter_context(_frozen_attention(lm))
        for norm in lm.norms():
            stack.callback(norm.register_forward_hook(_freeze_norm).remove)
        yield


@contextmanager
def _frozen_attention(lm: LanguageModel) -> Iterator[None]:
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    before = lm.model.config._attn_implementation
    ALL_ATTENTION_FUNCTIONS.register(_FROZEN, _attention_with_constant_pattern)
    ALL_MASK_ATTENTION_FUNCTIONS.register(_FROZEN, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])  # else no mask is handed on
    lm.model.config._attn_implementation = _FROZEN
    try:
        yield
    finally:
        lm.model.config._attn_implementation = before


def _attention_with_constant_pattern(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """Softmax attention whose pattern is a constant. Heads `[B, H, T, d_head]`; grouped keys are repeated.

    The mask is boolean or added to the scores; None: causal and nothing else.
    """
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    wide = torch.promote_types(query.dtype, torch.float32)
    scores = query.detach().to(wide) @ key.detach().to(wide).transpose(-1, -2) * scale
    if attention_mask is None:
        n = scores.shape[-1]
        attention_mask = torch.ones(n, n, dtype=torch.bool, device=scores.device).tril()
    if attention_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attention_mask, float("-inf"))
    else:
        scores = scores + attention_mask
    pattern = scores.softmax(-1).to(value.dtype)
    return (pattern @ value).transpose(1, 2).contiguous(), pattern


def _freeze_norm(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    """The same output as a linear function of the input: the scale is a constant. Rounded once."""
    x = inputs[0].to(torch.promote_types(output.dtype, torch.float32))
    if isinstance(module, nn.LayerNorm):
        centred = x - x.mean(-1, keepdim=True)
        scale = torch.rsqrt(centred.detach().pow(2).mean(-1, keepdim=True) + module.eps)
        return (centred * scale * module.weight + (module.bias if module.bias is not None else 0.0)).to(output.dtype)
    # RMSNorm of every family is x · scale(x) · gain; the gain's parametrisation (w or 1 + w) is read off a
    # vector of ones, whose own scale is known.
    eps = float(getattr(module, "variance_epsilon", getattr(module, "eps", 1e-6)))
    gain = rms_gain(module, x.shape[-1], eps)
    scale = torch.rsqrt(x.detach().pow(2).mean(-1, keepdim=True) + eps)
    return (x * scale * gain).to(output.dtype)


def rms_gain(module: nn.Module, width: int, eps: float) -> Tensor:
    """The factor `[width]` that an RMSNorm multiplies normalised inputs by, however it stores it."""
    weight: Any = module.weight
    ones = torch.ones(width, dtype=torch.promote_types(weight.dtype, torch.float32), device=weight.device)
    return module.forward(ones) * (1.0 + eps) ** 0.5
