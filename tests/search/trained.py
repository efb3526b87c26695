"""A small model that was really trained, with trained dictionaries: `a + b mod 7`. Seconds."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hagd.activations.capture import capture
from hagd.attribution.graph import build_graph
from hagd.attribution.node_attribution import attribute_nodes
from hagd.attribution.records import AttributionGraph
from hagd.config.model import MiniModel
from hagd.config.stages import GraphConfig
from hagd.config.task import ModularArithmetic
from hagd.config.transcoder import TranscoderConfig
from hagd.models.language_model import LanguageModel
from hagd.models.mini import build_mini
from hagd.patching.means import slot_means
from hagd.patching.objective import Objective
from hagd.patching.patched_model import PatchedModel
from hagd.tasks.build import build_task
from hagd.tasks.records import TaskData
from hagd.transcoders.initialise import initialise
from hagd.transcoders.objective import Scaling, StackedTranscoders
from hagd.transcoders.records import TranscoderSet
from hagd.transcoders.training import export


@dataclass(frozen=True)
class Trained:
    """A model, its objective on 40 discovery prompts, and the graph of all live features."""

    objective: Objective
    graph: AttributionGraph

    @property
    def flat(self) -> torch.Tensor:
        return torch.as_tensor(self.graph.flat)

    def divergence(self, members: torch.Tensor) -> float:
        """Of the circuit whose candidates are `members`, on all prompts."""
        patched = self.objective.patched
        gates = torch.zeros(patched.gate_shape)
        gates.view(-1)[self.flat[members]] = 1.0
        return float(self.objective.divergences(gates[None], torch.arange(len(self.objective)))[0])


def train() -> Trained:
    task = build_task(ModularArithmetic(p=7, n_train=3, n_discovery=40, n_selection=3, n_validation=3), None, seed=0)
    lm = memorised(task)
    transcoders = dictionaries(lm, task)
    means = slot_means(lm, transcoders, task.discovery, 3, batch=64)
    patched = PatchedModel(lm, transcoders, means)
    objective = Objective(patched, task, task.discovery, ablation="mean", error="mean", batch_size=256)
    config = GraphConfig(edge_prompts=16)
    return Trained(objective, build_graph(patched, task, task.discovery, attribute_nodes(objective, config), config))


def memorised(task: TaskData) -> LanguageModel:
    lm = build_mini(MiniModel(d_model=32, n_heads=2, d_mlp=64), 8, 3, seed=0)
    tokens = torch.cartesian_prod(torch.arange(7), torch.arange(7))
    prompts = torch.cat([tokens, torch.full((49, 1), 7)], dim=1)
    answers = tokens.sum(1) % 7
    model = lm.model.requires_grad_(True)
    optimiser = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.1)
    for _ in range(150):
        loss = torch.nn.functional.cross_entropy(model(prompts).logits[:, -1], answers)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    lm = LanguageModel(model)
    with torch.no_grad():
        assert (lm.model(prompts).logits[:, -1].argmax(-1) == answers).all()
    assert not any(parameter.requires_grad for parameter in lm.model.parameters())
    return lm


def dictionaries(lm: LanguageModel, task: TaskData) -> TranscoderSet:
    x, y = (side.flatten(1, 2) for side in capture(lm, task.discovery.tokens[:, 0], "mlp", (0, 1)))
    config = TranscoderConfig(k=8, expansion=2, steps=300, batch_size=x.shape[1])
    stacked = StackedTranscoders(config, 2, 32, seed=0)
    x_scaling, y_scaling = Scaling.of(x), Scaling.of(y)
    x, y = x_scaling(x), y_scaling(y)
    initialise(stacked, x, y)
    optimiser = torch.optim.Adam(stacked.parameters(), lr=5e-3)
    for _ in range(300):
        losses = stacked.losses(x, y, 0)
        optimiser.zero_grad()
        losses.total.backward()
        optimiser.step()
    assert losses.fvu < 0.1
    return TranscoderSet("tiny", "mlp", export(stacked, x_scaling, y_scaling, (0, 1)), ())
