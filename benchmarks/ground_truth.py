"""Search methods on circuits that are known: `PYTHONPATH=. python benchmarks/ground_truth.py [--json FILE]`.

Four GPT-2 models with weights written by hand (`tests/ground_truth/`). Every method ranks all live features and heads;
AUROC is the probability that a node of the mechanism ranks above another. Recall is that of a circuit with as many
nodes as the mechanism. Mean over seeds; one thread.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from hagd.config.stages import SearchConfig

METHODS: dict[str, dict[str, Any]] = {
    "hagd": {},
    "gates": {"method": "gates"},
    "attribution": {"method": "attribution"},
    "gradient_activation": {"method": "gradient_activation"},
    "greedy": {"method": "greedy"},
    "random": {"method": "random"},
}


def main() -> None:
    """See the module's docstring."""
    from tests.ground_truth.mechanisms import MECHANISMS
    from tests.ground_truth.recovery import prepare, recover

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--json", type=Path, help="file for every figure")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results = []
    print("| mechanism | nodes | " + " | ".join(METHODS) + " |\n" + "| --- " * (len(METHODS) + 2) + "|")
    for name, make in MECHANISMS.items():
        mechanism = make()
        searched = [prepare(mechanism, seed) for seed in arguments.seeds]
        cells = []
        for method, options in METHODS.items():
            found = [
                recover(mechanism, each, SearchConfig(sizes=(), **options), seed)
                for seed, each in zip(arguments.seeds, searched, strict=True)
            ]
            results += [
                {"mechanism": name, "method": method, "seed": seed, **asdict(each)}
                for seed, each in zip(arguments.seeds, found, strict=True)
            ]
            cells.append(" / ".join(f"{mean(getattr(each, key) for each in found):{form}}" for key, form in FIGURES))
        live = len(searched[0].graph.flat)
        print(f"| {name} | {int(mechanism.members.sum())} of {live} | " + " | ".join(cells) + " |", flush=True)
        if arguments.json:
            arguments.json.write_text(json.dumps(results, indent=1))


FIGURES = (("auroc", ".3f"), ("recall", ".2f"), ("evaluations", ",.0f"))

if __name__ == "__main__":
    main()
