"""Massive activations, which train nothing and are not measured.

Shape legend: L layers, n tokens, d = d_model.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

MASSIVE = 10.0
"""A token whose activation norm exceeds this many medians is an outlier (attention sinks)."""


@dataclass(frozen=True)
class Outliers:
    """Largest ordinary norms of a site's inputs and outputs, measured once and then fixed.

    Attributes:
        x_limit: `[L]` of the inputs.
        y_limit: `[L]` of the outputs.
    """

    x_limit: Tensor
    y_limit: Tensor

    @classmethod
    def of(cls, x_norm: Tensor, y_norm: Tensor) -> Outliers:
        """`MASSIVE` times the median over tokens of the norms `[L, n]` of inputs and outputs."""
        return cls(*(MASSIVE * norm.median(dim=1).values for norm in (x_norm, y_norm)))

    def keep(self, x: Tensor, y: Tensor) -> Tensor:
        """Boolean `[n]`: tokens whose inputs and outputs `[L, n, d]` are ordinary at every layer."""
        return self.ordinary(x.float().norm(dim=-1), y.float().norm(dim=-1))

    def ordinary(self, x_norm: Tensor, y_norm: Tensor) -> Tensor:
        """The same, of norms `[L, n]`."""
        x_limit, y_limit = self.x_limit.to(x_norm.device), self.y_limit.to(y_norm.device)
        return ((x_norm <= x_limit[:, None]) & (y_norm <= y_limit[:, None])).all(0)
