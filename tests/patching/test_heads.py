"""Heads as nodes of the patched model, against loops with plain hooks."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor

from hagd.activations.capture import Site
from hagd.config.model import Architecture
from hagd.config.stages import Ablation, ErrorMode
from hagd.patching.patched_model import PatchedModel
from hagd.patching.records import GateLayout
from hagd.tasks.records import Prompts
from tests.builders import ARCHITECTURES, patched_model, random_model, random_prompts, random_transcoders
from tests.patching.slow import at_scored, slow_logits, used
from tests.reference import HeadAttention, heads_of, mean_by_slot, run


def tiny(
    architecture: Architecture,
    prompts: Prompts,
    head_layers: tuple[int, ...] = (0, 2),
    site: Site = "mlp",
    layers: tuple[int, ...] | None = None,
) -> PatchedModel:
    lm = random_model(architecture, n_layers=3, length=6)
    return patched_model(lm, random_transcoders(lm, site=site, layers=layers), prompts, head_layers=head_layers)


def random_gates(patched: PatchedModel, *leading: int) -> Tensor:
    return torch.rand(*leading, *patched.gate_shape, generator=torch.Generator().manual_seed(9))


def with_heads(patched: PatchedModel, features: float, heads: float) -> Tensor:
    gates = torch.full(patched.gate_shape, features)
    gates[patched.layout.n_features :] = heads
    return gates


@pytest.mark.parametrize(
    ("architecture", "site", "ablation", "error"),
    [
        *product(ARCHITECTURES, ["mlp"], ["mean", "zero", "resample"], ["mean"]),
        ("gpt2", "resid", "mean", "mean"),
        ("gpt_neox", "resid", "resample", "keep"),
        ("llama", "mlp", "mean", "keep"),
    ],
)
def test_every_mode_is_what_the_slow_implementation_does(
    architecture: Architecture, site: Site, ablation: Ablation, error: ErrorMode
) -> None:
    prompts = random_prompts(n=3)
    patched = tiny(architecture, prompts, site=site)
    gates = random_gates(patched)
    layout = patched.layout
    parts = layout.features(gates), layout.heads(gates)
    assert parts[0].shape == (3, 3, 12) and parts[1].shape == (2, 3, 4)
    expected = slow_logits(patched, prompts, parts[0], ablation, error, parts[1])
    found = used(patched.logits(prompts, gates, ablation=ablation, error=error), prompts)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    free = used(patched.logits(prompts, with_heads(patched, 0, 1)), prompts)
    assert (free - found).abs().max() > 1e-2


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_complete_circuit_with_errors_is_the_full_model(architecture: Architecture) -> None:
    prompts = random_prompts(c=3)
    patched = tiny(architecture, prompts)
    full = patched.full_logits(prompts)
    for ablation in ("mean", "zero", "resample"):
        found = patched.logits(prompts, torch.ones(patched.gate_shape), ablation=ablation, error="keep")
        torch.testing.assert_close(found, full, rtol=1e-5, atol=1e-5)
        without = patched.logits(prompts, with_heads(patched, 1, 0), ablation=ablation, error="keep")
        assert (without - full).abs().max() > 1e-2


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_open_heads_change_no_bit(architecture: Architecture) -> None:
    """A circuit with every head is the circuit of a model whose heads are no nodes."""
    prompts = random_prompts()
    patched = tiny(architecture, prompts)
    plain = PatchedModel(patched.lm, patched.transcoders, patched.means)
    gates = torch.rand(plain.gate_shape, generator=torch.Generator().manual_seed(9))
    together = torch.cat([gates.flatten(), torch.ones(2 * 3 * 4)])
    assert torch.equal(patched.logits(prompts, together), plain.logits(prompts, gates))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_empty_circuit_has_heads_at_their_means(architecture: Architecture) -> None:
    prompts = random_prompts()
    patched = tiny(architecture, prompts, head_layers=(0, 1, 2))
    lm, tokens, slots = patched.lm, prompts.tokens[:, 0], prompts.slots[:, 0]
    z = heads_of(lm, tokens, (0, 1, 2))
    means = mean_by_slot(z.flatten(-2), slots, 3)[:, slots.clamp(min=0)].unflatten(-1, z.shape[-2:])
    mlps = mean_by_slot(torch.stack(run(lm, tokens).mlp_out), slots, 3)[:, slots.clamp(min=0)]
    attention = HeadAttention(lm, lambda layer, z: means[layer])
    expected = run(lm, tokens, lambda layer, read, written: mlps[layer], attention=attention)
    found = used(patched.logits(prompts, torch.zeros(patched.gate_shape)), prompts)
    torch.testing.assert_close(found, at_scored(expected.logits, prompts), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("layers", "head_layers"), [((2,), (1,)), ((1,), (1, 2)), ((0, 1), (2,)), ((2,), (0,))])
def test_heads_of_any_layers(layers: tuple[int, ...], head_layers: tuple[int, ...]) -> None:
    prompts = random_prompts(n=3, c=2)
    patched = tiny("llama", prompts, head_layers, layers=layers)
    gates = random_gates(patched)
    parts = patched.layout.features(gates), patched.layout.heads(gates)
    for _ in range(2):  # the second time, what lies below is read back
        found = used(patched.logits(prompts, gates, ablation="resample"), prompts)
        expected = slow_logits(patched, prompts, parts[0], "resample", "mean", parts[1])
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_each_prompt_may_have_its_own_gates() -> None:
    prompts = random_prompts(n=4, c=2)
    patched = tiny("gpt_neox", prompts)
    gates = random_gates(patched, 3)
    owner = torch.tensor([2, 0, 1, 2])
    together = patched.logits(prompts, gates, owner=owner)
    for i in range(4):
        alone = patched.logits(prompts[i : i + 1], gates[owner[i]])
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-4, atol=1e-5)
    assert (together - patched.logits(prompts, gates[0])).abs().max() > 1e-2


def test_gradients_of_head_gates_are_finite_differences() -> None:
    prompts = random_prompts()
    lm = random_model("llama", n_layers=2, length=6)
    patched = patched_model(lm, random_transcoders(lm, k=12), prompts, head_layers=(0, 1))
    gates = random_gates(patched).requires_grad_()
    weights = torch.randn(5, 1, 2, 8, generator=torch.Generator().manual_seed(0))
    (patched.logits(prompts, gates) * weights).sum().backward()
    assert gates.grad is not None
    step, first = 1e-3, patched.layout.n_features
    with torch.no_grad():
        for j in (first + gates.grad[first:].abs().topk(8).indices).tolist():
            ends = []
            for sign in (1, -1):
                moved = gates.detach().clone()
                moved[j] += sign * step
                ends.append((patched.logits(prompts, moved) * weights).sum().item())
            assert (ends[0] - ends[1]) / (2 * step) == pytest.approx(gates.grad[j].item(), rel=2e-2)


def test_half_precision_models_can_be_patched() -> None:
    prompts = random_prompts()
    lm = random_model("llama", n_layers=2, length=6, dtype=torch.bfloat16)
    patched = patched_model(lm, random_transcoders(lm), prompts, head_layers=(0, 1))
    plain = PatchedModel(lm, patched.transcoders, patched.means)
    opened = patched.logits(prompts, with_heads(patched, 1, 1))
    assert torch.equal(opened, plain.logits(prompts, torch.ones(plain.gate_shape)))
    assert (opened - patched.logits(prompts, with_heads(patched, 1, 0))).abs().max() > 0.05


def test_the_model_is_left_as_it_was() -> None:
    prompts = random_prompts()
    patched = tiny("gpt2", prompts)
    before = patched.lm.hidden(prompts.tokens[:, 0])
    patched.logits(prompts, random_gates(patched), ablation="resample", error="keep")
    with pytest.raises((RuntimeError, IndexError)):
        patched.logits(prompts, torch.zeros(3, 3, 12))
    assert torch.equal(patched.lm.hidden(prompts.tokens[:, 0]), before)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in patched.lm.model.modules())


def test_positions_in_the_gates() -> None:
    """Features keep theirs when heads become nodes; every position is one node."""
    plain, layout = GateLayout((1, 3), 3, 5), GateLayout((1, 3), 3, 5, (0, 3), 4)
    assert plain.shape == (2, 3, 5) and layout.shape == (30 + 24,)
    nodes = [tuple(x.tolist()) for x in layout.place(torch.arange(54))]
    expected = [(False, layer, slot, j) for layer in (1, 3) for slot in range(3) for j in range(5)]
    assert list(zip(*nodes, strict=True))[:30] == expected
    for ours, theirs in zip(layout.place(torch.arange(30)), plain.place(torch.arange(30)), strict=True):
        assert torch.equal(ours, theirs)
    heads = [(True, layer, slot, h) for layer in (0, 3) for slot in range(3) for h in range(4)]
    assert list(zip(*nodes, strict=True))[30:] == heads
    gates = torch.rand(2, 54)
    for i in range(2):
        assert torch.equal(layout.join(layout.features(gates)[i], layout.heads(gates)[i]), gates[i])
    assert layout.heads(gates)[1, 1, 2, 3] == gates[1, 53] and layout.features(gates)[1, 1, 2, 4] == gates[1, 29]
