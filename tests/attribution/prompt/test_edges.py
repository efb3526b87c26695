"""Edges of one prompt against interventions in the frozen model that is wired by hand. Double precision."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from hagd.attribution.prompt.graph import feature_biases, head_biases, without_sources
from hagd.attribution.prompt.logits import LogitTargets, head_directions
from hagd.attribution.prompt.rows import Targets, edges_into
from hagd.attribution.prompt.trace import decompose
from hagd.config.model import Architecture
from hagd.models.linear_parts import linear_attention
from tests.attribution.prompt.cases import (
    HEADS,
    LENGTH,
    Case,
    case_of,
    logit_targets,
    matrix,
    random_case,
    removals,
    sequential_neox,
    values,
)
from tests.builders import ARCHITECTURES, VARIANTS
from tests.reference import features_of, heads_of

CASES: list[tuple[Architecture, str, tuple[int, ...] | None, tuple[int, ...]]] = [
    *product(ARCHITECTURES, VARIANTS, [None], [()]),
    *product(ARCHITECTURES, ("topk", "everything"), [(0, 2), (1,)], [()]),
    *product(ARCHITECTURES, ("topk", "everything"), [None, (0, 2)], [(0, 1, 2), (1,)]),
]
"""Architecture, dictionaries, layers that have one, layers whose heads are nodes."""


@pytest.mark.parametrize(("architecture", "variant", "layers", "head_layers"), CASES)
def test_every_edge_is_an_intervention_in_the_frozen_model(
    architecture: Architecture, variant: str, layers: tuple[int, ...] | None, head_layers: tuple[int, ...]
) -> None:
    assert_interventions(random_case(architecture, variant, layers=layers, head_layers=head_layers))


@pytest.mark.parametrize("head_layers", [(), (0, 1, 2)])
def test_a_neox_without_parallel_residuals_is_read_like_a_sequential_model(head_layers: tuple[int, ...]) -> None:
    assert_interventions(case_of(sequential_neox(), "everything", head_layers=head_layers))


def assert_interventions(case: Case) -> None:
    frozen = case.frozen
    expected = values(case, frozen.clean) - values(case, frozen(*removals(case)))
    scale = expected.abs().max().item()
    assert scale > 1e-2
    found = matrix(case)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6 * scale)
    if case.directions:
        heads = slice(case.sources.n_features, case.sources.n_inner)
        of_heads = expected[heads].abs().max().item()
        torch.testing.assert_close(found[heads], expected[heads], rtol=1e-5, atol=1e-6 * of_heads)
        assert of_heads > 1e-2 and expected[:, heads].abs().max() > 1e-2


@pytest.mark.parametrize(("architecture", "variant", "layers", "head_layers"), CASES)
def test_edges_and_bias_add_up_to_what_is_read(
    architecture: Architecture, variant: str, layers: tuple[int, ...] | None, head_layers: tuple[int, ...]
) -> None:
    case = random_case(architecture, variant, layers=layers, head_layers=head_layers)
    targets = logit_targets(case)
    last = targets.positions == LENGTH - 1
    chosen = LogitTargets(targets.nodes[last], targets.vectors[last], *(torch.zeros(3, dtype=torch.float64),) * 3)
    silent = without_sources(case.model, case.sources, case.transcoders, case.run.entering - case.run.embedding)
    features = torch.cat(feature_biases(silent, case.sources, case.transcoders))
    sums, n = matrix(case).sum(1), case.sources.n_features
    torch.testing.assert_close(sums[:n] + features, case.active.activation, rtol=1e-6, atol=1e-6)
    logits = chosen.vectors @ silent.final[-1]
    torch.testing.assert_close(sums[-5:][last] + logits, case.run.logits[[1, 2, 5]], rtol=1e-6, atol=1e-6)
    assert features.abs().max() > 0.1
    if head_layers:
        heads = torch.cat(head_biases(silent, case.model, case.directions))
        z = heads_of(case.lm, case.tokens[None], head_layers)[:, 0]
        read = (z * torch.stack(list(case.directions.values()))).sum(-1).flatten()
        torch.testing.assert_close(sums[n:-5] + heads, read, rtol=1e-6, atol=1e-6)
        assert heads.abs().max() > 1e-2


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_heads_are_read_along_the_gradient_of_what_is_explained(architecture: Architecture) -> None:
    case = random_case(architecture, head_layers=(0, 2))
    weight, weights = case.lm.unembedding.weight, torch.tensor([0.7, 0.4], dtype=torch.float64)
    vectors = torch.stack([weight[1], -weight[5]])
    logits = LogitTargets(torch.tensor([1, 5]), vectors, torch.zeros(2), weights, weights)
    found = head_directions(case.lm, case.run, logits)
    assert list(found) == [0, 2]
    for layer, u in found.items():
        torch.testing.assert_close(u, case.directions[layer], rtol=1e-6, atol=1e-9)
        assert (u[-1] != 0).all() and (layer == 0 or not u[:-1].any()), "above the last layer positions do not mix"


def edges_of(case: Case, targets: Targets) -> torch.Tensor:
    """`[R, sources]`."""
    rows = edges_into(case.model, case.sources, targets)
    out = torch.zeros(len(targets), len(case.sources), dtype=torch.float64)
    out[:, rows.columns] = rows.dense
    return out


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_paths_through_heads_are_what_attention_passed_on_without_them(architecture: Architecture) -> None:
    """Two layers: read along a target's own gradient, the heads between take up all that went through attention."""
    case, plain = (random_case(architecture, n_layers=2, head_layers=layers) for layers in ((0, 1), ()))
    logit = logit_targets(plain)
    target = Targets(2, logit.nodes[-1:], logit.positions[-1:], logit.vectors[-1:])
    whole, direct = edges_of(plain, target)[0], edges_of(case, target)[0]
    gradients: dict[str, torch.Tensor] = {}
    case.model.pull(
        2,
        target.positions,
        case.model.at_unembedding(target.positions, target.vectors),
        lambda writer, layer, g: gradients.update({f"{writer} {layer}": g}),
    )
    through = torch.zeros(len(case.sources), dtype=torch.float64)
    for layer in (0, 1):
        u = torch.zeros(LENGTH, HEADS, 4, dtype=torch.float64)
        u[-1] = torch.einsum("d,hed->he", gradients[f"heads {layer}"][0], linear_attention(case.lm, layer, u.dtype).W_O)
        last = torch.full((HEADS,), LENGTH - 1)
        vectors = case.model.head_reads(layer, u)[-1]
        found = edges_of(case, Targets(layer, torch.arange(HEADS), last, vectors, "heads", torch.arange(HEADS)))
        through += found.sum(0)
    feature = slice(0, case.sources.n_features)
    assert through[feature].abs().max() > 1e-2 and direct[feature].abs().max() > 1e-2
    torch.testing.assert_close(direct[feature] + through[feature], whole[feature], rtol=1e-6, atol=1e-9)


def test_heads_above_a_target_change_none_of_its_edges() -> None:
    plain, case = random_case("llama", "everything"), random_case("llama", "everything", head_layers=(2,))
    below, shift = plain.sources.features_below(2), case.sources.n_inner - case.sources.n_features
    n = plain.sources.n_features
    found = torch.cat([matrix(case)[:below, :n], matrix(case)[:below, n + shift :]], dim=1)
    assert torch.equal(found, matrix(plain)[:below]) and not matrix(case)[:below, n : n + shift].any()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_errors_and_features_are_what_each_mlp_wrote(architecture: Architecture) -> None:
    case = random_case(architecture, "cross_layer")
    f, errors = features_of(case.lm, case.transcoders, case.tokens[None])
    layer, position, feature = f[:, 0].nonzero(as_tuple=True)
    assert torch.equal(layer, case.active.layer) and torch.equal(position, case.active.position)
    assert torch.equal(feature, case.active.feature)
    torch.testing.assert_close(case.active.activation, f[layer, 0, position, feature], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(case.sources.errors, errors[:, 0], rtol=1e-6, atol=1e-6)
    written = torch.stack([case.sources.written(i) for i in range(3)])
    biases_only = torch.stack([t.b_dec for t in case.transcoders.transcoders])[:, None]
    torch.testing.assert_close(written + biases_only, torch.stack(case.run.mlp_out), rtol=1e-6, atol=1e-6)


def test_the_first_position_can_be_left_to_the_errors() -> None:
    case = random_case("gpt2", "skip")
    active, errors = decompose(case.run, case.transcoders, skip_first=True)
    assert (active.position > 0).all() and len(active) < len(case.active)
    transcoder = case.transcoders.transcoders[1]
    whole = case.run.mlp_out[1][0] - transcoder.b_dec - case.run.mlp_in[1][0] @ transcoder.W_skip
    torch.testing.assert_close(errors[1][0], whole)
    torch.testing.assert_close(errors[1][1:], case.sources.errors[1, 1:])
