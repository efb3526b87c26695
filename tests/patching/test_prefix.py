from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor, nn

from hagd.activations.capture import Site
from hagd.config.model import Architecture
from hagd.config.stages import Ablation, ErrorMode
from hagd.patching import prefix
from hagd.patching.patched_model import PatchedModel
from hagd.patching.prefix import Prefix
from hagd.tasks.records import Prompts
from tests.builders import ARCHITECTURES, VARIANTS, patched_model, random_model, random_prompts, random_transcoders

SITES: tuple[Site, ...] = ("mlp", "resid")


def late(architecture: Architecture, site: Site, prompts: Prompts, variant: str = "topk") -> PatchedModel:
    lm = random_model(architecture, n_layers=4, length=6)
    return patched_model(lm, random_transcoders(lm, site=site, layers=(2, 3), **VARIANTS[variant]), prompts)


def from_the_bottom(patched: PatchedModel) -> PatchedModel:
    """The same, computing every layer in every pass."""
    other = PatchedModel(patched.lm, patched.transcoders, patched.means)
    other._prefix = Prefix(patched.lm, 0)
    return other


def gates_of(patched: PatchedModel) -> Tensor:
    return torch.rand(patched.gate_shape, generator=torch.Generator().manual_seed(9))


@pytest.mark.parametrize(
    ("architecture", "site", "c", "variant"),
    [*product(ARCHITECTURES, SITES, (1, 3), ["topk"]), ("llama", "mlp", 1, "everything")],
)
def test_resumed_passes_give_what_whole_ones_give(architecture: Architecture, site: Site, c: int, variant: str) -> None:
    prompts = random_prompts(c=c)
    patched = late(architecture, site, prompts, variant)
    whole = from_the_bottom(patched)
    gates = gates_of(patched)
    modes: list[tuple[Ablation, ErrorMode]] = [("mean", "mean"), ("resample", "mean"), ("zero", "keep")]
    for _ in range(2):  # the second time, what enters is read back
        for ablation, error in modes:
            found = patched.logits(prompts, gates, ablation=ablation, error=error)
            torch.testing.assert_close(found, whole.logits(prompts, gates, ablation=ablation, error=error))
        tokens = prompts.tokens.flatten(0, 1)
        torch.testing.assert_close(patched.features(tokens), whole.features(tokens))
        torch.testing.assert_close(patched.full_logits(prompts), whole.full_logits(prompts))


def test_gradients_of_gates_are_those_of_whole_passes() -> None:
    prompts = random_prompts()
    patched = late("llama", "mlp", prompts)
    found = []
    for each in (patched, from_the_bottom(patched)):
        gates = gates_of(patched).requires_grad_()
        each.logits(prompts, gates).square().sum().backward()
        assert gates.grad is not None
        found.append(gates.grad)
    torch.testing.assert_close(*found)


def test_lower_layers_run_once_a_sequence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefix, "_AT_ONCE", 2)
    prompts = random_prompts(n=5)
    patched = late("gpt2", "mlp", prompts)
    patched = PatchedModel(patched.lm, patched.transcoders, patched.means)
    ran: list[int] = []

    def count(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        ran.append(len(inputs[0]))

    patched.lm.layers[1].mlp.register_forward_pre_hook(count)
    gates = gates_of(patched)
    twice = prompts[torch.tensor([0, 1, 0, 1, 2])]
    patched.logits(twice, gates)
    assert sum(ran) == 3
    patched.logits(prompts, gates)
    patched.full_logits(prompts)
    assert sum(ran) == 5
    monkeypatch.setattr(prefix, "_LIMIT_MB", 0)
    patched.logits(prompts, gates)
    assert sum(ran) == 10


def test_the_model_is_left_as_it_was() -> None:
    prompts = random_prompts()
    patched = late("gpt_neox", "mlp", prompts)
    lm, tokens = patched.lm, prompts.tokens[:, 0]
    before = lm.hidden(tokens)
    with pytest.raises(RuntimeError), Prefix(lm, 2).resumed(tokens):
        raise RuntimeError
    assert not any("forward" in vars(layer) for layer in lm.layers)
    torch.testing.assert_close(lm.hidden(tokens), before)
    lm.layers[0].forward = wrapped = lm.layers[0].forward  # as libraries do that move inputs between devices
    with Prefix(lm, 2).resumed(tokens):
        torch.testing.assert_close(lm.hidden(tokens), before)
    assert lm.layers[0].forward is wrapped
