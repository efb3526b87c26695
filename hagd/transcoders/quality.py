"""How well dictionaries explain a model, measured on tokens that did not train them.

Shape legend: L layers, B sequences, T positions, n tokens, S slots, d = d_model, m dictionary size.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from hagd.activations.capture import capture
from hagd.activations.outliers import Outliers
from hagd.models.language_model import LanguageModel
from hagd.tasks.records import IGNORED, PADDING, Prompts
from hagd.transcoders.module import TranscoderTraining
from hagd.transcoders.objective import Scaling
from hagd.transcoders.records import DENSITY_EDGES, LayerQuality, TranscoderSet
from hagd.transcoders.splicing import splice

_AT_ONCE = 64
_SPLICED = 64
_DENSE = 0.1
_TWIN = 0.9


@torch.no_grad()
def measure(
    lm: LanguageModel,
    found: TranscoderSet,
    heads: TranscoderTraining | None,
    outliers: Outliers | None,
    prompts: Prompts,
    n_slots: int,
) -> TranscoderSet:
    """`found` with the quality of each layer, over the positions of `prompts` that have a slot.

    FVU is `Σ ‖y − ŷ‖² / Σ ‖y − ȳ‖²` with one mean over all tokens.

    Args:
        lm: the model.
        found: its dictionaries.
        heads: holds the prediction heads, if they were trained here.
        outliers: tokens that training left out are left out here; None: measured on `prompts`.
        prompts: none of them trained the dictionaries.
        n_slots: of the task.
    """
    tokens, slots = prompts.tokens.flatten(0, 1).to(lm.device), prompts.slots.flatten(0, 1).to(lm.device)
    measured, found = found, found.to(lm.device)
    x, y = _captured(lm, found, tokens)
    used = slots >= 0
    limits = outliers or Outliers.of(x[:, used].norm(dim=-1), y[:, used].norm(dim=-1))
    keep = used & limits.keep(x.flatten(1, 2), y.flatten(1, 2)).view_as(used)
    slot, x, y = slots[keep], x[:, keep], y[:, keep]
    rows, places = slice(_SPLICED), range(len(found.transcoders))
    in_splices = tokens[rows], next_tokens(prompts)[rows].to(lm.device), keep[rows], y.mean(1)
    *alone, together = splice(lm, found, [*([i] for i in places), places], *in_splices)
    predicted = [] if heads is None else _prediction_r2(heads.to(lm.device), x)
    qualities: list[LayerQuality] = []
    features: dict[int, Tensor] = {}
    for i, transcoder in enumerate(found.transcoders):
        features[i] = transcoder.encode(x[i])
        error = (y[i] - found.reconstruct(i, features, x[i])).square().sum(-1)
        power = (y[i] - y[i].mean(0)).square().sum(-1)
        l0, frequency = _firing(features[i])
        qualities.append(
            LayerQuality(
                layer=transcoder.layer,
                fvu=_ratio(error, power),
                l0=l0,
                dead=float((frequency == 0).float().mean()),
                dense=float((frequency > _DENSE).float().mean()),
                near_duplicates=_near_duplicates(transcoder.W_dec),
                density=_histogram(frequency),
                kl=alone[i].kl,
                loss_recovered=alone[i].recovered,
                fvu_by_slot=tuple(_ratio(error[slot == s], power[slot == s]) for s in range(n_slots)),
                prediction_r2=predicted[i] if i < len(predicted) else float("nan"),
            )
        )
        if not transcoder.W_later:
            del features[i]
    return replace(measured, quality=tuple(qualities), kl=together.kl, loss_recovered=together.recovered)


def next_tokens(prompts: Prompts) -> Tensor:
    """`[N · C, T, K]`: tokens right after each position, at scored ones the accepted answers; PADDING if unused.

    A mini model is trained on its labels alone, so only they are targets.
    """
    if prompts.labels is not None:
        return prompts.labels.masked_fill(prompts.labels == IGNORED, PADDING)[..., None]
    tokens, slots, scored, answers = (
        value.flatten(0, 1) for value in (prompts.tokens, prompts.slots, prompts.scored, prompts.answers)
    )
    targets = tokens.new_full((*tokens.shape, answers.shape[-1]), PADDING)
    targets[:, :-1, 0] = tokens[:, 1:].masked_fill(slots[:, 1:] == PADDING, PADDING)
    row, place = (scored != PADDING).nonzero(as_tuple=True)
    targets[row, scored[row, place]] = answers[row, place]
    return targets


def _captured(lm: LanguageModel, found: TranscoderSet, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Site inputs and outputs `[L, B, T, d]`."""
    parts = [capture(lm, rows, found.site, found.layers) for rows in tokens.split(_AT_ONCE)]
    x, y = (torch.cat(side, 1) for side in zip(*parts, strict=True))
    return x, y


def _firing(f: Tensor) -> tuple[float, Tensor]:
    """Of features `[n, m]`: how many are active on a token, and on which share of the tokens each one `[m]` is."""
    fired = f > 0
    return float(fired.sum() / len(f)), fired.float().mean(0)


def _ratio(error: Tensor, power: Tensor) -> float:
    return float(error.sum() / power.sum()) if len(power) and power.sum() > 0 else float("nan")


def _near_duplicates(W_dec: Tensor) -> float:
    """Share of features whose decoder row has a cosine above `_TWIN` with another one's."""
    rows = torch.nn.functional.normalize(W_dec, dim=-1)
    twins = 0
    for start in range(0, len(rows), 1024):
        cosine = rows[start : start + 1024] @ rows.T
        twins += int((cosine > _TWIN).sum(1).gt(1).sum())
    return twins / len(rows)


def _histogram(frequency: Tensor) -> tuple[float, ...]:
    """Share of all features in each bin of `DENSITY_EDGES`; what never fires is in none, what is rarer in the first."""
    alive = frequency[frequency > 0].log10().clamp(min=DENSITY_EDGES[0])
    counts = torch.histogram(alive.cpu(), bins=torch.tensor(DENSITY_EDGES)).hist
    return tuple((counts / len(frequency)).tolist())


def _prediction_r2(module: TranscoderTraining, x: Tensor) -> list[float]:
    """Explained share of each next layer's features by the prediction heads; `x` raw `[L, n, d]`."""
    stacked = module.stacked
    if not len(stacked.heads):
        return []
    scaled = Scaling(module.x_mean, module.x_scale)(x)
    codes = stacked.encode(scaled)
    predicted = stacked.predict(codes, stacked.decode(codes, scaled)[1])
    found = []
    for guess, code in zip(predicted, codes[1:], strict=True):
        f = torch.zeros_like(guess)
        f[code.support.token, code.support.index] = code.values
        miss, spread = (f - guess).square().sum(), (f - f.mean(0)).square().sum()
        found.append(float(1 - miss / spread.clamp(min=1e-12)))
    return found
