"""One interface for all methods: (model on the discovery split, graph, budget) → circuits of several sizes.

HAGD is scorer → group tests over the hierarchy → elimination → gates → causal pruning; every part can be switched off.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from hagd.attribution.records import AttributionGraph
from hagd.config.stages import GraphConfig, SearchConfig
from hagd.errors import ConfigError
from hagd.hierarchy.records import Hierarchy
from hagd.patching.objective import Objective
from hagd.search import baselines
from hagd.search.edge_pruning import by_edge_pruning
from hagd.search.elimination import eliminate
from hagd.search.exhaustive import best_circuits
from hagd.search.gates import descend
from hagd.search.pruning import budgets_of, exchange_idle
from hagd.search.records import Circuit, SearchResult, SearchStep
from hagd.search.traversal import find_idle

log = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]
_EVEN = 1.0  # gate logit of a flat start; guided ones run from 0 for the worst candidate to twice this
_IDLE = 3.0  # by how much group tests lower the start of an idle node
_TRAVERSAL_TOLERANCE = 0.05


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


@dataclass(frozen=True)
class _Refined:
    """What the parts of HAGD and of flat gates share.

    Attributes:
        searched, config: as in `find_circuit`.
        sizes: of all circuits, ascending. size: of the reported one, among them.
        ledger: of the parts. generator: of samples and noise.
    """

    searched: Searched
    config: SearchConfig
    sizes: list[int]
    size: int
    ledger: _Ledger
    generator: torch.Generator


def find_circuit(searched: Searched, config: SearchConfig, seed: int) -> SearchResult:
    """Circuits of every size in `config.sizes` (below the number of candidates) and of the reported size.

    Raises:
        ConfigError: more nodes are asked for than there are candidates.
    """
    available = searched.graph.n_candidates
    if config.n_nodes is not None and config.n_nodes > available:
        cut = available == searched.graph_config.n_max
        raise ConfigError(
            f"search.n_nodes: expected at most {available} (live candidate nodes of this model and task), "
            f"found {config.n_nodes}; lower it{' or raise graph.n_max' if cut else ''}"
        )
    if config.n_nodes is not None:
        return _search_at(searched, config, config.n_nodes, seed)
    return _smallest(searched, config, seed)


def _search_at(searched: Searched, config: SearchConfig, size: int, seed: int) -> SearchResult:
    generator = torch.Generator().manual_seed(seed)
    sizes = sorted({*(s for s in config.sizes if s < searched.graph.n_candidates), size})
    ledger = _Ledger(searched, size)
    if config.method in ("hagd", "gates"):
        members, score = _gated(_Refined(searched, config, sizes, size, ledger, generator))
    elif config.method == "exhaustive":
        report = lambda done, total: searched.progress("circuits", done, total)  # noqa: E731
        members = best_circuits(searched.discovery, searched.graph.flat, sizes, report)
        score = np.bincount(np.concatenate(list(members.values())), minlength=searched.graph.n_candidates).astype(float)
        ledger.close("exhaustive", members[size])
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
        case "gradient_activation" | "integrated_gradients_inputs":
            return baselines.by_method(searched.discovery, searched.graph, searched.graph_config, config.method)
        case "greedy" | "greedy_edges":
            report = lambda done, total: searched.progress(config.method, done, total)  # noqa: E731
            prune = baselines.by_greedy_pruning if config.method == "greedy" else by_edge_pruning
            return prune(searched.discovery, searched.graph, generator, config.greedy_prompts, report)
        case _:
            return baselines.by_chance(searched.graph, seed)


def _gated(run: _Refined) -> tuple[dict[int, np.ndarray], np.ndarray]:
    """HAGD, or flat gates: the same refinement without scorer, traversal, choice and pruning."""
    searched, config, size = run.searched, run.config, run.size
    guided = config.method == "hagd"
    start = np.full(searched.graph.n_candidates, _EVEN)
    if guided:
        start = _start(run)
    rankings = {each: [start] for each in run.sizes}
    if config.gates:
        trained = descend(
            searched.discovery,
            torch.as_tensor(searched.graph.flat),
            torch.as_tensor(start, dtype=torch.float32),
            [each for each in run.sizes if each < len(start)],
            steps=config.gate_steps,
            learning_rate=config.gate_learning_rate,
            batch=config.gate_batch,
            generator=run.generator,
            progress=lambda done, total: searched.progress("gates", done, total),
        )
        for each, logits in trained.items():
            rankings[each].insert(0, logits.numpy().astype(np.float64))
    best = {each: (_best_ranking(searched, found, each) if guided else found[0]) for each, found in rankings.items()}
    members = {each: _top(ranking, each) for each, ranking in best.items()}
    if config.gates or guided:
        run.ledger.close("gates" if config.gates else "choice", members[size])
    if guided and config.pruning and config.pruning_budget > 0:
        exchanged = _prune(run, best, members)
        run.ledger.close("pruning", members[size], f"{exchanged} nodes exchanged, smaller circuits included")
    return members, best[size]


def _start(run: _Refined) -> np.ndarray:
    """First gate logits `[n]`: ranks of the scorer or the attribution, lowered where group tests found nodes idle, or
    of the elimination among the nodes that these leave."""
    searched, config, size = run.searched, run.config, run.size
    scored = searched.scores is not None
    score = baselines.by_attribution(searched.graph) if searched.scores is None else searched.scores
    note = "meta-learned scorer" if scored else "no meta-learned scorer"
    run.ledger.close("scorer", _top(score, size), note)
    start = _rank(score) * 2 * _EVEN
    n_left = len(start) // 2 if scored else len(start)
    if config.traversal and config.traversal_budget > 0:
        found = find_idle(
            searched.discovery,
            searched.graph,
            searched.hierarchy,
            tolerance=_TRAVERSAL_TOLERANCE,
            budget=config.traversal_budget,
            generator=run.generator,
        )
        start = start - _IDLE * found.idle
        n_left = min(n_left, int((~found.idle).sum()))
        note = f"{int(found.idle.sum())} of {len(start)} idle by {found.tested} group tests, {found.levels} levels"
        run.ledger.close("traversal", _top(start, size), note)
    if config.elimination:
        score = eliminate(
            searched.discovery,
            torch.as_tensor(searched.graph.flat),
            start,
            run.sizes,
            n_start=n_left,
            keep=config.elimination_keep,
            steps=config.elimination_steps,
            prompts=config.elimination_prompts,
            generator=run.generator,
            progress=lambda done, total: searched.progress("elimination", done, total),
        )
        run.ledger.close("elimination", _top(score, size))
        start = _rank(score) * 2 * _EVEN
    return start


def _best_ranking(searched: Searched, rankings: list[np.ndarray], size: int) -> np.ndarray:
    """The ranking whose first `size` nodes lose least on the discovery split.

    Gates trained for very small circuits can end below the attribution that they started from; measuring both costs
    an evaluation each and keeps the search from losing silently.
    """
    rankings = [*rankings, baselines.by_attribution(searched.graph)]
    discovery = searched.discovery
    shape = discovery.patched.gate_shape
    circuits = [Circuit(np.sort(searched.graph.flat[_top(ranking, size)])).gates(shape) for ranking in rankings]
    losses = discovery.losses(torch.stack(circuits), torch.arange(len(discovery)))
    return rankings[int(losses.argmin())]


def _prune(run: _Refined, rankings: dict[int, np.ndarray], members: dict[int, np.ndarray]) -> int:
    """Exchange idle nodes in place, in the reported circuit and then in the smaller ones; returns how many."""
    searched, config = run.searched, run.config
    budgets = budgets_of(list(members), run.size, config.pruning_budget)
    total = 0
    for done, (each, budget) in enumerate(budgets.items()):
        exchange = exchange_idle(
            searched.discovery,
            torch.as_tensor(searched.graph.flat),
            members[each],
            np.argsort(-rankings[each], kind="stable"),
            budget=budget,
            prompts=config.pruning_prompts,
            generator=run.generator,
        )
        members[each] = exchange.members
        total += exchange.exchanged
        searched.progress("pruning", done + 1, len(budgets))
    return total


def _smallest(searched: Searched, config: SearchConfig, seed: int) -> SearchResult:
    """The smallest circuit that keeps the target on the selection split, by bisection over sizes.

    Each probe is a search of its own size, because a ranking trained for one size is poor far below it, and only a
    circuit that was itself measured to keep the target is returned.
    """
    shape = searched.discovery.patched.gate_shape
    wanted = config.target_preservation * searched.selection.full().accuracy
    started = time.perf_counter()
    tried: list[SearchResult] = []

    def keeps(circuit: Circuit) -> bool:
        return searched.selection.outcome(circuit.gates(shape)).accuracy >= wanted

    def probe(size: int) -> SearchResult:
        tried.append(_search_at(searched, config, size, seed))
        return tried[-1]

    best = probe(searched.graph.n_candidates)
    if not keeps(best.circuit):
        log.warning(
            "search.n_nodes=null: not even all %d candidates keep search.target_preservation=%g on the selection "
            "split; lower it, raise graph.n_max, use dictionaries that explain more (transcoder.k), or set "
            "search.n_nodes",
            best.size,
            config.target_preservation,
        )
        return _with_probes(best, tried, started, "no size keeps the target: all candidates")
    low, high = 0, best.size
    for circuit in best.circuits[:-1]:  # found along the way; the first that keeps the target bounds the bisection
        if keeps(circuit):
            found = probe(len(circuit))
            if keeps(found.circuit):
                best, high = found, found.size
                break
        low = len(circuit)
    while high - low > max(1, high // 20):
        found = probe((low + high) // 2)
        if keeps(found.circuit):
            best, high = found, found.size
        else:
            low = found.size
    return _with_probes(best, tried, started, f"{len(tried)} sizes tried")


def _with_probes(best: SearchResult, tried: list[SearchResult], started: float, note: str) -> SearchResult:
    """`best` with what the other probes cost as its first part."""
    others = sum(result.evaluations for result in tried) - best.evaluations
    seconds = time.perf_counter() - started - sum(step.seconds for step in best.steps)
    step = SearchStep("size", others, seconds, 0, float("nan"), note)
    return replace(best, evaluations=best.evaluations + others, steps=(step, *best.steps))


def _top(score: np.ndarray, n: int) -> np.ndarray:
    return np.argsort(-score, kind="stable")[:n]


def _rank(score: np.ndarray) -> np.ndarray:
    """0 for the lowest to 1 for the highest."""
    ranks = np.empty(len(score))
    ranks[np.argsort(score, kind="stable")] = np.arange(len(score))
    return ranks / max(len(score) - 1, 1)
