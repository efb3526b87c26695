"""From the records of all stages to the one record that figures, terminal and page read."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hagd.attribution.records import FEATURE, HEAD, KIND_NAMES, LOGIT, TOKEN, AttributionGraph
from hagd.config.run import StagesConfig
from hagd.config.task import SymbolicTask
from hagd.hierarchy.records import Hierarchy
from hagd.models.language_model import LanguageModel
from hagd.patching.objective import Objective
from hagd.patching.patched_model import PatchedModel
from hagd.report.records import (
    Curve,
    Edges,
    LayerReconstruction,
    NodeView,
    ReportData,
    SearchPart,
    SizedCircuit,
    TopPrompt,
    joined,
)
from hagd.report.supernodes import Observed, Supernodes
from hagd.report.wording import poor_model
from hagd.search.records import Circuit, SearchResult, SearchStep
from hagd.tasks.records import TaskData
from hagd.transcoders.loaded import shown_config
from hagd.transcoders.records import TranscoderSet
from hagd.validation.records import Validation

_CONTROLS = {
    "attribution": "integrated gradients",
    "gradient_activation": "gradient × activation",
    "random": "random nodes",
}
_TOP_PROMPTS = 5
_TOP_TOKENS = 8


@dataclass(frozen=True)
class Extraction:
    """The results of all stages of one run; `discovery` runs circuits on the discovery split."""

    config: StagesConfig
    patched: PatchedModel
    discovery: Objective
    task: TaskData
    graph: AttributionGraph
    hierarchy: Hierarchy
    result: SearchResult
    validation: Validation


def assemble(run: Extraction, progress: Callable[[int, int], None]) -> ReportData:
    """Everything that is shown of one extraction; examples and effects come from the discovery split."""
    config, task, graph, result = run.config, run.task, run.graph, run.result
    circuits = tuple(c for c in result.circuits if len(c) <= max(result.size, config.report.max_nodes))
    rows, edges = _with_ends(graph, _members(graph, result.score, *circuits))
    metrics = _metrics(run, len(_with_ends(graph, _members(graph, result.score, result.circuit))[1].weight))
    observed = _observe(run)
    return ReportData(
        model=config.model.name,
        task=config.task.name,
        seed=config.seed,
        settings=flat_settings(config, run.patched.transcoders),
        metrics=metrics,
        slot_names=task.slot_names,
        search=_parts(result.steps),
        curves=tuple(
            Curve(
                _curve_name(c.method, config.search.method),
                c.sizes,
                c.faithfulness,
                c.preservation,
                c.low,
                c.high,
                c.method != "circuit",
            )
            for c in run.validation.curves
        ),
        reconstruction=tuple(
            LayerReconstruction(q.layer, q.fvu, q.l0, q.dead, q.fvu_by_slot) for q in run.patched.transcoders.quality
        ),
        nodes=_node_views(run, observed, rows, progress),
        edges=edges,
        circuits=_sized(run, circuits),
        levels=tuple(map(Supernodes(run.patched, graph, observed).level, run.hierarchy.levels)),
        warnings=_warnings(run, metrics),
    )


def _parts(steps: Sequence[SearchStep]) -> tuple[SearchPart, ...]:
    """What a part found is what the one before it left."""
    before = [None, *(step.preservation for step in steps)]
    return tuple(
        SearchPart(s.name, round(s.evaluations), s.seconds, s.changed, found, s.preservation, s.note)
        for s, found in zip(steps, before, strict=False)
    )


def _curve_name(curve: str, method: str) -> str:
    """What a curve of validation is called, given the method of the search."""
    if curve != "circuit":
        return _CONTROLS[curve]
    return "HAGD circuit" if method == "hagd" else "this circuit"


def _metrics(run: Extraction, n_edges: int) -> dict[str, float]:
    task, graph, hierarchy, result = run.task, run.graph, run.hierarchy, run.result
    quality = run.patched.transcoders.quality
    return {
        **run.validation.metrics,
        "model.chance": task.chance,
        "task.dropped": float(task.n_dropped),
        "transcoder.fvu": float(np.mean([q.fvu for q in quality])),
        "transcoder.l0": float(np.mean([q.l0 for q in quality])),
        "transcoder.dead": float(np.mean([q.dead for q in quality])),
        "graph.nodes": float(len(graph.nodes)),
        "graph.features": float((graph.nodes.kind == FEATURE).sum()),
        "graph.edges": float(graph.edge_index.shape[1]),
        "hierarchy.levels": float(len(hierarchy.levels)),
        **_hierarchy_metrics(hierarchy),
        "circuit.nodes": float(result.size),
        "circuit.edges": float(n_edges),
        "search.evaluations": result.evaluations,
        **(_head_metrics(graph, result) if run.config.graph.heads else {}),
    }


def _head_metrics(graph: AttributionGraph, result: SearchResult) -> dict[str, float]:
    """How many of the graph's and the circuit's nodes are heads."""
    is_head = graph.nodes.kind == HEAD
    inside = int(is_head[_members(graph, result.score, result.circuit)].sum())
    return {
        "graph.heads": float(is_head.sum()),
        "circuit.heads": float(inside),
        "circuit.features": float(result.size - inside),
    }


def _hierarchy_metrics(hierarchy: Hierarchy) -> dict[str, float]:
    """Modularity of every level and of the most modular one, coherence of the finest one."""
    finest = hierarchy.levels[-1]
    return {
        "hierarchy.modularity": max(level.modularity for level in hierarchy.levels),
        **{f"hierarchy.level{i}.modularity": level.modularity for i, level in enumerate(hierarchy.levels, start=1)},
        "hierarchy.coherence": finest.coherence,
        "hierarchy.coherence_null": finest.coherence_null,
    }


def _members(graph: AttributionGraph, score: np.ndarray, *circuits: Circuit) -> np.ndarray:
    """Rows in the graph of the nodes of these circuits, best first."""
    inside = np.flatnonzero(np.isin(graph.flat, np.concatenate([circuit.nodes for circuit in circuits])))
    return inside[np.argsort(-score[inside], kind="stable")]


def _with_ends(graph: AttributionGraph, members: np.ndarray) -> tuple[np.ndarray, Edges]:
    """Rows of these nodes and of the errors, tokens and logits that edges join to them; edges between all of them."""
    ends = np.arange(graph.n_candidates, len(graph.nodes))
    source, target = graph.edge_index
    edges = joined(Edges(source, target, graph.edge_attr), np.concatenate([members, ends]))
    touched = np.isin(ends, np.concatenate([edges.source, edges.target]))
    return np.concatenate([members, ends[touched]]), edges


def _sized(run: Extraction, circuits: Sequence[Circuit]) -> tuple[SizedCircuit, ...]:
    """The circuits by row, with what validation measured at their sizes."""
    curve = next((c for c in run.validation.curves if c.method == "circuit"), None)
    points = zip(curve.sizes, curve.preservation, curve.faithfulness, strict=True) if curve else ()
    measured = {size: (preservation, faithfulness) for size, preservation, faithfulness in points}
    return tuple(
        SizedCircuit(
            np.flatnonzero(np.isin(run.graph.flat, circuit.nodes)), *measured.get(len(circuit), (math.nan, math.nan))
        )
        for circuit in circuits
    )


@torch.no_grad()
def _observe(run: Extraction) -> Observed:
    """On the CPU: tokens are read one by one."""
    prompts = run.discovery.prompts[: run.config.report.effect_prompts]
    tokens, slots = prompts.tokens.flatten(0, 1), prompts.slots.flatten(0, 1)
    f = run.patched.features(tokens)[0].cpu()
    heads = run.patched.heads(tokens).norm(dim=-1).cpu() if run.config.graph.heads else None
    text = _token_text(run.patched, run.task)
    return Observed(f, tokens.cpu(), slots.cpu(), run.task.slot_names, text, heads)


@torch.no_grad()
def _node_views(
    run: Extraction, observed: Observed, rows: np.ndarray, progress: Callable[[int, int], None]
) -> tuple[NodeView, ...]:
    patched, task, graph, result = run.patched, run.task, run.graph, run.result
    tokens, slots, text = observed.tokens, observed.slots, observed.text
    effects = _ablation_effects(run, _members(graph, result.score, result.circuit))
    mean_writes = patched.mean_head_writes()
    nodes, views = graph.nodes, []
    for done, row in enumerate(rows.tolist()):
        kind, layer, slot, feature = (int(x[row]) for x in (nodes.kind, nodes.layer, nodes.slot, nodes.feature))
        common: dict[str, Any] = {
            "id": row,
            "kind": KIND_NAMES[kind],
            "layer": layer,
            "slot": slot,
            "feature": feature,
            "score": float(result.score[row]) if row < graph.n_candidates else 0.0,
            "mean_activation": float(nodes.mean[row]),
            "supernodes": tuple(int(level.supernode[row]) for level in run.hierarchy.levels),
        }
        if kind in (FEATURE, HEAD):
            activation = observed.activation(patched, kind, layer, feature).masked_fill(slots != slot, 0)
            if kind == FEATURE:
                direction = written(patched.transcoders, patched.transcoders.layers.index(layer), feature)
            else:
                direction = mean_writes[patched.layout.head_layers.index(layer), slot, feature]
            common |= {
                "ablation_effect": effects.get(row),
                "prompts": _top_prompts(activation, tokens, slots, text),
                "promoted": promoted(direction, patched.lm, text),
                "inputs": _inputs(activation, tokens, text),
            }
        if kind != FEATURE:
            common["label"] = _label(kind, layer, feature, task.slot_names[slot])
        views.append(NodeView(**common))
        progress(done + 1, len(rows))
    return tuple(views)


def _ablation_effects(run: Extraction, rows: np.ndarray) -> dict[int, float]:
    """Rise of KL(full ‖ circuit) when one node of the circuit is ablated, by row."""
    patched, discovery, graph, result = run.patched, run.discovery, run.graph, run.result
    gates = result.circuit.gates(patched.gate_shape).to(patched.lm.device)
    index = torch.arange(min(len(discovery), run.config.report.effect_prompts))
    base = float(discovery.divergences(gates[None], index)[0])
    effects: dict[int, float] = {}
    for start in range(0, len(rows), 64):
        part = rows[start : start + 64].tolist()
        ablated = gates.expand(len(part), *gates.shape).clone()
        ablated.flatten(1)[torch.arange(len(part)), torch.as_tensor(graph.flat[part])] = 0.0
        rises = discovery.divergences(ablated, index) - base
        effects |= dict(zip(part, rises.tolist(), strict=True))
    return effects


def _top_prompts(
    activation: Tensor, tokens: Tensor, slots: Tensor, text: Callable[[int], str]
) -> tuple[TopPrompt, ...]:
    strongest, position = activation.max(-1)
    order = strongest.topk(min(_TOP_PROMPTS, len(strongest))).indices.tolist()
    return tuple(
        TopPrompt(
            tuple(text(int(t)) for t, s in zip(tokens[i], slots[i], strict=True) if s >= 0),
            int(position[i]),
            float(strongest[i]),
        )
        for i in order
        if strongest[i] > 0
    )


def written(transcoders: TranscoderSet, index: int, feature: int) -> Tensor:
    """The decoder direction `[d]` of a feature of the layer at `index`, over all layers that it writes to."""
    transcoder = transcoders.transcoders[index]
    return transcoder.W_dec[feature] + sum(decoder[feature] for decoder in transcoder.W_later)


def promoted(direction: Tensor, lm: LanguageModel, text: Callable[[int], str]) -> tuple[tuple[str, float], ...]:
    """Tokens whose logits a decoder direction `[d]` raises most, read through the unembedding alone."""
    unembedding: Any = lm.unembedding
    logits = (unembedding.weight.float() @ direction.to(unembedding.weight.device).float()).cpu()
    best = (logits - logits.mean()).topk(min(_TOP_TOKENS, len(logits)))
    return tuple((text(i), v) for v, i in zip(best.values.tolist(), best.indices.tolist(), strict=True))


def _inputs(activation: Tensor, tokens: Tensor, text: Callable[[int], str]) -> tuple[tuple[str, float], ...]:
    """Tokens at which the feature is on average most active, among those at which it fires."""
    where = activation > 0
    ids, inverse = tokens[where].unique(return_inverse=True)
    total = torch.zeros(len(ids), device=activation.device).index_add_(0, inverse, activation[where])
    count = torch.zeros_like(total).index_add_(0, inverse, torch.ones_like(activation[where]))
    mean = total / count.clamp(min=1)
    best = mean.topk(min(_TOP_TOKENS, len(mean)))
    return tuple((text(int(ids[i])), v) for v, i in zip(best.values.tolist(), best.indices.tolist(), strict=True))


def _token_text(patched: PatchedModel, task: TaskData) -> Callable[[int], str]:
    if task.vocabulary:
        return lambda token: task.vocabulary[token]
    return patched.lm.token_text


def _label(kind: int, layer: int, index: int, slot: str) -> str:
    if kind == TOKEN:
        return f"token {slot}"
    if kind == HEAD:
        return f"head L{layer}.{index} {slot}"
    return "answer − distractor" if kind == LOGIT else f"error L{layer} {slot}"


def _warnings(run: Extraction, metrics: dict[str, float]) -> tuple[str, ...]:
    config, task, patched = run.config, run.task, run.patched
    found = [
        f"layer {q.layer}: {q.fvu:.0%} of the variance is unexplained"
        for q in patched.transcoders.quality
        if q.fvu > config.transcoder.fvu_warning
    ]
    if task.n_dropped:
        found.append(f"{task.n_dropped} discovery and selection prompts that the full model gets wrong were left out")
    target = config.task.training.target_accuracy if isinstance(config.task, SymbolicTask) else 0.0
    if poor := poor_model(metrics["model.accuracy"], metrics["model.chance"], target):
        found.append(poor)
    if metrics["empty.accuracy"] > 0.5 * metrics["model.accuracy"]:
        found.append("the empty circuit keeps more than half of the accuracy: preservation says little here")
    return tuple(found)


def flat_settings(config: StagesConfig, transcoders: TranscoderSet) -> dict[str, str]:
    """Dotted key → value of the whole configuration, as text; of dictionaries from elsewhere what they are."""
    return _flat(shown_config(config, transcoders))


def _flat(config: dict[str, Any], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = "null" if value is None else str(value)
    return flat
