from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from hagd.activations.capture import Site
from hagd.config.model import Architecture
from hagd.config.stages import Ablation, ErrorMode
from hagd.models.language_model import LanguageModel
from hagd.patching.means import slot_means
from hagd.patching.patched_model import PatchedModel
from hagd.tasks.records import PADDING, Prompts
from hagd.transcoders.records import TranscoderSet
from tests.builders import (
    ARCHITECTURES,
    VARIANTS,
    patched_model,
    random_model,
    random_prompts,
    random_transcoders,
)
from tests.patching.slow import at_scored, slow_logits, used
from tests.reference import features_of, mean_by_slot, run

SITES: tuple[Site, ...] = ("mlp", "resid")
EVERYWHERE = pytest.mark.parametrize(("architecture", "site"), list(product(ARCHITECTURES, SITES)))


def tiny(
    architecture: Architecture,
    site: Site,
    prompts: Prompts,
    layers: tuple[int, ...] | None = None,
    variant: str = "topk",
) -> PatchedModel:
    lm = random_model(architecture, n_layers=3, length=6)
    return patched_model(lm, random_transcoders(lm, site=site, layers=layers, **VARIANTS[variant]), prompts)


def random_gates(patched: PatchedModel, *leading: int) -> Tensor:
    return torch.rand(*leading, *patched.gate_shape, generator=torch.Generator().manual_seed(9))


@pytest.mark.parametrize(
    ("architecture", "site", "variant"),
    [*product(ARCHITECTURES, SITES, ["topk"]), *product(ARCHITECTURES, ["mlp"], ["everything"])],
)
@pytest.mark.parametrize("c", [1, 3])
def test_with_open_gates_and_kept_errors_nothing_is_patched(
    architecture: Architecture, site: Site, variant: str, c: int
) -> None:
    prompts = random_prompts(c=c)
    patched = tiny(architecture, site, prompts, variant=variant)
    full = patched.lm.logits_at(prompts.tokens.flatten(0, 1), prompts.scored.flatten(0, 1)).unflatten(0, (5, c))
    for ablation in ("mean", "zero", "resample"):
        logits = patched.logits(prompts, torch.ones(patched.gate_shape), ablation=ablation, error="keep")
        assert logits.shape == (5, c, 2, 8)
        torch.testing.assert_close(logits, full, rtol=1e-5, atol=1e-5)
    strict = patched.logits(prompts, torch.ones(patched.gate_shape), error="mean")
    assert (strict - full).abs().max() > 1e-2, "errors are large here"


@EVERYWHERE
@pytest.mark.parametrize("ablation", ["mean", "zero", "resample"])
@pytest.mark.parametrize("error", ["mean", "keep"])
def test_every_mode_is_what_the_slow_implementation_does(
    architecture: Architecture, site: Site, ablation: Ablation, error: ErrorMode
) -> None:
    prompts = random_prompts(n=4)
    patched = tiny(architecture, site, prompts)
    gates = random_gates(patched)
    expected = slow_logits(patched, prompts, gates, ablation, error)
    found = used(patched.logits(prompts, gates, ablation=ablation, error=error), prompts)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


OTHER_VARIANTS: list[tuple[str, Architecture, Ablation, ErrorMode]] = [
    ("skip", "gpt2", "mean", "mean"),
    ("thresholds", "llama", "zero", "keep"),
    ("cross_layer", "gpt_neox", "resample", "mean"),
    ("everything", "llama", "mean", "mean"),
    ("everything", "gpt2", "resample", "keep"),
    ("everything", "gpt_neox", "zero", "mean"),
]


@pytest.mark.parametrize(("variant", "architecture", "ablation", "error"), OTHER_VARIANTS)
def test_every_kind_of_dictionary_is_what_the_slow_implementation_does(
    variant: str, architecture: Architecture, ablation: Ablation, error: ErrorMode
) -> None:
    prompts = random_prompts(n=4)
    patched = tiny(architecture, "mlp", prompts, variant=variant)
    gates = random_gates(patched)
    expected = slow_logits(patched, prompts, gates, ablation, error)
    for _ in range(2):  # one pass leaves nothing to the next
        found = used(patched.logits(prompts, gates, ablation=ablation, error=error), prompts)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    plain = used(tiny(architecture, "mlp", prompts).logits(prompts, gates, ablation=ablation, error=error), prompts)
    assert (plain - expected).abs().max() > 1e-2


@pytest.mark.parametrize("layers", [(0, 2), (1, 2), (2,)])
def test_cross_layer_features_write_to_later_decomposed_layers_only(layers: tuple[int, ...]) -> None:
    prompts = random_prompts(n=3)
    patched = tiny("gpt2", "mlp", prompts, layers=layers, variant="everything")
    gates = random_gates(patched)
    found = used(patched.logits(prompts, gates), prompts)
    torch.testing.assert_close(found, slow_logits(patched, prompts, gates, "mean", "mean"), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("site", "variant"), [*product(SITES, ("topk", "thresholds")), ("mlp", "everything")])
def test_only_decomposed_layers_are_patched(site: Site, variant: str) -> None:
    prompts = random_prompts(n=3, c=2)
    patched = tiny("gpt2", site, prompts, layers=(1,), variant=variant)
    gates = random_gates(patched)
    assert gates.shape == (1, 3, 12)
    found = used(patched.logits(prompts, gates, ablation="resample", error="keep"), prompts)
    expected = slow_logits(patched, prompts, gates, "resample", "keep")
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_closed_gates_leave_constants(architecture: Architecture) -> None:
    """Then every site writes the same in every prompt, its mean output in the slot."""
    prompts = random_prompts()
    patched = tiny(architecture, "mlp", prompts)
    closed = torch.zeros(patched.gate_shape)
    tokens, slots = prompts.tokens[:, 0], prompts.slots[:, 0]
    outputs = torch.stack(run(patched.lm, tokens).mlp_out)
    mean_output = mean_by_slot(outputs, slots, 3)

    def constant(layer: int, read: Tensor, written: Tensor) -> Tensor:
        return mean_output[layer][slots.clamp(min=0)]

    expected = at_scored(run(patched.lm, tokens, constant).logits, prompts)
    torch.testing.assert_close(used(patched.logits(prompts, closed), prompts), expected, rtol=1e-4, atol=1e-5)


def test_zero_ablation_leaves_the_bias() -> None:
    prompts = random_prompts()
    patched = tiny("llama", "mlp", prompts)
    patched.means.errors.zero_()
    biases = [t.b_dec for t in patched.transcoders.transcoders]
    expected = run(patched.lm, prompts.tokens[:, 0], lambda layer, read, written: biases[layer].expand_as(written))
    found = used(patched.logits(prompts, torch.zeros(patched.gate_shape), ablation="zero"), prompts)
    torch.testing.assert_close(found, at_scored(expected.logits, prompts), rtol=1e-4, atol=1e-5)


@EVERYWHERE
def test_resampling_from_the_prompt_itself_changes_nothing(architecture: Architecture, site: Site) -> None:
    prompts = random_prompts()
    patched = tiny(architecture, site, prompts)
    own = replace(prompts, counterfactual=prompts.tokens)
    full = patched.lm.logits_at(prompts.tokens[:, 0], prompts.scored[:, 0])[:, None]
    closed = torch.zeros(patched.gate_shape)
    found = patched.logits(own, closed, ablation="resample", error="keep")
    torch.testing.assert_close(found, full, rtol=1e-5, atol=1e-5)
    other = patched.logits(prompts, closed, ablation="resample", error="keep")
    assert (other - full).abs().max() > 1e-2


@pytest.mark.parametrize("c", [1, 3])
@pytest.mark.parametrize("ablation", ["mean", "zero", "resample"])
def test_each_prompt_may_have_its_own_gates(c: int, ablation: Ablation) -> None:
    prompts = random_prompts(n=6, c=c)
    patched = tiny("gpt_neox", "mlp", prompts)
    gates = random_gates(patched, 3)
    owner = torch.tensor([2, 0, 0, 1, 2, 1])
    together = patched.logits(prompts, gates, ablation=ablation, owner=owner)
    for i in range(6):
        alone = patched.logits(prompts[i : i + 1], gates[owner[i]], ablation=ablation)
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-4, atol=1e-5)
    assert (together - patched.logits(prompts, gates[0], ablation=ablation)).abs().max() > 1e-2


@pytest.mark.parametrize("variant", [{}, {"skip": True, "cross_layer": True}])
def test_gradients_of_gates_are_finite_differences(variant: dict[str, Any]) -> None:
    prompts = random_prompts()
    lm = random_model("gpt2", n_layers=2, length=6)
    patched = patched_model(lm, random_transcoders(lm, k=12, **variant), prompts)
    gates = random_gates(patched).requires_grad_()
    weights = torch.randn(5, 1, 2, 8, generator=torch.Generator().manual_seed(0))
    (patched.logits(prompts, gates) * weights).sum().backward()
    assert gates.grad is not None
    step = 1e-3
    largest = gates.grad.flatten().abs().topk(10).indices
    with torch.no_grad():
        for j in largest.tolist():
            ends = []
            for sign in (1, -1):
                moved = gates.detach().clone()
                moved.view(-1)[j] += sign * step
                ends.append((patched.logits(prompts, moved) * weights).sum().item())
            assert (ends[0] - ends[1]) / (2 * step) == pytest.approx(gates.grad.view(-1)[j].item(), rel=2e-2)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_nobody_reads_is_not_computed(architecture: Architecture) -> None:
    """The dictionaries stand in for the MLPs of their layers; those of other layers run."""
    prompts = random_prompts()
    patched = tiny(architecture, "mlp", prompts, layers=(0, 2))
    ran: list[int] = []
    for layer in range(3):
        for part in patched.lm.mlp(layer).children():
            part.register_forward_hook(lambda *_, layer=layer: ran.append(layer))
    patched.logits(prompts, random_gates(patched))
    assert set(ran) == {1}
    patched.full_logits(prompts)
    assert set(ran) == {0, 1, 2}


def test_padding_does_not_matter() -> None:
    prompts = random_prompts()
    patched = tiny("gpt2", "mlp", prompts)
    gates = random_gates(patched)
    changed = prompts.tokens.clone()
    changed[prompts.slots == PADDING] = 7 - changed[prompts.slots == PADDING]
    assert not torch.equal(changed, prompts.tokens)
    before = used(patched.logits(prompts, gates, error="keep"), prompts)
    after = used(patched.logits(replace(prompts, tokens=changed), gates, error="keep"), prompts)
    torch.testing.assert_close(before, after)


def test_evaluations_are_counted() -> None:
    prompts = random_prompts()
    patched = tiny("gpt2", "mlp", prompts)
    gates = random_gates(patched)
    patched.logits(prompts, gates)
    assert patched.evaluations == 5
    patched.logits(prompts[:2], gates.requires_grad_())
    assert patched.evaluations == 5 + 3 * 2, "a backward pass counts as two forward passes"


@pytest.mark.parametrize("site", SITES)
def test_the_model_is_left_as_it_was(site: Site) -> None:
    prompts = random_prompts()
    patched = tiny("gpt2", site, prompts)
    before = patched.lm.hidden(prompts.tokens[:, 0])
    patched.logits(prompts, random_gates(patched))
    with pytest.raises(RuntimeError):
        patched.logits(prompts, torch.zeros(3, 3, 5))
    assert torch.equal(patched.lm.hidden(prompts.tokens[:, 0]), before)
    assert not any(module._forward_hooks or "forward" in vars(module) for module in patched.lm.model.modules())


@pytest.mark.parametrize("variant", ["topk", "everything"])
def test_half_precision_models_can_be_patched(variant: str) -> None:
    prompts = random_prompts()
    lm = random_model("llama", n_layers=2, length=6, dtype=torch.bfloat16)
    patched = patched_model(lm, random_transcoders(lm, **VARIANTS[variant]), prompts)
    full = lm.logits_at(prompts.tokens[:, 0], prompts.scored[:, 0])[:, None]
    found = patched.logits(prompts, torch.ones(patched.gate_shape), error="keep")
    torch.testing.assert_close(found, full, rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    ("architecture", "site", "variant"),
    [*product(ARCHITECTURES, SITES, ["topk"]), *product(["gpt2"], ["mlp"], VARIANTS), ("llama", "resid", "thresholds")],
)
def test_features_and_means_are_those_of_the_slow_implementation(
    architecture: Architecture, site: Site, variant: str
) -> None:
    prompts = random_prompts(n=7, c=2)
    lm: LanguageModel = random_model(architecture, length=6)
    transcoders: TranscoderSet = random_transcoders(lm, site=site, **VARIANTS[variant])
    means = slot_means(lm, transcoders, prompts, 4, batch=3)
    tokens, slots = prompts.tokens.flatten(0, 1), prompts.slots.flatten(0, 1)
    f, errors = features_of(lm, transcoders, tokens)
    for found, expected in zip(PatchedModel(lm, transcoders, means).features(tokens), (f, errors), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    for found, values in ((means.features, f), (means.errors, errors), (means.frequency, (f > 0).float())):
        torch.testing.assert_close(found, mean_by_slot(values, slots, 4), rtol=1e-4, atol=1e-5)
    assert (means.features[:, 3] == 0).all(), "a slot without positions"
