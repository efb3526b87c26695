"""Eq. 4 once more in NumPy: dense, in double precision, nothing of `hagd.transcoders` but the names of its weights.

Shape legend: L layers, B tokens, d = d_model, m dictionary size, T layers written to.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hagd.config.transcoder import TranscoderConfig
from hagd.transcoders.dictionary import Codes
from hagd.transcoders.objective import StackedTranscoders

LAYERS, TOKENS, D = 3, 7, 4
Array = NDArray[np.float64]


def settings(**changes: Any) -> TranscoderConfig:
    return TranscoderConfig(
        **{
            "k": 2,
            "expansion": 5,
            "lambda_prediction": 0.3,
            "lambda_sparsity": 0.2,
            "aux_weight": 0.5,
            "steps": 10,
            "batch_size": 10,
            "dead_fraction": 0.5,
            "head_rank": 3,
            "bandwidth": 0.4,
            **changes,
        }
    )


def random_stacked(
    config: TranscoderConfig, n_layers: int = LAYERS, seed: int = 0, dtype: torch.dtype = torch.float64
) -> StackedTranscoders:
    """No parameter is neutral, no two layers have the same power."""
    stacked = StackedTranscoders(config, n_layers, D, seed).to(dtype)
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in stacked.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=g, dtype=torch.float64))
        for dictionary in stacked.dictionaries:
            if dictionary.log_threshold is not None:
                dictionary.log_threshold.sub_(0.5)
            dictionary.basis.copy_(torch.linalg.qr(torch.randn(D, D, generator=g, dtype=torch.float64)).Q)
        stacked.power.copy_(torch.rand(n_layers, generator=g) + 2)
    return stacked


def random_tokens(seed: int = 1, n_layers: int = LAYERS, n: int = TOKENS) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(n_layers, n, D, generator=g, dtype=torch.float64) for _ in range(2))  # type: ignore[return-value]


def arrays(stacked: StackedTranscoders) -> dict[str, Array]:
    return {name: value.detach().numpy().copy() for name, value in stacked.state_dict().items()}


def dense(codes: Codes) -> Tensor:
    """Features `[B, m]`."""
    support = codes.support
    out = torch.zeros(support.n_tokens, support.m, dtype=codes.values.dtype)
    for t in range(support.n_tokens):
        for pair in range(int(support.offsets[t]), int(support.offsets[t + 1])):
            assert out[t, support.index[pair]] == 0, "a pair is there once"
            out[t, support.index[pair]] = codes.values[pair].detach()
    return out


def top(row: Array, k: int) -> Array:
    out = np.zeros_like(row)
    for j in np.argsort(-row)[:k]:
        out[j] = max(row[j], 0.0)
    return out


def activate(pre: Array, config: TranscoderConfig, threshold: Array | None) -> Array:
    """Features `[B, m]` of pre-activations `[B, m]`."""
    if config.activation == "topk":
        return np.array([top(row, config.k) for row in pre])
    if config.activation == "batch_topk":
        return top(pre.ravel(), config.k * len(pre)).reshape(pre.shape)
    if config.activation == "relu":
        return np.where(pre > 0, pre, 0)
    assert threshold is not None
    return np.where(pre > threshold, pre, 0)


@dataclass
class Slow:
    """The terms of Eq. 4 and what they are made of.

    Attributes:
        terms: by name of the field of `Losses`.
        pre: `[L, B, m]`. f: `[L, B, m]`. miss: `[L, B, d]`, target minus reconstruction.
        energy: by layer, of the contributions that are predicted.
    """

    terms: dict[str, float] = field(default_factory=dict)
    pre: list[Array] = field(default_factory=list)
    f: list[Array] = field(default_factory=list)
    miss: list[Array] = field(default_factory=list)
    energy: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Nudge:
    """Added to features `[L, B, m]`, and to the mean number of active ones of a layer `[L]`."""

    f: Array
    l0: Array


def slow_losses(
    w: dict[str, Array],
    config: TranscoderConfig,
    x: Array,
    y: Array,
    silent: Array,
    held: Slow | None = None,
    nudge: Nudge | None = None,
) -> Slow:
    """All terms for tokens `x`, `y` `[L, B, d]`.

    Args:
        w: weights by name.
        config: settings.
        x: inputs.
        y: targets.
        silent: `[L, m]`, tokens since each feature fired, this batch included.
        held: where what no gradient flows through comes from; None = from this very evaluation.
        nudge: what features and their number are moved by.
    """
    n_layers, n_tokens, d = x.shape
    found, l0 = Slow(), []
    for i in range(n_layers):
        threshold = np.exp(w[f"layers.{i}.log_threshold"]) if config.activation == "jumprelu" else None
        found.pre.append(x[i] @ encoder(w, i).T + w[f"layers.{i}.b_enc"])
        found.f.append(activate(found.pre[i], config, threshold))
        l0.append((found.f[i] > 0).sum() / n_tokens)
        if nudge is not None:
            found.f[i] = found.f[i] + nudge.f[i]
            l0[i] = l0[i] + nudge.l0[i]
    fvu = []
    for i in range(n_layers):
        recon = np.zeros_like(y[i]) + w[f"layers.{i}.b_dec"]
        if config.skip:
            recon += x[i] @ w[f"layers.{i}.W_skip"]
        for source in range(i + 1) if config.cross_layer else [i]:
            columns = slice((i - source) * d, (i - source + 1) * d)
            recon += found.f[source] @ w[f"layers.{source}.W_dec"][:, columns]
        found.miss.append(y[i] - recon)
        fvu.append((found.miss[i] ** 2).sum() / (n_tokens * w["power"][i]))
    length = [np.sqrt((w[f"layers.{i}.W_dec"] ** 2).sum(1)) for i in range(n_layers)]
    found.energy = [((found.f[i] * length[i]) ** 2).sum() for i in range(n_layers)]
    if config.skip:
        found.energy = [max(energy, n_tokens * power) for energy, power in zip(found.energy, w["power"], strict=True)]
    constants = found if held is None else held
    if config.activation == "jumprelu":
        sparsity = sum((l0[i] / config.k - 1) ** 2 for i in range(n_layers))
    else:
        sparsity = sum((found.f[i] * length[i]).sum() for i in range(n_layers)) / (n_tokens * np.sqrt(config.k * d))
    prediction = 0.0
    for i in range(n_layers - 1 if config.lambda_prediction > 0 else 0):
        miss = (found.f[i + 1] - guess(w, config, i, found.f[i])) * length[i + 1]
        prediction += (miss**2).sum() / constants.energy[i + 1]
    auxiliary = 0.0
    for i in range(n_layers if config.aux_weight > 0 else 0):
        dead = oldest(silent[i], config)
        if not len(dead):
            continue
        for t in range(n_tokens):
            revived = top(found.pre[i][t, dead], 2 * config.k) @ w[f"layers.{i}.W_dec"][dead, :d]
            auxiliary += ((constants.miss[i][t] - revived) ** 2).sum() / (n_tokens * w["power"][i])
        auxiliary -= 0.03 * w[f"layers.{i}.b_enc"][dead].sum()
    found.terms = {
        "total": sum(fvu)
        + config.lambda_prediction * prediction
        + config.lambda_sparsity * sparsity
        + config.aux_weight * auxiliary,
        "fvu": sum(fvu) / n_layers,
        "prediction": prediction,
        "sparsity": sparsity,
        "auxiliary": auxiliary,
        "l0": sum(l0) / n_layers,
    }
    return found


def encoder(w: dict[str, Array], i: int) -> Array:
    """Layer i's encoder rows `[m, d]` in the basis of the tokens."""
    return w[f"layers.{i}.W_enc"] @ w[f"layers.{i}.basis"].T


def guess(w: dict[str, Array], config: TranscoderConfig, i: int, f: Array) -> Array:
    """Layer i + 1's features `[B, m]` as the head expects them from layer i's."""
    d, kind = w["layers.0.W_enc"].shape[1], config.prediction_head
    if kind == "dense":
        return np.maximum(f @ w[f"heads.{i}.dense"] + w[f"heads.{i}.bias"], 0)
    low_rank = f @ w[f"heads.{i}.down"] @ w[f"heads.{i}.up"].T if "low_rank" in kind else 0.0
    if kind == "low_rank":
        return np.maximum(low_rank + w[f"heads.{i}.bias"], 0)
    moved = f @ w[f"layers.{i}.W_dec"][:, :d] @ w[f"heads.{i}.map"] + w[f"heads.{i}.map_bias"]
    return np.maximum(moved @ encoder(w, i + 1).T + w[f"layers.{i + 1}.b_enc"] + low_rank, 0)


def oldest(silent: Array, config: TranscoderConfig) -> NDArray[np.int64]:
    """The dead features that AuxK looks at: the longest silent, at most an eighth of all."""
    dead = np.flatnonzero(silent > config.dead_fraction * config.steps * config.batch_size)
    return dead[np.argsort(-silent[dead])][: max(1, len(silent) // 8)]
