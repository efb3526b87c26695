"""What nodes do on prompts, against loops over nodes and prompts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from hagd.attribution.graph import build_graph
from hagd.attribution.node_attribution import attribute_nodes
from hagd.attribution.records import HEAD, AttributionGraph
from hagd.config.stages import GraphConfig
from hagd.hierarchy import activity
from hagd.hierarchy.activity import activations, intervention_effects, linear_effects
from hagd.patching.objective import Objective
from hagd.patching.patched_model import PatchedModel
from hagd.tasks.records import Prompts
from tests.builders import patched_model, prompts_task, random_model, random_prompts, random_transcoders
from tests.reference import heads_of

Case = tuple[Objective, AttributionGraph]


def attributed(patched: PatchedModel, prompts: Prompts) -> Case:
    task = prompts_task(prompts)
    objective = Objective(patched, task, prompts, ablation="mean", error="mean", batch_size=4)
    config = GraphConfig(edge_prompts=3)
    return objective, build_graph(patched, task, prompts, attribute_nodes(objective, config), config)


@pytest.fixture(scope="module", params=[1, 2], ids=["one option", "two options"])
def case(request: pytest.FixtureRequest) -> Case:
    lm, prompts = random_model(length=6), random_prompts(n=7, c=request.param)
    patched = patched_model(lm, random_transcoders(lm), prompts)
    return attributed(patched, prompts)


def test_activations_are_summed_over_the_slot(case: Case) -> None:
    objective, graph = case
    patched, prompts, nodes = objective.patched, objective.prompts, graph.nodes
    expected = np.zeros((graph.n_candidates, len(prompts)))
    for i in range(len(prompts)):
        f, _ = patched.features(prompts.tokens[i])  # options as sequences
        for row in range(graph.n_candidates):
            index = patched.transcoders.layers.index(nodes.layer[row])
            expected[row, i] = f[index, ..., nodes.feature[row]][prompts.slots[i] == nodes.slot[row]].sum()
    np.testing.assert_allclose(activations(objective, graph), expected, rtol=1e-4, atol=1e-6)
    assert (expected > 0).any(1).all(), "every candidate is active somewhere"


@pytest.fixture(scope="module")
def with_heads() -> Case:
    lm, prompts = random_model("llama", length=6), random_prompts(n=7, c=2)
    patched = patched_model(lm, random_transcoders(lm), prompts, head_layers=(0, 1))
    return attributed(patched, prompts)


def test_heads_are_as_active_as_their_outputs_are_long(with_heads: Case) -> None:
    objective, graph = with_heads
    prompts, nodes, found = objective.prompts, graph.nodes, activations(*with_heads)
    rows = np.flatnonzero(nodes.kind == HEAD).tolist()
    assert len(rows) == 2 * 3 * 4 and (found > 0).any(1).all()
    for row in rows:
        for i in range(len(prompts)):
            z = heads_of(objective.patched.lm, prompts.tokens[i], (int(nodes.layer[row]),))[0, :, :, nodes.feature[row]]
            expected = z.norm(dim=-1)[prompts.slots[i] == nodes.slot[row]].sum().item()
            assert found[row, i] == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_heads_are_ablated_alone(with_heads: Case) -> None:
    objective, graph = with_heads
    rows, everything = np.flatnonzero(graph.nodes.kind == HEAD)[:5], torch.arange(len(objective))
    base = objective.metric("logit_difference", torch.ones(objective.patched.gate_shape), everything)
    found = intervention_effects(objective, graph, "logit_difference", rows)
    linear = linear_effects(objective, graph, "logit_difference")
    assert linear.shape == (graph.n_candidates, len(objective)) and np.abs(found).max() > 1e-3
    for row, effect in zip(rows.tolist(), found, strict=True):
        gates = torch.ones(objective.patched.gate_shape)
        gates[graph.flat[row]] = 0
        ablated = objective.metric("logit_difference", gates, everything)
        np.testing.assert_allclose(effect, ablated - base, rtol=1e-3, atol=1e-5)


def test_linear_effects_are_derivatives_of_single_gates(case: Case) -> None:
    """Central differences of the metric along each gate, from all gates open."""
    objective, graph = case
    step, everything = 1e-2, torch.arange(len(objective))
    found = linear_effects(objective, graph, "logit_difference")
    assert found.shape == (graph.n_candidates, len(objective))
    agreeing = 0
    for row in range(graph.n_candidates):
        ends = []
        for sign in (1, -1):
            gates = torch.ones(objective.patched.gate_shape)
            gates.view(-1)[graph.flat[row]] += sign * step
            ends.append(objective.metric("logit_difference", gates, everything))
        difference = ((ends[0] - ends[1]) / (2 * step)).numpy()
        agreeing += np.isclose(found[row], difference, rtol=0.05, atol=2e-3).all()
    assert agreeing > 0.9 * graph.n_candidates, "TopK switches some other features within the step"


def test_linear_effects_add_up_to_gradient_times_activation(case: Case) -> None:
    objective, graph = case
    config = GraphConfig(attribution="gradient_activation")
    expected = attribute_nodes(objective, config).signed.flatten().numpy()[graph.flat]
    np.testing.assert_allclose(
        linear_effects(objective, graph, "logit_difference").mean(1), expected, rtol=1e-3, atol=1e-6
    )


def test_interventions_close_one_gate_at_a_time(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    objective, graph = case
    rows = np.array([0, 3, graph.n_candidates - 1])
    everything = torch.arange(len(objective))
    with torch.no_grad():
        base = objective.metric("logit_difference", torch.ones(objective.patched.gate_shape), everything)
        expected = []
        for row in rows:
            gates = torch.ones(objective.patched.gate_shape)
            gates.view(-1)[graph.flat[row]] = 0
            expected.append((objective.metric("logit_difference", gates, everything) - base).numpy())
    seen: list[tuple[int, int]] = []
    found = intervention_effects(objective, graph, "logit_difference", rows, lambda done, n: seen.append((done, n)))
    np.testing.assert_allclose(found, np.array(expected), rtol=1e-3, atol=1e-5)
    assert seen[-1] == (3, 3) and np.abs(found).max() > 1e-3
    monkeypatch.setattr(activity, "_GATES_AT_ONCE", 1)
    one_by_one = intervention_effects(objective, graph, "logit_difference", rows)
    np.testing.assert_allclose(one_by_one, found, rtol=1e-3, atol=1e-5)


def test_interventions_keep_to_the_batch_size(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    objective, graph = case
    assert len(objective) > objective.batch_size
    sizes: list[int] = []
    metric = Objective.metric

    def counted(self: Objective, name: str, gates: Tensor, index: Tensor, owner: Tensor | None = None) -> Tensor:
        sizes.append(len(index))
        return metric(self, name, gates, index, owner)

    monkeypatch.setattr(Objective, "metric", counted)
    intervention_effects(objective, graph, "logit_difference", np.array([0, 3]))
    assert sizes == [4, 3] * 3, "all nodes, then without each of the two"
