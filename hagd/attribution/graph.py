"""The attribution graph of a task: candidate nodes by attribution, then the strongest edges into each."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from hagd.attribution.direct_edges import DirectEdges, strongest_incoming
from hagd.attribution.records import ERROR, FEATURE, HEAD, LOGIT, TOKEN, Attribution, AttributionGraph, Nodes
from hagd.attribution.total_edges import TotalEdges
from hagd.config.stages import GraphConfig
from hagd.patching.patched_model import PatchedModel
from hagd.tasks.records import Prompts, TaskData


def candidate_nodes(
    attribution: Attribution, patched: PatchedModel, prompts: Prompts, n_max: int
) -> tuple[Nodes, np.ndarray]:
    """The `n_max` most important live features and heads, then every error, token and logit node.

    Returns the nodes and the position of each candidate in the flattened gates.
    """
    layers, n_slots = patched.transcoders.layers, patched.layout.n_slots
    importance = torch.where(attribution.live, attribution.importance, -1.0).flatten().cpu()
    count = min(n_max, int(attribution.live.sum()))
    flat = importance.topk(count).indices
    is_head, layer, slot, feature = patched.layout.place(flat)
    # At site mlp all of what an MLP without dictionary writes is error; at site resid such a layer writes nothing.
    written = range(patched.lm.n_layers) if patched.transcoders.site == "mlp" else layers
    other = [(ERROR, each, s) for each in written for s in range(n_slots)]
    other += [(TOKEN, -1, s) for s in range(n_slots)]
    other += [(LOGIT, patched.lm.n_layers, _scored_slot(prompts))]
    kinds, other_layer, other_slot = (torch.tensor(column) for column in zip(*other, strict=True))
    fill = torch.zeros(len(other))

    def column(candidates: Tensor, others: Tensor) -> np.ndarray:
        return torch.cat([candidates.cpu().to(others.dtype), others]).numpy()

    nodes = Nodes(
        kind=column(torch.where(is_head, HEAD, FEATURE), kinds),
        layer=column(layer, other_layer),
        slot=column(slot, other_slot),
        feature=column(feature, torch.zeros(len(other), dtype=torch.long)),
        attribution=column(attribution.signed.flatten()[flat], fill),
        importance=column(importance[flat], fill),
        mean=column(patched.mean_activation.flatten()[flat], fill),
        frequency=column(patched.frequency.flatten()[flat], fill + 1),
    )
    return nodes, flat.numpy()


def _scored_slot(prompts: Prompts) -> int:
    """Slot of the last scored position of the first prompt, where the answer is read."""
    scored = prompts.scored[0, 0]
    return int(prompts.slots[0, 0, scored[scored >= 0][-1]].clamp(min=0))


def build_graph(
    patched: PatchedModel,
    task: TaskData,
    prompts: Prompts,
    attribution: Attribution,
    config: GraphConfig,
    progress: Callable[[int, int], None] | None = None,
) -> AttributionGraph:
    """Edges into every candidate and the logit, averaged over `config.edge_prompts` of `prompts`.

    At most `config.edges_per_node` incoming edges are kept a target, strongest first.
    """
    prompts = prompts[: config.edge_prompts].to(patched.lm.device)
    nodes, flat = candidate_nodes(attribution, patched, prompts, config.n_max)
    method = DirectEdges if config.edges == "direct" else TotalEdges
    edges = method(patched, task, prompts, nodes, config.ablation, config.metric)
    targets = np.flatnonzero(np.isin(nodes.kind, (FEATURE, HEAD, LOGIT)))
    sources_of, effects_of, target_of = [], [], []
    for done, target in enumerate(targets.tolist()):
        keep = len(nodes) if nodes.kind[target] == LOGIT else config.edges_per_node
        sources, effects = strongest_incoming(edges.column, target, keep)
        sources_of.append(sources)
        effects_of.append(effects.detach().float())
        target_of.append(torch.full_like(sources, target))
        if progress is not None:
            progress(done + 1, len(targets))
    edge_index = torch.stack([torch.cat(sources_of), torch.cat(target_of)]).cpu().numpy()
    return AttributionGraph(nodes, edge_index, torch.cat(effects_of).cpu().numpy(), flat, attribution)
