"""Eq. 4 of arXiv 2601.12879 over all layers at once, each term normalised so that the λs carry over between models.

Every term is a mean over tokens divided by what all processes that share a batch agree on, so that they can average
their gradients. Shape legend: L layers, B tokens, d = d_model, m dictionary size. Inputs and targets are
centred and scaled to mean norm √d (`Scaling`), which the exported weights undo.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from hagd.config.transcoder import TranscoderConfig
from hagd.training.device import LateReading, sent_ahead
from hagd.training.processes import mean_over_processes, rank_and_world
from hagd.transcoders.dictionary import Codes, Dictionary
from hagd.transcoders.prediction_head import PredictionHead
from hagd.transcoders.sparse.device_kernels import large
from hagd.transcoders.sparse.products import fuses, squared_norm, weighted_total

_OLD_SHARE = 8
"""AuxK looks at no more than m / 8 dead features a step, the longest silent first: a step stays cheap."""


_RAISE = 0.03
"""Force on the biases of dead features, beside a mean error of one."""


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

    def of_layer(self, i: int) -> Scaling:
        """That of rows `[N, d]` of layer i."""
        return Scaling(self.mean[i], self.scale[i])


class Losses(NamedTuple):
    """Terms of one step; `total` is what is minimised, the rest is logged. `fvu_by_layer` `[L]` is the only vector,
    without gradient, and NaN where another term of the layer is not finite."""

    total: Tensor
    fvu: Tensor
    prediction: Tensor
    sparsity: Tensor
    auxiliary: Tensor
    l0: Tensor
    fvu_by_layer: Tensor


class LayerTerms(NamedTuple):
    """A layer's part of a step.

    Attributes:
        codes: features.
        written: what they add to each layer that they write to, `[B, d]` each; empty where nothing reads it.
        lengths: norms of the decoder rows, `[m]`.
        error: squared error of the reconstruction, summed over tokens.
        prediction: error of the prediction from the layer before, relative. auxiliary: the AuxK term.
    """

    codes: Codes
    written: tuple[Tensor, ...]
    lengths: Tensor
    error: Tensor
    prediction: Tensor
    auxiliary: Tensor


class Previous(Protocol):
    """Brings the features of the layer before, and what they write `[B, d]`, from its process."""

    def __call__(self, codes: Codes, written: Tensor) -> tuple[Codes, Tensor]:
        """Given the same of the first own layer, for numbers, precision and device."""


class Following(Protocol):
    """Takes features, and what they write `[B, d]`, to the process of the next layer."""

    def __call__(self, codes: Codes, written: Tensor) -> Tensor:
        """A zero to be added to the loss; its derivative is what comes back from there."""


class StackedTranscoders(nn.Module):
    """The dictionaries of L layers and the prediction heads between neighbours, in scaled units.

    With `config.cross_layer` the features of a layer write to every later one too (Ameisen et al. 2025).

    Args:
        config: of the dictionaries.
        n_layers: layers of the whole stack.
        d: `d_model`.
        seed: of the first weights; a layer's are the same whoever owns it.
        own: the layers that this process trains, all by default; L is their number. A head belongs to the layer that
            it predicts.
        previous: brings what the layer before the first own one did; there when that layer is another process's.
        following: takes what the last own layer did to the process of the next one.
        built: called with each own layer and its new dictionary, and with each head, before the next one is built.
    """

    silent: Tensor
    power: Tensor

    def __init__(
        self,
        config: TranscoderConfig,
        n_layers: int,
        d: int,
        seed: int,
        own: range | None = None,
        previous: Previous | None = None,
        following: Following | None = None,
        built: Callable[[int, Dictionary | PredictionHead], None] = lambda *_: None,
    ) -> None:
        super().__init__()
        self.config = config
        self.own = range(n_layers) if own is None else own
        self.previous = previous
        self.following = following
        self.seed = seed
        g = torch.Generator().manual_seed(seed)
        m, layers, heads = config.expansion * d, {}, {}
        for i in range(n_layers):  # layers of others are drawn too: the generator is shared
            dictionary = Dictionary(config, d, n_layers - i if config.cross_layer else 1, g)
            if i in self.own:
                layers[str(i)] = dictionary
                built(i, dictionary)
        for i in range(n_layers - 1 if config.lambda_prediction > 0 else 0):
            head = PredictionHead(config.prediction_head, d, m, config.head_rank, g)
            if i + 1 in self.own:
                heads[str(i)] = head
                built(i + 1, head)
        self.layers, self.heads = nn.ModuleDict(layers), nn.ModuleDict(heads)
        self.register_buffer("silent", torch.zeros(len(self.own), m))
        self.register_buffer("power", torch.full((len(self.own),), float(d)))
        self._n_dead = [LateReading() for _ in self.own]

    @property
    def dictionaries(self) -> list[Dictionary]:
        """One a layer."""
        return list(self.layers.values())  # type: ignore[arg-type]

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
            for i, head in enumerate(self.heads.values())
        ]

    def losses(self, x: Tensor, y: Tensor, step: int, scalings: tuple[Scaling, Scaling] | None = None) -> Losses:
        """All terms for tokens `x`, `y` `[L, B, d]` in a step; also counts how long each feature was silent.

        Args:
            x: inputs.
            y: targets.
            step: of the training.
            scalings: of inputs and targets, applied a layer at a time; None: they are scaled already.
        """
        config, n_tokens = self.config, x.shape[1]
        zero = x.new_zeros(())
        terms: list[LayerTerms] = []
        for i, dictionary in enumerate(self.dictionaries):
            earlier = [terms[s].written[i - s] for s in range(i)] if config.cross_layer else []
            before = (terms[-1].codes, terms[-1].written[0]) if terms and terms[-1].written else None
            scale = (_same, _same) if scalings is None else tuple(each.of_layer(i) for each in scalings)
            terms.append(dictionary(self._layer, i, x[i], y[i], scale, earlier, before, step, _asking(x)))
        first, last = terms[0], terms[-1]
        handed_on = self.following(last.codes, last.written[0]) if self.following else zero
        prediction = torch.stack([t.prediction for t in terms]).sum()
        others = torch.stack([t.prediction + t.auxiliary for t in terms]).detach()
        if self.previous is not None:
            before = self.previous(first.codes, first.written[0])
            of_first = self._prediction(0, self.dictionaries[0], first.codes, first.lengths, before, step)
            prediction = prediction + of_first
            others[0] += of_first.detach()
        fvu = torch.stack([t.error for t in terms]) / (n_tokens * self.power)
        sparsity = self._sparsity(terms, n_tokens, x.shape[2])
        auxiliary = torch.stack([t.auxiliary for t in terms]).sum()
        total = (
            fvu.sum()
            + config.lambda_prediction * prediction
            + config.lambda_sparsity * sparsity
            + config.aux_weight * auxiliary
            + handed_on
        )
        l0 = torch.stack([t.codes.l0 for t in terms])
        return Losses(total, fvu.mean(), prediction, sparsity, auxiliary, l0.mean(), fvu.detach() + 0 * others)

    def _layer(
        self,
        dictionary: Dictionary,
        i: int,
        x: Tensor,
        y: Tensor,
        scale: tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]],
        earlier: list[Tensor],
        before: tuple[Codes, Tensor] | None,
        step: int,
        asking: Tensor,
    ) -> LayerTerms:
        """What needs the weights of the own layer i, in one go: where they are divided over processes, no other
        layer's have to be in memory.

        Args:
            dictionary: of the layer.
            i: its place among the own ones.
            x: inputs `[B, d]`. y: targets. scale: of both; scaled tokens are held no longer than they are needed.
            earlier: what layers before write to this one.
            before: features of the layer before and what they write to it; None: not of this process.
            step: of the training.
            asking: zero, with gradient.
        """
        scale_x, scale_y = scale
        codes = dictionary.encode(scale_x(x))
        written: tuple[Tensor, ...] = ()
        if self._only_the_error_is_read(dictionary):
            squared, lengths, error = dictionary.squared_error(codes, scale_y(y))
        else:
            written, lengths = dictionary.write_and_measure(codes)
            constant = dictionary.b_dec if dictionary.W_skip is None else dictionary.constant(scale_x(x))
            error = sum(earlier, constant + written[0]).sub_(scale_y(y))
            squared = squared_norm(error)
        prediction = auxiliary = x.new_zeros(())
        if len(self.heads) and before is not None:
            prediction = self._prediction(i, dictionary, codes, lengths, before, step)
        self._count_silence(i, codes)
        if self.config.aux_weight > 0:
            auxiliary = self._auxiliary(i, dictionary, lambda: scale_x(x), error.detach())
        dictionary.follow_threshold(codes)
        return LayerTerms(codes, written, lengths, squared + asking, prediction, auxiliary)

    def _only_the_error_is_read(self, dictionary: Dictionary) -> bool:
        """Whether nothing but a layer's own error depends on what its features write, where one kernel makes it."""
        alone = not (self.config.cross_layer or len(self.heads) or self.following or self.config.skip)
        return alone and fuses(dictionary.W_dec)

    def _sparsity(self, terms: list[LayerTerms], n_tokens: int, d: int) -> Tensor:
        """Summed over layers: L1 of contributions (a free decoder norm would let f shrink), or for JumpReLU the
        squared relative distance of L0 from k."""
        k = self.config.k
        if self.config.activation == "jumprelu":
            l0 = torch.stack([t.codes.l0 for t in terms])
            # The square of a mean over the tokens of all processes, with the gradient of this one's share.
            distance = mean_over_processes(l0) / k - 1
            return (distance.square() + 2 * distance * (l0 - l0.detach()) / k).sum()
        sizes = [weighted_total(t.codes.values, t.codes.support, t.lengths) for t in terms]
        return torch.stack(sizes).sum() / (n_tokens * (k * d) ** 0.5)

    def _prediction(
        self, i: int, dictionary: Dictionary, target: Codes, lengths: Tensor, before: tuple[Codes, Tensor], step: int
    ) -> Tensor:
        source = self.own[i] - 1
        size = target.values.detach() * lengths.detach()[target.support.index]
        energy = mean_over_processes(size.square().sum())
        if dictionary.W_skip is not None:  # relative to the little that a skip leaves to them it would kill them
            energy = torch.maximum(energy, target.support.n_tokens * self.power[i])
        sample = self._sampled(dictionary.m, source, step)
        if not large(dictionary.W_dec):  # a derivative of its own, which keeps earlier results to the bit
            lengths = dictionary.lengths()
        head: Any = self.heads[str(source)]
        loss: Tensor = head.loss(*before, target, dictionary, lengths, sample)
        return loss / energy.clamp(min=1e-12)

    def _sampled(self, m: int, head: int, step: int) -> Tensor:
        """Features whose inactivity prices a head in a step; the same in every process."""
        device, wanted = self.silent.device, self.config.head_negatives
        if wanted >= m:
            return torch.arange(m, device=device)
        chosen = np.random.default_rng([self.seed, head, step]).choice(m, wanted, replace=False, shuffle=False)
        return sent_ahead(torch.from_numpy(chosen), device)

    @torch.no_grad()
    def _count_silence(self, i: int, codes: Codes) -> None:
        active = (codes.values > 0).to(self.silent.dtype)
        times = torch.zeros_like(self.silent[i]).index_add_(0, codes.support.index, active)
        fired = mean_over_processes(times) > 0
        self.silent[i].add_(codes.support.n_tokens * rank_and_world()[1]).masked_fill_(fired, 0)

    def dead(self) -> Tensor:
        """Boolean `[L, m]`: silent for `dead_fraction` of all training tokens."""
        budget = self.config.steps * self.config.batch_size
        return self.silent > self.config.dead_fraction * budget

    def _auxiliary(self, i: int, dictionary: Dictionary, scaled: Callable[[], Tensor], error: Tensor) -> Tensor:
        """AuxK (Gao et al. 2024): dead features explain what the living leave over, and their biases rise: where that
        is little, explaining it alone would not bring them among the top k again."""
        n_dead = min(self._n_dead[i](self.dead()[i].sum()), max(1, dictionary.m // _OLD_SHARE))
        if not n_dead:
            return self.power.new_zeros(())
        chosen = self.silent[i].topk(n_dead).indices
        bias = dictionary.b_enc[chosen]
        pre = torch.addmm(bias, dictionary.turned(scaled()), dictionary.W_enc[chosen].T)
        values, index = pre.topk(min(2 * self.config.k, n_dead), dim=-1)
        f = torch.zeros_like(pre).scatter(-1, index, values.relu())
        miss = mse_loss(f @ dictionary.W_dec[chosen, : dictionary.d], -error.to(bias.dtype), reduction="sum")
        return miss / (len(error) * self.power[i]) - _RAISE * bias.sum()


def _asking(x: Tensor) -> Tensor:
    """Zero with a gradient. A layer whose inputs ask for none gives its gathered weights back at the end of the whole
    backward pass instead of right after its own part of it."""
    return torch.zeros((), dtype=x.dtype, device=x.device, requires_grad=True)


def _same(x: Tensor) -> Tensor:
    return x
