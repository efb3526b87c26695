"""The graph of one prompt as a whole: identities, logits, what is stored of it, the most influential features."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import MistralConfig, MistralForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hagd.attribution.prompt.compute import Calculation, Computed
from hagd.attribution.prompt.graph import at_last_position, build_prompt_graph
from hagd.attribution.prompt.influence import pass_down
from hagd.attribution.prompt.logits import DIFFERENCE, LogitTargets, difference, given, head_directions, likely
from hagd.attribution.prompt.records import PromptGraph
from hagd.attribution.prompt.trace import trace
from hagd.attribution.records import ERROR, FEATURE, HEAD, LOGIT, TOKEN
from hagd.config.model import Architecture
from hagd.config.stages import GraphConfig
from hagd.errors import NumericalError
from hagd.models.language_model import LanguageModel
from tests.attribution.prompt.cases import HEADS, LENGTH, Case, case_of, explained, matrix, random_case
from tests.builders import ARCHITECTURES, VOCABULARY, randomise
from tests.reference import HeadAttention, run


def calculation(case: Case, logits: LogitTargets, strongest: int | None = None) -> Calculation:
    targets = at_last_position(case.sources, logits)
    weights = logits.weights.double().numpy()
    directions = head_directions(case.lm, case.run, logits)
    return Calculation(case.model, case.sources, case.transcoders, targets, weights, strongest, directions=directions)


def dense(computed: Computed, size: int) -> np.ndarray:
    """Rows are targets."""
    out = np.zeros((size, size), dtype=np.float32)
    for block in computed.edges.from_above():
        out[block.targets[block.row], block.source] = block.value
    return out


def graph(case: Case, tmp_path: Path, **options: Any) -> PromptGraph:
    config = GraphConfig(scope="prompt", prompt="any", **options)
    logits = likely(case.lm, case.run, 4, 0.9)
    return build_prompt_graph(case.lm, case.transcoders, case.run, logits, config, tmp_path)


def series(matrix: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """`Σ_t w Âᵗ`, t from 1, until nothing is left."""
    share = np.abs(matrix) / np.maximum(np.abs(matrix).sum(1, keepdims=True), 1e-30)
    total, step = np.zeros_like(weights), weights @ share
    while step.any():
        total, step = total + step, step @ share
    return total


@pytest.mark.parametrize(("architecture", "head_layers"), [*product(ARCHITECTURES, [(), (0, 1, 2), (1,)])])
def test_stored_edges_are_all_edges(architecture: Architecture, head_layers: tuple[int, ...], tmp_path: Path) -> None:
    case = random_case(architecture, "cross_layer", head_layers=head_layers)
    logits = given(case.lm, case.run, [1, 2])
    work = calculation(case, logits)
    work.directions = case.directions
    computed = work.all_features(tmp_path)
    found = dense(computed, len(work.weights))
    n = case.sources.n_inner
    np.testing.assert_allclose(found[:n, : len(case.sources)], matrix(case)[:n].numpy(), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(computed.incoming[:n], found[:n].sum(1), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(computed.influence, pass_down(computed.edges, work.weights), rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(computed.influence, series(found, work.weights), rtol=1e-4, atol=1e-7)
    assert (found[len(case.sources) :] != 0).any(1).all() and not found[n : len(case.sources)].any()


def test_only_the_strongest_edges_can_be_stored_and_influence_still_counts_all(tmp_path: Path) -> None:
    case = random_case("llama")
    logits = given(case.lm, case.run, [1, 2])
    whole = calculation(case, logits).all_features(tmp_path / "all")
    part = calculation(case, logits, strongest=5).all_features(tmp_path / "some")
    size = len(case.sources) + 2
    every, some = dense(whole, size), dense(part, size)
    assert ((some != 0).sum(1) <= 5).all() and np.array_equal(some[some != 0], every[some != 0])
    for row in np.flatnonzero((some != 0).sum(1) == 5):
        left_out = np.where(some[row] == 0, np.abs(every[row]), 0).max()
        assert np.abs(some[row][some[row] != 0]).min() >= left_out
    np.testing.assert_allclose(part.influence, whole.influence, rtol=1e-12)
    np.testing.assert_allclose(part.incoming, whole.incoming, rtol=1e-12)


@pytest.mark.parametrize("head_layers", [(), (0, 1, 2)])
def test_the_most_influential_nodes_are_explained_alone(head_layers: tuple[int, ...], tmp_path: Path) -> None:
    case = random_case("gpt2", head_layers=head_layers)
    logits = given(case.lm, case.run, [3])
    n, size = case.sources.n_inner, len(case.sources) + 1
    whole = calculation(case, logits).all_features(tmp_path / "all")
    part = calculation(case, logits).most_influential(tmp_path / "some", 12)
    chosen = np.flatnonzero(part.chosen[:n])
    assert len(chosen) == 12 and part.chosen[n:].all()
    rows = np.append(chosen, size - 1)
    assert np.array_equal(dense(part, size)[rows], dense(whole, size)[rows])
    assert sorted(part.edges.targets.tolist()) == rows.tolist()
    assert not part.influence[:n][~part.chosen[:n]].any()
    best = np.argsort(-whole.influence[:n])[:12]
    assert len(set(best) & set(chosen)) >= 8, "nearly those of the whole graph"
    assert (chosen >= case.sources.n_features).any() == bool(head_layers)
    everything = calculation(case, logits).most_influential(tmp_path / "every", n)
    np.testing.assert_allclose(everything.influence, whole.influence, rtol=1e-4, atol=1e-7)


def test_logits_are_taken_off_their_mean_and_differences_are_one_node(tmp_path: Path) -> None:
    case = random_case("gpt_neox")
    logits = case.run.logits
    for found, expected in (
        (given(case.lm, case.run, [1, 4]), (logits - logits.mean())[[1, 4]]),
        (difference(case.lm, case.run, 1, 4), (logits[1] - logits[4])[None]),
    ):
        torch.testing.assert_close(found.vectors @ case.run.final[-1] + found.bias, expected, rtol=1e-6, atol=1e-6)
    share = logits.softmax(-1)
    several = likely(case.lm, case.run, 8, 0.9)
    assert torch.equal(several.tokens, share.sort(descending=True).indices[: len(several)])
    assert several.weights.sum() >= 0.9 > several.weights[:-1].sum()
    assert len(likely(case.lm, case.run, 2, 1.0)) == 2
    one = difference(case.lm, case.run, 1, 4)
    config = GraphConfig(scope="prompt", prompt="any")
    nodes = build_prompt_graph(case.lm, case.transcoders, case.run, one, config, tmp_path).nodes
    assert nodes.feature[nodes.kind == LOGIT].tolist() == [DIFFERENCE]


@pytest.mark.parametrize(("architecture", "head_layers"), [*product(ARCHITECTURES, [(), (0, 2)])])
def test_nodes_are_typed_and_no_two_are_the_same(
    architecture: Architecture, head_layers: tuple[int, ...], tmp_path: Path
) -> None:
    case = random_case(architecture, head_layers=head_layers)
    found = graph(case, tmp_path, pruning={"nodes": 1.0, "edges": 1.0})
    nodes = found.nodes
    ids = list(zip(nodes.kind, nodes.layer, nodes.position, nodes.feature, strict=True))
    assert len(set(ids)) == len(ids) == len(nodes)
    assert set(nodes.kind) == {FEATURE, ERROR, TOKEN, LOGIT} | ({HEAD} if head_layers else set())
    assert {i[1:] for i in ids if i[0] == HEAD} <= set(product(head_layers, range(LENGTH), range(HEADS)))
    active = set(
        zip(*(x.tolist() for x in (case.active.layer, case.active.position, case.active.feature)), strict=True)
    )
    assert {i[1:] for i in ids if i[0] == FEATURE} <= active
    assert [i[1:] for i in ids if i[0] == TOKEN] == [(-1, p, int(case.tokens[p])) for p in range(LENGTH)]
    source, target = found.edge_index
    below = nodes.layer[source] < nodes.layer[target]
    if architecture != "gpt_neox":  # an MLP reads the heads of its own layer
        own = (nodes.kind[source] == HEAD) & (nodes.kind[target] == FEATURE)
        below |= own & (nodes.layer[source] == nodes.layer[target])
    assert below.all() and (nodes.position[source] <= nodes.position[target]).all()
    assert found.edge_influence.min() > 0 and found.sum_error < 1e-5
    assert 0 < found.replacement < 1 and 0 < found.completeness < 1


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_record_tells_what_a_head_does(architecture: Architecture, tmp_path: Path) -> None:
    """Unpruned, edges and bias of a head add up to `u · z`: by how much what is explained changes as `z` shrinks."""
    case = random_case(architecture, head_layers=(0, 1, 2))
    weight, weights = case.lm.unembedding.weight, torch.tensor([0.7, 0.4], dtype=torch.float64)
    vectors = torch.stack([weight[1], -weight[5]])
    logits = replace(given(case.lm, case.run, [1, 5]), vectors=vectors, bias=torch.zeros(2), weights=weights)
    config = GraphConfig(scope="prompt", prompt="any", pruning={"nodes": 1.0, "edges": 1.0})
    found = build_prompt_graph(case.lm, case.transcoders, case.run, logits, config, tmp_path)
    nodes, (_, target) = found.nodes, found.edge_index
    heads = np.flatnonzero(nodes.kind == HEAD)
    assert len(heads) > 8
    incoming = np.bincount(target, found.edge_attr, minlength=len(nodes))
    np.testing.assert_allclose((incoming + nodes.bias)[heads], nodes.value[heads], rtol=1e-4, atol=1e-5)
    for node in heads[:: len(heads) // 6]:
        layer, p, head = int(nodes.layer[node]), int(nodes.position[node]), int(nodes.feature[node])
        both = []
        for step in (-3e-3, 3e-3):  # softmax is in single precision

            def shrink(own: int, z: Tensor, step: float = step, at: tuple[int, int, int] = (layer, p, head)) -> Tensor:
                scale = torch.ones(*z.shape[:3], 1, dtype=z.dtype)
                if own == at[0]:
                    scale[0, at[1], at[2]] += step
                return z * scale

            both.append(
                explained(run(case.lm, case.tokens[None], attention=HeadAttention(case.lm, shrink)).logits[0, -1])
            )
        assert float(both[1] - both[0]) / 6e-3 == pytest.approx(nodes.value[node], rel=5e-3, abs=1e-5)


def test_a_graph_explains_less_when_less_is_kept(tmp_path: Path) -> None:
    case = random_case("llama")
    sizes = []
    for i, share in enumerate((0.3, 0.6, 0.9, 1.0)):
        found = graph(case, tmp_path / str(i), pruning={"nodes": share, "edges": 0.98})
        sizes.append((len(found.nodes), found.edge_index.shape[1]))
    assert sizes == sorted(sizes) and len(set(sizes)) == 4


def test_a_model_that_does_more_than_the_frozen_one_is_noticed(tmp_path: Path) -> None:
    case = random_case("gpt2")
    run = replace(case.run, patterns=tuple(pattern.roll(1, 0) for pattern in case.run.patterns))
    config = GraphConfig(scope="prompt", prompt="any")
    with pytest.raises(NumericalError, match="add up to the model's activations"):
        build_prompt_graph(case.lm, case.transcoders, run, likely(case.lm, run, 4, 0.9), config, tmp_path)


def test_a_model_whose_attention_is_not_the_traced_one_is_refused(tmp_path: Path) -> None:
    case = random_case("llama")
    ALL_ATTENTION_FUNCTIONS.register("capped", capped_attention)
    case.lm.model.config._attn_implementation = "capped"
    run = trace(case.lm, case.tokens)
    config = GraphConfig(scope="prompt", prompt="any")
    with pytest.raises(NumericalError, match=r"expected the run with HAGD's own attention to give the model's logits"):
        build_prompt_graph(case.lm, case.transcoders, run, likely(case.lm, run, 4, 0.9), config, tmp_path)


def capped_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, **_: Any
) -> tuple[Tensor, None]:
    """Causal, with a soft cap."""
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    scores = (query @ key.transpose(-1, -2) * scaling).tanh()
    causal = torch.ones_like(scores, dtype=torch.bool).tril()
    return (scores.masked_fill(~causal, float("-inf")).softmax(-1) @ value).transpose(1, 2), None


def test_a_window_shorter_than_the_prompt_is_in_the_graph(tmp_path: Path) -> None:
    window = 2
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    lm = LanguageModel(MistralForCausalLM(MistralConfig(**sizes, **heads, sliding_window=window)))
    randomise(lm)
    lm.model.to(torch.float64)
    case = case_of(lm)
    within = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril() & torch.ones(LENGTH, LENGTH).triu(1 - window).bool()
    assert all(((pattern != 0) == within).all() for pattern in case.run.patterns)
    last = torch.tensor([[LENGTH - 1]])
    torch.testing.assert_close(case.run.logits.float(), lm.logits_at(case.tokens[None], last)[0, 0])
    found = graph(case, tmp_path, pruning={"nodes": 1.0, "edges": 1.0})
    nodes, (source, target) = found.nodes, found.edge_index
    first = nodes.layer[target] == 0
    assert (nodes.position[target] - nodes.position[source])[first].max() == window - 1
