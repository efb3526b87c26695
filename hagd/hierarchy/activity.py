"""What each candidate of a graph, feature or head, does on each prompt.

Shape legend: N prompts, n_candidates, L, S, m, K, H as in `hagd.attribution.records` and `hagd.patching.patched_model`.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from hagd.attribution.records import HEAD, AttributionGraph
from hagd.patching.objective import Objective

_GATES_AT_ONCE = 1 << 24


@torch.no_grad()
def activations(objective: Objective, graph: AttributionGraph) -> np.ndarray:
    """Activation of every candidate, summed over the positions of its slot, on every prompt: `[n_candidates, N]`.

    That of a head is the length of its output z.
    """
    patched, n = objective.patched, graph.n_candidates
    layout, nodes = patched.layout, graph.nodes
    is_head = nodes.kind[:n] == HEAD
    found = np.zeros((n, len(objective)), dtype=np.float32)
    for start in range(0, len(objective), objective.batch_size):
        part = objective.prompts[start : start + objective.batch_size]
        tokens, columns = part.tokens.flatten(0, 1), slice(start, start + len(part))
        values = [(~is_head, layout.layers, patched.features(tokens)[0])]
        if layout.head_layers:
            values.append((is_head, layout.head_layers, patched.heads(tokens).norm(dim=-1)))
        for chosen, layers, f in values:
            rows = np.flatnonzero(chosen)
            layer = torch.as_tensor(np.searchsorted(layers, nodes.layer[rows]))
            slot, index = torch.as_tensor(nodes.slot[rows]), torch.as_tensor(nodes.feature[rows])
            found[rows, columns] = _by_slot(f, part.slots, layout.n_slots)[layer, :, slot, index].cpu().numpy()
    return found


def _by_slot(f: Tensor, slots: Tensor, n_slots: int) -> Tensor:
    """Sums `[L, N, S + 1, m]` of `f` `[L, N·C, T, m]` over the positions of each slot, padding last."""
    n = len(slots)
    by_slot = f.new_zeros(len(f), n, n_slots + 1, f.shape[-1])
    index = torch.where(slots < 0, n_slots, slots).reshape(n, -1)  # [N, C·T]
    by_slot.index_put_(
        (
            torch.arange(len(f), device=f.device)[:, None, None],
            torch.arange(n, device=f.device)[None, :, None],
            index[None],
        ),
        f.reshape(len(f), n, -1, f.shape[-1]),
        accumulate=True,
    )
    return by_slot


def linear_effects(objective: Objective, graph: AttributionGraph, metric: str) -> np.ndarray:
    """First-order effect of every candidate on the metric of every prompt: `[n_candidates, N]`.

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

    Each value is that of a run of the patched model in which every other feature and head is kept and recomputed.

    Args:
        objective: a split that the nodes were not grouped on.
        graph: `rows` are candidates of it.
        metric: `log_probability` or `logit_difference`.
        rows: int64.
        progress: called with the nodes done and all of them.
    """
    patched, index = objective.patched, torch.arange(len(objective))
    device = patched.lm.device
    whole = torch.ones(patched.gate_shape, device=device)
    parts = index.split(objective.batch_size)
    base = torch.cat([objective.metric(metric, whole, part) for part in parts])
    flat = torch.as_tensor(graph.flat[rows])
    at_once = max(1, min(objective.batch_size // max(len(index), 1), _GATES_AT_ONCE // whole.numel()))
    found = []
    for start in range(0, len(flat), at_once):
        nodes = flat[start : start + at_once]
        n = len(nodes)
        gates = whole.expand(n, *whole.shape).clone()
        gates.flatten(1)[torch.arange(n), nodes] = 0.0
        values = [
            objective.metric(metric, gates, part.repeat(n), torch.arange(n).repeat_interleave(len(part))).view(n, -1)
            for part in parts
        ]
        found.append((torch.cat(values, dim=1) - base).cpu())
        if progress is not None:
            progress(start + n, len(flat))
    return torch.cat(found).numpy()
