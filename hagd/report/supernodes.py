"""What each supernode reads and writes, drawn from all of its features and heads, in the circuit or not.

Shape legend: B sequences, T positions, V tokens, S supernodes of a level, n_candidates features and heads of the graph,
L, m, K, H as in `hagd.patching.patched_model`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.sparse import csr_array
from torch import Tensor

from hagd.attribution.records import FEATURE, HEAD, AttributionGraph
from hagd.hierarchy.records import Level
from hagd.patching.patched_model import PatchedModel
from hagd.report.records import HierarchyLevel, SupernodeView, TopPrompt

_TOKENS = 5
_PROMPTS = 3
_NAMED = 2
_LOGITS_AT_ONCE = 1 << 24


@dataclass(frozen=True)
class Observed:
    """Features and heads on some prompts, on the CPU.

    Attributes:
        f: `[L, B, T, m]`.
        tokens, slots: int64 `[B, T]`.
        slot_names: position roles.
        text: of a token.
        heads: `[K, B, T, H]`, lengths of the outputs of heads that are nodes; None without them.
    """

    f: Tensor
    tokens: Tensor
    slots: Tensor
    slot_names: tuple[str, ...]
    text: Callable[[int], str]
    heads: Tensor | None = None

    def activation(self, patched: PatchedModel, kind: int, layer: int, index: Any) -> Tensor:
        """`[B, T]` of one feature or head of a layer, `[B, T, n]` of several."""
        if kind == FEATURE:
            return self.f[patched.layout.layers.index(layer)][..., index]
        assert kind == HEAD and self.heads is not None
        return self.heads[patched.layout.head_layers.index(layer)][..., index]


class Supernodes:
    """Describes the supernodes of any level of one graph."""

    def __init__(self, patched: PatchedModel, graph: AttributionGraph, observed: Observed) -> None:
        self._graph, self._observed, self._n_layers = graph, observed, patched.lm.n_layers
        self._unembedding: Any = patched.lm.unembedding
        self._written = _written(patched, graph)
        self._vocabulary, inverse = observed.tokens.unique(return_inverse=True)
        self._by_token, self._by_prompt = _relative_activity(patched, graph, observed, inverse)

    def level(self, level: Level) -> HierarchyLevel:
        """The level, every supernode named and described."""
        n, n_candidates = len(self._graph.nodes), self._graph.n_candidates
        ones = np.ones(n_candidates)
        members = csr_array(
            (ones, (level.supernode[:n_candidates], np.arange(n_candidates))), shape=(level.n_supernodes, n_candidates)
        )
        size = np.maximum(np.asarray(members.sum(axis=1)), 1)[:, None]
        read, prompts = members @ self._by_token / size, members @ self._by_prompt / size
        promoted = promoted_together(members @ self._written, self._unembedding, self._observed.text)
        order = np.argsort(level.supernode, kind="stable")
        cuts = np.searchsorted(level.supernode[order], np.arange(1, level.n_supernodes))
        views = []
        for i, rows in enumerate(np.split(order, cuts)):
            nodes = self._graph.nodes
            slot, span = place(nodes.layer[rows], nodes.slot[rows], self._observed.slot_names, self._n_layers)
            inputs = _strongest(read[i], lambda j: self._observed.text(int(self._vocabulary[j])))
            written = promoted[i] if (rows < n_candidates).any() else ()
            n_heads = int((nodes.kind[rows] == HEAD).sum())
            label = named(slot, span, inputs, written, len(rows), n_heads)
            views.append(SupernodeView(label, len(rows), slot, span, inputs, written, self._prompts(prompts[i], slot)))
        assert sum(view.n_nodes for view in views) == n
        return HierarchyLevel(
            tuple(views), level.modularity, level.eigengap, level.conductance, level.coherence, level.coherence_null
        )

    def _prompts(self, activity: np.ndarray, slot: str) -> tuple[TopPrompt, ...]:
        observed = self._observed
        found = []
        for i in np.argsort(-activity, kind="stable")[:_PROMPTS].tolist():
            if activity[i] <= 0:
                break
            used = observed.slots[i] >= 0
            tokens = tuple(observed.text(token) for token in observed.tokens[i][used].tolist())
            here = (observed.slots[i][used] == observed.slot_names.index(slot)).nonzero().flatten().tolist()
            found.append(TopPrompt(tokens, here[-1] if here else len(tokens) - 1, float(activity[i])))
        return tuple(found)


def place(layer: np.ndarray, slot: np.ndarray, slot_names: Sequence[str], n_layers: int) -> tuple[str, str]:
    """Most frequent slot of some nodes, and their range of layers; tokens and logits are no layer of the model."""
    low, high = int(layer.min()), int(layer.max())
    ends = {-1: "tokens", n_layers: "logits"}
    first, last = ends.get(low, f"L{low}"), ends.get(high, f"L{high}" if low in ends else str(high))
    return slot_names[int(np.bincount(slot).argmax())], first if low == high else f"{first}–{last}"


@torch.no_grad()
def promoted_together(
    written: np.ndarray, unembedding: Any, text: Callable[[int], str]
) -> list[tuple[tuple[str, float], ...]]:
    """Tokens whose logits what supernodes write `[S, d]` raises most, through the unembedding alone."""
    weight = unembedding.weight.float().cpu()
    found = []
    for part in torch.as_tensor(written).float().split(max(1, _LOGITS_AT_ONCE // len(weight))):
        logits = part @ weight.T
        best = (logits - logits.mean(1, keepdim=True)).topk(min(_TOKENS, len(weight)))
        for values, tokens in zip(best.values.tolist(), best.indices.tolist(), strict=True):
            found.append(tuple((text(t), v) for t, v in zip(tokens, values, strict=True)))
    return found


def _written(patched: PatchedModel, graph: AttributionGraph) -> np.ndarray:
    """What each candidate adds to the residual stream on average, `[n_candidates, d]`."""
    nodes, n = graph.nodes, graph.n_candidates
    is_head = nodes.kind[:n] == HEAD
    written = np.zeros((n, patched.lm.d_model))
    for transcoder in patched.transcoders.transcoders:
        rows = np.flatnonzero(~is_head & (nodes.layer[:n] == transcoder.layer))
        decoder = transcoder.W_dec + sum(transcoder.W_later) if transcoder.W_later else transcoder.W_dec
        written[rows] = decoder[torch.as_tensor(nodes.feature[rows])].float().cpu().numpy()
    written *= nodes.mean[:n, None]
    for layer, writes in zip(patched.layout.head_layers, patched.mean_head_writes().float().cpu(), strict=True):
        rows = np.flatnonzero(is_head & (nodes.layer[:n] == layer))
        written[rows] = writes[torch.as_tensor(nodes.slot[rows]), torch.as_tensor(nodes.feature[rows])].numpy()
    return written


def _relative_activity(
    patched: PatchedModel, graph: AttributionGraph, observed: Observed, token: Tensor
) -> tuple[np.ndarray, np.ndarray]:
    """Activation of each candidate in its slot over its largest one: mean by token, and largest by prompt.

    Returns:
        `[n_candidates, V]` over the tokens numbered by `token` `[B, T]`, and `[n_candidates, B]`.
    """
    nodes, n = graph.nodes, graph.n_candidates
    n_tokens, n_prompts = int(token.max()) + 1, len(token)
    by_token, by_prompt = np.zeros((n, n_tokens), dtype=np.float32), np.zeros((n, n_prompts), dtype=np.float32)
    cells = np.stack([nodes.kind[:n], nodes.layer[:n], nodes.slot[:n]])
    for kind, layer, slot in np.unique(cells, axis=1).T.tolist():
        rows = np.flatnonzero((cells == np.array([[kind], [layer], [slot]])).all(0))
        where = observed.slots == slot
        if not where.any():
            continue
        f = observed.activation(patched, kind, layer, torch.as_tensor(nodes.feature[rows])).float() * where[..., None]
        f = f / f.amax((0, 1)).clamp(min=1e-12)  # [B, T, rows]
        by_prompt[rows] = f.amax(1).T.numpy()
        ids = token[where]
        count = torch.bincount(ids, minlength=n_tokens).clamp(min=1)
        total = torch.zeros(n_tokens, len(rows)).index_add_(0, ids, f[where])
        by_token[rows] = (total / count[:, None]).T.numpy()
    return by_token, by_prompt


def _strongest(values: np.ndarray, text: Callable[[int], str]) -> tuple[tuple[str, float], ...]:
    best = np.argsort(-values, kind="stable")[:_TOKENS]
    return tuple((text(int(j)), float(values[j])) for j in best if values[j] > 0)


def named(
    slot: str,
    span: str,
    inputs: tuple[tuple[str, float], ...],
    promoted: tuple[tuple[str, float], ...],
    n_nodes: int,
    n_heads: int = 0,
) -> str:
    """The label of a supernode: slot, layers, tokens in and out, and how many nodes it has."""
    count = f"{n_nodes}, heads: {n_heads}" if n_heads else f"{n_nodes}"
    return f"{slot} {span}{_in_and_out(inputs, promoted, slot)} ({count})"


def _in_and_out(inputs: tuple[tuple[str, float], ...], promoted: tuple[tuple[str, float], ...], slot: str) -> str:
    """`: in → out`, without tokens in that the slot's name already says."""
    read = [text.strip() for text, _ in inputs[:_NAMED] if text.strip() != slot]
    write = [text.strip() for text, _ in promoted[:_NAMED]]
    if not read and not write:
        return ""
    return ": " + " ".join([*read, *(["→", *write] if write else [])])
