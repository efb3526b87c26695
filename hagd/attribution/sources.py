"""What is written to the residual stream, as leaves of the autograd graph of one frozen forward pass.

Shape legend: L decomposed layers, B sequences, T positions, d = d_model, m dictionary size, S slots, H heads, e width
of a head.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hagd.activations.capture import site_module
from hagd.activations.heads import Rewrite, rewritten_heads
from hagd.models.freezing import frozen_linear
from hagd.patching.patched_model import PatchedModel

Leaf = tuple[Literal["embedding", "site", "heads"], int]
"""What wrote a leaf: the embedding (layer −1), the site of a layer, or its heads."""


@dataclass
class ForwardPass:
    """One forward pass whose writes are leaves.

    Attributes:
        embedding: `[B, T, d]`, leaf.
        written: model layer → `[B, T, d]`, leaf: what the site of that layer wrote, a linear skip apart.
        read: model layer → `[B, T, d]`, what the site of that layer read, as a function of the leaves.
        heads: model layer → `[B, T, H, e]`, leaf: outputs of its heads, of layers whose heads are nodes.
        heads_read: model layer → `[B, T, H, e]`, these outputs as a function of the leaves.
        logits: `[B, A, V]`, as a function of the leaves.
    """

    embedding: Tensor | None = None
    written: dict[int, Tensor] = field(default_factory=dict)
    read: dict[int, Tensor] = field(default_factory=dict)
    heads: dict[int, Tensor] = field(default_factory=dict)
    heads_read: dict[int, Tensor] = field(default_factory=dict)
    logits: Tensor | None = None

    def leaves(self, below: int, heads_below: int) -> dict[Leaf, Tensor]:
        """The embedding, what sites of layers below `below` wrote, and heads of layers below `heads_below`."""
        assert self.embedding is not None
        found: dict[Leaf, Tensor] = {("embedding", -1): self.embedding}
        found |= {("site", layer): self.written[layer] for layer in sorted(self.written) if layer < below}
        return found | {("heads", layer): self.heads[layer] for layer in sorted(self.heads) if layer < heads_below}


def direct_pass(patched: PatchedModel, tokens: Tensor, positions: Tensor) -> ForwardPass:
    """A clean forward pass in which gradients are direct effects.

    Attention patterns and norm scales are constants (`frozen_linear`). At site mlp every MLP output is a leaf, so
    nothing flows through an MLP but through the linear skip of its transcoder; at site resid every decomposed
    layer's output is one, so effects reach the next decomposed layer and no further. Outputs of heads that are nodes
    are leaves too: what goes through such a head is an edge into it and one out of it.
    """
    lm, site = patched.lm, patched.transcoders.site
    found = ForwardPass()
    layers = range(lm.n_layers) if site == "mlp" else patched.transcoders.layers
    with ExitStack() as stack:
        stack.enter_context(frozen_linear(lm))
        stack.enter_context(_embedding_leaf(lm.embedding, found))
        for layer in layers:
            hook = _leaf_hook(layer, patched, found)
            stack.callback(site_module(lm, site, layer).register_forward_hook(hook).remove)
        stack.enter_context(rewritten_heads(lm, patched.layout.head_layers, _head_leaf(patched, found)))
        with torch.enable_grad():
            found.logits = lm.logits_at(tokens, positions)
    return found


def _leaf_hook(layer: int, patched: PatchedModel, found: ForwardPass) -> Any:
    skipping = {t.layer: t for t in patched.transcoders.transcoders if t.W_skip is not None}

    def hook(_: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
        of_layer = output if isinstance(output, Tensor) else output[0]
        y = of_layer.to(patched.lm.device)
        x = inputs[0].to(y.device) if patched.transcoders.site == "mlp" else y
        skipped = skipping[layer].skip(x).to(y.dtype) if layer in skipping else None
        leaf = (y if skipped is None else y - skipped).detach().requires_grad_()
        found.read[layer] = x
        found.written[layer] = leaf
        written = (leaf if skipped is None else leaf + skipped).to(of_layer.device)
        return written if isinstance(output, Tensor) else (written, *output[1:])

    return hook


def _head_leaf(patched: PatchedModel, found: ForwardPass) -> Rewrite:
    def rewrite(index: int, z: Tensor) -> Tensor:
        layer = patched.layout.head_layers[index]
        found.heads_read[layer] = z
        found.heads[layer] = z.detach().requires_grad_()
        return found.heads[layer]

    return rewrite


@contextmanager
def _embedding_leaf(embedding: nn.Module, found: ForwardPass) -> Iterator[None]:
    def hook(_: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        found.embedding = output.detach().requires_grad_()
        return found.embedding

    handle = embedding.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
