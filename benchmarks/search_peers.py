"""HAGD beside auto-circuit's own ACDC and EAP-IG on heads and MLPs: `python benchmarks/search_peers.py [--json FILE]`.

The default mini GPT-2 on modular addition, without dictionaries: nodes are heads and whole MLPs at each position,
because the peers know no others; nodes outside a circuit are at their means over the discovery split, for all methods
and when circuits are judged. The peers run from their own package in an environment of its own
(`circuit-peers-requirements.txt`, 1.5 GB, made once) on the same weights, converted with a check of equal logits, and
the same discovery prompts; their edges become ranked nodes (`search_peers_worker.py`). Every method's circuits are
judged by the same code on the validation split, at equal numbers of nodes.

- `hagd`: the default search over these nodes. `integrated_gradients`, `greedy`, `random`: as in `search.py`.
- `eap_ig`: `mask_gradient_prune_scores`, integrated over 8 mask values, ablating to the means.
- `acdc`: `acdc_prune_scores` as shipped, which ablates to the corrupt prompts' activations; `acdc_means`: the same with
  the means in their place.

Ends with a table and one line of JSON. One thread.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from affinities import pipeline
from contenders import one_thread
from paired import interval
from peers_environment import peers_python
from rich.console import Console
from safetensors.torch import save_file
from torch import Tensor, nn

from hagd.activations.capture import capture
from hagd.activations.heads import rewritten_heads
from hagd.attribution.node_attribution import attribute_nodes
from hagd.attribution.records import AttributionGraph, Nodes
from hagd.config.stages import GraphConfig, SearchConfig
from hagd.hierarchy.records import Hierarchy
from hagd.models.language_model import LanguageModel
from hagd.models.mini import mini_state
from hagd.patching.means import head_means
from hagd.patching.objective import Objective
from hagd.patching.patched_model import PatchedModel
from hagd.patching.prefix import Prefix
from hagd.search.find_circuit import Searched, find_circuit
from hagd.search.records import Circuit
from hagd.tasks.records import Prompts, TaskData
from hagd.validation.measures import area_log, faithfulness, preservation

SIZES = (2, 4, 6, 8, 10, 12, 15, 20)
"""The last layer is read at the last position only: of 30 nodes 20 can matter."""

OURS = ("hagd", "integrated_gradients", "greedy", "random")


class ComponentModel(PatchedModel):
    """Heads and MLPs as nodes: `z ← v + g (z − v)` with v the mean by slot.

    Gates are `[L, S, H + 1]`, the MLP last: L layers, S slots, H heads; below, e is the width of a head.
    """

    def __init__(self, lm: LanguageModel, prompts: Prompts, n_slots: int) -> None:
        self.lm, self.evaluations, self.head_means = lm, 0, None
        self._prefix, self._layers = Prefix(lm, 0), tuple(range(lm.n_layers))
        self._heads = head_means(lm, self._layers, prompts, n_slots, len(prompts)).outputs  # [L, S, H, e]
        written = capture(lm, prompts.tokens[:, 0], "mlp", self._layers)[1]
        slots = prompts.slots[:, 0]
        self._mlps = torch.stack([written[:, slots == s].mean(1) for s in range(n_slots)], 1)  # [L, S, d]

    @property
    def gate_shape(self) -> tuple[int, ...]:
        return *self._heads.shape[:2], self._heads.shape[2] + 1

    @property
    def frequency(self) -> Tensor:
        return torch.ones(self.gate_shape)

    def logits(self, prompts: Prompts, gates: Tensor, *, owner: Tensor | None = None, **_: Any) -> Tensor:
        gates = gates if gates.dim() > 3 else gates[None]
        owner = torch.zeros(len(prompts), dtype=torch.long) if owner is None else owner
        slots = prompts.slots[:, 0]
        gate = gates.transpose(0, 1)[:, owner[:, None], slots]  # [L, B, T, H + 1]
        self.evaluations += len(prompts) * (3 if gates.requires_grad else 1)

        def heads(layer: int, z: Tensor) -> Tensor:
            return torch.lerp(self._heads[layer][slots], z, gate[layer, ..., :-1, None])

        def mlp(layer: int) -> Callable[[nn.Module, Any, Tensor], Tensor]:
            return lambda _, __, y: torch.lerp(self._mlps[layer][slots], y, gate[layer, ..., -1:])

        hooks = [self.lm.mlp(layer).register_forward_hook(mlp(layer)) for layer in self._layers]
        try:
            with rewritten_heads(self.lm, self._layers, heads):
                return self.lm.logits_at(prompts.tokens[:, 0], prompts.scored[:, 0])[:, None]
        finally:
            for hook in hooks:
                hook.remove()


def component_graph(objective: Objective) -> AttributionGraph:
    """All heads and MLPs by falling integrated gradients, without edges."""
    attribution = attribute_nodes(objective, GraphConfig())
    importance = attribution.importance.flatten()
    flat = torch.argsort(importance, descending=True, stable=True).numpy()
    layer, slot, index = np.unravel_index(flat, objective.patched.gate_shape)
    values = importance.numpy()[flat]
    nodes = Nodes(np.zeros_like(flat), layer, slot, index, values, values, values, np.ones(len(flat)))
    return AttributionGraph(nodes, np.empty((2, 0), dtype=np.int64), np.empty(0), flat, attribution)


def ours(method: str, searched: Searched, seed: int) -> tuple[dict[int, Circuit], float]:
    """Circuits by size, and evaluations."""
    name = {"integrated_gradients": "attribution"}.get(method, method)
    config = SearchConfig(method=name, sizes=SIZES, n_nodes=10)  # type: ignore[arg-type]
    found = find_circuit(searched, config, seed)
    return {len(circuit): circuit for circuit in found.circuits}, found.evaluations


def peers(lm: LanguageModel, prompts: Prompts) -> dict[str, Any]:
    """Node scores and seconds of every method of the worker."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        save_file(mini_state(lm), folder / "weights.safetensors")
        sides = {
            "clean": prompts.tokens[:, 0],
            "corrupt": prompts.counterfactual[:, 0],
            "answers": prompts.answers[:, 0, 0, :1],
            "wrong": prompts.distractors[:, 0, 0, :1],
        }
        save_file({key: value.contiguous() for key, value in sides.items()}, folder / "prompts.safetensors")
        (folder / "config.json").write_text(lm.model.config.to_json_string())
        worker = Path(__file__).with_name("search_peers_worker.py")
        command = [peers_python("circuit-peers"), worker, folder]
        subprocess.run(command, check=True, stdout=sys.stderr, env=one_thread())
        found: dict[str, Any] = json.loads((folder / "scores.json").read_text())
        return found


def judged(objective: Objective, circuits: dict[int, Circuit]) -> dict[str, Any]:
    """Preservation and faithfulness of circuits by size, and the area under faithfulness over log size."""
    shape, every = objective.patched.gate_shape, np.arange(len(objective))
    full, empty = objective.full(), objective.outcome(torch.zeros(shape))
    outcomes = {n: objective.outcome(circuits[n].gates(shape)) for n in SIZES}
    kept = {n: preservation(each, full)(every) for n, each in outcomes.items()}
    lead = {n: faithfulness(each, full, empty)(every) for n, each in outcomes.items()}
    return {"preservation": kept, "faithfulness": lead, "cpr_log": area_log(SIZES, list(lead.values()))}


def one_seed(seed: int, overrides: list[str]) -> list[dict[str, Any]]:
    """Every method on the model of one seed."""
    p = pipeline(seed, overrides, Console(quiet=True))
    task: TaskData = p.get("prompts")
    model = ComponentModel(p.lm, task.discovery, len(task.slot_names))
    discovery, selection, validation = (
        Objective(model, task, prompts, ablation="mean", error="mean", batch_size=512, loss="both")
        for prompts in (task.discovery, task.selection, task.validation)
    )
    searched = Searched(discovery, selection, component_graph(discovery), Hierarchy(1, (), ""), GraphConfig())
    results = []
    for method in OURS:
        circuits, evaluations = ours(method, searched, seed)
        results.append({"method": method, "evaluations": evaluations, **judged(validation, circuits)})
    for method, found in peers(p.lm, task.discovery).items():
        order = np.argsort(-np.array(found["scores"]).flatten(), kind="stable")
        circuits = {n: Circuit(np.sort(order[:n])) for n in SIZES}
        results.append({"method": method, "seconds": found["seconds"], **judged(validation, circuits)})
    empty = validation.outcome(torch.zeros(model.gate_shape)).accuracy
    return [{"seed": seed, "empty_accuracy": empty, **result} for result in results]


def compared(seeds: Sequence[int], overrides: list[str]) -> list[dict[str, Any]]:
    """One row a method and seed."""
    return [result for seed in seeds for result in one_seed(seed, overrides)]


def areas(results: list[dict[str, Any]]) -> dict[str, float]:
    """Mean `cpr_log` of each method."""
    methods = dict.fromkeys(r["method"] for r in results)
    return {m: round(mean(r["cpr_log"] for r in results if r["method"] == m), 4) for m in methods}


def table(results: list[dict[str, Any]]) -> str:
    """Means over seeds: area, HAGD's paired gain, and faithfulness / preservation by size."""
    lines = ["| method | cpr_log | HAGD's gain | " + " | ".join(f"{n} nodes" for n in SIZES) + " |"]
    lines.append("| --- " * (len(SIZES) + 3) + "|")
    areas = {(r["method"], r["seed"]): r["cpr_log"] for r in results}
    for method in dict.fromkeys(r["method"] for r in results):
        own = [r for r in results if r["method"] == method]
        gain, half = interval([areas["hagd", r["seed"]] - r["cpr_log"] for r in own])
        cells = [
            f"{mean(r['faithfulness'][n] for r in own):.2f} / {mean(r['preservation'][n] for r in own):.2f}"
            for n in SIZES
        ]
        told = "" if method == "hagd" else f"{gain:+.3f} ± {half:.3f}"
        lines.append(f"| {method} | {mean(r['cpr_log'] for r in own):.3f} | {told} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--json", type=Path, help="file for every figure")
    arguments, overrides = parser.parse_known_args()
    torch.set_num_threads(1)
    results = compared(arguments.seeds, overrides)
    print(table(results))
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1))
    print(json.dumps(areas(results)))


if __name__ == "__main__":
    main()
