"""Records of the patched model.

Shape legend: L decomposed layers, S slots, m dictionary size, d = d_model, K layers whose heads are nodes, H heads,
e width of a head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class SlotMeans:
    """What nodes are set to when they are ablated to their mean over the discovery split.

    Attributes:
        features: `[L, S, m]`.
        errors: `[L, S, d]`, mean of the error term ε.
        frequency: `[L, S, m]`, share of the prompts on which the feature is active in the slot.
    """

    features: Tensor
    errors: Tensor
    frequency: Tensor

    def to(self, device: torch.device) -> SlotMeans:
        """The same on another device."""
        return SlotMeans(self.features.to(device), self.errors.to(device), self.frequency.to(device))


@dataclass(frozen=True)
class HeadMeans:
    """What heads are set to when they are ablated to their mean over the discovery split.

    Attributes:
        layers: those whose heads are nodes, ascending.
        outputs: `[K, S, H, e]`, mean of z, what a head gives to the output projection.
    """

    layers: tuple[int, ...]
    outputs: Tensor

    def to(self, device: torch.device) -> HeadMeans:
        """The same on another device."""
        return HeadMeans(self.layers, self.outputs.to(device))


class Place(NamedTuple):
    """Which nodes some gates belong to, each `[n]`; `number` is that of the feature or of the head."""

    is_head: Tensor
    layer: Tensor
    slot: Tensor
    number: Tensor


@dataclass(frozen=True)
class GateLayout:
    """Which node each gate belongs to: features `[L, S, m]`, and heads `[K, S, H]` where they are nodes.

    With heads, gates are one axis: those of features flattened, then those of heads flattened, so that a feature's
    position in the flattened gates is the same with and without them.

    Attributes:
        layers: decomposed layers.
        n_slots, m: S and m.
        head_layers: layers whose heads are nodes.
        n_heads: H; 0 without such layers.
    """

    layers: tuple[int, ...]
    n_slots: int
    m: int
    head_layers: tuple[int, ...] = ()
    n_heads: int = 0

    @property
    def n_features(self) -> int:
        """L·S·m."""
        return len(self.layers) * self.n_slots * self.m

    @property
    def shape(self) -> tuple[int, ...]:
        """(L, S, m); (L·S·m + K·S·H,) where heads are nodes."""
        if not self.head_layers:
            return len(self.layers), self.n_slots, self.m
        return (self.n_features + len(self.head_layers) * self.n_slots * self.n_heads,)

    def features(self, gates: Tensor) -> Tensor:
        """The features' part `[…, L, S, m]` of gates `[…, *shape]`."""
        if not self.head_layers:
            return gates
        return gates[..., : self.n_features].unflatten(-1, (len(self.layers), self.n_slots, self.m))

    def heads(self, gates: Tensor) -> Tensor:
        """The heads' part `[…, K, S, H]` of gates `[…, *shape]` of a layout with heads."""
        return gates[..., self.n_features :].unflatten(-1, (len(self.head_layers), self.n_slots, self.n_heads))

    def join(self, features: Tensor, heads: Tensor) -> Tensor:
        """Values `[L, S, m]` of features and `[K, S, H]` of heads (none without heads) in the shape of the gates."""
        return torch.cat([features.flatten(), heads.flatten().to(features.dtype)]).view(self.shape)

    def place(self, flat: Tensor) -> Place:
        """The nodes at positions `[n]` of the flattened gates."""
        layers, head_layers = torch.tensor(self.layers), torch.tensor(self.head_layers, dtype=torch.long)
        is_head = flat >= self.n_features
        index = torch.where(is_head, flat - self.n_features, flat)
        width = torch.where(is_head, self.n_heads, self.m)
        rows = index // width
        row = rows // self.n_slots
        layer = torch.empty_like(flat)
        layer[~is_head], layer[is_head] = layers[row[~is_head]], head_layers[row[is_head]]
        return Place(is_head, layer, rows % self.n_slots, index % width)
