from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor

from hagd.activations.capture import Site
from hagd.attribution.heads import head_deviations, head_directions
from hagd.attribution.node_attribution import attribute_nodes
from hagd.config.model import Architecture
from hagd.config.stages import Ablation, ErrorMode, GraphConfig
from hagd.patching.objective import Objective
from hagd.tasks.scoring import logit_difference
from tests.builders import (
    VARIANTS,
    patched_model,
    prompts_task,
    random_model,
    random_prompts,
    random_transcoders,
)
from tests.reference import encode, features_of, run


def objective(
    architecture: Architecture = "gpt2",
    *,
    site: Site = "mlp",
    c: int = 1,
    k: int = 4,
    ablation: Ablation = "mean",
    error: ErrorMode = "mean",
    batch_size: int = 3,
    variant: str = "topk",
    head_layers: tuple[int, ...] = (),
) -> Objective:
    prompts = random_prompts(n=7, c=c)
    lm = random_model(architecture, length=6)
    transcoders = random_transcoders(lm, site=site, k=k, **VARIANTS[variant])
    patched = patched_model(lm, transcoders, prompts, head_layers=head_layers)
    return Objective(patched, prompts_task(prompts), prompts, ablation=ablation, error=error, batch_size=batch_size)


def slow_attribution(target: Objective, metric: str, points: list[float]) -> Tensor:
    """One prompt and one point of the path at a time."""
    total = torch.zeros(target.patched.gate_shape)
    for point, row in product(points, range(len(target))):
        gates = torch.full(target.patched.gate_shape, point, requires_grad=True)
        (gradient,) = torch.autograd.grad(target.metric(metric, gates, torch.tensor([row])).sum(), gates)
        total += gradient / (len(target) * len(points))
    return total


@pytest.mark.parametrize("metric", ["logit_difference", "log_probability"])
@pytest.mark.parametrize(("c", "head_layers"), [(1, ()), (3, ()), (1, (0, 1))])
@pytest.mark.parametrize(
    ("method", "points"), [("integrated_gradients", [0.125, 0.375, 0.625, 0.875]), ("gradient_activation", [1.0])]
)
def test_attributions_are_those_of_a_loop(
    metric: str, c: int, head_layers: tuple[int, ...], method: str, points: list[float]
) -> None:
    target = objective(c=c, head_layers=head_layers)
    config = GraphConfig(attribution=method, ig_steps=4, metric=metric)  # type: ignore[arg-type]
    found = attribute_nodes(target, config)
    expected = slow_attribution(target, metric, points)
    assert expected.abs().max() > 1e-2
    torch.testing.assert_close(found.signed, expected, rtol=1e-3, atol=1e-5)
    assert torch.equal(found.importance, found.signed.abs())
    layout = target.patched.layout
    assert torch.equal(layout.features(found.live), target.patched.means.frequency > 0)
    assert not head_layers or layout.heads(found.live).all()


@pytest.mark.parametrize(
    ("architecture", "site", "ablation", "error", "variant", "head_layers"),
    [
        ("gpt2", "mlp", "mean", "mean", "topk", ()),
        pytest.param("gpt_neox", "mlp", "zero", "keep", "topk", (), marks=pytest.mark.slow),
        ("llama", "resid", "resample", "keep", "topk", ()),
        pytest.param("llama", "mlp", "resample", "mean", "topk", (), marks=pytest.mark.slow),
        ("gpt2", "mlp", "mean", "mean", "skip", ()),
        ("gpt2", "mlp", "mean", "mean", "cross_layer", ()),
        ("gpt2", "mlp", "mean", "mean", "topk", (0, 1)),
        ("gpt_neox", "mlp", "resample", "keep", "topk", (1,)),
        pytest.param("llama", "resid", "zero", "keep", "topk", (0, 1), marks=pytest.mark.slow),
    ],
)
def test_attributions_add_up(
    architecture: Architecture,
    site: Site,
    ablation: Ablation,
    error: ErrorMode,
    variant: str,
    head_layers: tuple[int, ...],
) -> None:
    """To what closing every gate changes, when no feature is switched by TopK."""
    options = {"k": 12, "batch_size": 7, "variant": variant, "head_layers": head_layers}
    target = objective(architecture, site=site, ablation=ablation, error=error, **options)  # type: ignore[arg-type]
    found = attribute_nodes(target, GraphConfig(ig_steps=50))
    ends = [target.outcome(torch.full(target.patched.gate_shape, g)).logit_difference.mean().item() for g in (1.0, 0.0)]
    everything = found.importance.sum().item()
    assert everything > 0.3, "much that may not add up"
    assert found.signed.sum().item() == pytest.approx(ends[0] - ends[1], abs=0.003 * everything)


def test_one_step_at_the_end_is_gradient_times_activation() -> None:
    """∂metric/∂g at g = 1 is ∂metric/∂f · (f − v): here by moving the one feature's gate a little."""
    target = objective(k=12)
    found = attribute_nodes(target, GraphConfig(attribution="gradient_activation")).signed
    step = 1e-2
    for j in found.abs().flatten().topk(5).indices.tolist():
        ends = []
        for sign in (1, -1):
            gates = torch.ones(target.patched.gate_shape)
            gates.view(-1)[j] += sign * step
            ends.append(target.outcome(gates).logit_difference.mean().item())
        assert (ends[0] - ends[1]) / (2 * step) == pytest.approx(found.flatten()[j].item(), rel=0.02)


@pytest.mark.parametrize(("share", "ablation"), [(0.25, "mean"), (0.75, "resample"), (0.5, "zero")])
def test_on_mixed_inputs_a_gate_moves_the_deviation_of_the_clean_prompt(share: float, ablation: Ablation) -> None:
    """Against the model wired by hand: mixed embeddings, clean errors, and one feature moved by (g − 1) · (f − v)."""
    target = objective(k=12, ablation=ablation, error="keep")
    patched, prompts, lm = target.patched, target.prompts, target.patched.lm
    tokens, other, slots = (x[:, 0] for x in (prompts.tokens, prompts.counterfactual, prompts.slots))
    clean, errors = features_of(lm, patched.transcoders, tokens)
    ablated = {
        "mean": patched.means.features[:, slots.clamp(min=0)],
        "resample": features_of(lm, patched.transcoders, other)[0],
        "zero": torch.zeros_like(clean),
    }[ablation]
    deviation = clean - ablated

    def score(j: int, g: float) -> float:
        moved = torch.zeros(patched.gate_shape)
        moved.view(-1)[j] = g - 1
        moved = moved[:, slots.clamp(min=0)] * deviation

        def write(layer: int, read: Tensor, _: Tensor) -> Tensor:
            transcoder = patched.transcoders.transcoders[layer]
            f = encode(transcoder, read) + moved[layer]
            return f @ transcoder.W_dec + transcoder.b_dec + errors[layer]

        nudge = (1 - share) * (lm.embedding.weight[other] - lm.embedding.weight[tokens])
        hidden = run(lm, tokens, write, nudge=nudge).logits
        at = prompts.scored[:, 0, :, None].clamp(min=0).expand(-1, -1, hidden.shape[-1])
        return logit_difference(hidden.gather(1, at)[:, None], prompts, False).mean().item()

    gates = torch.ones(patched.gate_shape, requires_grad=True)
    target.metric_between("logit_difference", gates, torch.arange(len(target)), share).mean().backward()
    assert gates.grad is not None
    for j in gates.grad.abs().flatten().topk(4).indices.tolist():
        change = (score(j, 1.01) - score(j, 0.99)) / 0.02
        assert change == pytest.approx(gates.grad.flatten()[j].item(), rel=0.02)


@pytest.mark.parametrize("head_layers", [(), (0, 1)])
def test_integrated_gradients_on_inputs_end_in_gradient_times_activation(head_layers: tuple[int, ...]) -> None:
    target = objective(k=12, error="keep", head_layers=head_layers)
    steps = 12
    found = attribute_nodes(target, GraphConfig(attribution="integrated_gradients_inputs", ig_steps=steps)).signed
    parts = []
    for share in [(i + 0.5) / steps for i in range(steps)] + [1.0]:
        gates = torch.ones(target.patched.gate_shape, requires_grad=True)
        target.metric_between("logit_difference", gates, torch.arange(len(target)), share).mean().backward()
        parts.append(gates.grad)
    torch.testing.assert_close(found, torch.stack(parts[:-1]).mean(0), rtol=1e-3, atol=1e-5)
    last = attribute_nodes(target, GraphConfig(attribution="gradient_activation")).signed
    torch.testing.assert_close(parts[-1], last, rtol=1e-3, atol=1e-5)
    assert not torch.allclose(found, last, rtol=0.1)


def test_of_a_head_it_is_the_gradient_at_its_output_times_the_deviation() -> None:
    """Above the last heads of NeoX comes nothing that is patched: the gradient is the full model's."""
    target = objective("gpt_neox", k=12, error="keep", head_layers=(1,))
    found = target.patched.layout.heads(attribute_nodes(target, GraphConfig(attribution="gradient_activation")).signed)
    prompts, task = target.prompts, target.task
    u = head_directions(target.patched, task, prompts, "logit_difference")[1]
    moved = head_deviations(target.patched, prompts, "mean")[1]
    slots = prompts.slots[:, 0]
    for slot in range(3):
        expected = (u * moved).sum(-1)[slots == slot].sum(0) / len(prompts)
        torch.testing.assert_close(found[0, slot], expected, rtol=1e-3, atol=1e-5)


def test_the_cost_and_the_progress_are_what_they_say() -> None:
    target = objective()
    seen: list[tuple[int, int]] = []
    attribute_nodes(target, GraphConfig(ig_steps=5), lambda done, total: seen.append((done, total)))
    assert target.patched.evaluations == 5 * 7 * 3
    assert seen == [(i, 5) for i in range(1, 6)]
