"""Eq. 4 of arXiv 2601.12879 over all layers at once, each term normalised so that the λs carry over between models.

Shape legend: L layers, B tokens, d = d_model, m dictionary size. Inputs and targets are centred and scaled to
mean norm √d (`Scaling`), which the exported weights undo.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from hagd.config.stages import TranscoderConfig
from hagd.transcoders.records import topk_relu


@dataclass(frozen=True)
class Scaling:
    """`x ↦ (x − mean) · scale`: mean `[L, 1, d]`, scale `[L, 1, 1]`."""

    mean: Tensor
    scale: Tensor

    @classmethod
    def of(cls, x: Tensor) -> Scaling:
        """Measured on `x` `[L, N, d]`."""
        mean = x.mean(1, keepdim=True)
        norm = (x - mean).norm(dim=-1).mean(1)[:, None, None]
        return cls(mean, x.shape[-1] ** 0.5 / norm.clamp(min=1e-12))

    def __call__(self, x: Tensor) -> Tensor:
        return (x - self.mean) * self.scale


class Losses(NamedTuple):
    """Terms of one step; `total` is what is minimised, the rest is logged."""

    total: Tensor
    fvu: Tensor
    prediction: Tensor
    sparsity: Tensor
    auxiliary: Tensor


class StackedTranscoders(nn.Module):
    """The dictionaries of L layers and the prediction heads between neighbours, in scaled units."""

    silent: Tensor

    def __init__(self, config: TranscoderConfig, n_layers: int, d: int, seed: int) -> None:
        super().__init__()
        self.config = config
        m = config.expansion * d
        generator = torch.Generator().manual_seed(seed)
        rows = nn.functional.normalize(torch.randn(n_layers, m, d, generator=generator), dim=-1)
        self.W_enc = nn.Parameter(rows)
        self.b_enc = nn.Parameter(torch.zeros(n_layers, 1, m))
        self.W_dec = nn.Parameter(rows.clone())
        self.b_dec = nn.Parameter(torch.zeros(n_layers, 1, d))
        heads = max(n_layers - 1, 0) if config.lambda_prediction > 0 else 0
        if config.prediction_head == "tied":
            self.head_map = nn.Parameter(torch.eye(d).repeat(heads, 1, 1))
            self.head_bias = nn.Parameter(torch.zeros(heads, 1, d))
        else:
            self.head_map = nn.Parameter(torch.zeros(heads, m, m))
            self.head_bias = nn.Parameter(torch.zeros(heads, 1, m))
        self.register_buffer("silent", torch.zeros(n_layers, m))

    @torch.no_grad()
    def initialise(self, x: Tensor, y: Tensor) -> None:
        """Set the decoder from data: row j points along the mean target of the tokens on which j fires, at the
        least-squares length. `x`, `y`: scaled `[L, B, d]`."""
        f = self.encode(x)
        energy = f.pow(2).sum(1)[..., None]
        rows = torch.einsum("lbm,lbd->lmd", f, y) / energy.clamp(min=1e-6)
        self.W_dec.copy_(torch.where(energy > 0, rows, self.W_dec * rows.norm(dim=-1).mean()))
        recon = self.decode(self.encode(x))
        alpha = (recon * y).sum((1, 2)) / recon.pow(2).sum((1, 2)).clamp(min=1e-6)
        self.W_dec.mul_(alpha[:, None, None])

    def preactivations(self, x: Tensor) -> Tensor:
        """`[L, B, m]` of scaled inputs `[L, B, d]`."""
        return torch.baddbmm(self.b_enc, x, self.W_enc.transpose(1, 2))

    def encode(self, x: Tensor) -> Tensor:
        """Features `[L, B, m]`."""
        return topk_relu(self.preactivations(x), self.config.k)

    def decode(self, f: Tensor) -> Tensor:
        """Scaled reconstruction `[L, B, d]`."""
        return torch.baddbmm(self.b_dec, f, self.W_dec)

    def predict(self, f: Tensor, decoded: Tensor | None = None) -> Tensor:
        """Predicted features `[L − 1, B, m]` of every layer but the first, from the layer before.

        `decoded` is `decode(f)` where it is known already.
        """
        if self.config.prediction_head == "tied":
            written = (self.decode(f) if decoded is None else decoded)[:-1] - self.b_dec[:-1]
            moved = torch.baddbmm(self.head_bias, written, self.head_map)
            return torch.baddbmm(self.b_enc[1:], moved, self.W_enc[1:].transpose(1, 2)).relu()
        return torch.baddbmm(self.head_bias, f[:-1], self.head_map).relu()

    def losses(self, x: Tensor, y: Tensor) -> Losses:
        """All terms for scaled tokens `x`, `y` `[L, B, d]`; also counts how long each feature has been silent."""
        config = self.config
        n_tokens, d = x.shape[1:]
        pre = self.preactivations(x)
        f = topk_relu(pre, config.k)
        decoded = self.decode(f)
        residual = y - decoded
        power = y.pow(2).sum((1, 2)).clamp(min=1e-12)
        fvu = residual.pow(2).sum((1, 2)) / power
        lengths = self.W_dec.norm(dim=-1)[:, None, :]
        # Contributions, not raw features: a free decoder norm would let f shrink and cheat both terms below.
        contribution = f * lengths
        sparsity = contribution.abs().sum((1, 2)) / (n_tokens * (config.k * d) ** 0.5)
        zero = x.new_zeros(())
        prediction = auxiliary = zero
        if self.head_map.shape[0]:
            miss = (f[1:] - self.predict(f, decoded)) * lengths[1:]
            energy = contribution[1:].detach().pow(2).sum((1, 2)).clamp(min=1e-12)
            prediction = (miss.pow(2).sum((1, 2)) / energy).sum()
        self._count_silence(f, n_tokens)
        if config.aux_weight > 0:
            auxiliary = self._auxiliary(pre, residual.detach(), power)
        total = (
            fvu.sum()
            + config.lambda_prediction * prediction
            + config.lambda_sparsity * sparsity.sum()
            + config.aux_weight * auxiliary
        )
        return Losses(total, fvu.mean(), prediction, sparsity.sum(), auxiliary)

    @torch.no_grad()
    def _count_silence(self, f: Tensor, n_tokens: int) -> None:
        fired = (f > 0).any(1)
        self.silent.add_(n_tokens).masked_fill_(fired, 0)

    def dead(self) -> Tensor:
        """Boolean `[L, m]`: silent for `dead_fraction` of all training tokens."""
        budget = self.config.steps * self.config.batch_size
        return self.silent > self.config.dead_fraction * budget

    def _auxiliary(self, pre: Tensor, residual: Tensor, power: Tensor) -> Tensor:
        """AuxK (Gao et al. 2024): dead features explain what the living leave over."""
        dead = self.dead()
        if not dead.any():
            return pre.new_zeros(())
        k = min(2 * self.config.k, int(dead.sum(-1).max()))
        f = topk_relu(pre.masked_fill(~dead[:, None], float("-inf")), k)
        miss = residual - torch.bmm(f, self.W_dec)
        return (miss.pow(2).sum((1, 2)) / power).sum()
