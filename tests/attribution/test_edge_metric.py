"""Edges into the logit, and the directions in which heads are read, are those of `graph.metric`."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from hagd.attribution.direct_edges import DirectEdges
from hagd.attribution.heads import head_directions
from hagd.attribution.node_attribution import attribute_nodes
from hagd.attribution.records import FEATURE, HEAD, LOGIT
from hagd.attribution.total_edges import TotalEdges
from hagd.config.stages import GraphConfig, Metric
from hagd.patching.objective import Objective
from hagd.tasks.records import PADDING, Prompts
from tests.attribution.edge_cases import assert_same, directions, matrix, random_case, removal
from tests.reference import Frozen


def log_probabilities(logits: Tensor, prompts: Prompts) -> Tensor:
    """Sum over prompts of the mean over scored positions of the answer's log-probability."""
    total = torch.zeros((), dtype=logits.dtype)
    for row in range(len(prompts)):
        at = [i for i in range(prompts.scored.shape[2]) if prompts.scored[row, 0, i] != PADDING]
        for i in at:
            answer = prompts.answers[row, 0, i, 0]
            total = total + logits[row, prompts.scored[row, 0, i]].log_softmax(-1)[answer] / len(at)
    return total


def test_direct_edges_into_the_logit_are_those_of_the_metric() -> None:
    """To first order: what a source moves the logits by, along the gradient of the log-probability."""
    case = random_case("gpt2", "mean", varied=True)
    frozen = Frozen(case.patched.lm, case.tokens, case.patched.transcoders.transcoders)
    clean = frozen().logits.detach().requires_grad_()
    (along,) = torch.autograd.grad(log_probabilities(clean, case.prompts), clean)
    expected = torch.zeros(len(case.nodes), dtype=torch.float64)
    for node in range(len(case.nodes)):
        if case.nodes.kind[node] != LOGIT:
            expected[node] = ((clean - frozen(*removal(case, node)).logits) * along).sum() / len(case.prompts)
    edges = DirectEdges(case.patched, case.task, case.prompts, case.nodes, "mean", "log_probability")
    assert_same(matrix(edges, case)[-1].detach(), expected.detach())


@pytest.mark.parametrize("metric", ["log_probability", "logit_difference"])
def test_total_edges_into_the_logit_are_attributions_by_the_metric(metric: Metric) -> None:
    case = random_case("gpt2", "mean", head_layers=(1,))
    options = {"ablation": "mean", "error": "keep", "batch_size": 8}
    objective = Objective(case.patched, case.task, case.prompts, **options)  # type: ignore[arg-type]
    config = GraphConfig(attribution="gradient_activation", metric=metric)
    nodes = case.nodes
    heads, features = (np.flatnonzero(nodes.kind == kind) for kind in (HEAD, FEATURE))
    signed = attribute_nodes(objective, config).signed
    by_feature = case.patched.layout.features(signed)
    expected = torch.zeros(len(nodes), dtype=torch.float64)
    expected[features] = by_feature[nodes.layer[features], nodes.slot[features], nodes.feature[features]].double()
    by_head = case.patched.layout.heads(signed)
    expected[heads] = by_head[0, nodes.slot[heads], nodes.feature[heads]].double()
    edges = TotalEdges(case.patched, case.task, case.prompts, nodes, "mean", metric)
    assert_same(matrix(edges, case)[-1].detach(), expected, 1e-4)


def test_heads_are_read_along_the_metric() -> None:
    case = random_case("gpt2", "mean", varied=True, head_layers=(0, 1))
    expected = directions(case, (0, 1), lambda logits: log_probabilities(logits, case.prompts))
    found = head_directions(case.patched, case.task, case.prompts, "log_probability")
    for layer in (0, 1):
        torch.testing.assert_close(found[layer], expected[layer])
        assert not torch.allclose(found[layer], case.directions[layer], rtol=0.1)
