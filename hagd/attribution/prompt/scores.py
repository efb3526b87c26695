"""Why a head attends: one attention score, divided among pairs of what the query reads and what the key reads.

With norm scales and the patterns of lower layers held at their clean values, a query is a sum over sources, and so is a
key. The score is their product, so it divides exactly into one term for every pair: `Σ_ij (q_i · k_j) · scaling`, with
the biases as one more source on each side. Removing i from the query alone takes away the sum of its terms.

Shape legend: T positions, e width of a head, d = d_model, s sources.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from hagd.attribution.prompt.frozen_model import FrozenModel
from hagd.attribution.prompt.layout import Sources
from hagd.attribution.prompt.records import BIAS, ScoreAttribution
from hagd.attribution.prompt.rows import Targets, edges_into
from hagd.config.stages import AttentionScoreConfig
from hagd.errors import ConfigError
from hagd.models.language_model import LanguageModel
from hagd.models.linear_parts import linear_scores, rotation


def attribute_score(
    lm: LanguageModel,
    model: FrozenModel,
    sources: Sources,
    constant: Tensor,
    identities: np.ndarray,
    config: AttentionScoreConfig,
) -> ScoreAttribution:
    """The largest terms of the score that `config` names.

    Args:
        lm: the model.
        model: frozen around a clean run. sources: of that run.
        constant: `[T, d]`, what the attention reads when no source writes anything, from `FrozenModel.push`.
        identities: int64 `[s, 4]`, kind, layer, position and feature of every source.
        config: which score, and how many terms.

    Raises:
        ConfigError: there is no such layer, head or position.
    """
    query, key = score_positions(lm, sources, config)
    sides = query_and_key(lm, model, sources, constant, config.layer, config.head, query, key)
    terms = sides[0].T @ sides[1]
    size = terms.abs().flatten()
    best = size.topk(min(config.pairs, len(size))).indices
    ends = np.concatenate([identities[: len(sources)], np.full((1, 4), BIAS)])
    pairs = torch.stack([best // len(terms), best % len(terms)], dim=1).cpu().numpy()
    return ScoreAttribution(
        layer=config.layer,
        head=config.head,
        query=query,
        key=key,
        score=float(terms.sum()),
        ends=ends[pairs],
        terms=terms.flatten()[best].float().cpu().numpy(),
        of_all=float(size[best].sum() / size.sum()),
    )


def query_and_key(
    lm: LanguageModel,
    model: FrozenModel,
    sources: Sources,
    constant: Tensor,
    layer: int,
    head: int,
    query: int,
    key: int,
) -> tuple[Tensor, Tensor]:
    """What every source, and last the biases, add to a query and to a key: each `[e, s + 1]`.

    Their products, `queryᵀ key`, are the terms of the score: the scaling is in the query.
    """
    own = linear_scores(lm, layer, constant.dtype)
    shared = head * len(own.W_K) // len(own.W_Q)
    found = []
    for position, weight, bias in ((query, own.W_Q[head], own.b_Q[head]), (key, own.W_K[shared], own.b_K[shared])):
        turn = rotation(lm, position, constant.dtype)
        vectors = (weight @ turn).T.contiguous()
        e = len(vectors)
        targets = Targets(
            layer,
            torch.arange(e, device=vectors.device),
            torch.full((e,), position, device=vectors.device),
            vectors,
            reads="attention",
        )
        rows = edges_into(model, sources, targets)
        side = vectors.new_zeros(e, len(sources) + 1)
        side[:, rows.columns.to(side.device)] = rows.dense
        side[:, -1] = vectors @ constant[position] + bias @ turn
        found.append(side)
    return found[0] * own.scaling, found[1]


def score_positions(lm: LanguageModel, sources: Sources, config: AttentionScoreConfig) -> tuple[int, int]:
    """The positions of query and key.

    Raises:
        ConfigError: there is no such layer, head or position.
    """
    heads, n = int(lm.model.config.num_attention_heads), sources.n_positions
    query = config.query if config.query is not None else n - 1
    if config.layer >= sources.n_layers or config.head >= heads or query >= n or config.key > query:
        raise ConfigError(
            f"graph.score: expected a layer below {sources.n_layers}, a head below {heads}, a query below {n} and a "
            f"key up to it, found layer {config.layer}, head {config.head}, query {query}, key {config.key}; correct it"
        )
    return query, config.key
