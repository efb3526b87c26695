from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hagd.activations.heads import head_outputs, rewritten_heads
from hagd.config.model import Architecture
from hagd.models.linear_parts import linear_attention
from tests.builders import ARCHITECTURES, random_model, random_prompts
from tests.reference import heads_of

TOKENS = random_prompts().tokens[:, 0]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_heads_and_the_bias_are_all_that_attention_writes(architecture: Architecture) -> None:
    lm = random_model(architecture, length=6)
    written: list[Tensor] = []
    handles = [
        layer.get_submodule(lm.adapter.attention).register_forward_hook(lambda _, __, out: written.append(out[0]))
        for layer in lm.layers
    ]
    z = head_outputs(lm, TOKENS, (0, 1))
    assert z.shape == (2, 5, 6, 4, 4)
    for layer, handle in enumerate(handles):
        handle.remove()
        part = linear_attention(lm, layer, torch.float32)
        summed = sum(z[layer, :, :, h] @ part.W_O[h] for h in range(4)) + part.b_O
        torch.testing.assert_close(summed, written[layer], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(head_outputs(lm, TOKENS, (1,)), heads_of(lm, TOKENS, (1,)))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_head_reads_the_values_where_it_attends(architecture: Architecture) -> None:
    lm = random_model(architecture, length=6)
    entering: list[Tensor] = []
    norm = lm.layers[0].get_submodule(lm.adapter.attention_norm)
    handle = norm.register_forward_hook(lambda _, __, out: entering.append(out))
    patterns = lm.model(input_ids=TOKENS, output_attentions=True, use_cache=False).attentions[0]
    handle.remove()
    part = linear_attention(lm, 0, torch.float32)
    z = head_outputs(lm, TOKENS, (0,))[0]
    for h in range(4):
        kv = h * len(part.W_V) // 4
        expected = patterns[:, h] @ (entering[0] @ part.W_V[kv] + part.b_V[kv])
        torch.testing.assert_close(z[:, :, h], expected, rtol=1e-5, atol=1e-5)


def test_what_is_rewritten_is_what_later_layers_read() -> None:
    lm = random_model("gpt2", length=6)
    before = lm.hidden(TOKENS)
    with rewritten_heads(lm, (0, 1), lambda index, z: z):
        assert torch.equal(lm.hidden(TOKENS), before)
    with rewritten_heads(lm, (0,), lambda index, z: torch.zeros_like(z)):
        assert (lm.hidden(TOKENS) - before).abs().max() > 1e-2
        torch.testing.assert_close(head_outputs(lm, TOKENS, (1,)), heads_of_without(0))
    assert torch.equal(lm.hidden(TOKENS), before)
    assert not any(module._forward_pre_hooks for module in lm.model.modules())


def heads_of_without(layer: int) -> Tensor:
    """Outputs of heads of layer 1 when the output projection of another layer has no weights."""
    lm = random_model("gpt2", length=6)
    lm.model.transformer.h[layer].attn.c_proj.weight.zero_()
    return heads_of(lm, TOKENS, (1,))
