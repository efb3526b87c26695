"""Direct edges against interventions in a frozen model that is wired by hand, in double precision."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor

from hagd.attribution.direct_edges import DirectEdges, strongest_incoming
from hagd.attribution.records import ERROR, FEATURE, HEAD, LOGIT, TOKEN
from hagd.attribution.total_edges import TotalEdges
from hagd.config.model import Architecture
from hagd.config.stages import Ablation
from tests.attribution.edge_cases import SLOW, Case, all_nodes, assert_same, matrix, random_case, removal, slow
from tests.builders import ARCHITECTURES, patched_double, random_model, random_transcoders, tiny_task
from tests.reference import Frozen, mean_by_slot, skipped

MODES = [
    *product(ARCHITECTURES, ("mean",), (False, True), ("topk",), (2,)),
    ("gpt2", "zero", True, "topk", 2),
    ("llama", "resample", False, "topk", 2),
    ("gpt_neox", "zero", True, "thresholds", 2),
    ("gpt2", "resample", True, "everything", 3),
    pytest.param("gpt_neox", "resample", True, "topk", 2, marks=SLOW),
    pytest.param("gpt2", "mean", False, "skip", 3, marks=SLOW),
    pytest.param("llama", "mean", False, "cross_layer", 3, marks=SLOW),
    pytest.param("gpt_neox", "mean", False, "everything", 3, marks=SLOW),
    pytest.param("llama", "mean", True, "everything", 2, marks=SLOW),
]
"""Slow are combinations whose parts all stand in the others."""


def by_intervention(case: Case, frozen: Frozen) -> Tensor:
    """What each target loses when one source is removed from the frozen model, `[targets, nodes]`."""
    clean = case.values(frozen())
    expected = torch.zeros(len(case.targets), len(case.nodes), dtype=torch.float64)
    for node in range(len(case.nodes)):
        if case.nodes.kind[node] != LOGIT:
            expected[:, node] = clean - case.values(frozen(*removal(case, node)))
    return expected


@pytest.mark.parametrize(("architecture", "ablation", "varied", "variant", "n_layers"), MODES)
def test_direct_edges_are_interventions_in_the_frozen_model(
    architecture: Architecture, ablation: Ablation, varied: bool, variant: str, n_layers: int
) -> None:
    case = random_case(architecture, ablation, varied=varied, variant=variant, n_layers=n_layers)
    frozen = Frozen(case.patched.lm, case.tokens, case.patched.transcoders.transcoders)
    expected = by_intervention(case, frozen)
    found = matrix(DirectEdges(case.patched, case.task, case.prompts, case.nodes, ablation), case)
    assert_same(found, expected)
    for kind in (FEATURE, ERROR, TOKEN):
        assert found[:, case.nodes.kind == kind].abs().max() > 1e-3, "each kind of source has edges"
    assert found[-1].abs().max() > 1e-3 and case.nodes.kind[case.targets[-1]] == LOGIT


@pytest.mark.parametrize(
    ("architecture", "ablation", "varied", "variant", "n_layers", "head_layers"),
    [
        *product(ARCHITECTURES, ["mean"], [True], ["topk"], [2], [(0, 1)]),
        *slow(product(ARCHITECTURES, ["mean"], [False], ["topk"], [2], [(0, 1)])),
        ("gpt2", "resample", False, "topk", 3, (1, 2)),
        ("gpt_neox", "zero", False, "everything", 2, (1,)),
        ("llama", "resample", True, "skip", 2, (0, 1)),
    ],
)
def test_edges_from_and_into_heads_are_interventions_in_the_frozen_model(
    architecture: Architecture,
    ablation: Ablation,
    varied: bool,
    variant: str,
    n_layers: int,
    head_layers: tuple[int, ...],
) -> None:
    case = random_case(
        architecture, ablation, varied=varied, variant=variant, n_layers=n_layers, head_layers=head_layers
    )
    frozen = Frozen(case.patched.lm, case.tokens, case.patched.transcoders.transcoders, head_layers)
    expected = by_intervention(case, frozen)
    found = matrix(DirectEdges(case.patched, case.task, case.prompts, case.nodes, ablation), case)
    is_head = torch.as_tensor(case.nodes.kind == HEAD)
    into = is_head[case.targets]
    assert_same(found[~into], expected[~into])
    assert_same(found[into], expected[into])
    assert int(is_head.sum()) == 4 * 3 * len(head_layers)
    for kind in (FEATURE, ERROR, TOKEN, HEAD):
        sources = torch.as_tensor(case.nodes.kind == kind)
        assert found[~into][:, sources].abs().max() > 1e-3, "each kind of source has edges"
        if case.nodes.layer[case.nodes.kind == kind].min() < max(head_layers):
            assert found[into][:, sources].abs().max() > 1e-3, "into heads, too"


@pytest.mark.parametrize(
    ("architecture", "layers", "head_layers"),
    [
        *product(ARCHITECTURES, [None, (0, 2)], [(0, 1, 2)]),
        ("gpt2", (1,), (2,)),
        ("llama", (2,), (0, 1)),
    ],
)
def test_incoming_edges_are_complete_with_heads(
    architecture: Architecture, layers: tuple[int, ...] | None, head_layers: tuple[int, ...]
) -> None:
    """Every source ablated at once, in the frozen model whose heads are constants."""
    case = random_case(architecture, "mean", n_layers=3, layers=layers, head_layers=head_layers)
    frozen = Frozen(case.patched.lm, case.tokens, case.patched.transcoders.transcoders, head_layers)
    outputs = torch.stack(frozen.clean.mlp_out)
    mean_output = mean_by_slot(outputs, case.slots, 3)[:, case.slots.clamp(min=0)]
    embedding = case.patched.lm.embedding.weight[case.tokens]
    mean_embedding = mean_by_slot(embedding[None], case.slots, 3)[0][case.slots.clamp(min=0)]
    ablated = frozen(dict(enumerate(mean_output - outputs)), mean_embedding - embedding, case.moved_heads)
    found = matrix(DirectEdges(case.patched, case.task, case.prompts, case.nodes, "mean"), case)
    assert_same(found.sum(1), case.values(frozen()) - case.values(ablated))


@pytest.mark.parametrize(
    ("architecture", "layers", "variant"),
    [
        *product(ARCHITECTURES, [None, (0,), (2,), (0, 2)], ["topk"]),
        ("gpt2", None, "skip"),
        ("llama", None, "cross_layer"),
        ("gpt_neox", None, "everything"),
        ("gpt2", (0, 2), "everything"),
    ],
)
def test_incoming_edges_are_complete(architecture: Architecture, layers: tuple[int, ...] | None, variant: str) -> None:
    """They sum to the target's pre-activation minus what it is when every source is ablated."""
    case = random_case(architecture, "mean", n_layers=3, layers=layers, variant=variant)
    transcoders = case.patched.transcoders.transcoders
    frozen = Frozen(case.patched.lm, case.tokens, transcoders)
    outputs = torch.stack(frozen.clean.mlp_out)
    for transcoder in transcoders:
        outputs[transcoder.layer] -= skipped(transcoder, frozen.clean.mlp_in[transcoder.layer])
    mean_output = mean_by_slot(outputs, case.slots, 3)[:, case.slots.clamp(min=0)]
    embedding = case.patched.lm.embedding.weight[case.tokens]
    mean_embedding = mean_by_slot(embedding[None], case.slots, 3)[0][case.slots.clamp(min=0)]
    ablated = frozen(dict(enumerate(mean_output - outputs)), mean_embedding - embedding)
    found = matrix(DirectEdges(case.patched, case.task, case.prompts, case.nodes, "mean"), case)
    assert_same(found.sum(1), case.values(frozen()) - case.values(ablated))


@pytest.mark.parametrize(("architecture", "variant"), [*product(ARCHITECTURES, ["topk"]), ("gpt2", "everything")])
def test_edges_leave_the_model_as_it_was(architecture: Architecture, variant: str) -> None:
    case = random_case(architecture, "mean", variant=variant)
    lm = case.patched.lm
    before = lm.hidden(case.tokens)
    for method in (DirectEdges, TotalEdges):
        method(case.patched, case.task, case.prompts, case.nodes, "mean").column(0)
        assert torch.equal(lm.hidden(case.tokens), before)
    assert not any(module._forward_hooks for module in lm.model.modules())
    assert lm.model.config._attn_implementation == "eager"


def test_direct_edges_at_the_residual_stream_stop_at_the_next_decomposed_layer() -> None:
    task = tiny_task()
    lm = random_model("gpt2", n_layers=3, dtype=torch.float64)
    patched = patched_double(lm, random_transcoders(lm, site="resid", dtype=torch.float64), task.discovery)
    nodes = all_nodes(patched, task.discovery, "mean")
    edges = DirectEdges(patched, task, task.discovery, nodes, "mean")
    for target in np.flatnonzero((nodes.kind == FEATURE) & (nodes.layer == 2)):
        sources, effects = edges.column(int(target))
        moved = nodes.layer[sources[effects != 0]]
        assert set(moved.tolist()) <= {1}
    sources, effects = edges.column(len(nodes) - 1)
    assert set(nodes.layer[sources[effects != 0]].tolist()) == {2}


def test_the_strongest_incoming_edges_are_kept() -> None:
    effects = torch.tensor([0.0, -3.0, 1.0, 2.0, 0.0, -0.5])

    def column(target: int) -> tuple[Tensor, Tensor]:
        return torch.arange(6) + target, effects

    sources, kept = strongest_incoming(column, 10, 2)
    assert sorted(zip(sources.tolist(), kept.tolist(), strict=True)) == [(11, -3.0), (13, 2.0)]
    sources, kept = strongest_incoming(column, 0, 6)
    assert sorted(sources.tolist()) == [1, 2, 3, 5]
