"""Total edges: as direct ones, but nothing is frozen, so effects also pass through other nodes.

Each decomposed site writes the reconstruction from `f + δ`, plus ε, with δ = 0 a leaf and ε the clean error, so
gradients with respect to δ at one layer are total effects on every later layer's pre-activations. Heads that are nodes
write `z + δ` likewise; as targets they are read as in `hagd.attribution.heads`.

Shape legend: B sequences, T positions, m dictionary size, s sources, H heads, e width of a head.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from hagd.activations.capture import site_module
from hagd.activations.heads import rewritten_heads
from hagd.attribution.columns import EdgeColumns
from hagd.attribution.heads import head_deviations
from hagd.attribution.records import FEATURE, HEAD, LOGIT
from hagd.config.stages import Ablation
from hagd.tasks.records import Prompts
from hagd.transcoders.records import Transcoder


class TotalEdges(EdgeColumns):
    """Columns of the total attribution matrix for one batch of prompts; features, heads and the logit only."""

    def _run(self, prompts: Prompts, ablation: Ablation) -> Tensor:
        patched = self.patched
        tokens = prompts.tokens.flatten(0, 1)
        with torch.no_grad():
            features, self._errors = patched.features(tokens)
            if ablation == "resample":
                ablated = patched.features(prompts.counterfactual.flatten(0, 1))[0]
            else:
                means = patched.means.features[:, self.slots.clamp(min=0)]
                ablated = torch.zeros_like(means) if ablation == "zero" else means
            moved = dict(zip(patched.transcoders.layers, features - ablated, strict=True))
            self._active = features > 0
        self._deviations = {(FEATURE, layer): deviation for layer, deviation in moved.items()}
        self._deviations |= {(HEAD, layer): z for layer, z in head_deviations(patched, prompts, ablation).items()}
        self._leaves = {key: torch.zeros_like(x, requires_grad=True) for key, x in self._deviations.items()}
        self._heads: dict[int, Tensor] = {}
        self._pre: dict[int, Tensor] = {}
        self._features: list[Tensor] = []
        return self._forward(tokens, prompts.scored.flatten(0, 1))

    def column(self, target: int) -> tuple[Tensor, Tensor]:
        """Sources and edges into node `target`: indices `[s]`, effects `[s]` averaged over the prompts."""
        kind, layer = int(self.nodes.kind[target]), int(self.nodes.layer[target])
        layers, n_layers = self.patched.transcoders.layers, self.patched.lm.n_layers
        nothing = torch.empty(0, dtype=torch.long), torch.empty(0)
        if kind == LOGIT:
            return self._from_gradients(self._metric, n_layers, n_layers)
        here, feature = self.slots == int(self.nodes.slot[target]), int(self.nodes.feature[target])
        if kind == HEAD:
            output, direction = (x[layer][here][:, feature] for x in (self._heads, self._directions))
            return self._from_gradients((output * direction).sum(), layer, layer)
        if kind != FEATURE:
            return nothing
        index = layers.index(layer)
        where = here & self._active[index][..., feature]
        if not where.any():
            return nothing
        return self._from_gradients(self._pre[index][where][:, feature].sum(), layer, layer + 1)

    def _from_gradients(self, output: Tensor, below: int, heads_below: int) -> tuple[Tensor, Tensor]:
        """Effects of features of layers below `below` and heads of layers below `heads_below`."""
        sources = [key for key in self._leaves if key[1] < (heads_below if key[0] == HEAD else below)]
        if not sources or not output.requires_grad:
            return torch.empty(0, dtype=torch.long), torch.empty(0)
        leaves = [self._leaves[key] for key in sources]
        gradients = torch.autograd.grad(output, leaves, retain_graph=True, allow_unused=True)
        index, effect = [], []
        kind, layer, slot = (torch.as_tensor(x) for x in (self.nodes.kind, self.nodes.layer, self.nodes.slot))
        for key, gradient in zip(sources, gradients, strict=True):
            if gradient is None:
                continue
            products = gradient * self._deviations[key]
            products = products.sum(-1) if key[0] == HEAD else products  # [B, T, m] or [B, T, H]
            for s in range(self.patched.layout.n_slots):
                members = ((kind == key[0]) & (layer == key[1]) & (slot == s)).nonzero()[:, 0]
                by_feature = products[self.slots == s].sum(0)
                index.append(members)
                effect.append(by_feature[torch.as_tensor(self.nodes.feature)[members]] / self.n_prompts)
        if not index:
            return torch.empty(0, dtype=torch.long), torch.empty(0)
        return torch.cat(index), torch.cat(effect).cpu()

    def _forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        lm, site = self.patched.lm, self.patched.transcoders.site
        with ExitStack() as stack, torch.enable_grad():
            for i, transcoder in enumerate(self.patched.transcoders.transcoders):
                hook = self._hook(i, transcoder)
                stack.callback(site_module(lm, site, transcoder.layer).register_forward_hook(hook).remove)
            stack.enter_context(rewritten_heads(lm, self.patched.layout.head_layers, self._nudge_heads))
            return lm.logits_at(tokens, positions)

    def _nudge_heads(self, index: int, z: Tensor) -> Tensor:
        layer = self.patched.layout.head_layers[index]
        self._heads[layer] = z + self._leaves[HEAD, layer]
        return self._heads[layer]

    def _hook(self, index: int, transcoder: Transcoder) -> Any:
        def hook(_: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
            y = output if isinstance(output, Tensor) else output[0]
            x = (inputs[0] if self.patched.transcoders.site == "mlp" else y).to(self.patched.lm.device)
            self._pre[index] = transcoder.preactivations(x)
            self._features.append(transcoder.encode(x) + self._leaves[FEATURE, transcoder.layer])
            recon = self.patched.transcoders.reconstruct(index, self._features, x)
            written = (recon + self._errors[index]).to(y.device, y.dtype)
            return written if isinstance(output, Tensor) else (written, *output[1:])

        return hook
