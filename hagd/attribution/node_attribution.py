"""Effect of each feature and head on the task metric, by the path integral over gates.

With gates g ∈ [0, 1] on `f = v + g (f − v)`, the integral of ∂metric/∂g along the straight path from 0 (everything
ablated) to 1 (nothing ablated) is integrated gradients (Sundararajan et al. 2017) over feature activations, and over
the outputs of heads where these are nodes. For a smooth encoder the attributions add up to `metric(M) − metric(M_∅)`;
TopK switches features in jumps that no gradient sees, so with it they do so only where the same features stay active
along the path. One step at g = 1 is gradient × activation: for a head, its output's gradient · its deviation.

`integrated_gradients_inputs` takes the gradient at the node along the straight path of token embeddings from the
counterfactual to the prompt instead, times the node's deviation on the prompt (EAP-IG of Hanna et al. 2024, on nodes).
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
    steps = 1 if config.attribution == "gradient_activation" else config.ig_steps
    points = [1.0] if config.attribution == "gradient_activation" else [(i + 0.5) / steps for i in range(steps)]
    total = torch.zeros(objective.patched.gate_shape, device=objective.patched.lm.device)
    for done, point in enumerate(points):
        total += _mean_gradient(objective, config, point)
        if progress is not None:
            progress(done + 1, steps)
    signed = total / steps
    return Attribution(signed, signed.abs(), objective.patched.frequency > 0)


def _mean_gradient(objective: Objective, config: GraphConfig, point: float) -> Tensor:
    n, inputs = len(objective), config.attribution == "integrated_gradients_inputs"
    total = torch.zeros(objective.patched.gate_shape, device=objective.patched.lm.device)
    for start in range(0, n, objective.batch_size):
        index = torch.arange(start, min(start + objective.batch_size, n))
        gates = torch.full_like(total, 1.0 if inputs else point, requires_grad=True)
        measured = (
            objective.metric_between(config.metric, gates, index, point)
            if inputs
            else objective.metric(config.metric, gates, index)
        )
        measured.sum().backward()
        assert gates.grad is not None
        total += gates.grad
    return total / n
