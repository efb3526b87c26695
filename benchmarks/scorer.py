"""What a meta-learned scorer ranks, and whether its graph edges help: `python benchmarks/scorer.py [--json FILE]`.

Graphs of mini models (three architectures × three tasks × model seeds) are labelled with the circuits that the search
finds in them without a scorer. A scorer with messages along edges and one without are trained on graphs of
`--train-seeds` and rank the nodes of graphs of `--test-seeds`, whose models, searches and prompts neither has seen:

- `seed`: trained on all architectures and tasks, tested on the same with other model seeds;
- `task`, `architecture`: trained without the task or the architecture that is tested.

A ranking is judged by `cpr_log` on the validation split, without any search, beside the rankings by integrated
gradients (which is one of the scorer's inputs) and the circuits of the search without a scorer. `--search` also
searches the test graphs of the split `seed` with the scorer without edges, which halves where elimination begins.
Intervals: 95 % t-intervals of paired differences over the test graphs. One thread; ends with one line of JSON.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory

import numpy as np
import torch
from affinities import MODELS, TASKS, pipeline
from paired import interval
from rich.console import Console

from hagd.artifacts.codec import save_record
from hagd.config.run import GNNConfig
from hagd.pipeline.pipeline import Pipeline
from hagd.search.records import SearchResult
from hagd.search.scorer.apply import score
from hagd.search.scorer.inputs import membership_target, scored_graph
from hagd.search.scorer.records import ScoredGraph, TrainedScorer
from hagd.search.scorer.training import train_scorer
from hagd.validation.validate import validate

SCORERS = {"edges": True, "no edges": False}


@dataclass(frozen=True)
class Cell:
    """One model of one task, with its labelled graph."""

    model: str
    task: str
    seed: int
    stages: Pipeline
    labelled: ScoredGraph


@dataclass(frozen=True)
class Result:
    """`cpr_log` of rankings and of the search on one test graph."""

    split: str
    model: str
    task: str
    seed: int
    edges: float
    no_edges: float
    integrated_gradients: float
    search: float


def cell(model: str, task: str, seed: int, overrides: Sequence[str]) -> Cell:
    """The stages up to the search, taken from `paths.runs` or computed."""
    p = pipeline(seed, [f"model={model}", f"task={task}", *overrides], Console(quiet=True))
    graph, found = p.get("graph"), p.get("search")
    assert isinstance(found, SearchResult)
    target = membership_target(found.circuits, graph.flat)
    name = f"{model}-{task}-{seed}"
    print(f"{name}: {graph.n_candidates} candidates", flush=True)
    return Cell(model, task, seed, p, scored_graph(graph, p.get("hierarchy"), target, name, p.lm.n_layers))


def trained(cells: Sequence[Cell], config: GNNConfig, seed: int) -> TrainedScorer:
    """Meta-trained on `cells`, of which the last only tells its correlation."""
    with TemporaryDirectory() as folder:
        return train_scorer(
            [each.labelled for each in cells], config, seed, cells[0].stages.config.trainer, Path(folder)
        )


def judge(split: str, tested: Cell, scorers: dict[str, TrainedScorer]) -> Result:
    """Rankings of `tested` on its validation split."""
    p = tested.stages
    graph, hierarchy, found = p.get("graph"), p.get("hierarchy"), p.get("search")
    rankings = {name: score(scorer, graph, hierarchy, p.lm.n_layers) for name, scorer in scorers.items()}
    n = graph.n_candidates
    rankings["integrated_gradients"] = np.asarray(graph.nodes.importance[:n])
    config = p.config.validation.model_copy(update={"n_random": 1, "n_removed": 0, "n_subsets": 0, "n_bootstrap": 10})
    grid, ablation = p.config.search.sizes, p.config.graph.ablation
    metrics = validate(p.patched, p.get("prompts"), graph, found, rankings, grid, ablation, config, tested.seed).metrics
    areas = {name: metrics[f"control.{name}.cpr_log"] for name in rankings}
    ig = areas["integrated_gradients"]
    return Result(
        split,
        tested.model,
        tested.task,
        tested.seed,
        areas["edges"],
        areas["no edges"],
        ig,
        metrics["curve.cpr_log"],
    )


def guided(tested: Cell, scorer: Path) -> tuple[float, float]:
    """What a scorer changes of a search: its `cpr_log` on the validation split, and its evaluations."""
    p = tested.stages
    plain, before = p.get("validation").metrics["curve.cpr_log"], p.get("search").evaluations
    search = p.config.search.model_copy(update={"scorer": str(scorer)})
    other = Pipeline(p.config.model_copy(update={"search": search}), Console(quiet=True))
    return other.get("validation").metrics["curve.cpr_log"] - plain, other.get("search").evaluations - before


def folds(split: str, train: Sequence[Cell], test: Sequence[Cell]) -> Iterable[tuple[list[Cell], list[Cell]]]:
    """What is trained on and what is tested, for each task or architecture that is held out."""
    if split == "seed":
        yield list(train), list(test)
        return
    key = {"task": lambda each: each.task, "architecture": lambda each: each.model}[split]
    for held_out in dict.fromkeys(map(key, test)):
        yield [each for each in train if key(each) != held_out], [each for each in test if key(each) == held_out]


def table(results: Sequence[Result]) -> str:
    """One row a split: means, and paired differences."""
    lines = [
        "| held out | test graphs | edges | no edges | integrated gradients | search | edges − no edges "
        "| no edges − integrated gradients |",
        "| --- " * 8 + "|",
    ]
    for split in dict.fromkeys(each.split for each in results):
        own = [each for each in results if each.split == split]
        means = [
            mean(getattr(r, name) for r in own) for name in ("edges", "no_edges", "integrated_gradients", "search")
        ]
        gains = [
            "{:+.3f} ± {:.3f}".format(*interval(values))
            for values in ([r.edges - r.no_edges for r in own], [r.no_edges - r.integrated_gradients for r in own])
        ]
        lines.append(f"| {split} | {len(own)} | " + " | ".join([*(f"{value:.3f}" for value in means), *gains]) + " |")
    return "\n".join(lines)


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train-seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--test-seeds", type=int, nargs="+", default=[3, 4])
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--tasks", nargs="+", default=TASKS)
    parser.add_argument("--splits", nargs="+", default=["seed", "task", "architecture"])
    parser.add_argument("--epochs", type=int, default=GNNConfig().epochs)
    parser.add_argument("--search", action="store_true", help="also search with the scorer without edges")
    parser.add_argument("--json", type=Path, help="file for every figure")
    arguments, overrides = parser.parse_known_args()
    torch.set_num_threads(1)
    train, test = (
        [
            cell(model, task, seed, ["search.n_nodes=200", *overrides])
            for seed in seeds
            for model in arguments.models
            for task in arguments.tasks
        ]
        for seeds in (arguments.train_seeds, arguments.test_seeds)
    )
    results: list[Result] = []
    for split in arguments.splits:
        for seen, held_out in folds(split, train, test):
            scorers = {
                name: trained(seen, GNNConfig(edges=edges, epochs=arguments.epochs), 0)
                for name, edges in SCORERS.items()
            }
            results += [judge(split, each, scorers) for each in held_out]
            if split == "seed" and arguments.search:
                with TemporaryDirectory() as folder:
                    save_record(scorers["no edges"], Path(folder))
                    gains = [guided(each, Path(folder)) for each in held_out]
                names = ("cpr_log", "evaluations")
                told = zip(names, (interval(values) for values in zip(*gains, strict=True)), strict=True)
                print("search with less search without it: ", dict(told), flush=True)
        print(table(results), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(result) for result in results], indent=1))
    edges, half = interval([each.edges - each.no_edges for each in results])
    print(json.dumps({"graphs": len(train), "edges_minus_no_edges": round(edges, 4), "interval": round(half, 4)}))


if __name__ == "__main__":
    main()
