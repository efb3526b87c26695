"""What is said of a supernode, against loops over its members."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hagd.attribution.graph import build_graph
from hagd.attribution.node_attribution import attribute_nodes
from hagd.attribution.records import HEAD, AttributionGraph
from hagd.config.stages import GraphConfig
from hagd.hierarchy.records import Level
from hagd.models.linear_parts import linear_attention
from hagd.patching.objective import Objective
from hagd.patching.patched_model import PatchedModel
from hagd.report.records import HierarchyLevel
from hagd.report.supernodes import Observed, Supernodes, place
from tests.builders import patched_model, prompts_task, random_model, random_prompts, random_transcoders
from tests.reference import heads_of

SLOTS = ("first", "second", "third")


@pytest.fixture(scope="module", params=[False, True], ids=["own layer", "cross-layer"])
def described(request: pytest.FixtureRequest) -> tuple[PatchedModel, AttributionGraph, Observed, Level, HierarchyLevel]:
    lm, prompts = random_model(length=6), random_prompts(n=9)
    patched = patched_model(lm, random_transcoders(lm, cross_layer=request.param), prompts)
    task = prompts_task(prompts)
    objective = Objective(patched, task, prompts, ablation="mean", error="mean", batch_size=16)
    config = GraphConfig(edge_prompts=4)
    graph = build_graph(patched, task, prompts, attribute_nodes(objective, config), config)
    tokens, slots = prompts.tokens.flatten(0, 1), prompts.slots.flatten(0, 1)
    observed = Observed(patched.features(tokens)[0], tokens, slots, SLOTS, lambda token: f"t{token}")
    group = np.random.default_rng(0).integers(5, size=len(graph.nodes))
    group[-8:] = 5  # errors, tokens and the logit alone
    level = Level(group, 6, 0.1, 0.2, 0.3, 0.4, 0.05)
    return patched, graph, observed, level, Supernodes(patched, graph, observed).level(level)


def test_members_places_and_qualities_are_those_of_the_level(described) -> None:  # type: ignore[no-untyped-def]
    _, graph, _, level, shown = described
    assert (shown.modularity, shown.conductance, shown.eigengap) == (0.1, 0.2, 0.3)
    assert (shown.coherence, shown.coherence_null) == (0.4, 0.05)
    for i, view in enumerate(shown.supernodes):
        rows = np.flatnonzero(level.supernode == i)
        layers = graph.nodes.layer[rows]
        assert view.n_nodes == len(rows) and f"({len(rows)})" in view.label
        assert view.slot == SLOTS[np.bincount(graph.nodes.slot[rows]).argmax()]
        assert (str(max(layers)) in view.layers) == (max(layers) < 2) == ("logits" not in view.layers)
        assert ("tokens" in view.layers) == (min(layers) == -1)


@pytest.mark.parametrize(
    ("layers", "span"),
    [
        ([0], "L0"),
        ([1, 0], "L0–1"),
        ([-1, 1], "tokens–L1"),
        ([0, 2], "L0–logits"),
        ([2, -1], "tokens–logits"),
        ([-1], "tokens"),
        ([2], "logits"),
    ],
)
def test_tokens_and_logits_are_no_layers(layers: list[int], span: str) -> None:
    assert place(np.array(layers), np.zeros(len(layers), int), SLOTS, 2) == ("first", span)


def test_heads_are_members_like_features() -> None:
    lm, prompts = random_model("llama", length=6), random_prompts(n=9)
    patched = patched_model(lm, random_transcoders(lm), prompts, head_layers=(1,))
    task = prompts_task(prompts)
    objective = Objective(patched, task, prompts, ablation="mean", error="mean", batch_size=16)
    graph = build_graph(patched, task, prompts, attribute_nodes(objective, GraphConfig()), GraphConfig(edge_prompts=4))
    tokens, slots, nodes = prompts.tokens[:, 0], prompts.slots[:, 0], graph.nodes
    lengths = patched.heads(tokens).norm(dim=-1)
    observed = Observed(patched.features(tokens)[0], tokens, slots, SLOTS, lambda token: f"t{token}", lengths)
    here = (nodes.kind == HEAD) & (nodes.slot == 1)
    level = Level(here.astype(np.int64), 2, 0.1, 0.2, 0.3)
    _, view = Supernodes(patched, graph, observed).level(level).supernodes
    assert view.label.startswith("second L1: ") and view.label.endswith("(4, heads: 4)")
    rows = np.flatnonzero(here)
    assert len(rows) == 4 and (graph.n_candidates > rows).all()
    z = heads_of(lm, tokens, (1,))[0][slots == 1]  # [positions, H, e]
    written = torch.einsum("he,hed->d", z.mean(0), linear_attention(lm, 1, torch.float32).W_O)
    logits = lm.unembedding.weight.detach() @ written
    best = (logits - logits.mean()).topk(5)
    assert [value for _, value in view.promoted] == pytest.approx(best.values.tolist(), rel=1e-3, abs=1e-5)
    share = (z.norm(dim=-1) / z.norm(dim=-1).amax(0)).mean(1)
    ids = tokens[slots == 1]
    for text, value in view.inputs:
        assert value == pytest.approx(share[ids == int(text[1:])].mean().item(), rel=1e-4)


def test_inputs_are_tokens_on_which_members_are_most_active(described) -> None:  # type: ignore[no-untyped-def]
    patched, graph, observed, level, shown = described
    nodes, n = graph.nodes, graph.n_candidates
    for i, view in enumerate(shown.supernodes[:5]):
        total: dict[int, float] = {}
        members = [row for row in range(n) if level.supernode[row] == i]
        for row in members:
            f = observed.f[patched.transcoders.layers.index(nodes.layer[row]), ..., nodes.feature[row]]
            seen: dict[int, list[float]] = {}
            for b, t in (observed.slots == nodes.slot[row]).nonzero().tolist():
                seen.setdefault(int(observed.tokens[b, t]), []).append(float(f[b, t]))
            largest = max((value for values in seen.values() for value in values), default=0)
            for token, values in seen.items():
                total[token] = total.get(token, 0) + float(np.mean(values)) / max(largest, 1e-12) / len(members)
        best = sorted((value for value in total.values() if value > 0), reverse=True)[:5]
        assert [value for _, value in view.inputs] == pytest.approx(best, rel=1e-4)
        for text, value in view.inputs:
            assert total[int(text[1:])] == pytest.approx(value, rel=1e-4)
    assert shown.supernodes[5].inputs == () == shown.supernodes[5].promoted == shown.supernodes[5].prompts


def test_promoted_tokens_are_those_of_what_members_write(described) -> None:  # type: ignore[no-untyped-def]
    patched, graph, _, level, shown = described
    nodes, n = graph.nodes, graph.n_candidates
    for i, view in enumerate(shown.supernodes[:5]):
        written = torch.zeros(patched.lm.d_model)
        for row in range(n):
            if level.supernode[row] != i:
                continue
            transcoder = patched.transcoders.transcoders[patched.transcoders.layers.index(nodes.layer[row])]
            for decoder in (transcoder.W_dec, *transcoder.W_later):
                written += float(nodes.mean[row]) * decoder[nodes.feature[row]]
        logits = patched.lm.unembedding.weight.detach() @ written
        logits = logits - logits.mean()
        best = logits.topk(5)
        assert [value for _, value in view.promoted] == pytest.approx(best.values.tolist(), rel=1e-3, abs=1e-5)
        assert [text for text, _ in view.promoted] == [f"t{token}" for token in best.indices.tolist()]


def test_prompts_are_those_on_which_members_are_active_together(described) -> None:  # type: ignore[no-untyped-def]
    patched, graph, observed, level, shown = described
    nodes, n = graph.nodes, graph.n_candidates
    for i, view in enumerate(shown.supernodes[:5]):
        members = [row for row in range(n) if level.supernode[row] == i]
        total = np.zeros(len(observed.tokens))
        for row in members:
            f = observed.f[patched.transcoders.layers.index(nodes.layer[row]), ..., nodes.feature[row]]
            f = torch.where(observed.slots == nodes.slot[row], f, 0)
            total += (f.max(-1).values / f.max().clamp(min=1e-12)).numpy() / len(members)
        order = np.argsort(-total, kind="stable")[:3]
        assert [prompt.activation for prompt in view.prompts] == pytest.approx(total[order].tolist(), rel=1e-4)
        texts = [
            tuple(
                f"t{t}" for t, s in zip(observed.tokens[b].tolist(), observed.slots[b].tolist(), strict=True) if s >= 0
            )
            for b in order
        ]
        assert [prompt.tokens for prompt in view.prompts] == texts
        assert all(0 <= prompt.position < len(prompt.tokens) for prompt in view.prompts)
