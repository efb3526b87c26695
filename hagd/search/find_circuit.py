"""One interface for all methods: (model on the discovery split, graph, budget) → circuits of several sizes.

HAGD is scorer → coarse-to-fine traversal → gates → causal pruning; every part can be switched off.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch

from hagd.attribution.records import AttributionGraph
from hagd.config.stages import GraphConfig, SearchConfig
from hagd.errors import ConfigError
from hagd.hierarchy.records import Hierarchy
from hagd.patching.objective import Objective
from hagd.search import baselines
from hagd.search.gates import descend
from hagd.search.pruning import exchange_idle
from hagd.search.records import Circuit, SearchResult, SearchStep
from hagd.search.traversal import find_idle

Progress = Callable[[str, int, int], None]
_OPEN = 2.0  # start of the best candidate's gate logit; the worst starts at 0
_IDLE = 3.0  # by how much group tests lower the start of an idle node
_TRAVERSAL_TOLERANCE = 0.05
_EXCHANGE_PROMPTS = 256


@dataclass(frozen=True)
class Searched:
    """Everything that a search may look at; the validation split is not among it."""

    discovery: Objective
    selection: Objective
    graph: AttributionGraph
    hierarchy: Hierarchy
    graph_config: GraphConfig
    scores: np.ndarray | None = None
    progress: Progress = field(default=lambda *_: None)


class _Ledger:
    """Writes down what each part cost and changed."""

    def __init__(self, searched: Searched, size: int) -> None:
        self._searched = searched
        self._size = size
        self.steps: list[SearchStep] = []
        self._members: set[int] = set()
        self._evaluations = searched.discovery.patched.evaluations
        self._clock = time.perf_counter()

    def close(self, name: str, members: np.ndarray, note: str = "") -> None:
        """End a part whose best circuit of the reported size is now `members` (candidate indices)."""
        discovery, selection = self._searched.discovery, self._searched.selection
        spent = (discovery.patched.evaluations - self._evaluations) / len(discovery)
        seconds = time.perf_counter() - self._clock
        circuit = Circuit(np.sort(self._searched.graph.flat[members]))
        full = selection.full().accuracy
        accuracy = selection.outcome(circuit.gates(discovery.patched.gate_shape)).accuracy
        now = set(members.tolist())
        changed = len(now - self._members) if self._members else 0
        self.steps.append(SearchStep(name, spent, seconds, changed, accuracy / max(full, 1e-9), note))
        self._members = now
        self._evaluations = discovery.patched.evaluations
        self._clock = time.perf_counter()


def find_circuit(searched: Searched, config: SearchConfig, seed: int) -> SearchResult:
    """Circuits of every size in `config.sizes` (below the number of candidates) and of the reported size.

    Raises:
        ConfigError: more nodes are asked for than there are candidates.
    """
    available = searched.graph.n_features
    if config.n_nodes is not None and config.n_nodes > available:
        raise ConfigError(
            f"search.n_nodes: expected at most {available} (live candidate nodes of this model and task), "
            f"found {config.n_nodes}; lower it or raise graph.n_max"
        )
    if config.n_nodes is not None:
        return _search_at(searched, config, config.n_nodes, seed)
    return _smallest(searched, config, seed)


def _search_at(searched: Searched, config: SearchConfig, size: int, seed: int) -> SearchResult:
    generator = torch.Generator().manual_seed(seed)
    sizes = sorted({*(s for s in config.sizes if s < searched.graph.n_features), size})
    ledger = _Ledger(searched, size)
    if config.method in ("hagd", "gates"):
        members, score = _gated(searched, config, sizes, size, ledger, generator)
    else:
        score = _ranking(searched, config, seed, generator)
        members = {n: _top(score, n) for n in sizes}
        ledger.close(config.method, members[size])
    flat = searched.graph.flat
    return SearchResult(
        method=config.method,
        size=size,
        circuits=tuple(Circuit(np.sort(flat[members[n]])) for n in sizes),
        score=score,
        evaluations=sum(step.evaluations for step in ledger.steps),
        steps=tuple(ledger.steps),
    )


def _ranking(searched: Searched, config: SearchConfig, seed: int, generator: torch.Generator) -> np.ndarray:
    match config.method:
        case "attribution":
            return baselines.by_attribution(searched.graph)
        case "gradient_activation":
            return baselines.by_method(searched.discovery, searched.graph, searched.graph_config, "gradient_activation")
        case "greedy":
            report = lambda done, total: searched.progress("greedy", done, total)  # noqa: E731
            return baselines.by_greedy_pruning(searched.discovery, searched.graph, generator, report)
        case _:
            return baselines.by_chance(searched.graph, seed)


def _gated(
    searched: Searched,
    config: SearchConfig,
    sizes: list[int],
    size: int,
    ledger: _Ledger,
    generator: torch.Generator,
) -> tuple[dict[int, np.ndarray], np.ndarray]:
    """HAGD, or flat gates: the same refinement without scorer, traversal and pruning."""
    flat = torch.as_tensor(searched.graph.flat)
    n = len(flat)
    guided = config.method == "hagd"
    score = baselines.by_attribution(searched.graph)
    if guided:
        note = "start: attribution (no meta-learned scorer)" if searched.scores is None else "meta-learned scorer"
        score = score if searched.scores is None else searched.scores
        ledger.close("scorer", _top(score, size), note)
    start = torch.as_tensor(_rank(score)).float() * _OPEN if guided else torch.full((n,), _OPEN / 2)
    if guided and config.traversal and config.traversal_budget > 0:
        found = find_idle(
            searched.discovery,
            searched.graph,
            searched.hierarchy,
            tolerance=_TRAVERSAL_TOLERANCE,
            budget=config.traversal_budget,
            generator=generator,
        )
        start = start - _IDLE * torch.as_tensor(found.idle).float()
        note = f"{int(found.idle.sum())} of {n} idle by {found.tested} group tests, {found.levels} levels"
        ledger.close("traversal", _top(start.numpy(), size), note)
    members = {each: _top(start.numpy(), each) for each in sizes}
    final = start.numpy().astype(np.float64)
    if config.gates:
        trained = descend(
            searched.discovery,
            flat,
            start,
            [each for each in sizes if each < n],
            steps=config.gate_steps,
            learning_rate=config.gate_learning_rate,
            batch=config.gate_batch,
            generator=generator,
            progress=lambda done, total: searched.progress("gates", done, total),
        )
        members |= {each: _top(logits.numpy(), each) for each, logits in trained.items()}
        final = trained.get(size, start).numpy().astype(np.float64)
        ledger.close("gates", members[size])
    if guided and config.pruning and config.pruning_budget > 0:
        exchange = exchange_idle(
            searched.discovery,
            flat,
            members[size],
            np.argsort(-final),
            budget=config.pruning_budget,
            prompts=_EXCHANGE_PROMPTS,
            generator=generator,
        )
        members[size] = exchange.members
        ledger.close("pruning", members[size], f"{exchange.exchanged} nodes exchanged")
    return members, final


def _smallest(searched: Searched, config: SearchConfig, seed: int) -> SearchResult:
    """The smallest circuit that keeps the target on the selection split, by bisection over sizes.

    Each probe is a search of its own size, because a ranking trained for one size is poor far below it.
    """
    wanted = config.target_preservation
    base = searched.selection.full().accuracy
    low, high = 1, searched.graph.n_features
    best = _search_at(searched, config, high, seed)
    shape = searched.discovery.patched.gate_shape

    def keeps(circuit: Circuit) -> bool:
        return searched.selection.outcome(circuit.gates(shape)).accuracy >= wanted * base

    passing = [len(circuit) for circuit in best.circuits if keeps(circuit)]
    failing = [len(circuit) for circuit in best.circuits if len(circuit) not in passing]
    high = min(passing, default=high)
    low = max((size for size in failing if size < high), default=0)
    best = _search_at(searched, config, high, seed)
    while high - low > max(1, high // 20):
        middle = (low + high) // 2
        probe = _search_at(searched, config, middle, seed)
        if keeps(probe.circuit):
            best, high = probe, middle
        else:
            low = middle
    return best


def _top(score: np.ndarray, n: int) -> np.ndarray:
    return np.argsort(-score, kind="stable")[:n]


def _rank(score: np.ndarray) -> np.ndarray:
    """0 for the lowest to 1 for the highest."""
    ranks = np.empty(len(score))
    ranks[np.argsort(score, kind="stable")] = np.arange(len(score))
    return ranks / max(len(score) - 1, 1)
