"""How the search's cost grows with the number of candidates: `python benchmarks/search_growth.py [--json FILE]`.

Parity on `gpt2_mini` with dictionaries of 32 times the width and 256 active features has more than 20,000 candidates,
of which the graph keeps the `graph.n_max` most attributed. They are trained briefly and edges are measured on few
prompts, because neither decides what a search costs. For each of these sizes: evaluations of the discovery split and
seconds of every part of the search at 200 nodes, one thread, and exponents p of a fit ~ nᵖ.
`search.gates=false search.pruning=false` measures the coarse phase alone. `--cells` takes the nine cells of `search.py`
instead, each with the candidates that it has; searches that are stored are not run again. Ends with one line of JSON.
"""

from __future__ import annotations

import argparse
import json
from itertools import product
from pathlib import Path

import numpy as np
import torch
from affinities import MODELS, TASKS, pipeline
from rich.console import Console

from hagd.search.records import SearchResult

LARGE = [
    "task=parity",
    "transcoder.expansion=32",
    "transcoder.k=256",
    "transcoder.steps=200",
    "graph.edge_prompts=4",
    "graph.edges_per_node=8",
    "hierarchy.coherence_budget=0",
]


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[500, 1000, 2000, 5000, 10000, 20000])
    parser.add_argument("--cells", action="store_true", help="the nine cells of search.py instead of sizes")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--json", type=Path, help="file for every figure")
    arguments, overrides = parser.parse_known_args()
    torch.set_num_threads(1)
    settings = [[*LARGE, f"graph.n_max={size}"] for size in arguments.sizes]
    if arguments.cells:
        settings = [[f"model={model}", f"task={task}"] for model, task in product(MODELS, TASKS)]
    rows = []
    print("| candidates | part | evaluations | seconds |\n| --- | --- | --- | --- |")
    for setting, seed in product(settings, arguments.seeds):
        found = pipeline(seed, ["search.n_nodes=200", *setting, *overrides], Console(quiet=True)).get("search")
        assert isinstance(found, SearchResult)
        n = len(found.score)
        for step in found.steps:
            rows.append({"n": n, "part": step.name, "evaluations": step.evaluations, "seconds": step.seconds})
            print(f"| {n:,} | {step.name} | {step.evaluations:,.1f} | {step.seconds:,.1f} |", flush=True)
    fits = {}
    for part in dict.fromkeys(row["part"] for row in rows if row["evaluations"]):
        own = [row for row in rows if row["part"] == part]
        n = np.log([row["n"] for row in own])
        for name in ("evaluations", "seconds"):
            fits[f"{part}.{name}"] = round(float(np.polyfit(n, np.log([row[name] for row in own]), 1)[0]), 3)
    eliminated = [row for row in rows if row["part"] == "elimination"]
    x, y = np.log([row["n"] for row in eliminated]), np.array([row["evaluations"] for row in eliminated])
    slope, start = np.polyfit(x, y, 1)
    fits["elimination evaluations"] = f"{start:.1f} + {slope:.2f} ln n"
    fits["largest residual"] = round(float(np.abs(y - start - slope * x).max()), 1)
    if arguments.json:
        arguments.json.write_text(json.dumps({"rows": rows, "fits": fits}, indent=1))
    print(json.dumps(fits))


if __name__ == "__main__":
    main()
