"""Direct edges against interventions in a frozen model that is wired by hand; total edges against finite differences
of the model that is not frozen. Double precision."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hagd.activations.capture import Site
from hagd.attribution.direct_edges import DirectEdges, strongest_incoming
from hagd.attribution.graph import candidate_nodes
from hagd.attribution.records import ERROR, FEATURE, HEAD, LOGIT, TOKEN, Attribution, Nodes
from hagd.attribution.total_edges import TotalEdges
from hagd.config.model import Architecture
from hagd.config.stages import Ablation
from hagd.patching.patched_model import PatchedModel
from hagd.tasks.records import PADDING, Prompts, TaskData
from tests.builders import (
    ARCHITECTURES,
    VARIANTS,
    patched_double,
    prompts_task,
    random_model,
    random_prompts,
    random_transcoders,
    tiny_task,
)
from tests.reference import (
    Frozen,
    HeadAttention,
    Pass,
    decoder,
    encode,
    features_of,
    heads_of,
    mean_by_slot,
    output_projection,
    run,
    skipped,
    written_features,
)

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

    @property
    def targets(self) -> list[int]:
        return np.flatnonzero(np.isin(self.nodes.kind, (FEATURE, HEAD, LOGIT))).tolist()

    def values(self, found: Pass) -> Tensor:
        """Every target, `[len(targets)]`: pre-activation where it is active in the clean run, or a head's output along
        its direction; mean over prompts."""
        out = []
        for target in self.targets:
            layer, slot, feature = (int(x[target]) for x in (self.nodes.layer, self.nodes.slot, self.nodes.feature))
            if self.nodes.kind[target] == LOGIT:
                out.append(self.lead(found.logits))
                continue
            if self.nodes.kind[target] == HEAD:
                here, u = found.heads[layer][self.slots == slot], self.directions[layer][self.slots == slot]
                out.append((here[:, feature] * u[:, feature]).sum() / len(self.prompts))
                continue
            i = self.patched.transcoders.layers.index(layer)
            transcoder = self.patched.transcoders.transcoders[i]
            where = (self.slots == slot) & (self.f[i, ..., feature] > 0)
            out.append(
                (found.mlp_in[layer][where] @ transcoder.W_enc[feature] + transcoder.b_enc[feature]).sum()
                / len(self.prompts)
            )
        return torch.stack(out)

    def lead(self, logits: Tensor) -> Tensor:
        """Mean over prompts of the mean over scored positions of answer minus distractor."""
        prompts, total = self.prompts, torch.zeros((), dtype=logits.dtype)
        for row in range(len(prompts)):
            at = [i for i in range(prompts.scored.shape[2]) if prompts.scored[row, 0, i] != PADDING]
            for i in at:
                scores = logits[row, prompts.scored[row, 0, i]]
                right, wrong = prompts.answers[row, 0, i, 0], prompts.distractors[row, 0, i, 0]
                total = total + (scores[right] - scores[wrong]) / len(at)
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


MODES = [
    *product(ARCHITECTURES, ("mean",), (False, True), ("topk",), (2,)),
    ("gpt2", "zero", True, "topk", 2),
    ("llama", "resample", False, "topk", 2),
    ("gpt_neox", "zero", True, "thresholds", 2),
    ("gpt2", "resample", True, "everything", 3),
    pytest.param("gpt_neox", "resample", True, "topk", 2, marks=SLOW),
    pytest.param("gpt2", "mean", False, "skip", 3, marks=SLOW),
    pytest.param("llama", "mean", False, "cross_layer", 3, marks=SLOW),
    pytest.param("gpt_neox", "mean", False, "everything", 3, marks=SLOW),
    pytest.param("llama", "mean", True, "everything", 2, marks=SLOW),
]
"""Slow are combinations whose parts all stand in the others."""


def by_intervention(case: Case, frozen: Frozen) -> Tensor:
    """What each target loses when one source is removed from the frozen model, `[targets, nodes]`."""
    clean = case.values(frozen())
    expected = torch.zeros(len(case.targets), len(case.nodes), dtype=torch.float64)
    for node in range(len(case.nodes)):
        if case.nodes.kind[node] != LOGIT:
            expected[:, node] = clean - case.values(frozen(*removal(case, node)))
    return expected


@pytest.mark.parametrize(("architecture", "ablation", "varied", "variant", "n_layers"), MODES)
def test_direct_edges_are_interventions_in_the_frozen_model(
    architecture: Architecture, ablation: Ablation, varied: bool, variant: str, n_layers: int
) -> None:
    case = random_case(architecture, ablation, varied=varied, variant=variant, n_layers=n_layers)
    frozen = Frozen(case.patched.lm, case.tokens, case.patched.transcoders.transcoders)
    expected = by_intervention(case, frozen)
    found = matrix(DirectEdges(case.patched, case.task, case.prompts, case.nodes, ablation), case)
    assert_same(found, expected)
    for kind in (FEATURE, ERROR, TOKEN):
        assert found[:, case.nodes.kind == kind].abs().max() > 1e-3, "each kind of source has edges"
    assert found[-1].abs().max() > 1e-3 and case.nodes.kind[case.targets[-1]] == LOGIT


@pytest.mark.parametrize(
    ("architecture", "ablation", "varied", "variant", "n_layers", "head_layers"),
    [
        *product(ARCHITECTURES, ["mean"], [True], ["topk"], [2], [(0, 1)]),
        *slow(product(ARCHITECTURES, ["mean"], [False], ["topk"], [2], [(0, 1)])),
        ("gpt2", "resample", False, "topk", 3, (1, 2)),
        ("gpt_neox", "zero", False, "everything", 2, (1,)),
        ("llama", "resample", True, "skip", 2, (0, 1)),
    ],
)
def test_edges_from_and_into_heads_are_interventions_in_the_frozen_model(
    architecture: Architecture,
    ablation: Ablation,
    varied: bool,
    variant: str,
    n_layers: int,
    head_layers: tuple[int, ...],
) -> None:
    case = random_case(
        architecture, ablation, varied=varied, variant=variant, n_layers=n_layers, head_layers=head_layers
    )
    frozen = Frozen(case.patched.lm, case.tokens, case.patched.transcoders.transcoders, head_layers)
    expected = by_intervention(case, frozen)
    found = matrix(DirectEdges(case.patched, case.task, case.prompts, case.nodes, ablation), case)
    is_head = torch.as_tensor(case.nodes.kind == HEAD)
    into = is_head[case.targets]
    assert_same(found[~into], expected[~into])
    assert_same(found[into], expected[into])
    assert int(is_head.sum()) == 4 * 3 * len(head_layers)
    for kind in (FEATURE, ERROR, TOKEN, HEAD):
        sources = torch.as_tensor(case.nodes.kind == kind)
        assert found[~into][:, sources].abs().max() > 1e-3, "each kind of source has edges"
        if case.nodes.layer[case.nodes.kind == kind].min() < max(head_layers):
            assert found[into][:, sources].abs().max() > 1e-3, "into heads, too"


@pytest.mark.parametrize(
    ("architecture", "layers", "head_layers"),
    [
        *product(ARCHITECTURES, [None, (0, 2)], [(0, 1, 2)]),
        ("gpt2", (1,), (2,)),
        ("llama", (2,), (0, 1)),
    ],
)
def test_incoming_edges_are_complete_with_heads(
    architecture: Architecture, layers: tuple[int, ...] | None, head_layers: tuple[int, ...]
) -> None:
    """Every source ablated at once, in the frozen model whose heads are constants."""
    case = random_case(architecture, "mean", n_layers=3, layers=layers, head_layers=head_layers)
    frozen = Frozen(case.patched.lm, case.tokens, case.patched.transcoders.transcoders, head_layers)
    outputs = torch.stack(frozen.clean.mlp_out)
    mean_output = mean_by_slot(outputs, case.slots, 3)[:, case.slots.clamp(min=0)]
    embedding = case.patched.lm.embedding.weight[case.tokens]
    mean_embedding = mean_by_slot(embedding[None], case.slots, 3)[0][case.slots.clamp(min=0)]
    ablated = frozen(dict(enumerate(mean_output - outputs)), mean_embedding - embedding, case.moved_heads)
    found = matrix(DirectEdges(case.patched, case.task, case.prompts, case.nodes, "mean"), case)
    assert_same(found.sum(1), case.values(frozen()) - case.values(ablated))


@pytest.mark.parametrize(
    ("architecture", "layers", "variant"),
    [
        *product(ARCHITECTURES, [None, (0,), (2,), (0, 2)], ["topk"]),
        ("gpt2", None, "skip"),
        ("llama", None, "cross_layer"),
        ("gpt_neox", None, "everything"),
        ("gpt2", (0, 2), "everything"),
    ],
)
def test_incoming_edges_are_complete(architecture: Architecture, layers: tuple[int, ...] | None, variant: str) -> None:
    """They sum to the target's pre-activation minus what it is when every source is ablated."""
    case = random_case(architecture, "mean", n_layers=3, layers=layers, variant=variant)
    transcoders = case.patched.transcoders.transcoders
    frozen = Frozen(case.patched.lm, case.tokens, transcoders)
    outputs = torch.stack(frozen.clean.mlp_out)
    for transcoder in transcoders:
        outputs[transcoder.layer] -= skipped(transcoder, frozen.clean.mlp_in[transcoder.layer])
    mean_output = mean_by_slot(outputs, case.slots, 3)[:, case.slots.clamp(min=0)]
    embedding = case.patched.lm.embedding.weight[case.tokens]
    mean_embedding = mean_by_slot(embedding[None], case.slots, 3)[0][case.slots.clamp(min=0)]
    ablated = frozen(dict(enumerate(mean_output - outputs)), mean_embedding - embedding)
    found = matrix(DirectEdges(case.patched, case.task, case.prompts, case.nodes, "mean"), case)
    assert_same(found.sum(1), case.values(frozen()) - case.values(ablated))


@pytest.mark.parametrize(("architecture", "variant"), [*product(ARCHITECTURES, ["topk"]), ("gpt2", "everything")])
def test_edges_leave_the_model_as_it_was(architecture: Architecture, variant: str) -> None:
    case = random_case(architecture, "mean", variant=variant)
    lm = case.patched.lm
    before = lm.hidden(case.tokens)
    for method in (DirectEdges, TotalEdges):
        method(case.patched, case.task, case.prompts, case.nodes, "mean").column(0)
        assert torch.equal(lm.hidden(case.tokens), before)
    assert not any(module._forward_hooks for module in lm.model.modules())
    assert lm.model.config._attn_implementation == "eager"


def test_direct_edges_at_the_residual_stream_stop_at_the_next_decomposed_layer() -> None:
    task = tiny_task()
    lm = random_model("gpt2", n_layers=3, dtype=torch.float64)
    patched = patched_double(lm, random_transcoders(lm, site="resid", dtype=torch.float64), task.discovery)
    nodes = all_nodes(patched, task.discovery, "mean")
    edges = DirectEdges(patched, task, task.discovery, nodes, "mean")
    for target in np.flatnonzero((nodes.kind == FEATURE) & (nodes.layer == 2)):
        sources, effects = edges.column(int(target))
        moved = nodes.layer[sources[effects != 0]]
        assert set(moved.tolist()) <= {1}
    sources, effects = edges.column(len(nodes) - 1)
    assert set(nodes.layer[sources[effects != 0]].tolist()) == {2}


def with_features_moved(case: Case, moved: dict[int, Tensor], heads: dict[int, Tensor] | None = None) -> Pass:
    """The model that is not frozen, whose decomposed sites write what `f + moved` and the clean error give, and whose
    heads give what they do plus `heads`."""
    transcoders = case.patched.transcoders
    features: list[Tensor] = []

    def rewrite(layer: int, read: Tensor, written: Tensor) -> Tensor:
        if layer not in transcoders.layers:
            return written
        i = transcoders.layers.index(layer)
        transcoder = transcoders.transcoders[i]
        features.append(encode(transcoder, read) + moved.get(i, 0.0))
        beside = skipped(transcoder, read) + transcoder.b_dec + case.errors[i]
        return written_features(transcoders, i, features) + beside

    attention = HeadAttention(case.patched.lm, lambda layer, z: z + (heads or {}).get(layer, 0.0))
    return run(case.patched.lm, case.tokens, write=rewrite, attention=attention)


@pytest.mark.parametrize(("architecture", "ablation"), [("gpt2", "mean"), ("gpt_neox", "resample"), ("llama", "zero")])
def test_total_edges_of_heads_are_finite_differences_of_the_real_model(
    architecture: Architecture, ablation: Ablation
) -> None:
    case = random_case(architecture, ablation, n_layers=3, layers=(0, 2), head_layers=(1, 2))
    found = matrix(TotalEdges(case.patched, case.task, case.prompts, case.nodes, ablation), case)
    step, sources = 1e-4, np.flatnonzero(np.isin(case.nodes.kind, (FEATURE, HEAD)))[::3]
    expected = torch.zeros_like(found)
    for node in sources:
        kind, layer, slot, number = (
            int(x[node]) for x in (case.nodes.kind, case.nodes.layer, case.nodes.slot, case.nodes.feature)
        )
        here, ends = (case.slots == slot).double()[..., None], []
        for sign in (step, -step):
            if kind == HEAD:
                _, _, moved = removal(case, node)
                ends.append(case.values(with_features_moved(case, {}, {layer: -sign * moved[layer]})))
            else:
                i, only = (0, 2).index(layer), torch.eye(12, dtype=torch.float64)[number]
                moved = {i: sign * (case.f[i] - case.ablated[i]) * here * only}
                ends.append(case.values(with_features_moved(case, moved)))
        expected[:, node] = (ends[0] - ends[1]) / (2 * step)
    tolerance = 1e-5 if architecture == "gpt2" else 5e-3
    is_head, into = case.nodes.kind[sources] == HEAD, case.nodes.kind[case.targets] == HEAD
    for rows in (into, ~into):
        assert_same(found[rows][:, sources], expected[rows][:, sources], tolerance)
    assert found[:, sources][:, is_head].abs().max() > 1e-2


@pytest.mark.parametrize(
    ("architecture", "ablation", "varied", "k", "variant"),
    [
        ("gpt2", "mean", False, 4, "topk"),
        ("gpt2", "resample", True, 12, "topk"),
        ("gpt_neox", "zero", False, 12, "topk"),
        ("gpt2", "mean", False, 4, "skip"),
        ("gpt2", "mean", False, 4, "cross_layer"),
        ("gpt2", "resample", True, 4, "everything"),
    ],
)
def test_total_edges_are_finite_differences_of_the_real_model(
    architecture: Architecture, ablation: Ablation, varied: bool, k: int, variant: str
) -> None:
    case = random_case(architecture, ablation, varied=varied, n_layers=3, k=k, variant=variant)
    case.prompts = case.prompts[:4]
    case.f, case.errors, case.ablated = case.f[:, :4], case.errors[:, :4], case.ablated[:, :4]
    found = matrix(TotalEdges(case.patched, case.task, case.prompts, case.nodes, ablation), case)
    direct = matrix(DirectEdges(case.patched, case.task, case.prompts, case.nodes, ablation), case)
    layers, step = case.patched.transcoders.layers, 1e-4
    sources = np.flatnonzero(case.nodes.kind == FEATURE)[::4]
    expected = torch.zeros_like(found)
    for node in sources:
        i, j = layers.index(int(case.nodes.layer[node])), int(case.nodes.feature[node])
        moved = torch.zeros_like(case.f[i])
        moved[..., j] = (case.f[i] - case.ablated[i])[..., j] * (case.slots == int(case.nodes.slot[node]))
        up, down = (case.values(with_features_moved(case, {i: sign * step * moved})) for sign in (1, -1))
        expected[:, node] = (up - down) / (2 * step)
    # NeoX and Llama compute softmax in single precision, which limits finite differences.
    tolerance = 1e-5 if architecture == "gpt2" else 5e-3
    assert_same(found[:, sources], expected[:, sources], tolerance)
    assert (found[:, case.nodes.kind != FEATURE] == 0).all()
    assert (found - direct)[:, sources].abs().max() > 1e-2, "paths through other nodes are counted"


@pytest.mark.parametrize("method", [DirectEdges, TotalEdges])
@pytest.mark.parametrize(
    ("site", "variant"), [("mlp", {}), ("resid", {}), ("mlp", {"skip": True, "cross_layer": True})]
)
def test_half_precision_models_have_edges(
    method: type[DirectEdges | TotalEdges], site: Site, variant: dict[str, Any]
) -> None:
    from tests.builders import patched_model

    task = tiny_task()
    columns = []
    for dtype in (torch.float32, torch.bfloat16):
        lm = random_model("llama", dtype=torch.bfloat16)
        lm.model.to(dtype)
        patched = patched_model(lm, random_transcoders(lm, site=site, k=12, **variant), task.discovery)
        nodes = all_nodes(patched, task.discovery, "resample")
        order = np.lexsort((nodes.feature, nodes.slot, nodes.layer, nodes.kind))
        dense = torch.zeros(len(nodes))
        sources, effects = method(patched, task, task.discovery, nodes, "resample").column(len(nodes) - 1)
        dense[sources] = effects.detach().float()
        columns.append(dense[order])
    assert torch.corrcoef(torch.stack(columns))[0, 1] > 0.98


def test_the_strongest_incoming_edges_are_kept() -> None:
    effects = torch.tensor([0.0, -3.0, 1.0, 2.0, 0.0, -0.5])

    def column(target: int) -> tuple[Tensor, Tensor]:
        return torch.arange(6) + target, effects

    sources, kept = strongest_incoming(column, 10, 2)
    assert sorted(zip(sources.tolist(), kept.tolist(), strict=True)) == [(11, -3.0), (13, 2.0)]
    sources, kept = strongest_incoming(column, 0, 6)
    assert sorted(sources.tolist()) == [1, 2, 3, 5]
