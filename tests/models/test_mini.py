from __future__ import annotations

from typing import get_args

import pytest
import torch

from hagd.config.model import Architecture, MiniModel
from hagd.errors import ModelError
from hagd.models.freezing import frozen_linear
from hagd.models.mini import build_mini, mini_from_state, mini_state

ARCHITECTURES = get_args(Architecture)


def config(architecture: Architecture, **changes: int) -> MiniModel:
    return MiniModel(name="m", architecture=architecture, d_model=16, n_heads=2, d_mlp=24, **changes)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_sizes_are_the_configured_ones(architecture: Architecture) -> None:
    lm = build_mini(config(architecture, n_layers=3), vocab_size=7, n_positions=5, seed=0)
    assert (lm.n_layers, lm.d_model, lm.vocab_size) == (3, 16, 7)
    logits = lm.logits_at(torch.arange(5)[None], torch.tensor([[0, 4]]))
    assert logits.shape == (1, 2, 7)
    assert not lm.model.training and lm.unembedding.weight is not lm.embedding.weight


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_weights_depend_on_the_seed_alone(architecture: Architecture) -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    first = mini_state(build_mini(config(architecture), 7, 5, seed=1))
    assert torch.equal(torch.rand(2), expected)
    again, other = (mini_state(build_mini(config(architecture), 7, 5, seed=seed)) for seed in (1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_state_round_trip_is_bitwise(architecture: Architecture) -> None:
    lm = build_mini(config(architecture), 7, 5, seed=4)
    restored = mini_from_state(config(architecture), 7, 5, mini_state(lm))
    tokens, positions = torch.tensor([[1, 2, 3, 6]]), torch.tensor([[3]])
    assert torch.equal(lm.logits_at(tokens, positions), restored.logits_at(tokens, positions))


def test_state_of_another_model_is_refused() -> None:
    state = mini_state(build_mini(config("gpt2"), 7, 5, seed=0))
    with pytest.raises(ModelError, match=r"do not fit model.architecture=llama"):
        mini_from_state(config("llama"), 7, 5, state)
    with pytest.raises(ModelError, match="vocabulary 8"):
        mini_from_state(config("gpt2"), 8, 5, state)


def test_llama_shares_keys_and_values_among_heads() -> None:
    lm = build_mini(config("llama", n_kv_heads=1), 7, 5, seed=0)
    assert lm.layers[0].self_attn.k_proj.weight.shape == (8, 16)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_freezing_leaves_the_forward_pass_as_it_is(architecture: Architecture) -> None:
    lm = build_mini(config(architecture), 7, 6, seed=0)
    tokens, positions = torch.tensor([[1, 2, 3, 6, 0, 2]]), torch.tensor([[1, 5]])
    free = lm.logits_at(tokens, positions)
    with frozen_linear(lm):
        torch.testing.assert_close(lm.logits_at(tokens, positions), free, atol=1e-5, rtol=1e-4)
