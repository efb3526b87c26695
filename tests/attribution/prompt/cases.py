"""One random prompt through a tiny random model in double precision, and what its edges must be."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor
from transformers import GPTNeoXForCausalLM

from hagd.attribution.prompt.frozen_model import FrozenModel, freeze
from hagd.attribution.prompt.graph import written_by_heads
from hagd.attribution.prompt.layout import Sources
from hagd.attribution.prompt.rows import Targets, edges_into, inner_batches
from hagd.attribution.prompt.trace import ActiveFeatures, Trace, decompose, trace
from hagd.config.model import Architecture
from hagd.models.language_model import LanguageModel
from hagd.transcoders.records import TranscoderSet
from tests.builders import VARIANTS, VOCABULARY, random_model, random_transcoders, randomise
from tests.reference import Frozen, Pass, decoder, heads_of, output_projection

LENGTH, HEADS = 5, 4


@dataclass
class Case:
    lm: LanguageModel
    transcoders: TranscoderSet
    tokens: Tensor
    run: Trace
    active: ActiveFeatures
    sources: Sources
    model: FrozenModel
    directions: dict[int, Tensor]  # layer → [T, H, e], gradient of `explained` at heads

    @property
    def frozen(self) -> Frozen:
        """With a sequence for each source."""
        tokens = self.tokens.expand(len(self.sources), -1)
        return Frozen(self.lm, tokens, self.transcoders.transcoders, tuple(self.directions))

    @property
    def n_rows(self) -> int:
        """Of `matrix`: features, heads, five logits."""
        return self.sources.n_inner + 5


def random_case(architecture: Architecture, variant: str = "topk", n_layers: int = 3, **options: Any) -> Case:
    lm = random_model(architecture, n_layers=n_layers, length=LENGTH, dtype=torch.float64)
    return case_of(lm, variant, **options)


def case_of(
    lm: LanguageModel,
    variant: str = "topk",
    layers: tuple[int, ...] | None = None,
    head_layers: tuple[int, ...] = (),
    **options: Any,
) -> Case:
    found = random_transcoders(lm, layers=layers, dtype=torch.float64, **VARIANTS[variant], **options)
    tokens = torch.randint(VOCABULARY, (LENGTH,), generator=torch.Generator().manual_seed(7))
    run = trace(lm, tokens, head_layers)
    active, errors = decompose(run, found)
    model = freeze(lm, run, found)
    sources = Sources(run.embedding, active, errors, found, written_by_heads(model, run))
    return Case(lm, found, tokens, run, active, sources, model, directions(lm, tokens, head_layers))


def sequential_neox() -> LanguageModel:
    """A GPT-NeoX whose MLPs read after the attention of their layer."""
    config = random_model("gpt_neox", n_layers=3, length=LENGTH).model.config
    config.use_parallel_residual = False
    lm = LanguageModel(GPTNeoXForCausalLM(config))
    randomise(lm)
    lm.model.to(torch.float64)
    return lm


def explained(logits: Tensor) -> Tensor:
    """What heads are read along the gradient of; `[V]` at the last position."""
    return 0.7 * logits[1] - 0.4 * logits[5]


def directions(lm: LanguageModel, tokens: Tensor, layers: tuple[int, ...]) -> dict[int, Tensor]:
    """Gradients of `explained` in the unpatched model, by plain hooks."""
    leaves: list[Tensor] = []

    def hook(_: Any, inputs: tuple[Tensor]) -> tuple[Tensor]:
        leaves.append(torch.zeros_like(inputs[0], requires_grad=True))
        return (inputs[0] + leaves[-1],)

    handles = [output_projection(lm, layer).register_forward_pre_hook(hook) for layer in layers]
    total = explained(lm.model(input_ids=tokens[None], use_cache=False).logits[0, -1])
    for handle in handles:
        handle.remove()
    found = torch.autograd.grad(total, leaves) if layers else ()
    return {layer: u[0].unflatten(-1, (HEADS, -1)) for layer, u in zip(layers, found, strict=True)}


def head_nodes(case: Case) -> list[tuple[int, int, int]]:
    """Layer, position and number of each head that is a node, in the order of their rows."""
    return list(product(case.directions, range(LENGTH), range(HEADS)))


def removals(case: Case) -> tuple[dict[int, Tensor], Tensor, dict[int, Tensor]]:
    """What is added to each MLP's output, the embedding, and heads, when source s is taken away in sequence s."""
    sources, n, inner, layers = case.sources, case.sources.n_features, case.sources.n_inner, case.transcoders.layers
    moved = torch.zeros(case.lm.n_layers + 1, len(sources), LENGTH, case.lm.d_model, dtype=torch.float64)
    written = (
        dict(zip(case.directions, heads_of(case.lm, case.tokens[None], tuple(case.directions))[:, 0], strict=True))
        if case.directions
        else {}
    )
    moved_heads = {layer: torch.zeros(len(sources), *z.shape, dtype=z.dtype) for layer, z in written.items()}
    for source, (layer, p, head) in enumerate(head_nodes(case), start=n):
        moved_heads[layer][source, p, head] = -written[layer][p, head]
    for source in [*range(n), *range(inner, len(sources))]:
        if source >= inner:
            layer, p = divmod(source - inner, LENGTH)
            own = case.run.embedding if layer == case.lm.n_layers else sources.errors[layer]
            moved[layer, source, p] = -own[p]
            continue
        layer, p, feature = (int(x[source]) for x in (case.active.layer, case.active.position, case.active.feature))
        for target, written_to in enumerate(layers):
            rows = decoder(case.transcoders, layers.index(layer), target)
            if rows is not None:
                moved[written_to, source, p] = -case.active.activation[source] * rows[feature]
    return dict(enumerate(moved[:-1])), moved[-1], moved_heads


def logit_targets(case: Case) -> Targets:
    """Three tokens at the last position, two at the one before."""
    positions = torch.tensor([LENGTH - 2, LENGTH - 2, LENGTH - 1, LENGTH - 1, LENGTH - 1])
    vectors = case.lm.unembedding.weight[[0, 3, 1, 2, 5]]
    return Targets(case.lm.n_layers, torch.arange(5) + len(case.sources), positions, vectors)


def matrix(case: Case) -> Tensor:
    """`[n_rows, sources]`: every feature, every head that is a node and the five logits."""
    out = torch.zeros(case.n_rows, len(case.sources), dtype=torch.float64)
    batches = [logit_targets(case), *inner_batches(case.model, case.sources, case.transcoders, case.directions)]
    n = case.sources.n_inner
    for batch in batches:
        rows = edges_into(case.model, case.sources, batch)
        at = torch.where(batch.nodes < n, batch.nodes, batch.nodes - len(case.sources) + n)
        out[at[:, None], rows.columns] = rows.dense
    return out


def values(case: Case, found: Pass) -> Tensor:
    """What each row of `matrix` reads, by sequence `[n_rows, B]`: pre-activations without bias, heads, then logits."""
    out = []
    for layer, p, feature in zip(case.active.layer, case.active.position, case.active.feature, strict=True):
        transcoder = case.transcoders.transcoders[case.transcoders.layers.index(int(layer))]
        out.append(found.mlp_in[int(layer)][:, int(p)] @ transcoder.W_enc[int(feature)])
    out += [found.heads[layer][:, p, head] @ case.directions[layer][p, head] for layer, p, head in head_nodes(case)]
    logits = found.logits
    return torch.stack([*out, logits[:, -2, 0], logits[:, -2, 3], logits[:, -1, 1], logits[:, -1, 2], logits[:, -1, 5]])
