"""Do heads as nodes raise preservation at equal size? IOI with SmolLM2-135M, circuits by integrated gradients.

`python benchmarks/heads.py --json FILE` takes the stages up to the ablation values from `paths.runs` (or computes them;
`make smollm2`) with `experiment=smollm2_ioi_heads`, and compares three kinds of circuits of equal numbers of nodes:

- `free`: features; attention is never ablated (the default, `graph.heads=false`);
- `features`: features; every head of the head layers is at its mean;
- `both`: features and heads of the head layers; heads outside the circuit are at their means.

Error terms are at their means everywhere. Nodes are ranked by integrated gradients on the discovery split, each kind of
circuit in its own patched model. With `--gates` rankings are refined by gates as in `search=hagd` without traversal and
pruning, and at each size the best one on the discovery split is taken. Sizes are those of the experiment, so the
validation split chooses nothing. Other settings replace the experiment. Ends with a table and one line of JSON.

`--scan` only prints, for ranges of layers, what the model answers on discovery prompts when all heads there are at
their means: what the experiment's layers were chosen by.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from affinities import pipeline
from rich.console import Console
from torch import Tensor

from hagd.activations.heads import rewritten_heads
from hagd.attribution.graph import candidate_nodes
from hagd.attribution.node_attribution import attribute_nodes
from hagd.attribution.records import HEAD, AttributionGraph
from hagd.config.stages import Ablation, ErrorMode
from hagd.hierarchy.records import Hierarchy
from hagd.patching.means import head_means
from hagd.patching.objective import Objective, Outcome
from hagd.patching.patched_model import PatchedModel
from hagd.pipeline.objectives import discovery_objective, objective_on
from hagd.pipeline.pipeline import Pipeline
from hagd.search.find_circuit import Searched, find_circuit
from hagd.search.records import Circuit
from hagd.tasks.records import Prompts
from hagd.tasks.scoring import is_correct, logit_difference
from hagd.validation.measures import bootstrap, faithfulness, preservation
from hagd.validation.random_circuits import random_matched

ARMS = ("free", "features", "both")
_DRAWS = 10
_SCANNED = ((25, 29), (20, 24), (20, 29), (15, 29), (10, 29))
_SCAN_PROMPTS = 48


class HeadsAblated(PatchedModel):
    """Circuits of features alone, while every head of the head layers is at its ablation value."""

    @property
    def gate_shape(self) -> tuple[int, ...]:
        return len(self.layout.layers), self.layout.n_slots, self.layout.m

    @property
    def frequency(self) -> Tensor:
        return self.means.frequency

    @property
    def mean_activation(self) -> Tensor:
        return self.means.features

    def logits(
        self,
        prompts: Prompts,
        gates: Tensor,
        *,
        ablation: Ablation = "mean",
        error: ErrorMode = "mean",
        owner: Tensor | None = None,
    ) -> Tensor:
        flat = gates.flatten(-3)
        closed = flat.new_zeros(*flat.shape[:-1], self.layout.shape[0] - self.layout.n_features)
        return super().logits(prompts, torch.cat([flat, closed], -1), ablation=ablation, error=error, owner=owner)


def arms(p: Pipeline) -> dict[str, PatchedModel]:
    """The patched model of each kind of circuit."""
    both = p.patched
    return {
        "free": PatchedModel(both.lm, both.transcoders, both.means),
        "features": HeadsAblated(both.lm, both.transcoders, both.means, both.head_means),
        "both": both,
    }


class Arm:
    """One kind of circuit: its candidates and its circuits of every size."""

    def __init__(self, p: Pipeline, patched: PatchedModel, gates: bool) -> None:
        began = time.process_time()
        self.p, self.patched, self.task = p, patched, p.get("prompts")
        discovery = discovery_objective(p.config, patched, self.task)
        attribution = attribute_nodes(discovery, p.config.graph)
        nodes, flat = candidate_nodes(attribution, patched, self.task.discovery, p.config.graph.n_max)
        nothing = np.empty((2, 0), dtype=np.int64)
        self.graph = AttributionGraph(nodes, nothing, np.empty(0, dtype=np.float32), flat, attribution)
        self.attribution = {n: Circuit(np.sort(flat[:n])) for n in p.config.search.sizes}
        self.gates = self._gated(discovery) if gates else {}
        self.cpu_s = time.process_time() - began

    def _gated(self, discovery: Objective) -> dict[int, Circuit]:
        config = self.p.config.search.model_copy(update={"traversal": False, "pruning": False})
        selection = objective_on(self.p.config, self.patched, self.task, self.task.selection)
        no_hierarchy = Hierarchy(1, (), "")  # only group tests read it
        searched = Searched(discovery, selection, self.graph, no_hierarchy, self.p.config.graph)
        return {len(circuit): circuit for circuit in find_circuit(searched, config, self.p.config.seed).circuits}

    def heads(self, circuit: Circuit) -> int:
        """Heads among the nodes of a circuit."""
        kind = self.graph.nodes.kind[: self.graph.n_candidates]
        return int((kind[np.isin(self.graph.flat, circuit.nodes)] == HEAD).sum())

    def measure(self, prompts: Prompts) -> dict[str, Any]:
        """Accuracies, and preservation and faithfulness of every circuit."""
        objective = objective_on(self.p.config, self.patched, self.task, prompts)
        shape = self.patched.gate_shape
        full, empty = objective.full(), objective.outcome(torch.zeros(shape))
        everything = objective.outcome(torch.ones(shape))

        def of(outcome: Outcome) -> dict[str, float]:
            kept = bootstrap(preservation(outcome, full), len(prompts), 1000, 0)
            lead = faithfulness(outcome, full, empty)(np.arange(len(prompts)))
            lead_left = float(outcome.logit_difference.mean())
            return {**kept._asdict(), "faithfulness": lead, "logit_difference": lead_left}

        reported = self.attribution[self.p.config.search.n_nodes or max(self.attribution)]
        random = [objective.outcome(c.gates(shape)) for c in random_matched(self.graph, reported, _DRAWS, 0)]
        values = [preservation(each, full)(np.arange(len(prompts))) for each in random]
        return {
            "full_accuracy": full.accuracy,
            "full_logit_difference": float(full.logit_difference.mean()),
            "empty": of(empty),
            "everything": of(everything),
            "random": {"value": float(np.mean(values)), "low": min(values), "high": max(values), "draws": values},
            "attribution": {n: of(objective.outcome(c.gates(shape))) for n, c in self.attribution.items()},
            "gates": {n: of(objective.outcome(c.gates(shape))) for n, c in self.gates.items()},
        }


@torch.no_grad()
def scan(p: Pipeline, console: Console) -> None:
    """Accuracy and logit difference with all heads of some layers at their means, everything else untouched."""
    task, lm = p.get("prompts"), p.lm
    part = task.discovery[:_SCAN_PROMPTS]
    slots = part.slots[:, 0].clamp(min=0)
    for first, last in _SCANNED:
        layers = tuple(range(first, last + 1))
        means = head_means(lm, layers, part, len(task.slot_names), _SCAN_PROMPTS).outputs[:, slots]
        with rewritten_heads(lm, layers, lambda index, z, means=means: means[index]):
            logits = lm.logits_at(part.tokens[:, 0], part.scored[:, 0])[:, None]
        accuracy = float(is_correct(logits, part, task.accuracy).double().mean())
        lead = float(logit_difference(logits, part).mean())
        console.print(f"layers {first}-{last}: accuracy {accuracy:.2f}, logit difference {lead:.2f}")


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--gates", action="store_true")
    parser.add_argument("--scan", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument(
        "overrides", nargs="*", help="settings as of extract.py, instead of experiment=smollm2_ioi_heads"
    )
    options = parser.parse_args(arguments)
    console = Console()
    p = pipeline(0, options.overrides or ["experiment=smollm2_ioi_heads"], console)
    torch.set_num_threads(p.config.trainer.threads or 1)
    if options.scan:
        scan(p, console)
        return
    result: dict[str, Any] = {"head_layers": list(p.patched.layout.head_layers)}
    task = p.get("prompts")
    built = {name: Arm(p, patched, options.gates) for name, patched in arms(p).items() if name in options.arms}
    for name, arm in built.items():
        circuits = {"attribution": arm.attribution, "gates": arm.gates}
        result[name] = {
            "heads": {kind: {n: arm.heads(c) for n, c in found.items()} for kind, found in circuits.items()},
            "cpu_s": arm.cpu_s,
            **{split: arm.measure(getattr(task, split)) for split in ("selection", "validation")},
        }
        console.print(f"{name}: {arm.cpu_s:.0f} CPU s")
        for split in ("selection", "validation"):
            found = result[name][split]
            shown = {"empty": found["empty"], "random": found["random"], **found["attribution"]}
            shown |= {f"{n} by gates": value for n, value in found["gates"].items()} | {"all": found["everything"]}
            for size, value in shown.items():
                console.print(f"  {split} {size}: {value['value']:.3f} [{value['low']:.3f}, {value['high']:.3f}]")
    line = json.dumps(result)
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    print(line)


if __name__ == "__main__":
    main()
