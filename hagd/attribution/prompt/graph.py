"""The graph of one prompt: every direct edge between what is active, pruned to what carries the influence.

Shape legend: T positions, H heads, e width of a head, N nodes before pruning, n features, h heads that are nodes,
k logits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hagd.attribution.prompt.compute import Calculation, Computed
from hagd.attribution.prompt.frozen_model import FrozenModel, Pushed, freeze
from hagd.attribution.prompt.influence import Pruned, prune
from hagd.attribution.prompt.layout import Sources
from hagd.attribution.prompt.logits import LogitTargets, head_directions
from hagd.attribution.prompt.records import PromptGraph, PromptNodes
from hagd.attribution.prompt.rows import Targets
from hagd.attribution.prompt.scores import attribute_score, score_positions
from hagd.attribution.prompt.trace import Trace, decompose
from hagd.attribution.records import ERROR, FEATURE, HEAD, LOGIT, TOKEN
from hagd.config.stages import GraphConfig, GraphPruningConfig
from hagd.errors import NumericalError
from hagd.models.language_model import LanguageModel
from hagd.transcoders.records import TranscoderSet

_TOLERANCE = 0.02
"""Of `PromptGraph.sum_error`. Single precision stays below 1e-4, bfloat16 models round away a percent."""

_LOGIT_TOLERANCE = 1e-3
"""Of the logits of the clean run, over their spread. Single precision stays below 1e-5, bfloat16 rounds away 5 units in
the last place."""


@torch.no_grad()
def build_prompt_graph(
    lm: LanguageModel,
    transcoders: TranscoderSet,
    run: Trace,
    logits: LogitTargets,
    config: GraphConfig,
    folder: Path,
    progress: Callable[[int, int], None] | None = None,
) -> PromptGraph:
    """The graph of a clean run.

    Args:
        lm: the model.
        transcoders: of its MLPs, on its device.
        run: from `trace`; where it tells the outputs of heads, these are nodes.
        logits: what is explained.
        config: `strongest`, `max_features`, `skip_first`, `pruning` and `score` are read.
        folder: for the edges before pruning.
        progress: called with targets done and targets in all.

    Raises:
        NumericalError: the clean run did not give the model's logits, or edges and biases do not add up to the model's
            activations, so it is not what `FrozenModel` makes of it.
    """
    _refuse_other_logits(lm, run)
    active, errors = decompose(run, transcoders, skip_first=config.skip_first)
    model = freeze(lm, run, transcoders)
    sources = Sources(run.embedding, active, errors, transcoders, written_by_heads(model, run))
    if config.score is not None:
        score_positions(lm, sources, config.score)  # before any work
    targets, weights = at_last_position(sources, logits), logits.weights.double().cpu().numpy()
    directions = head_directions(lm, run, logits)
    calculation = Calculation(model, sources, transcoders, targets, weights, config.strongest, progress, directions)
    if config.max_features is None or config.max_features >= sources.n_inner:
        computed = calculation.all_features(folder)
    else:
        computed = calculation.most_influential(folder, config.max_features)
    silent = without_sources(model, sources, transcoders, run.entering - run.embedding)
    biases = (*feature_biases(silent, sources, transcoders), *head_biases(silent, model, directions))
    bias = torch.cat([*biases, logits.vectors @ silent.final[-1] + logits.bias])
    values = (active.activation.to(run.dtype), *read_from_heads(run.heads, directions))
    value = torch.cat([*values, logits.vectors @ run.final[-1] + logits.bias])
    sum_error = _sum_error(computed, sources, value, bias)
    _refuse_deviation(lm, sum_error)
    pruned = _pruned(calculation, computed, config.pruning)
    nodes = _all_nodes(run, sources, logits, value, bias, computed.influence)
    found = _record(run, sources, logits, computed, pruned, nodes, sum_error)
    if config.score is None:
        return found
    identities = np.stack(nodes[:4], axis=1)
    heard = silent.attention_in[config.score.layer]
    return replace(found, score=attribute_score(lm, model, sources, heard, identities, config.score))


def _pruned(calculation: Calculation, computed: Computed, shares: GraphPruningConfig) -> Pruned:
    sources = calculation.sources
    return prune(
        computed.edges,
        calculation.weights,
        computed.influence,
        n_inner=sources.n_inner,
        first_token=sources.error(sources.n_layers),
        node_share=shares.nodes,
        edge_share=shares.edges,
    )


def _refuse_other_logits(lm: LanguageModel, run: Trace) -> None:
    """The clean run's attention is HAGD's own; what the model's does otherwise, its sums cannot tell."""
    last = torch.tensor([[len(run.tokens) - 1]], device=run.tokens.device)
    logits = lm.logits_at(run.tokens[None], last)[0, 0]
    deviation = float((run.logits - logits).norm() / (logits - logits.mean()).norm())
    tolerance = max(_LOGIT_TOLERANCE, 16 * torch.finfo(lm.model.dtype).eps)
    if not deviation <= tolerance:
        raise NumericalError(
            f"graph of {lm.name}: expected the run with HAGD's own attention to give the model's logits within "
            f"{tolerance:.1%}, found a deviation of {deviation:.1%}; this model's attention does more than softmax "
            "under a mask (a soft cap, a sink), which HAGD does not model"
        )


def _refuse_deviation(lm: LanguageModel, sum_error: float) -> None:
    if sum_error > _TOLERANCE:
        raise NumericalError(
            f"graph of {lm.name}: expected edges and biases to add up to the model's activations within "
            f"{_TOLERANCE:.0%}, found a deviation of {sum_error:.1%}; this architecture adds more to the residual "
            "stream than attention with a constant pattern and MLPs, which HAGD does not model"
        )


def written_by_heads(model: FrozenModel, run: Trace) -> dict[int, Tensor]:
    """Layer → `[T, H, d]`, what the heads that are nodes write."""
    return {layer: model.head_writes(layer, z) for layer, z in run.heads.items()}


def read_from_heads(outputs: Mapping[int, Tensor], directions: Mapping[int, Tensor]) -> list[Tensor]:
    """`u · z` of the heads that are nodes, `[T·H]` by layer from the first."""
    return [(outputs[layer] * directions[layer]).sum(-1).flatten() for layer in sorted(directions)]


def at_last_position(sources: Sources, logits: LogitTargets) -> Targets:
    """Logit nodes as targets, numbered after all sources."""
    count = torch.arange(len(logits), device=logits.vectors.device)
    last = torch.full_like(count, sources.n_positions - 1)
    return Targets(sources.n_layers, count + len(sources), last, logits.vectors)


def without_sources(model: FrozenModel, sources: Sources, transcoders: TranscoderSet, entering: Tensor) -> Pushed:
    """What everything reads when no source writes anything.

    Every bias of the model and the dictionaries, carried up through the frozen model, with `entering` `[T, d]`, which
    holds position embeddings.
    """
    written = torch.zeros_like(sources.errors)
    for transcoder in transcoders.transcoders:
        written[transcoder.layer] += transcoder.b_dec.to(written.dtype)
    return model.push(entering, tuple(written))


def feature_biases(silent: Pushed, sources: Sources, transcoders: TranscoderSet) -> list[Tensor]:
    """What each feature's pre-activation is when no source writes anything, by layer from the first."""
    found = []
    active = sources.active
    for transcoder in transcoders.transcoders:
        own = slice(sources.features_below(transcoder.layer), sources.features_below(transcoder.layer + 1))
        rows = active.feature[own]
        read = silent.mlp_in[transcoder.layer][active.position[own]]
        found.append((read * transcoder.W_enc[rows].to(read.dtype)).sum(1) + transcoder.b_enc[rows].to(read.dtype))
    return found


def head_biases(silent: Pushed, model: FrozenModel, directions: Mapping[int, Tensor]) -> list[Tensor]:
    """`u · z` of the heads that are nodes when no source writes anything, `[T·H]` by layer from the first."""
    outputs = {layer: model.head_outputs(layer, silent.attention_in[layer]) for layer in directions}
    return read_from_heads(outputs, directions)


def _sum_error(computed: Computed, sources: Sources, value: Tensor, bias: Tensor) -> float:
    """Over the targets whose edges were computed; heads, which are in another unit, for themselves."""
    targets = computed.edges.targets
    place = np.where(targets < sources.n_inner, targets, targets - len(sources) + sources.n_inner)
    expected = value.double().cpu().numpy()[place]
    found = computed.incoming[targets] + bias.double().cpu().numpy()[place]
    head = (place >= sources.n_features) & (place < sources.n_inner)
    return max(
        float(np.abs(found - expected)[own].max() / max(np.abs(expected[own]).max(), 1e-30))
        for own in (head, ~head)
        if own.any()
    )


def _record(
    run: Trace,
    sources: Sources,
    logits: LogitTargets,
    computed: Computed,
    pruned: Pruned,
    nodes: tuple[np.ndarray, ...],
    sum_error: float,
) -> PromptGraph:
    kept = np.flatnonzero(pruned.nodes)
    number = np.full(len(pruned.nodes), -1)
    number[kept] = np.arange(len(kept))
    errors = slice(sources.error(0), sources.error(sources.n_layers))
    tokens = slice(sources.error(sources.n_layers), len(sources))
    by_token, by_error = (float(computed.influence[where].sum()) for where in (tokens, errors))
    total = float(computed.influence.sum()) + float(logits.weights.sum())
    return PromptGraph(
        tokens=run.tokens,
        nodes=PromptNodes(*(column[kept] for column in nodes)),
        edge_index=np.stack([number[pruned.source], number[pruned.target]]),
        edge_attr=pruned.value,
        edge_influence=pruned.flow.astype(np.float32),
        n_active=sources.n_features,
        n_edges=len(computed.edges),
        replacement=by_token / max(by_token + by_error, 1e-30),
        completeness=1 - by_error / total,
        sum_error=sum_error,
    )


def cumulative_shares(influence: np.ndarray) -> np.ndarray:
    """For each node `[N]`, the share of all influence that it and the more influential nodes have."""
    order = np.argsort(-influence, kind="stable")
    shares = np.empty(len(influence))
    shares[order] = np.cumsum(influence[order]) / max(float(influence.sum()), 1e-30)
    return shares


def _all_nodes(
    run: Trace, sources: Sources, logits: LogitTargets, value: Tensor, bias: Tensor, influence: np.ndarray
) -> tuple[np.ndarray, ...]:
    """Columns of `PromptNodes`, of all N nodes; `value` and `bias` are `[n + h + k]`."""
    active, k = sources.active, len(logits)
    n_layers, n_positions, n_heads = sources.n_layers, sources.n_positions, sources.heads_at_position
    every = torch.arange(n_positions, device=active.layer.device)
    layers = torch.arange(n_layers, device=every.device).repeat_interleave(n_positions)
    heads = torch.cartesian_prod(
        torch.tensor(list(sources.heads), dtype=torch.long), torch.arange(n_positions), torch.arange(n_heads)
    )
    head_layer, head_position, head = heads.to(every.device).T
    counts = torch.tensor([len(active), len(heads), len(layers), n_positions, k], device=every.device)
    kind = torch.tensor([FEATURE, HEAD, ERROR, TOKEN, LOGIT], device=every.device).repeat_interleave(counts)
    layer = torch.cat([active.layer, head_layer, layers, torch.full_like(every, -1), every.new_full((k,), n_layers)])
    position = torch.cat(
        [active.position, head_position, every.repeat(n_layers + 1), every.new_full((k,), n_positions - 1)]
    )
    feature = torch.cat([active.feature, head, torch.zeros_like(layers), run.tokens, logits.tokens])
    nothing = bias.new_zeros(len(layers) + n_positions)
    inner = sources.n_inner
    integers = (x.cpu().numpy() for x in (kind, layer, position, feature))
    reals = (
        torch.cat([value[:inner], nothing, logits.probabilities]),
        torch.from_numpy(influence),
        torch.from_numpy(cumulative_shares(influence)),
        torch.cat([bias[:inner], nothing, bias[inner:]]),
    )
    return (*integers, *(x.float().cpu().numpy() for x in reals))
