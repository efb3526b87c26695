"""Eq. 4 of arXiv 2601.12879 over all layers at once, each term normalised so that the λs carry over between models.

Every term is a mean over tokens divided by what all processes that share a batch agree on, so that they can average
their gradients. Shape legend: L layers, B tokens, d = d_model, m dictionary size. Inputs and targets are
centred and scaled to mean norm √d (`Scaling`), which the exported weights undo.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from hagd.config.stages import TranscoderConfig
from hagd.training.processes import mean_over_processes, rank_and_world
from hagd.transcoders.dictionary import Codes, Dictionary
from hagd.transcoders.prediction_head import PredictionHead

_OLD_SHARE = 8
"""AuxK looks at no more than m / 8 dead features a step, the longest silent first: a step stays cheap."""


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
        return torch.addcmul(-self.mean * self.scale, x, self.scale)


class Losses(NamedTuple):
    """Terms of one step; `total` is what is minimised, the rest is logged."""

    total: Tensor
    fvu: Tensor
    prediction: Tensor
    sparsity: Tensor
    auxiliary: Tensor
    l0: Tensor


class StackedTranscoders(nn.Module):
    """The dictionaries of L layers and the prediction heads between neighbours, in scaled units.

    With `config.cross_layer` the features of a layer write to every later one too (Ameisen et al. 2025).
    """

    silent: Tensor
    power: Tensor

    def __init__(self, config: TranscoderConfig, n_layers: int, d: int, seed: int) -> None:
        super().__init__()
        self.config = config
        g = torch.Generator().manual_seed(seed)
        targets = [n_layers - i if config.cross_layer else 1 for i in range(n_layers)]
        self.layers = nn.ModuleList(Dictionary(config, d, n, g) for n in targets)
        heads = n_layers - 1 if config.lambda_prediction > 0 else 0
        m = config.expansion * d
        self.heads = nn.ModuleList(
            PredictionHead(config.prediction_head, d, m, config.head_rank, g) for _ in range(heads)
        )
        self.register_buffer("silent", torch.zeros(n_layers, m))
        self.register_buffer("power", torch.full((n_layers,), float(d)))

    @property
    def dictionaries(self) -> list[Dictionary]:
        """One a layer."""
        return list(self.layers)  # type: ignore[arg-type]

    def encode(self, x: Tensor) -> list[Codes]:
        """Features of scaled inputs `[L, B, d]`."""
        return [dictionary.encode(x[i]) for i, dictionary in enumerate(self.dictionaries)]

    def decode(self, codes: list[Codes], x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Scaled reconstruction `[B, d]` of each layer, and what its features write to their own layer `[B, d]`."""
        written = [dictionary.write(c) for dictionary, c in zip(self.dictionaries, codes, strict=True)]
        recon = []
        for i, dictionary in enumerate(self.dictionaries):
            own = dictionary.constant(x[i]) + written[i][0]
            earlier = [written[s][i - s] for s in range(i)] if self.config.cross_layer else []
            recon.append(sum(earlier, own))
        return recon, [w[0] for w in written]

    def predict(self, codes: list[Codes], written: list[Tensor]) -> list[Tensor]:
        """Predicted features `[B, m]` of every layer but the first, from the layer before."""
        dictionaries = self.dictionaries
        return [
            head.predict(codes[i], written[i], dictionaries[i + 1])  # type: ignore[operator]
            for i, head in enumerate(self.heads)
        ]

    def losses(self, x: Tensor, y: Tensor) -> Losses:
        """All terms for scaled tokens `x`, `y` `[L, B, d]`; also counts how long each feature has been silent."""
        config, n_tokens = self.config, x.shape[1]
        codes = self.encode(x)
        recon, written = self.decode(codes, x)
        errors = [mse_loss(guess, target, reduction="sum") for guess, target in zip(recon, y, strict=True)]
        fvu = torch.stack(errors) / (n_tokens * self.power)
        lengths = [dictionary.lengths() for dictionary in self.dictionaries]
        l0 = torch.stack([c.l0 for c in codes])
        sparsity = self._sparsity(codes, lengths, l0, n_tokens, x.shape[2])
        prediction = self._prediction(codes, written, lengths) if len(self.heads) else x.new_zeros(())
        self._count_silence(codes, n_tokens)
        auxiliary = self._auxiliary(x, y, recon) if config.aux_weight > 0 else x.new_zeros(())
        for dictionary, c in zip(self.dictionaries, codes, strict=True):
            dictionary.follow_threshold(c)
        total = (
            fvu.sum()
            + config.lambda_prediction * prediction
            + config.lambda_sparsity * sparsity
            + config.aux_weight * auxiliary
        )
        return Losses(total, fvu.mean(), prediction, sparsity, auxiliary, l0.mean())

    def _sparsity(self, codes: list[Codes], lengths: list[Tensor], l0: Tensor, n_tokens: int, d: int) -> Tensor:
        """Summed over layers: L1 of contributions (a free decoder norm would let f shrink), or for JumpReLU the
        squared relative distance of L0 from k."""
        k = self.config.k
        if self.config.activation == "jumprelu":
            # The square of a mean over the tokens of all processes, with the gradient of this one's share.
            distance = mean_over_processes(l0) / k - 1
            return (distance.square() + 2 * distance * (l0 - l0.detach()) / k).sum()
        total = sum((c.values @ n[c.support.index] for c, n in zip(codes, lengths, strict=True)), l0.new_zeros(()))
        return total / (n_tokens * (k * d) ** 0.5)

    def _prediction(self, codes: list[Codes], written: list[Tensor], lengths: list[Tensor]) -> Tensor:
        total = lengths[0].new_zeros(())
        for i, head in enumerate(self.heads):
            target, following = codes[i + 1], self.dictionaries[i + 1]
            contribution = target.values.detach() * lengths[i + 1].detach()[target.support.index]
            energy = mean_over_processes(contribution.square().sum())
            loss = head.loss(codes[i], written[i], target, following, self._sampled(following))  # type: ignore[operator]
            total = total + loss / energy.clamp(min=1e-12)
        return total

    def _sampled(self, dictionary: Dictionary) -> Tensor:
        m, wanted = dictionary.m, self.config.head_negatives
        device = dictionary.W_enc.device
        return torch.arange(m, device=device) if wanted >= m else torch.randperm(m, device=device)[:wanted]

    @torch.no_grad()
    def _count_silence(self, codes: list[Codes], n_tokens: int) -> None:
        fired = torch.zeros_like(self.silent, dtype=torch.bool)
        for row, c in zip(fired, codes, strict=True):
            row[c.support.index[c.values > 0]] = True
        fired = mean_over_processes(fired.float()) > 0
        self.silent.add_(n_tokens * rank_and_world()[1]).masked_fill_(fired, 0)

    def dead(self) -> Tensor:
        """Boolean `[L, m]`: silent for `dead_fraction` of all training tokens."""
        budget = self.config.steps * self.config.batch_size
        return self.silent > self.config.dead_fraction * budget

    def _auxiliary(self, x: Tensor, y: Tensor, recon: list[Tensor]) -> Tensor:
        """AuxK (Gao et al. 2024): dead features explain what the living leave over."""
        total = x.new_zeros(())
        for i, (dictionary, dead) in enumerate(zip(self.dictionaries, self.dead(), strict=True)):
            n_dead = min(int(dead.sum()), max(1, dictionary.m // _OLD_SHARE))
            if not n_dead:
                continue
            chosen = self.silent[i].topk(n_dead).indices
            pre = torch.addmm(dictionary.b_enc[chosen], x[i], dictionary.W_enc[chosen].T)
            values, index = pre.topk(min(2 * self.config.k, n_dead), dim=-1)
            f = torch.zeros_like(pre).scatter(-1, index, values.relu())
            missing = y[i] - recon[i].detach()
            miss = mse_loss(f @ dictionary.W_dec[chosen, : dictionary.d], missing, reduction="sum")
            total = total + miss / (x.shape[1] * self.power[i])
        return total
