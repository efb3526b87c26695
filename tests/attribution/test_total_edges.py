"""Total edges against finite differences of the model that is not frozen, in double precision."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hagd.activations.capture import Site
from hagd.attribution.direct_edges import DirectEdges
from hagd.attribution.records import FEATURE, HEAD
from hagd.attribution.total_edges import TotalEdges
from hagd.config.model import Architecture
from hagd.config.stages import Ablation
from tests.attribution.edge_cases import SLOW, Case, all_nodes, assert_same, matrix, random_case, removal
from tests.builders import random_model, random_transcoders, tiny_task
from tests.reference import HeadAttention, Pass, encode, run, skipped, written_features


def with_features_moved(case: Case, moved: dict[int, Tensor], heads: dict[int, Tensor] | None = None) -> Pass:
    """The model that is not frozen, whose decomposed sites write what `f + moved` and the clean error give, and whose
    heads give what they do plus `heads`."""
    transcoders = case.patched.transcoders
    features: list[Tensor] = []

    def rewrite(layer: int, read: Tensor, written: Tensor) -> Tensor:
        if layer not in transcoders.layers:
            return written
        i = transcoders.layers.index(layer)
        transcoder = transcoders.transcoders[i]
        features.append(encode(transcoder, read) + moved.get(i, 0.0))
        beside = skipped(transcoder, read) + transcoder.b_dec + case.errors[i]
        return written_features(transcoders, i, features) + beside

    attention = HeadAttention(case.patched.lm, lambda layer, z: z + (heads or {}).get(layer, 0.0))
    return run(case.patched.lm, case.tokens, write=rewrite, attention=attention)


@pytest.mark.parametrize(
    ("architecture", "ablation"),
    [("gpt2", "mean"), ("gpt_neox", "resample"), pytest.param("llama", "zero", marks=SLOW)],
)
def test_total_edges_of_heads_are_finite_differences_of_the_real_model(
    architecture: Architecture, ablation: Ablation
) -> None:
    case = random_case(architecture, ablation, n_layers=3, layers=(0, 2), head_layers=(1, 2))
    found = matrix(TotalEdges(case.patched, case.task, case.prompts, case.nodes, ablation), case)
    step, sources = 1e-4, np.flatnonzero(np.isin(case.nodes.kind, (FEATURE, HEAD)))[::3]
    expected = torch.zeros_like(found)
    for node in sources:
        kind, layer, slot, number = (
            int(x[node]) for x in (case.nodes.kind, case.nodes.layer, case.nodes.slot, case.nodes.feature)
        )
        here, ends = (case.slots == slot).double()[..., None], []
        for sign in (step, -step):
            if kind == HEAD:
                _, _, moved = removal(case, node)
                ends.append(case.values(with_features_moved(case, {}, {layer: -sign * moved[layer]})))
            else:
                i, only = (0, 2).index(layer), torch.eye(12, dtype=torch.float64)[number]
                moved = {i: sign * (case.f[i] - case.ablated[i]) * here * only}
                ends.append(case.values(with_features_moved(case, moved)))
        expected[:, node] = (ends[0] - ends[1]) / (2 * step)
    tolerance = 1e-5 if architecture == "gpt2" else 5e-3
    is_head, into = case.nodes.kind[sources] == HEAD, case.nodes.kind[case.targets] == HEAD
    for rows in (into, ~into):
        assert_same(found[rows][:, sources], expected[rows][:, sources], tolerance)
    assert found[:, sources][:, is_head].abs().max() > 1e-2


@pytest.mark.parametrize(
    ("architecture", "ablation", "varied", "k", "variant"),
    [
        ("gpt2", "mean", False, 4, "topk"),
        ("gpt2", "resample", True, 12, "topk"),
        ("gpt_neox", "zero", False, 12, "topk"),
        ("gpt2", "mean", False, 4, "skip"),
        ("gpt2", "mean", False, 4, "cross_layer"),
        ("gpt2", "resample", True, 4, "everything"),
    ],
)
def test_total_edges_are_finite_differences_of_the_real_model(
    architecture: Architecture, ablation: Ablation, varied: bool, k: int, variant: str
) -> None:
    case = random_case(architecture, ablation, varied=varied, n_layers=3, k=k, variant=variant)
    case.prompts = case.prompts[:4]
    case.f, case.errors, case.ablated = case.f[:, :4], case.errors[:, :4], case.ablated[:, :4]
    found = matrix(TotalEdges(case.patched, case.task, case.prompts, case.nodes, ablation), case)
    direct = matrix(DirectEdges(case.patched, case.task, case.prompts, case.nodes, ablation), case)
    layers, step = case.patched.transcoders.layers, 1e-4
    sources = np.flatnonzero(case.nodes.kind == FEATURE)[::4]
    expected = torch.zeros_like(found)
    for node in sources:
        i, j = layers.index(int(case.nodes.layer[node])), int(case.nodes.feature[node])
        moved = torch.zeros_like(case.f[i])
        moved[..., j] = (case.f[i] - case.ablated[i])[..., j] * (case.slots == int(case.nodes.slot[node]))
        up, down = (case.values(with_features_moved(case, {i: sign * step * moved})) for sign in (1, -1))
        expected[:, node] = (up - down) / (2 * step)
    # NeoX and Llama compute softmax in single precision, which limits finite differences.
    tolerance = 1e-5 if architecture == "gpt2" else 5e-3
    assert_same(found[:, sources], expected[:, sources], tolerance)
    assert (found[:, case.nodes.kind != FEATURE] == 0).all()
    assert (found - direct)[:, sources].abs().max() > 1e-2, "paths through other nodes are counted"


@pytest.mark.parametrize("method", [DirectEdges, TotalEdges])
@pytest.mark.parametrize(
    ("site", "variant"), [("mlp", {}), ("resid", {}), ("mlp", {"skip": True, "cross_layer": True})]
)
def test_half_precision_models_have_edges(
    method: type[DirectEdges | TotalEdges], site: Site, variant: dict[str, Any]
) -> None:
    from tests.builders import patched_model

    task = tiny_task()
    columns = []
    for dtype in (torch.float32, torch.bfloat16):
        lm = random_model("llama", dtype=torch.bfloat16)
        lm.model.to(dtype)
        patched = patched_model(lm, random_transcoders(lm, site=site, k=12, **variant), task.discovery)
        nodes = all_nodes(patched, task.discovery, "resample")
        order = np.lexsort((nodes.feature, nodes.slot, nodes.layer, nodes.kind))
        dense = torch.zeros(len(nodes))
        sources, effects = method(patched, task, task.discovery, nodes, "resample").column(len(nodes) - 1)
        dense[sources] = effects.detach().float()
        columns.append(dense[order])
    assert torch.corrcoef(torch.stack(columns))[0, 1] > 0.98
