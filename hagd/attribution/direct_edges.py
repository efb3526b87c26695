"""Direct edges `A_ij = E_prompts[(∂pre_j/∂f_i) · (f_i − v_i)]`, exact because the frozen model is linear.

Every edge into a target sums up: features, errors, tokens and heads together give the change of the target's
pre-activation when all of them move from their mean to their clean values. Where heads are nodes, attention of their
layers passes nothing on: the edge i → head is what i adds through its value projection to the head's output, read along
the metric's gradient (`hagd.attribution.heads`); head → j is what that output adds to j through its output projection.

Shape legend: P prompts (B sequences), T positions, d = d_model, m dictionary size, S slots, n nodes, H heads, e width
of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hagd.attribution.columns import EdgeColumns
from hagd.attribution.heads import head_deviations
from hagd.attribution.records import FEATURE, HEAD, LOGIT, TOKEN, Nodes
from hagd.attribution.sources import Leaf, direct_pass
from hagd.config.stages import Ablation
from hagd.patching.patched_model import PatchedModel
from hagd.tasks.records import Prompts


@dataclass(frozen=True)
class Deviations:
    """How far each source is from its ablation value on the edge prompts.

    Attributes:
        features: layer → `[B, T, m]`, `f − v`.
        errors: layer → `[B, T, d]`, `ε − mean ε`; for layers without transcoder the whole output minus its mean.
        tokens: `[B, T, d]`, embedding minus its mean over the prompts in the slot.
        heads: layer → `[B, T, H, e]`, `z − v`, of layers whose heads are nodes.
        active: layer → bool `[B, T, m]`.
    """

    features: dict[int, Tensor]
    errors: dict[int, Tensor]
    tokens: Tensor
    heads: dict[int, Tensor]
    active: dict[int, Tensor]


class DirectEdges(EdgeColumns):
    """Columns of the direct attribution matrix for one batch of prompts."""

    def _run(self, prompts: Prompts, ablation: Ablation) -> Tensor:
        self.forward = direct_pass(self.patched, prompts.tokens.flatten(0, 1), prompts.scored.flatten(0, 1))
        deviations = self._measure(prompts, ablation)
        self._active, self._dtype = deviations.active, deviations.tokens.dtype
        self._projectors = _group_sources(self.patched, self.nodes, deviations, self.slots)
        assert self.forward.logits is not None
        return self.forward.logits

    def column(self, target: int) -> tuple[Tensor, Tensor]:
        """Sources and edges into node `target`: indices `[s]`, effects `[s]` averaged over the prompts."""
        kind, layer = int(self.nodes.kind[target]), int(self.nodes.layer[target])
        n_layers = self.patched.lm.n_layers
        if kind == LOGIT:
            return self._from_gradients(self._metric, n_layers, n_layers)
        slot, feature = int(self.nodes.slot[target]), int(self.nodes.feature[target])
        if kind == HEAD:
            here = self.slots == slot
            output, direction = (x[layer][here][:, feature] for x in (self.forward.heads_read, self._directions))
            return self._from_gradients((output * direction).sum(), layer, layer)
        if kind != FEATURE:
            return torch.empty(0, dtype=torch.long), torch.empty(0)
        transcoder = self.patched.transcoders.transcoders[self.patched.transcoders.layers.index(layer)]
        where = (self.slots == slot) & self._active[layer][..., feature]
        if not where.any():
            return torch.empty(0, dtype=torch.long), torch.empty(0)
        read = self.forward.read[layer][where].to(transcoder.W_enc.dtype)
        pre = (read @ transcoder.W_enc[feature]).sum()
        return self._from_gradients(pre, layer, layer + 1)

    def _from_gradients(self, output: Tensor, below: int, heads_below: int) -> tuple[Tensor, Tensor]:
        leaves = self.forward.leaves(below, heads_below)
        gradients = torch.autograd.grad(output, tuple(leaves.values()), retain_graph=True, allow_unused=True)
        index, effect = [], []
        for leaf, gradient in zip(leaves, gradients, strict=True):
            if gradient is None:
                continue
            gradient = gradient.to(self._dtype)
            for projector in self._projectors.get(leaf, ()):
                index.append(projector.nodes)
                effect.append(projector.effects(gradient) / self.n_prompts)
        if not index:
            return torch.empty(0, dtype=torch.long), torch.empty(0)
        # A cross-layer feature writes to several layers: its effects add up.
        sources, place = torch.cat(index).unique(return_inverse=True)
        effects = torch.cat(effect).cpu()
        return sources, effects.new_zeros(len(sources)).index_add_(0, place, effects)

    @torch.no_grad()
    def _measure(self, prompts: Prompts, ablation: Ablation) -> Deviations:
        patched, slots = self.patched, self.slots.clamp(min=0)
        f, errors = patched.features(prompts.tokens.flatten(0, 1))
        other = patched.features(prompts.counterfactual.flatten(0, 1))[0] if ablation == "resample" else None
        features, error, active = {}, {}, {}
        for i, layer in enumerate(patched.transcoders.layers):
            ablated = torch.zeros(()) if ablation == "zero" else patched.means.features[i][slots]
            features[layer] = f[i] - (other[i] if other is not None else ablated.to(f.device))
            error[layer] = errors[i] - patched.means.errors[i][slots]
            active[layer] = f[i] > 0
        n_slots = patched.layout.n_slots
        for layer, written in self.forward.written.items():
            if layer not in error:
                error[layer] = _centre(written.detach().to(f.dtype), self.slots, n_slots)
        assert self.forward.embedding is not None
        embedding = self.forward.embedding.detach().to(f.dtype)
        heads = head_deviations(patched, prompts, ablation)
        return Deviations(features, error, _centre(embedding, self.slots, n_slots), heads, active)


@dataclass(frozen=True)
class _Projector:
    """Turns the gradient at one leaf into the edges of the nodes that write there, in one slot."""

    kind: int
    nodes: Tensor  # [s]
    features: Tensor  # [s]
    directions: Tensor  # [s, d], decoder rows; empty for other kinds
    where: tuple[Tensor, ...]  # the slot's p positions in [B, T]
    deviation: Tensor  # [p, s] of features, [p, H, e] of heads, else [p, d]

    def effects(self, gradient: Tensor) -> Tensor:
        """Sum over the slot's positions of `gradient · direction · deviation`, `[s]`."""
        g = gradient[self.where]
        if self.kind == FEATURE:
            return ((g @ self.directions.T) * self.deviation).sum(0)
        if self.kind == HEAD:
            return (g * self.deviation).sum((0, 2))[self.features]
        return (g * self.deviation).sum().reshape(1)


def _group_sources(
    patched: PatchedModel, nodes: Nodes, deviations: Deviations, slots: Tensor
) -> dict[Leaf, list[_Projector]]:
    """Projectors by the leaf that they read; `slots` are `[B, T]`."""
    groups: dict[Leaf, list[_Projector]] = {}
    places = [(slots == slot).nonzero(as_tuple=True) for slot in range(patched.layout.n_slots)]
    keys = torch.stack([torch.as_tensor(x) for x in (nodes.kind, nodes.layer, nodes.slot)], dim=1)
    for kind, layer, slot in keys.unique(dim=0).tolist():
        if kind == LOGIT:
            continue
        members = ((keys == torch.tensor([kind, layer, slot])).all(1)).nonzero()[:, 0]
        features = torch.as_tensor(nodes.feature)[members].to(slots.device)
        where = places[slot]
        if kind != FEATURE:
            written: Leaf = ("embedding", -1) if kind == TOKEN else ("heads" if kind == HEAD else "site", layer)
            if kind == TOKEN:
                moved = deviations.tokens
            else:
                moved = (deviations.heads if kind == HEAD else deviations.errors)[layer]
            groups.setdefault(written, []).append(
                _Projector(kind, members, features, torch.empty(0), where, moved[where])
            )
            continue
        moved = deviations.features[layer][where][:, features]
        index = patched.transcoders.layers.index(layer)
        transcoder = patched.transcoders.transcoders[index]
        for leaf, decoder in zip(
            patched.transcoders.layers[index:], (transcoder.W_dec, *transcoder.W_later), strict=False
        ):
            projector = _Projector(kind, members, features, decoder[features], where, moved)
            groups.setdefault(("site", leaf), []).append(projector)
    return groups


def _centre(values: Tensor, slots: Tensor, n_slots: int) -> Tensor:
    """`values` `[B, T, d]` minus their mean in the slot."""
    index = slots.clamp(min=0)
    keep = (slots >= 0).to(values.dtype)
    total = torch.zeros(n_slots, values.shape[-1], dtype=values.dtype, device=values.device)
    total.index_add_(0, index.flatten(), (values * keep[..., None]).flatten(0, 1))
    count = torch.zeros(n_slots, dtype=values.dtype, device=values.device).index_add_(
        0, index.flatten(), keep.flatten()
    )
    return values - (total / count.clamp(min=1)[:, None])[index]


def strongest_incoming(column: Callable[[int], tuple[Tensor, Tensor]], target: int, keep: int) -> tuple[Tensor, Tensor]:
    """The `keep` strongest non-zero edges into a target."""
    sources, effects = column(target)
    nonzero = effects != 0
    sources, effects = sources[nonzero], effects[nonzero]
    if len(effects) > keep:
        best = effects.abs().topk(keep).indices
        sources, effects = sources[best], effects[best]
    return sources, effects
