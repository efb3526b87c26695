from __future__ import annotations

import torch
from search_peers import ComponentModel
from torch import Tensor

from hagd.tasks.records import PADDING
from tests.builders import random_model, random_prompts
from tests.patching.slow import at_scored, used
from tests.reference import HeadAttention, run


def test_heads_and_mlps_outside_a_circuit_are_at_their_means() -> None:
    lm, prompts = random_model(length=6), random_prompts(n=4)
    model = ComponentModel(lm, prompts, 3)
    gates = torch.rand(2, 3, 5, generator=torch.Generator().manual_seed(0))
    tokens, slots = prompts.tokens[:, 0], prompts.slots[:, 0]
    clean = run(lm, tokens, attention=HeadAttention(lm))

    def moved(values: Tensor, whole: Tensor, gate: Tensor) -> Tensor:
        """`values` with those of each slot moved towards the mean of `whole` there."""
        out = values.clone()
        for s in range(3):
            here = slots == s
            out[here] = gate[s] * values[here] + (1 - gate[s]) * whole[here].mean(0)
        return out

    def heads(layer: int, z: Tensor) -> Tensor:
        return moved(z, clean.heads[layer], gates[layer, :, :4, None])

    expected = run(
        lm,
        tokens,
        write=lambda layer, _, written: moved(written, clean.mlp_out[layer], gates[layer, :, 4]),
        attention=HeadAttention(lm, heads),
    )
    assert (slots == PADDING).any()
    found = used(model.logits(prompts, gates), prompts)
    torch.testing.assert_close(found, at_scored(expected.logits, prompts), rtol=1e-4, atol=1e-5)
    both = model.logits(prompts, torch.stack([gates, torch.ones(2, 3, 5)]), owner=torch.tensor([0, 1, 0, 1]))
    torch.testing.assert_close(used(both, prompts)[::2], found[::2], rtol=1e-5, atol=1e-6)
    full = used(model.full_logits(prompts), prompts)
    torch.testing.assert_close(used(both, prompts)[1::2], full[1::2], rtol=1e-5, atol=1e-5)
