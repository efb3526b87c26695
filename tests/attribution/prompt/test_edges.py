"""Edges of one prompt against interventions in the frozen model that is wired by hand. Double precision."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from hagd.attribution.prompt.graph import biases, without_sources
from hagd.attribution.prompt.logits import LogitTargets
from hagd.attribution.prompt.trace import decompose
from hagd.config.model import Architecture
from tests.attribution.prompt.cases import LENGTH, logit_targets, matrix, random_case, removals, values
from tests.builders import ARCHITECTURES, VARIANTS
from tests.reference import features_of

CASES: list[tuple[Architecture, str, tuple[int, ...] | None]] = [
    *product(ARCHITECTURES, VARIANTS, [None]),
    *product(ARCHITECTURES, ("topk", "everything"), [(0, 2), (1,)]),
]


@pytest.mark.parametrize(("architecture", "variant", "layers"), CASES)
def test_every_edge_is_an_intervention_in_the_frozen_model(
    architecture: Architecture, variant: str, layers: tuple[int, ...] | None
) -> None:
    case = random_case(architecture, variant, layers=layers)
    frozen = case.frozen
    expected = values(case, frozen.clean) - values(case, frozen(*removals(case)))
    scale = expected.abs().max().item()
    assert scale > 1e-2
    torch.testing.assert_close(matrix(case), expected, rtol=1e-5, atol=1e-6 * scale)


@pytest.mark.parametrize(("architecture", "variant", "layers"), CASES)
def test_edges_and_bias_add_up_to_what_is_read(
    architecture: Architecture, variant: str, layers: tuple[int, ...] | None
) -> None:
    case = random_case(architecture, variant, layers=layers)
    targets = logit_targets(case)
    last = targets.positions == LENGTH - 1
    chosen = LogitTargets(targets.nodes[last], targets.vectors[last], *(torch.zeros(3, dtype=torch.float64),) * 3)
    silent = without_sources(case.model, case.sources, case.transcoders, case.run.entering - case.run.embedding)
    found = biases(silent, case.sources, case.transcoders, chosen)
    sums = matrix(case).sum(1)
    n = case.sources.n_features
    torch.testing.assert_close(sums[:n] + found[:n], case.active.activation, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(sums[n:][last] + found[n:], case.run.logits[[1, 2, 5]], rtol=1e-6, atol=1e-6)
    assert found.abs().max() > 0.1


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
