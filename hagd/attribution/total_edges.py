"""Total edges: as direct ones, but nothing is frozen, so effects also pass through other nodes.

Each decomposed site writes the reconstruction from `f + δ`, plus ε, with δ = 0 a leaf and ε the clean error, so
gradients with respect to δ at one layer are total effects on every later layer's pre-activations.

Shape legend: B sequences, T positions, m dictionary size, s sources.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from hagd.activations.capture import site_module
from hagd.attribution.records import FEATURE, LOGIT, Nodes
from hagd.config.stages import Ablation
from hagd.patching.patched_model import PatchedModel
from hagd.tasks.records import Prompts, TaskData
from hagd.tasks.scoring import logit_difference
from hagd.transcoders.records import Transcoder


class TotalEdges:
    """Columns of the total attribution matrix for one batch of prompts; features and the logit only."""

    def __init__(
        self, patched: PatchedModel, task: TaskData, prompts: Prompts, nodes: Nodes, ablation: Ablation
    ) -> None:
        self.patched = patched
        self.nodes = nodes
        self.n_prompts = len(prompts)
        self.slots = prompts.slots.flatten(0, 1)
        tokens = prompts.tokens.flatten(0, 1)
        with torch.no_grad():
            features, self._errors = patched.features(tokens)
            if ablation == "resample":
                ablated = patched.features(prompts.counterfactual.flatten(0, 1))[0]
            else:
                means = patched.means.features[:, self.slots.clamp(min=0)]
                ablated = torch.zeros_like(means) if ablation == "zero" else means
            self._deviations = features - ablated
            self._active = features > 0
        self._leaves = [torch.zeros_like(f, requires_grad=True) for f in features]
        self._pre: dict[int, Tensor] = {}
        self._features: list[Tensor] = []
        logits = self._forward(tokens, prompts.scored.flatten(0, 1)).unflatten(0, prompts.tokens.shape[:2])
        self._metric = logit_difference(logits, prompts, task.length_normalised).sum()

    def column(self, target: int) -> tuple[Tensor, Tensor]:
        """Sources and edges into node `target`: indices `[s]`, effects `[s]` averaged over the prompts."""
        kind, layer = int(self.nodes.kind[target]), int(self.nodes.layer[target])
        layers = self.patched.transcoders.layers
        if kind == LOGIT:
            return self._from_gradients(self._metric, len(layers))
        if kind != FEATURE:
            return torch.empty(0, dtype=torch.long), torch.empty(0)
        index, feature = layers.index(layer), int(self.nodes.feature[target])
        where = (self.slots == int(self.nodes.slot[target])) & self._active[index][..., feature]
        if index == 0 or not where.any():
            return torch.empty(0, dtype=torch.long), torch.empty(0)
        return self._from_gradients(self._pre[index][where][:, feature].sum(), index)

    def _from_gradients(self, output: Tensor, below: int) -> tuple[Tensor, Tensor]:
        gradients = torch.autograd.grad(output, self._leaves[:below], retain_graph=True, allow_unused=True)
        layers = self.patched.transcoders.layers
        index, effect = [], []
        kind, layer, slot = (torch.as_tensor(x) for x in (self.nodes.kind, self.nodes.layer, self.nodes.slot))
        for i, gradient in enumerate(gradients):
            if gradient is None:
                continue
            products = gradient * self._deviations[i]
            for s in range(self.patched.gate_shape[1]):
                members = ((kind == FEATURE) & (layer == layers[i]) & (slot == s)).nonzero()[:, 0]
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
            return lm.logits_at(tokens, positions)

    def _hook(self, index: int, transcoder: Transcoder) -> Any:
        def hook(_: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
            y = output if isinstance(output, Tensor) else output[0]
            x = inputs[0] if self.patched.transcoders.site == "mlp" else y
            self._pre[index] = transcoder.preactivations(x)
            self._features.append(transcoder.encode(x) + self._leaves[index])
            recon = self.patched.transcoders.reconstruct(index, self._features, x)
            written = (recon + self._errors[index]).to(y.dtype)
            return written if isinstance(output, Tensor) else (written, *output[1:])

        return hook
