"""Effect of each feature and head on the task metric, by the path integral over gates.

With gates g ∈ [0, 1] on `f = v + g (f − v)`, the integral of ∂metric/∂g along the straight path from 0 (everything
ablated) to 1 (nothing ablated) is integrated gradients (Sundararajan et al. 2017) over feature activations, and over
the outputs of heads where these are nodes. For a smooth encoder the attributions add up to `metric(M) − metric(M_∅)`;
TopK switches features in jumps that no gradient sees, so with it they do so only where the same features stay active
along the path. One step at g = 1 is gradient × activation: for a head, its output's gradient · its deviation.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hagd.attribution.records import Attribution
from hagd.config.stages import GraphConfig
from hagd.patching.objective import Objective


def attribute_nodes(
    objective: Objective, config: GraphConfig, progress: Callable[[int, int], None] | None = None
) -> Attribution:
    """Signed attributions of all features and heads of the patched model, averaged over the objective's prompts."""
    steps = config.ig_steps if config.attribution == "integrated_gradients" else 1
    points = [(i + 0.5) / steps for i in range(steps)] if config.attribution == "integrated_gradients" else [1.0]
    total = torch.zeros(objective.patched.gate_shape, device=objective.patched.lm.device)
    for done, point in enumerate(points):
        total += _mean_gradient(objective, config.metric, point)
        if progress is not None:
            progress(done + 1, steps)
    signed = total / steps
    return Attribution(signed, signed.abs(), objective.patched.frequency > 0)


def _mean_gradient(objective: Objective, metric: str, point: float) -> Tensor:
    n = len(objective)
    total = torch.zeros(objective.patched.gate_shape, device=objective.patched.lm.device)
    for start in range(0, n, objective.batch_size):
        index = torch.arange(start, min(start + objective.batch_size, n))
        gates = torch.full(objective.patched.gate_shape, point, device=total.device, requires_grad=True)
        objective.metric(metric, gates, index).sum().backward()
        assert gates.grad is not None
        total += gates.grad
    return total / n
