"""Records of the patched model.

Shape legend: L decomposed layers, S slots, m dictionary size, d = d_model.
"""

from __future__ import annotations

from dataclasses import dataclass

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
