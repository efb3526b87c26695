"""Search methods at equal size and cost: `python benchmarks/search.py [--quick] [--json FILE] [key=value …]`.

For every seed, model and task the stages up to the hierarchy are taken from `paths.runs` (or computed); then each
method searches its circuits and the validation split judges them. `cpr_log` is the area under faithfulness over the
logarithm of circuit size; `evaluations` are forward passes over the discovery split, a gradient step over all of it
being three.

- `hagd`: the default search. `edgeless_scorer`: at every size the better of attribution and the ranking of the scorer
  without edges that comes with HAGD.
- `flat_gates`: hard-concrete gates with as many steps as HAGD's evaluations buy, minimising the same loss.
- `flat_gates_200`: 200 steps; `evaluations_ratio_to_flat_gates` is what the cheapest of `LADDER`, HAGD with smaller
  budgets, needs to reach their mean `cpr_log`, over what they need.
- `greedy_equal_cost`: greedy pruning with as many prompts a test as make its evaluations HAGD's.
- `--peers`: also auto-circuit's own EAP-IG and ACDC, which know no features, beside ours on heads and MLPs of the
  default mini model (`search_peers.py`; the first time it installs their environment).
- `integrated_gradients`, `integrated_gradients_inputs`, `gradient_activation`, `greedy`, `random`: rankings of these
  names.

`nodes_at_0.90` and `nodes_at_0.97` are the sizes that `search.n_nodes=null` finds on the selection split, for the first
model and task. `--parts` adds HAGD without each of its parts, with other losses, and greedy pruning of edges. `--quick`
does three seeds of the default cell. A run that was stopped takes what it has from `paths.runs`. One thread; ends with
one line of JSON.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import search_peers
import torch
from affinities import MODELS, TASKS, pipeline
from paired import interval
from rich.console import Console

from hagd.search.records import SearchResult

_ALONE = ["search.gates=false", "search.pruning=false"]
METHODS: dict[str, list[str]] = {
    "hagd": [],
    "flat_gates": ["search=gates"],
    "flat_gates_200": ["search=gates", "search.gate_steps=200"],
    "greedy": ["search=greedy"],
    "greedy_equal_cost": ["search=greedy"],
    "integrated_gradients": ["search=attribution"],
    "integrated_gradients_inputs": ["search=integrated_gradients_inputs"],
    "gradient_activation": ["search=gradient_activation"],
    "random": ["search=random"],
    "edgeless_scorer": [*_ALONE, "search.elimination=false", "search.traversal=false", "search.scorer=edgeless"],
}
EQUAL_COST = ("flat_gates", "greedy_equal_cost", "flat gates: divergence")

LADDER: dict[str, list[str]] = {
    "elimination, 64 prompts": [*_ALONE, "search.elimination_prompts=64", "search.elimination_keep=0.65"],
    "elimination, 128 prompts": [*_ALONE, "search.elimination_prompts=128", "search.elimination_keep=0.65"],
    "elimination": _ALONE,
    "elimination and gates": ["search.pruning=false"],
    "all": [],
}
PARTS: dict[str, list[str]] = {
    "without elimination": ["search.elimination=false"],
    "without gates": ["search.gates=false"],
    "without pruning": ["search.pruning=false"],
    "with group tests": ["search.traversal=true"],
    "flat gates: divergence": ["search=gates", "search.loss=divergence"],
    "loss: divergence": ["search.loss=divergence"],
    "loss: shortfall": ["search.loss=shortfall"],
    "greedy_edges": ["search=greedy_edges"],
}
TARGETS = ("0.90", "0.97")


@dataclass(frozen=True)
class Result:
    """One method on one cell and seed."""

    model: str
    task: str
    seed: int
    method: str
    cpr_log: float
    cpr: float
    cmd: float
    preservation: float
    nodes: int
    evaluations: float
    seconds: float


class Cells:
    """Runs methods on every cell and seed, and keeps what they gave."""

    def __init__(self, cells: Sequence[tuple[str, str]], seeds: Sequence[int], overrides: Sequence[str]) -> None:
        self._keys = [(model, task, seed) for model, task in cells for seed in seeds]
        self._overrides = list(overrides)
        self.results: list[Result] = []

    def run(
        self,
        method: str,
        options: Sequence[str],
        equal_to: str | None = None,
        cell: tuple[str, str] | None = None,
    ) -> list[Result]:
        """`method` in one cell or everywhere; with `equal_to`, as many steps or prompts as its evaluations buy."""
        found = []
        for key in self._keys:
            if cell not in (None, key[:2]):
                continue
            equal = [] if equal_to is None else [self._equal(key, equal_to, "search=greedy" in options)]
            found.append(self._one(key, method, [*options, *equal]))
        self.results += found
        evaluations = mean(r.evaluations for r in found)
        print(f"{method}: cpr_log {mean(r.cpr_log for r in found):.3f}, {evaluations:.0f} evaluations", flush=True)
        return found

    def _one(self, key: tuple[str, str, int], method: str, options: Sequence[str]) -> Result:
        model, task, seed = key
        p = pipeline(seed, [f"model={model}", f"task={task}", *self._overrides, *options], Console(quiet=True))
        metrics, found = p.get("validation").metrics, p.get("search")
        assert isinstance(found, SearchResult)
        return Result(
            *key,
            method,
            metrics["curve.cpr_log"],
            metrics["curve.cpr"],
            metrics["curve.cmd"],
            metrics["validation.preservation"],
            found.size,
            found.evaluations,
            sum(step.seconds for step in found.steps),
        )

    def _equal(self, key: tuple[str, str, int], method: str, greedy: bool) -> str:
        """Steps of gates, or prompts of greedy pruning, that cost as much as `method`."""
        model, task, seed = key
        p = pipeline(seed, [f"model={model}", f"task={task}", *self._overrides], Console(quiet=True))
        (theirs,) = (r for r in self.results if (r.model, r.task, r.seed, r.method) == (*key, method))
        n = len(p.get("prompts").discovery)
        if greedy:
            prompts = round(theirs.evaluations * n / (p.get("graph").n_candidates + 2))
            return f"search.greedy_prompts={min(prompts, n)}"
        share = min(p.config.search.gate_batch / n, 1)
        return f"search.gate_steps={round(theirs.evaluations / (3 * share))}"


def table(results: Sequence[Result]) -> str:
    """Methods by cell: `cpr_log`, and HAGD's paired difference to it with a 95 % interval over seeds."""
    cells = list(dict.fromkeys((r.model, r.task) for r in results))
    methods = list(dict.fromkeys(r.method for r in results))
    value = {(r.model, r.task, r.seed, r.method): r.cpr_log for r in results}
    lines = [
        "| method | " + " | ".join(f"{model}, {task}" for model, task in cells) + " | evaluations | preservation |"
    ]
    lines.append("| --- " * (len(cells) + 3) + "|")
    for method in methods:
        row = []
        for model, task in cells:
            seeds = [r.seed for r in results if (r.model, r.task, r.method) == (model, task, method)]
            ours = [value[model, task, seed, "hagd"] for seed in seeds]
            theirs = [value[model, task, seed, method] for seed in seeds]
            gain, half = interval([a - b for a, b in zip(ours, theirs, strict=True)])
            row.append(f"{mean(theirs):.3f}" + ("" if method == "hagd" else f" ({gain:+.3f} ± {half:.3f})"))
        own = [r for r in results if r.method == method]
        row += [f"{mean(r.evaluations for r in own):,.0f}", f"{mean(r.preservation for r in own):.3f}"]
        lines.append(f"| {method} | " + " | ".join(row) + " |")
    return "\n".join(lines)


def overview(results: Sequence[Result]) -> str:
    """One row a method over all cells: in how many HAGD has the larger mean, or a significantly smaller one."""
    ours = {(r.model, r.task, r.seed): r.cpr_log for r in results if r.method == "hagd"}
    columns = (
        "method",
        "cpr_log",
        "HAGD's gain",
        "HAGD better in",
        "significantly worse in",
        "evaluations",
        "preservation",
    )
    lines = ["| " + " | ".join(columns) + " |", "| --- " * len(columns) + "|"]
    for method in dict.fromkeys(r.method for r in results):
        own = [r for r in results if r.method == method]
        gains: dict[tuple[str, str], list[float]] = {}
        for r in own:
            gains.setdefault((r.model, r.task), []).append(ours[r.model, r.task, r.seed] - r.cpr_log)
        cells = [interval(each) for each in gains.values()]
        gain, half = interval([one for each in gains.values() for one in each])
        better, worse = sum(middle > 0 for middle, _ in cells), sum(middle + wide < 0 for middle, wide in cells)
        told = (
            ["", "", ""] if method == "hagd" else [f"{gain:+.3f} ± {half:.3f}", f"{better} of {len(cells)}", f"{worse}"]
        )
        area, evaluations, kept = (mean(getattr(r, n) for r in own) for n in ("cpr_log", "evaluations", "preservation"))
        lines.append("| " + " | ".join([method, f"{area:.3f}", *told, f"{evaluations:,.0f}", f"{kept:.3f}"]) + " |")
    return "\n".join(lines)


def cheapest(cells: Cells, wanted: float) -> tuple[str, float]:
    """The first of `LADDER` whose mean `cpr_log` is `wanted`, and its evaluations; the last one if none is."""
    for name, options in LADDER.items():
        found = cells.run(f"hagd: {name}", options)
        if mean(r.cpr_log for r in found) >= wanted:
            break
    return name, mean(r.evaluations for r in found)


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="three seeds of the default cell")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--tasks", nargs="+", default=TASKS)
    parser.add_argument("--parts", action="store_true", help="also HAGD without each of its parts")
    parser.add_argument("--peers", action="store_true", help="also auto-circuit's EAP-IG and ACDC, on heads and MLPs")
    parser.add_argument("--json", type=Path, help="file for every figure")
    arguments, overrides = parser.parse_known_args()
    torch.set_num_threads(1)
    cells = [(model, task) for model in arguments.models for task in arguments.tasks]
    if arguments.quick:
        cells, arguments.seeds = [("gpt2_mini", "modular_addition")], [0, 1, 2]
    runs = Cells(cells, arguments.seeds, ["search.n_nodes=200", *overrides])
    found = {name: runs.run(name, options, "hagd" if name in EQUAL_COST else None) for name, options in METHODS.items()}
    compared = list(runs.results)
    name, evaluations = cheapest(runs, mean(r.cpr_log for r in found["flat_gates_200"]))
    if arguments.parts:
        for part, options in PARTS.items():
            compared += runs.run(part, options, "hagd" if part in EQUAL_COST else None)
    print("\n" + overview(compared) + "\n\n" + table(compared) + "\n")
    print(f"quality of 200 steps of flat gates reached by: {name}\n", flush=True)
    nodes = {
        target: runs.run(
            f"smallest at {target}", ["search.n_nodes=null", f"search.target_preservation={target}"], cell=cells[0]
        )
        for target in TARGETS
    }
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(result) for result in runs.results], indent=1))
    components = search_peers.compared(arguments.seeds, overrides) if arguments.peers else []
    line: dict[str, Any] = {
        "cpr_log": {name: round(mean(r.cpr_log for r in each), 4) for name, each in found.items()},
        "preservation_at_200": round(mean(r.preservation for r in found["hagd"]), 4),
        "evaluations_ratio_to_flat_gates": round(evaluations / mean(r.evaluations for r in found["flat_gates_200"]), 4),
    }
    line |= {f"nodes_at_{target}": round(mean(r.nodes for r in each), 1) for target, each in nodes.items()}
    if components:
        print(search_peers.table(components), end="\n\n")
        line["cpr_log_heads_and_mlps"] = search_peers.areas(components)
    print(json.dumps(line))


if __name__ == "__main__":
    main()
