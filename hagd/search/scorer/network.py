"""The scorer's network: GATv2 over nodes, supernodes and containment, or the same layers without messages."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import elu, one_hot
from torch_geometric.nn import GATv2Conv

from hagd.search.scorer.inputs import IMPORTANCE
from hagd.search.scorer.records import N_EDGE_TYPES

EDGE_INPUTS = N_EDGE_TYPES + 2


class CircuitScorer(nn.Module):
    """How likely each node belongs to the circuit, as one logit a node.

    Message passing follows Eq. 7–8 of arXiv 2601.12879, `h_v ← σ(Σ_u α_uv W h_u)` with softmax attention α over the
    neighbours u, in the form of Brody, Alon & Yahav (2022), "How attentive are graph attention networks?":

        α_uv = softmax_u( aᵀ LeakyReLU(W_v h_v + W_u h_u + W_e e_uv) )

    where `e_uv` holds the type, relative size and sign of the edge. Each layer adds its result to `h` and normalises.

    The logit is the head's output plus a learned gain times the node's importance on both of its rank scales. The head
    starts at zero, so an untrained network ranks exactly as importance does.

    Args:
        n_inputs: inputs a node, F.
        hidden: width, a multiple of `heads`.
        heads: attention heads.
        n_layers: message-passing layers.
        edges: False replaces each attention by a linear map of the node itself: the edge-less control.
    """

    def __init__(self, n_inputs: int, hidden: int, heads: int, n_layers: int, edges: bool) -> None:
        super().__init__()
        self.edges = edges
        self.encoder = nn.Sequential(nn.Linear(n_inputs, hidden), nn.ELU(), nn.Linear(hidden, hidden))
        self.layers = nn.ModuleList(
            GATv2Conv(hidden, hidden // heads, heads, edge_dim=EDGE_INPUTS, add_self_loops=False)
            if edges
            else nn.Linear(hidden, hidden)
            for _ in range(n_layers)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(hidden) for _ in range(n_layers))
        last = nn.Linear(hidden, 1)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.head = nn.Sequential(nn.Linear(hidden, hidden), nn.ELU(), last)
        self.gain = nn.Parameter(torch.ones(2))

    def forward(
        self, inputs: Tensor, edge_index: Tensor, edge_type: Tensor, edge_attr: Tensor, n_candidates: int
    ) -> Tensor:
        """Logits `[n_candidates]`; arguments as in `ScoredGraph`."""
        if not self.edges:
            inputs = inputs[:n_candidates]  # without messages nothing else can matter
        h = self.encoder(inputs)
        if self.edges:
            edge = torch.cat([one_hot(edge_type, N_EDGE_TYPES).to(edge_attr.dtype), edge_attr], dim=1)
        for layer, norm in zip(self.layers, self.norms, strict=True):
            message = layer(h, edge_index, edge) if self.edges else layer(h)
            h = norm(h + elu(message))
        importance = inputs[:n_candidates, IMPORTANCE : IMPORTANCE + 2]
        logits: Tensor = self.head(h[:n_candidates])[:, 0] + importance @ self.gain
        return logits
