"""How the time of the recursive spectral partition grows with the graph.

`python benchmarks/hierarchy.py` partitions made graphs of 10³ to 10⁵ nodes with 20 edges a node (`branching=4`,
`min_size=8`, all levels down to single supernodes of 8), fits the exponent of CPU seconds over nodes for each kind of
graph, and ends with one line of JSON. One thread; weights are log-normal.

- `modules`: modules within modules, four to one, all the way down; an edge lies in a module of any level alike.
- `random`: no structure at all, so that every eigenvalue lies close to the next.
- `chain`: an edge joins nodes whose places on a line are close, as token positions are in a long prompt; the smallest
  eigenvalues nearly coincide.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable

import numpy as np
from scipy.sparse import csr_array

from hagd.artifacts.manifest import peak_rss_mb
from hagd.config.stages import HierarchyConfig
from hagd.hierarchy.affinity import affinity
from hagd.hierarchy.partition import partition

_DEGREE = 20
_CHAIN_WIDTH = 0.01


def modules(n: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Sources and targets of edges in modules within modules."""
    depth = max(1, round(np.log(n / 8) / np.log(4)))
    source = rng.integers(n, size=_DEGREE * n)
    size = np.maximum(n // 4 ** rng.integers(0, depth + 1, size=len(source)), 2)
    target = source // size * size + (rng.random(len(source)) * size).astype(np.int64)
    return source, np.minimum(target, n - 1)


def random(n: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Sources and targets drawn uniformly."""
    return rng.integers(n, size=_DEGREE * n), rng.integers(n, size=_DEGREE * n)


def chain(n: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Sources, and targets near them on a line."""
    source = rng.integers(n, size=_DEGREE * n)
    step = np.rint(rng.standard_normal(len(source)) * _CHAIN_WIDTH * n).astype(np.int64)
    return source, np.clip(source + step, 0, n - 1)


KINDS: dict[str, Callable[[int, np.random.Generator], tuple[np.ndarray, np.ndarray]]] = {
    "modules": modules,
    "random": random,
    "chain": chain,
}


def made_graph(kind: str, n: int, seed: int) -> csr_array:
    """Affinities of a made graph whose nodes are in no telling order."""
    rng = np.random.default_rng(seed)
    edges = rng.permutation(n)[np.stack(KINDS[kind](n, rng))]
    return affinity(edges, rng.lognormal(size=edges.shape[1]), n)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, nargs="+", default=[1_000, 3_162, 10_000, 31_623, 100_000])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    config = HierarchyConfig(branching=4, min_size=8)
    seconds: dict[str, list[float]] = {}
    wall: dict[str, list[float]] = {}
    for kind in arguments.kinds:
        for n in arguments.nodes:
            w = made_graph(kind, n, arguments.seed)
            began, began_wall = time.process_time(), time.perf_counter()
            levels = partition(w, config, arguments.seed)
            seconds.setdefault(kind, []).append(round(time.process_time() - began, 3))
            wall.setdefault(kind, []).append(round(time.perf_counter() - began_wall, 3))
            print(
                f"{kind:8} {n:7,} nodes {w.nnz // 2:9,} pairs {seconds[kind][-1]:7.2f} CPU s {wall[kind][-1]:7.2f} s "
                f"{len(levels)} levels, modularity {max(level.modularity for level in levels):.3f}",
                flush=True,
            )
    result = {
        "nodes": arguments.nodes,
        "edges_a_node": _DEGREE,
        "cpu_seconds": seconds,
        "wall_seconds": wall,
        "exponent": {
            kind: round(float(np.polyfit(np.log(arguments.nodes), np.log(times), 1)[0]), 3)
            for kind, times in seconds.items()
        },
        "peak_mb": round(peak_rss_mb()),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
