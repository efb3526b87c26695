"""Affinities of the hierarchy compared on the default mini model: modularity, stability, causal coherence, group tests.

`python benchmarks/affinities.py --seeds 0 1 2 --json FILE` takes the stages up to the graph from `paths.runs` (or
computes them), builds one hierarchy an affinity, and reports, at each level, mean over seeds:

- modularity, of the affinity's own graph;
- stability: adjusted Rand index of the partitions from two halves of the discovery prompts (edges, attributions and
  profiles measured on one half each; the candidate nodes are the same), over features that have any effect: the others
  have no neighbours under most affinities and are dealt out in order, which is no stability;
- coherence: correlation between the effects of ablating two members of one supernode, over selection prompts, beside
  random groups of the same sizes, drawn from all features or only exchanged within a layer and slot;
- features that group tests find idle with the default budget and tolerance (discovery split), and what they cost.

Two controls: `layer and slot` groups features by place alone; `random` is the default's hierarchy with its features
exchanged at random. Nothing reads the validation split. Ends with a table and one line of JSON.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from rich.console import Console

from hagd.attribution.graph import build_graph
from hagd.attribution.node_attribution import attribute_nodes
from hagd.attribution.records import AttributionGraph
from hagd.cli.paths import conf_dir
from hagd.config.load import load_config
from hagd.config.run import ExtractConfig
from hagd.config.stages import HierarchyConfig
from hagd.hierarchy.activity import activations, intervention_effects, linear_effects
from hagd.hierarchy.coherence import coherence
from hagd.hierarchy.partition import build_hierarchy
from hagd.hierarchy.records import Hierarchy, nodes_key
from hagd.patching.objective import Objective
from hagd.pipeline.objectives import objective_on
from hagd.pipeline.pipeline import Pipeline
from hagd.search.traversal import find_idle

AFFINITIES = ("edges", "attribution", "targets", "effects", "coactivation")
MODELS, TASKS = ("gpt2_mini", "pythia_mini", "llama_mini"), ("modular_addition", "parity", "sorting")
"""Of the nine cells of `search.py`, `search_growth.py` and `scorer.py`."""

_TOLERANCE = 0.05
_COHERENCE_PROMPTS = 128


def pipeline(seed: int, overrides: Sequence[str], console: Console) -> Pipeline:
    """The stages of one extraction."""
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        composed: Any = OmegaConf.to_container(compose("extract", overrides=[f"seed={seed}", *overrides]), resolve=True)
    return Pipeline(load_config(ExtractConfig, composed), console)


def adjusted_rand(one: np.ndarray, other: np.ndarray) -> float:
    """Hubert & Arabie (1985): 1 for equal partitions, 0 on average for independent ones."""
    table = np.zeros((one.max() + 1, other.max() + 1))
    np.add.at(table, (one, other), 1)
    pairs, rows, columns = ((x * (x - 1) / 2).sum() for x in (table, table.sum(1), table.sum(0)))
    total = len(one) * (len(one) - 1) / 2
    expected = rows * columns / total
    highest = (rows + columns) / 2
    return float((pairs - expected) / (highest - expected)) if highest > expected else 1.0


class Seed:
    """One seed's model, its graphs of all and of half of the discovery prompts, and its nodes' effects."""

    def __init__(self, p: Pipeline) -> None:
        self.config, self.graph = p.config, p.get("graph")
        task, patched = p.get("prompts"), p.patched
        order = torch.randperm(len(task.discovery), generator=torch.Generator().manual_seed(p.config.seed))
        halves = [task.discovery[half.sort().values] for half in order.tensor_split(2)]
        self.objectives = [objective_on(p.config, patched, task, part) for part in (task.discovery, *halves)]
        self.graphs = [self.graph, *(self._half(objective) for objective in self.objectives[1:])]
        checked = objective_on(p.config, patched, task, task.selection[:_COHERENCE_PROMPTS])
        rows = np.arange(self.graph.n_candidates)
        self.effects = intervention_effects(checked, self.graph, p.config.graph.metric, rows)
        nodes = self.graph.nodes
        self.place = np.unique(nodes.layer * 1000 + nodes.slot, return_inverse=True)[1]

    def _half(self, objective: Objective) -> AttributionGraph:
        """The graph of the objective's prompts, with the candidates of all discovery prompts."""
        config, whole = self.config.graph, self.graph
        graph = build_graph(objective.patched, objective.task, objective.prompts, whole.attribution, config)
        assert np.array_equal(graph.flat, whole.flat)
        importance = graph.nodes.importance.copy()
        here = attribute_nodes(objective, config).importance.flatten().cpu().numpy()
        importance[: graph.n_candidates] = here[graph.flat]
        return replace(graph, nodes=replace(graph.nodes, importance=importance))

    def hierarchies(self, affinity: str) -> list[Hierarchy]:
        """Of all discovery prompts, and of each half."""
        options = HierarchyConfig(**{**self.config.hierarchy.model_dump(), "affinity": affinity})
        return [
            build_hierarchy(graph, options, self.config.seed, profile=self._profile(affinity, objective))
            for graph, objective in zip(self.graphs, self.objectives, strict=True)
        ]

    def _profile(self, affinity: str, objective: Objective) -> np.ndarray | None:
        if affinity == "coactivation":
            return activations(objective, self.graph)
        return linear_effects(objective, self.graph, self.config.graph.metric) if affinity == "effects" else None

    def measured(self, found: list[Hierarchy]) -> dict[str, Any]:
        """What is reported of one affinity at one seed; with several hierarchies the last two are those of halves."""
        n = self.graph.n_candidates
        live = self.graph.nodes.importance[:n] > 0
        levels = []
        for depth, level in enumerate(found[0].levels):
            group = np.unique(level.supernode[:n], return_inverse=True)[1]
            rng = np.random.default_rng(0)
            free = coherence(self.effects, group, rng)
            matched = coherence(self.effects, group, rng, strata=self.place[:n])
            halves = [h.levels[depth].supernode[:n][live] for h in found[1:] if depth < len(h.levels)]
            levels.append(
                {
                    "supernodes": int(group.max()) + 1,
                    "largest": float(np.bincount(group).max() / n),
                    "modularity": level.modularity if level.modularity == level.modularity else None,
                    "stability": adjusted_rand(*halves) if len(halves) == 2 else None,
                    "coherence": free.found,
                    "null": free.null,
                    "null_spread": free.spread,
                    "matched_null": matched.null,
                    "matched_spread": matched.spread,
                }
            )
        tests = find_idle(
            self.objectives[0],
            self.graph,
            found[0],
            tolerance=_TOLERANCE,
            budget=self.config.search.traversal_budget,
            generator=torch.Generator().manual_seed(0),
        )
        idle = {"share": float(tests.idle.mean()), "supernodes": tests.tested, "levels": tests.levels}
        return {"levels": levels, "idle": idle, "features": n, "features_with_effect": int(live.sum())}


def by_place(seed: Seed) -> Hierarchy:
    """One level: a supernode is a layer and slot."""
    (level, *_) = build_hierarchy(seed.graph, HierarchyConfig(), 0).levels
    return Hierarchy(4, (replace(level, supernode=seed.place, modularity=float("nan")),), nodes_key(seed.graph))


def exchanged(seed: Seed, hierarchy: Hierarchy) -> Hierarchy:
    """The same sizes at every level, with other features in them."""
    n = seed.graph.n_candidates
    order = np.concatenate([np.random.default_rng(0).permutation(n), np.arange(n, len(seed.graph.nodes))])
    levels = [replace(level, supernode=level.supernode[order], modularity=float("nan")) for level in hierarchy.levels]
    return replace(hierarchy, levels=tuple(levels))


def table(results: dict[str, list[dict[str, Any]]]) -> str:
    """Means over seeds, level by level."""
    lines = [
        "| affinity | level | supernodes | modularity | stability | coherence | random groups | same layer and slot |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, seeds in results.items():
        for depth in range(min(len(one["levels"]) for one in seeds)):
            rows = [one["levels"][depth] for one in seeds]

            def mean(key: str, rows: list[dict[str, Any]] = rows, digits: int = 3) -> str:
                values = [row[key] for row in rows if row[key] is not None]
                return f"{np.mean(values):.{digits}f}" if values and np.isfinite(values).all() else "–"

            cells = [mean("supernodes", digits=0), *map(mean, ("modularity", "stability", "coherence"))]
            cells += [mean("null"), mean("matched_null")]
            lines.append(f"| {name} | {depth + 1} | {' | '.join(cells)} |")
    lines += ["", "| affinity | idle features | supernodes tested |", "| --- | --- | --- |"]
    for name, seeds in results.items():
        share, tested = (np.mean([one["idle"][key] for one in seeds]) for key in ("share", "supernodes"))
        lines.append(f"| {name} | {100 * share:.1f} % | {tested:.0f} |")
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--json", type=Path, help="where every figure of every seed is written")
    parser.add_argument("--overrides", nargs="*", default=[], help="as for extract.py, for example paths.runs=FOLDER")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, list[dict[str, Any]]] = {}
    for number in arguments.seeds:
        seed = Seed(pipeline(number, arguments.overrides, Console(stderr=True)))
        for affinity in AFFINITIES:
            found = seed.hierarchies(affinity)
            results.setdefault(affinity, []).append(seed.measured(found))
            if affinity == "edges":
                results.setdefault("random", []).append(seed.measured([exchanged(seed, found[0])]))
        results.setdefault("layer and slot", []).append(seed.measured([by_place(seed)]))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps({"seeds": arguments.seeds, "results": results}, indent=1))
    print(table(results))
    print(json.dumps({name: [one["levels"][1:3] for one in seeds] for name, seeds in results.items()}))


if __name__ == "__main__":
    main()
