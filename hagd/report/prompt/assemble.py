"""From the graph of a prompt to the record that terminal and page read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hagd.activations.heads import head_outputs
from hagd.attribution.prompt.logits import DIFFERENCE
from hagd.attribution.prompt.records import BIAS, PromptGraph, ScoreAttribution
from hagd.attribution.records import ERROR, FEATURE, HEAD, KIND_NAMES, LOGIT, TOKEN
from hagd.config.run import StagesConfig
from hagd.config.stages import LogitsConfig
from hagd.hierarchy.records import Hierarchy
from hagd.models.language_model import LanguageModel
from hagd.models.linear_parts import linear_attention
from hagd.report.assemble import flat_settings, promoted, written
from hagd.report.prompt.records import Prediction, PromptReport, ScoreTerm, ScoreView
from hagd.report.prompt.supernodes import levels
from hagd.report.records import Edges, LayerReconstruction, NodeView
from hagd.transcoders.records import TranscoderSet

_PREDICTIONS = 10


def assemble_prompt(
    config: StagesConfig,
    lm: LanguageModel,
    transcoders: TranscoderSet,
    graph: PromptGraph,
    hierarchy: Hierarchy,
    text: Callable[[int], str],
) -> PromptReport:
    """Everything that is shown of a prompt's graph; `text` gives the text of a vocabulary index."""
    tokens = tuple(text(int(token)) for token in graph.tokens)
    quality = transcoders.quality
    metrics = _metrics(graph) | {"transcoder.fvu": float(np.mean([q.fvu for q in quality]))}
    if config.graph.heads:
        metrics["graph.heads"] = float((graph.nodes.kind == HEAD).sum())
    slot_names = tuple(f"{i} {token}" for i, token in enumerate(tokens))
    by_heads = _written_by_heads(lm, graph)
    return PromptReport(
        model=config.model.name,
        prompt=config.graph.prompt or "",
        settings=flat_settings(config, transcoders),
        metrics=metrics,
        tokens=tokens,
        slot_names=slot_names,
        predictions=_predictions(lm, graph, text),
        reconstruction=tuple(LayerReconstruction(q.layer, q.fvu, q.l0, q.dead) for q in quality),
        nodes=_node_views(lm, transcoders, graph, hierarchy, by_heads, tokens, text, config.graph.logits),
        edges=Edges(graph.edge_index[0], graph.edge_index[1], graph.edge_attr, graph.edge_influence),
        score=None if graph.score is None else _score_view(graph.score, tokens),
        levels=levels(lm, transcoders, graph, hierarchy, by_heads, slot_names, text),
        warnings=_warnings(graph),
    )


def _metrics(graph: PromptGraph) -> dict[str, float]:
    kind = graph.nodes.kind
    score = {} if graph.score is None else {"graph.score": graph.score.score}
    return score | {
        "graph.tokens": float(len(graph.tokens)),
        "graph.active_features": float(graph.n_active),
        "graph.edges_computed": float(graph.n_edges),
        "graph.nodes": float(len(graph.nodes)),
        "graph.features": float((kind == FEATURE).sum()),
        "graph.errors": float((kind == ERROR).sum()),
        "graph.logits": float((kind == LOGIT).sum()),
        "graph.edges": float(graph.edge_index.shape[1]),
        "graph.replacement": graph.replacement,
        "graph.completeness": graph.completeness,
        "graph.sum_error": graph.sum_error,
    }


@torch.no_grad()
def _predictions(lm: LanguageModel, graph: PromptGraph, text: Callable[[int], str]) -> tuple[Prediction, ...]:
    tokens = graph.tokens[None].to(lm.device)
    share = lm.logits_at(tokens, torch.tensor([[tokens.shape[1] - 1]], device=lm.device))[0, 0].softmax(-1)
    explained = [t for t in graph.nodes.feature[graph.nodes.kind == LOGIT].tolist() if t != DIFFERENCE]
    likely = share.topk(min(_PREDICTIONS, len(share))).indices.tolist()
    shown = [*likely, *(token for token in explained if token not in likely)]
    return tuple(Prediction(text(token), float(share[token]), token in explained) for token in shown)


def _node_views(
    lm: LanguageModel,
    transcoders: TranscoderSet,
    graph: PromptGraph,
    hierarchy: Hierarchy,
    by_heads: Mapping[int, Tensor],
    tokens: Sequence[str],
    text: Callable[[int], str],
    logits: LogitsConfig,
) -> tuple[NodeView, ...]:
    nodes, views = graph.nodes, []
    for row in range(len(nodes)):
        kind, layer, position, feature = (int(x[row]) for x in (nodes.kind, nodes.layer, nodes.position, nodes.feature))
        more: dict[str, Any] = {"kind": KIND_NAMES[kind]}
        if kind == FEATURE:
            more["promoted"] = promoted(written(transcoders, transcoders.layers.index(layer), feature), lm, text)
        elif kind == HEAD:
            more["label"] = f"L{layer}.{feature}"
            more["promoted"] = promoted(by_heads[layer][position, feature], lm, text)
        else:
            logit = _difference(logits) if feature == DIFFERENCE else f"logit {text(feature)}"
            more["label"] = {ERROR: f"error L{layer} {tokens[position]}", TOKEN: tokens[position]}.get(kind, logit)
        views.append(
            NodeView(
                id=row,
                layer=layer,
                slot=position,
                feature=max(feature, 0),
                score=float(nodes.influence[row]),
                mean_activation=float(nodes.value[row]),
                supernodes=tuple(int(level.supernode[row]) for level in hierarchy.levels),
                **more,
            )
        )
    return tuple(views)


def _difference(logits: LogitsConfig) -> str:
    assert logits.tokens is not None
    return f"{logits.tokens[0]} − {logits.minus}"


@torch.no_grad()
def _written_by_heads(lm: LanguageModel, graph: PromptGraph) -> dict[int, Tensor]:
    """Layer → `[T, H, d]`, what its heads write, of layers that have a head in the graph."""
    layers = sorted(set(graph.nodes.layer[graph.nodes.kind == HEAD].tolist()))
    if not layers:
        return {}
    outputs = head_outputs(lm, graph.tokens[None].to(lm.device), layers)[:, 0]
    return {
        layer: torch.einsum("the,hed->thd", z, linear_attention(lm, layer, z.dtype).W_O)
        for layer, z in zip(layers, outputs, strict=True)
    }


def _score_view(score: ScoreAttribution, tokens: Sequence[str]) -> ScoreView:
    def name(end: Sequence[int]) -> str:
        kind, layer, position, feature = end
        if kind == BIAS:
            return "biases"
        where = f"at {position} {tokens[position]}"
        names = {
            FEATURE: f"L{layer} #{feature}",
            HEAD: f"head L{layer}.{feature}",
            ERROR: f"error L{layer}",
            TOKEN: "token",
        }
        return f"{names[kind]} {where}"

    terms = zip(score.ends.tolist(), score.terms.tolist(), strict=True)
    return ScoreView(
        f"layer {score.layer}, head {score.head}: from {score.query} {tokens[score.query]} to {score.key} "
        f"{tokens[score.key]}",
        score.score,
        score.of_all,
        tuple(ScoreTerm(name(query), name(key), value) for (query, key), value in terms),
    )


def _warnings(graph: PromptGraph) -> tuple[str, ...]:
    if graph.replacement >= 0.5:
        return ()
    return (
        f"{1 - graph.replacement:.0%} of the influence on these logits comes from error terms: the features explain "
        "less than half of this prompt",
    )
