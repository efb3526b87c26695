"""One random prompt through a tiny random model in double precision, and what its edges must be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hagd.attribution.prompt.frozen_model import FrozenModel, freeze
from hagd.attribution.prompt.layout import Sources
from hagd.attribution.prompt.rows import Targets, edges_into, feature_batches
from hagd.attribution.prompt.trace import ActiveFeatures, Trace, decompose, trace
from hagd.config.model import Architecture
from hagd.models.language_model import LanguageModel
from hagd.transcoders.records import TranscoderSet
from tests.builders import VARIANTS, VOCABULARY, random_model, random_transcoders
from tests.reference import Frozen, Pass, decoder

LENGTH = 5


@dataclass
class Case:
    lm: LanguageModel
    transcoders: TranscoderSet
    tokens: Tensor
    run: Trace
    active: ActiveFeatures
    sources: Sources
    model: FrozenModel

    @property
    def frozen(self) -> Frozen:
        """With a sequence for each source."""
        return Frozen(self.lm, self.tokens.expand(len(self.sources), -1), self.transcoders.transcoders)


def random_case(
    architecture: Architecture,
    variant: str = "topk",
    n_layers: int = 3,
    layers: tuple[int, ...] | None = None,
    **options: Any,
) -> Case:
    lm = random_model(architecture, n_layers=n_layers, length=LENGTH, dtype=torch.float64)
    found = random_transcoders(lm, layers=layers, dtype=torch.float64, **VARIANTS[variant], **options)
    tokens = torch.randint(VOCABULARY, (LENGTH,), generator=torch.Generator().manual_seed(7))
    run = trace(lm, tokens)
    active, errors = decompose(run, found)
    return Case(lm, found, tokens, run, active, Sources(run.embedding, active, errors, found), freeze(lm, run, found))


def removals(case: Case) -> tuple[dict[int, Tensor], Tensor]:
    """What is added to each MLP's output, and to the embedding, when source s is taken away in sequence s."""
    sources, n, layers = case.sources, case.sources.n_features, case.transcoders.layers
    moved = torch.zeros(case.lm.n_layers + 1, len(sources), LENGTH, case.lm.d_model, dtype=torch.float64)
    for source in range(len(sources)):
        if source >= n:
            layer, p = divmod(source - n, LENGTH)
            own = case.run.embedding if layer == case.lm.n_layers else sources.errors[layer]
            moved[layer, source, p] = -own[p]
            continue
        layer, p, feature = (int(x[source]) for x in (case.active.layer, case.active.position, case.active.feature))
        for target, written_to in enumerate(layers):
            rows = decoder(case.transcoders, layers.index(layer), target)
            if rows is not None:
                moved[written_to, source, p] = -case.active.activation[source] * rows[feature]
    return dict(enumerate(moved[:-1])), moved[-1]


def logit_targets(case: Case) -> Targets:
    """Three tokens at the last position, two at the one before."""
    positions = torch.tensor([LENGTH - 2, LENGTH - 2, LENGTH - 1, LENGTH - 1, LENGTH - 1])
    vectors = case.lm.unembedding.weight[[0, 3, 1, 2, 5]]
    return Targets(case.lm.n_layers, torch.arange(5) + len(case.sources), positions, vectors)


def matrix(case: Case) -> Tensor:
    """`[n + 5, sources]`: every feature and the five logits."""
    out = torch.zeros(case.sources.n_features + 5, len(case.sources), dtype=torch.float64)
    batches = [logit_targets(case), *feature_batches(case.sources, case.transcoders)]
    n = case.sources.n_features
    for batch in batches:
        rows = edges_into(case.model, case.sources, batch)
        at = torch.where(batch.nodes < n, batch.nodes, batch.nodes - len(case.sources) + n)
        out[at[:, None], rows.columns] = rows.dense
    return out


def values(case: Case, found: Pass) -> Tensor:
    """What each row of `matrix` reads, by sequence `[n + 5, B]`: pre-activations without bias, then logits."""
    out = []
    for layer, p, feature in zip(case.active.layer, case.active.position, case.active.feature, strict=True):
        transcoder = case.transcoders.transcoders[case.transcoders.layers.index(int(layer))]
        out.append(found.mlp_in[int(layer)][:, int(p)] @ transcoder.W_enc[int(feature)])
    logits = found.logits
    return torch.stack([*out, logits[:, -2, 0], logits[:, -2, 3], logits[:, -1, 1], logits[:, -1, 2], logits[:, -1, 5]])
