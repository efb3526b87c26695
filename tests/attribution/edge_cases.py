"""Models, prompts and nodes between which edges are tested, and what is to be compared."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hagd.attribution.direct_edges import DirectEdges
from hagd.attribution.graph import candidate_nodes
from hagd.attribution.records import ERROR, FEATURE, HEAD, LOGIT, TOKEN, Attribution, Nodes
from hagd.attribution.total_edges import TotalEdges
from hagd.config.model import Architecture
from hagd.config.stages import Ablation
from hagd.patching.patched_model import PatchedModel
from hagd.tasks.records import PADDING, Prompts, TaskData
from tests.builders import (
    VARIANTS,
    patched_double,
    prompts_task,
    random_model,
    random_prompts,
    random_transcoders,
    tiny_task,
)
from tests.reference import Pass, decoder, features_of, heads_of, mean_by_slot, output_projection, run

SLOW = pytest.mark.slow


def slow(cases: Iterable[tuple[Any, ...]]) -> list[Any]:
    return [pytest.param(*each, marks=SLOW) for each in cases]


def one_answer(prompts: Prompts) -> Prompts:
    """With a single accepted token the logit difference is linear in the logits."""
    answers = prompts.answers.clone()
    answers[..., 1:] = PADDING
    return replace(prompts, answers=answers)


@dataclass
class Case:
    """Edges of one random model and everything that its reference needs."""

    patched: PatchedModel
    task: TaskData
    prompts: Prompts
    nodes: Nodes
    f: Tensor  # [L, B, T, m]
    errors: Tensor  # [L, B, T, d]
    ablated: Tensor  # [L, B, T, m]
    directions: dict[int, Tensor]  # layer → [B, T, H, e], gradient of the prompts' leads at heads
    moved_heads: dict[int, Tensor]  # layer → [B, T, H, e], ablation value minus clean output

    @property
    def tokens(self) -> Tensor:
        return self.prompts.tokens.flatten(0, 1)

    @property
    def slots(self) -> Tensor:
        return self.prompts.slots.flatten(0, 1)

    @cached_property
    def targets(self) -> list[int]:
        return np.flatnonzero(np.isin(self.nodes.kind, (FEATURE, HEAD, LOGIT))).tolist()

    @cached_property
    def places(self) -> list[tuple[int, int, int, int]]:
        """Kind, layer, slot and feature of every target."""
        nodes = self.nodes
        places = np.stack([nodes.kind, nodes.layer, nodes.slot, nodes.feature], axis=1)[self.targets]
        return [(kind, layer, slot, feature) for kind, layer, slot, feature in places.tolist()]

    def values(self, found: Pass) -> Tensor:
        """Every target, `[len(targets)]`: pre-activation where it is active in the clean run, or a head's output along
        its direction; mean over prompts."""
        out: list[Tensor] = []
        sums: dict[tuple[int, int], Tensor] = {}
        for kind, layer, slot, feature in self.places:
            if kind == LOGIT:
                out.append(self.lead(found.logits))
            elif kind == HEAD:
                here, u = found.heads[layer][self.slots == slot], self.directions[layer][self.slots == slot]
                out.append((here[:, feature] * u[:, feature]).sum() / len(self.prompts))
            else:
                if (layer, slot) not in sums:
                    sums[layer, slot] = self.preactivations(found, layer, slot)
                out.append(sums[layer, slot][feature] / len(self.prompts))
        return torch.stack(out)

    def preactivations(self, found: Pass, layer: int, slot: int) -> Tensor:
        """Sum of each feature's pre-activations at the positions of a slot where it is active in the clean run."""
        i = self.patched.transcoders.layers.index(layer)
        transcoder = self.patched.transcoders.transcoders[i]
        here = self.slots == slot
        read = found.mlp_in[layer][here] @ transcoder.W_enc.T + transcoder.b_enc
        return (read * (self.f[i][here] > 0)).sum(0)

    def lead(self, logits: Tensor) -> Tensor:
        """Mean over prompts of the mean over scored positions of answer minus distractor."""
        prompts, total = self.prompts, torch.zeros((), dtype=logits.dtype)
        answers, distractors = prompts.answers[:, 0, :, 0].tolist(), prompts.distractors[:, 0, :, 0].tolist()
        for row, scored in enumerate(prompts.scored[:, 0].tolist()):
            at = [i for i, position in enumerate(scored) if position != PADDING]
            for i in at:
                scores = logits[row, scored[i]]
                total = total + (scores[answers[row][i]] - scores[distractors[row][i]]) / len(at)
        return total / len(prompts)


def random_case(
    architecture: Architecture,
    ablation: Ablation,
    *,
    varied: bool = False,
    n_layers: int = 2,
    layers: tuple[int, ...] | None = None,
    k: int = 4,
    variant: str = "topk",
    head_layers: tuple[int, ...] = (),
) -> Case:
    """`varied`: unequal lengths, slots of several positions; otherwise modular arithmetic."""
    task = prompts_task(one_answer(random_prompts(n=6))) if varied else tiny_task()
    prompts = task.discovery
    lm = random_model(architecture, n_layers=n_layers, length=6, dtype=torch.float64)
    transcoders = random_transcoders(lm, layers=layers, k=k, dtype=torch.float64, **VARIANTS[variant])
    patched = patched_double(lm, transcoders, prompts, head_layers=head_layers)
    f, errors = features_of(lm, transcoders, prompts.tokens.flatten(0, 1))
    counterfactual, _ = features_of(lm, transcoders, prompts.counterfactual.flatten(0, 1))
    means = patched.means.features[:, prompts.slots.flatten(0, 1).clamp(min=0)]
    ablated = {"mean": means, "zero": torch.zeros_like(means), "resample": counterfactual}[ablation]
    case = Case(patched, task, prompts, all_nodes(patched, prompts, ablation), f, errors, ablated, {}, {})
    if head_layers:
        case.directions = directions(case, head_layers, lambda logits: case.lead(logits) * len(prompts))
        case.moved_heads = moved_heads(case, head_layers, ablation)
    return case


def directions(case: Case, layers: tuple[int, ...], score: Callable[[Tensor], Tensor]) -> dict[int, Tensor]:
    """Gradients of a score of the logits in the unpatched model, by plain hooks."""
    lm, leaves = case.patched.lm, []

    def hook(_: Any, inputs: tuple[Tensor]) -> tuple[Tensor]:
        leaves.append(torch.zeros_like(inputs[0], requires_grad=True))
        return (inputs[0] + leaves[-1],)

    handles = [output_projection(lm, layer).register_forward_pre_hook(hook) for layer in layers]
    total = score(lm.model(input_ids=case.tokens, use_cache=False).logits)
    for handle in handles:
        handle.remove()
    found = torch.autograd.grad(total, leaves)
    return {layer: u.unflatten(-1, (4, -1)) for layer, u in zip(layers, found, strict=True)}


def moved_heads(case: Case, layers: tuple[int, ...], ablation: Ablation) -> dict[int, Tensor]:
    clean = heads_of(case.patched.lm, case.tokens, layers)
    means = mean_by_slot(clean.flatten(-2), case.slots, 3)[:, case.slots.clamp(min=0)].unflatten(-1, clean.shape[-2:])
    other = heads_of(case.patched.lm, case.prompts.counterfactual.flatten(0, 1), layers)
    ablated = {"mean": means, "zero": torch.zeros_like(clean), "resample": other}[ablation]
    return dict(zip(layers, ablated - clean, strict=True))


def all_nodes(patched: PatchedModel, prompts: Prompts, ablation: Ablation) -> Nodes:
    """Every feature, except that only `resample` needs those that are never active."""
    live = patched.frequency > (-1 if ablation == "resample" else 0)
    g = torch.Generator().manual_seed(0)
    importance = torch.rand(patched.gate_shape, generator=g)
    return candidate_nodes(Attribution(importance, importance, live), patched, prompts, 10_000)[0]


def removal(case: Case, node: int) -> tuple[dict[int, Tensor], Tensor, dict[int, Tensor]]:
    """What is added to each MLP's output, the embedding, and heads, when one source goes to its ablation value."""
    kind, layer, slot, feature = (
        int(x[node]) for x in (case.nodes.kind, case.nodes.layer, case.nodes.slot, case.nodes.feature)
    )
    lm, transcoders = case.patched.lm, case.patched.transcoders
    where = (case.slots == slot)[..., None].double()
    if kind == TOKEN:
        embedding = lm.embedding.weight[case.tokens]
        mean = mean_by_slot(embedding[None], case.slots, 3)[0][case.slots.clamp(min=0)]
        return {}, -(embedding - mean) * where, {}
    nothing = torch.zeros(*case.tokens.shape, lm.d_model, dtype=torch.float64)
    if kind == HEAD:
        only = torch.zeros(4, 1, dtype=torch.float64)
        only[feature] = 1
        return {}, nothing, {layer: case.moved_heads[layer] * where[..., None] * only}
    if kind == ERROR and layer not in transcoders.layers:
        written = run(lm, case.tokens).mlp_out[layer]
        mean = mean_by_slot(written[None], case.slots, 3)[0][case.slots.clamp(min=0)]
        return {layer: -(written - mean) * where}, nothing, {}
    i = transcoders.layers.index(layer)
    if kind == ERROR:
        mean = mean_by_slot(case.errors, case.slots, 3)[i][case.slots.clamp(min=0)]
        return {layer: -(case.errors[i] - mean) * where}, nothing, {}
    deviation = (case.f[i] - case.ablated[i])[..., feature, None]
    moved = {}
    for target, written_to in enumerate(transcoders.layers):
        rows = decoder(transcoders, i, target)
        if rows is not None:
            moved[written_to] = -deviation * rows[feature] * where
    return moved, nothing, {}


def matrix(edges: DirectEdges | TotalEdges, case: Case) -> Tensor:
    """`[len(targets), n]`, zero where there is no edge."""
    out = torch.zeros(len(case.targets), len(case.nodes), dtype=torch.float64)
    for row, target in enumerate(case.targets):
        sources, effects = edges.column(target)
        assert len(sources.unique()) == len(sources), "an edge is counted once"
        out[row, sources] = effects.double()
    return out


def assert_same(found: Tensor, expected: Tensor, relative: float = 1e-5) -> None:
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(found, expected, rtol=relative, atol=relative * expected.abs().max().item())
