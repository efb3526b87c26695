"""The cross-layer term of Eq. 4: features of the next layer predicted from this layer's, `f̂' = ReLU(P f + c)`.

A dense P has m × m' entries. The other heads factor it, `P f = K q(f)` with a short query q, so that single
predictions are dot products: the loss is then computed on the features that are active in the next layer and on a
random sample of the others, weighted so that its expectation is the whole sum.

Shape legend: B tokens, n active pairs of the next layer, d = d_model, m dictionary size, r rank, s sampled features.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hagd.config.transcoder import PredictionHeadKind
from hagd.transcoders.dictionary import Codes, Dictionary
from hagd.transcoders.sparse.products import decode, gather_dot

_START = 0.01
"""Standard deviation of the first weights of heads that are not tied."""


class PredictionHead(nn.Module):
    """Predicts a layer's features from those of the layer before.

    - `tied`: `ReLU(W_enc' (A W_dec f + c) + b')`, the next layer's own encoder on a linear map of what is written;
    - `low_rank`: `ReLU(V U f + c)`, r × (m + m') parameters;
    - `tied_low_rank`: the sum of both inside one ReLU;
    - `dense`: `ReLU(P f + c)` (arXiv 2601.12879).
    """

    def __init__(self, kind: PredictionHeadKind, d: int, m: int, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        self.kind = kind
        tied, low_rank = kind in ("tied", "tied_low_rank"), kind in ("low_rank", "tied_low_rank")
        self.map = nn.Parameter(torch.eye(d)) if tied else None
        self.map_bias = nn.Parameter(torch.zeros(d)) if tied else None
        self.down = nn.Parameter(torch.randn(m, rank, generator=generator) / rank**0.5) if low_rank else None
        # At zero no ReLU would let a gradient through, and the head would stay there; a tied one is not at zero.
        small = _START * torch.randn(m, rank if low_rank else m, generator=generator) if not tied else None
        self.up = nn.Parameter(torch.zeros(m, rank) if small is None else small) if low_rank else None
        self.bias = None if tied else nn.Parameter(torch.zeros(m))
        self.dense = nn.Parameter(small) if kind == "dense" and small is not None else None

    def query_and_keys(self, codes: Codes, written: Tensor, following: Dictionary) -> tuple[Tensor, Tensor, Tensor]:
        """Query `[B, q]`, keys `[m', q]` and bias `[m']` of a factored head: its pre-activations are `q Kᵀ + c`.

        Args:
            codes: this layer's features.
            written: what they add to this layer's output, `[B, d]`.
            following: the next layer's dictionary.
        """
        queries: list[Tensor] = []
        keys: list[Tensor] = []
        bias: Tensor | None = self.bias
        if self.map is not None and self.map_bias is not None:
            queries.append(torch.addmm(following.turned(self.map_bias), written, following.turned(self.map)))
            keys.append(following.W_enc)
            bias = following.b_enc
        if self.down is not None and self.up is not None:
            queries.append(decode(codes.values, codes.support, self.down))
            keys.append(self.up)
        assert bias is not None
        if len(queries) == 1:
            return queries[0], keys[0], bias
        return torch.cat(queries, 1), torch.cat(keys, 1), bias

    def predict(self, codes: Codes, written: Tensor, following: Dictionary) -> Tensor:
        """All predicted features `[B, m']`; dense, so for few tokens."""
        if self.dense is not None and self.bias is not None:
            return (decode(codes.values, codes.support, self.dense) + self.bias).relu()
        query, keys, bias = self.query_and_keys(codes, written, following)
        return torch.addmm(bias, query, keys.T).relu()

    def loss(
        self, codes: Codes, written: Tensor, target: Codes, following: Dictionary, lengths: Tensor, sample: Tensor
    ) -> Tensor:
        """`Σ_tj (f'_tj − f̂'_tj)² ‖W_dec,j'‖²`, estimated without bias from the features `sample` `[s]`; exact if all.
        `lengths` `[m']` are these norms.

        The squared decoder norms make it an error of contributions: with free norms f alone could shrink.
        """
        weight, active = lengths.square(), target.support
        if self.dense is not None:
            predicted = self.predict(codes, written, following)
            at_active, at_sample = predicted[active.token, active.index], predicted[:, sample]
        else:
            query, keys, bias = self.query_and_keys(codes, written, following)
            # Under autocast the query has its precision, and the sums over active pairs want that of the keys.
            at_active = gather_dot(query.to(keys.dtype), active, keys, bias).relu()
            at_sample = torch.addmm(bias[sample], query, keys[sample].T).relu()
        # Autocast would sum in its precision, and float16 cannot hold squares of all pairs.
        with torch.autocast(weight.device.type, enabled=False):
            misses = (target.values - at_active).square() @ weight[active.index]
            inactive = at_sample.to(weight.dtype).square().masked_fill(_active_in(target, sample), 0)
            return misses + (inactive @ weight[sample]).sum() * (active.m / len(sample))


def _active_in(target: Codes, sample: Tensor) -> Tensor:
    """Boolean `[B, s]`: which sampled features are active on which token."""
    support, s = target.support, len(sample)
    place = torch.full((support.m,), s, device=sample.device)  # the others share one more column
    place[sample] = torch.arange(s, device=sample.device)
    mask = torch.zeros(support.n_tokens, s + 1, dtype=torch.bool, device=sample.device)
    mask.index_put_((support.token, place[support.index]), mask.new_ones(()))
    return mask[:, :s]
