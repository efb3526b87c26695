"""One training step with dense products in double precision, which a sparse one is compared with."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hagd.transcoders.objective import StackedTranscoders


def dense_step(stacked: StackedTranscoders, wanted: Sequence[str], x: Tensor, y: Tensor) -> list[Tensor]:
    """Loss and gradients of `wanted` parameters: TopK, unexplained variance and L1 term, all with dense products."""
    config = stacked.config
    x, y = x.double(), y.double()
    weights = {name: dict(stacked.dictionaries[0].named_parameters())[name].detach().double() for name in wanted}
    weights = {name: weight.requires_grad_() for name, weight in weights.items()}
    pre = x @ weights["W_enc"].T + weights["b_enc"]
    top = pre.topk(config.k)
    f = torch.zeros_like(pre).scatter(1, top.indices, top.values.relu())
    fvu = (y - f @ weights["W_dec"] - weights["b_dec"]).square().sum() / (len(x) * float(stacked.power[0]))
    l1 = (f * weights["W_dec"].norm(dim=1)).sum() / (len(x) * (config.k * x.shape[1]) ** 0.5)
    loss = fvu + config.lambda_sparsity * l1
    return [loss.detach(), *torch.autograd.grad(loss, list(weights.values()))]
