"""What each node of a graph does on each prompt.

Shape legend: N prompts, n_features feature nodes of the graph, L, S, m as in `hagd.patching.patched_model`.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from hagd.attribution.records import AttributionGraph
from hagd.patching.objective import Objective

_GATES_AT_ONCE = 1 << 24


@torch.no_grad()
def activations(objective: Objective, graph: AttributionGraph) -> np.ndarray:
    """Activation of every feature node, summed over the positions of its slot, on every prompt: `[n_features, N]`."""
    patched, n = objective.patched, graph.n_features
    nodes = graph.nodes
    layer = torch.as_tensor(np.searchsorted(patched.transcoders.layers, nodes.layer[:n]))
    slot, feature = torch.as_tensor(nodes.slot[:n]), torch.as_tensor(nodes.feature[:n])
    _, n_slots, m = patched.gate_shape
    found = []
    for start in range(0, len(objective), objective.batch_size):
        part = objective.prompts[start : start + objective.batch_size]
        f = patched.features(part.tokens.flatten(0, 1))[0]  # [L, B, T, m]
        slots = part.slots.flatten(0, 1)
        by_slot = f.new_zeros(len(f), len(part), n_slots + 1, m)
        index = torch.where(slots < 0, n_slots, slots).reshape(len(part), -1)  # [N, C·T]
        by_slot.index_put_(
            (
                torch.arange(len(f), device=f.device)[:, None, None],
                torch.arange(len(part), device=f.device)[None, :, None],
                index[None],
            ),
            f.reshape(len(f), len(part), -1, m),
            accumulate=True,
        )
        found.append(by_slot[layer, :, slot, feature].cpu())
    return torch.cat(found, dim=1).numpy()


def linear_effects(objective: Objective, graph: AttributionGraph, metric: str) -> np.ndarray:
    """First-order effect of every feature node on the metric of every prompt: `[n_features, N]`.

    The derivative of the metric with respect to the node's gate in the patched model with every gate open, so
    gradient × (activation − ablation value). One backward pass a prompt.
    """
    flat = torch.as_tensor(graph.flat)
    shape = objective.patched.gate_shape
    at_once = max(1, min(objective.batch_size, _GATES_AT_ONCE // int(np.prod(shape))))
    found = []
    for start in range(0, len(objective), at_once):
        index = torch.arange(start, min(start + at_once, len(objective)))
        gates = torch.ones(len(index), *shape, device=objective.patched.lm.device, requires_grad=True)
        objective.metric(metric, gates, index, torch.arange(len(index))).sum().backward()
        assert gates.grad is not None
        found.append(gates.grad.flatten(1)[:, flat].T.cpu())
    return torch.cat(found, dim=1).numpy()


@torch.no_grad()
def intervention_effects(
    objective: Objective,
    graph: AttributionGraph,
    metric: str,
    rows: np.ndarray,
    progress: Callable[[int, int], None] | None = None,
) -> np.ndarray:
    """Change of the metric on every prompt when one node alone is ablated, `[len(rows), N]`.

    Each value is that of a run of the patched model in which every other feature node is kept and recomputed.

    Args:
        objective: a split that the nodes were not grouped on.
        graph: `rows` are feature nodes of it.
        metric: `log_probability` or `logit_difference`.
        rows: int64.
        progress: called with the nodes done and all of them.
    """
    patched, index = objective.patched, torch.arange(len(objective))
    device = patched.lm.device
    whole = torch.ones(1, *patched.gate_shape, device=device)
    base = objective.metric(metric, whole[0], index)
    flat = torch.as_tensor(graph.flat[rows])
    at_once = max(1, min(objective.batch_size // max(len(index), 1), _GATES_AT_ONCE // whole.numel()))
    found = []
    for start in range(0, len(flat), at_once):
        part = flat[start : start + at_once]
        gates = whole.repeat(len(part), 1, 1, 1)
        gates.flatten(1)[torch.arange(len(part)), part] = 0.0
        owner = torch.arange(len(part)).repeat_interleave(len(index))
        value = objective.metric(metric, gates, index.repeat(len(part)), owner)
        found.append((value.view(len(part), len(index)) - base).cpu())
        if progress is not None:
            progress(start + len(part), len(flat))
    return torch.cat(found).numpy()
