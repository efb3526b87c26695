"""How alike two circuits of different models are, by what their nodes respond to and by where their effect lies.

Features of two models have nothing in common but the prompts on which they fire. So two nodes are compared by the
correlation of their activations over the same prompts, within a position slot, which the task defines for all models.

Shape legend: n nodes, R places (prompt and position) of a slot.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import linear_sum_assignment

from hagd.attribution.records import AttributionGraph
from hagd.tasks.records import Prompts
from hagd.validation.activation_profiles import Group, Profiles, Side
from hagd.validation.measures import bootstrap, of_draws
from hagd.validation.random_circuits import random_circuits, random_matched
from hagd.validation.records import Comparison

Progress = Callable[[int, int], None]
Rows = tuple[np.ndarray, np.ndarray]
"""Candidates of the first graph and of the second."""

_ACTIVITY_CLASSES = 4


def compare(
    first: Side,
    second: Side,
    matching: Sequence[Prompts],
    measuring: Sequence[Prompts],
    *,
    n_null: int,
    n_bootstrap: int,
    seed: int,
    progress: Progress | None = None,
) -> Comparison:
    """Similarity of two circuits beside that of random ones; symmetric but for the draws.

    - `similarity`: nodes of the same kind and slot are matched one to one so that the sum of the positive correlations
      of matched nodes over the prompts `matching` is largest; `2 Σ r / (n_1 + n_2)` with `r` their correlations over
      the prompts `measuring`. 1 for a circuit and itself, in any order of its nodes. `.low` and `.high`: 95 %,
      bootstrap over prompts with the matching as it is.
    - `cka`: linear CKA (Kornblith et al. 2019) of the standardised activations over `measuring`, by kind and slot, mean
      weighted by nodes: alike are circuits that tell the same prompts apart, in whatever basis.
    - `overlap`: `Σ min / Σ max` of two distributions, the shares of a circuit's attribution by (kind, slot, relative
      depth).

    Nodes that are constant on the prompts tell nothing apart and do not count.

    Nulls: the same of `n_null` pairs of random circuits. `NAME_null`: as many nodes of each kind in each layer and
    slot; `NAME_null_active`: besides, as many of each quarter of the candidates by how often they fire;
    `overlap_null`: as many nodes, anywhere. Values are means, bounds the central 95 % of the draws; `.z` is the
    distance of ours in standard deviations of the draws, `.p = (1 + #{null ≥ ours}) / (1 + n_null)`.

    Args:
        first, second: the circuits; layers and widths may differ, slots may not.
        matching, measuring: splits without prompts in common, on which both models run.
        n_null: pairs of random circuits.
        n_bootstrap: resamples.
        seed: of random circuits and the bootstrap.
        progress: called with random pairs measured and to measure.
    """
    alignment = Alignment(first, second, matching, measuring)
    rows = alignment.counted((first.rows(first.circuit), second.rows(second.circuit)))
    pairs = alignment.match(rows)
    ours = {
        "similarity": alignment.similarity(rows),
        "cka": alignment.cka(rows),
        "overlap": effect_overlap(first, second, rows),
    }
    n = sum(map(len, rows))
    sampled = bootstrap(
        lambda prompts: alignment.matched(pairs, prompts) * 2 / n if n else float("nan"),
        sum(map(len, measuring)),
        n_bootstrap,
        seed,
    )
    found = {**ours, "similarity.low": sampled.low, "similarity.high": sampled.high, "nodes": float(n)}
    for name, values in _nulls(alignment, _draws(first, second, n_null, seed), progress).items():
        found |= _against(name, ours[name.split("_")[0]], np.array(values))
    return Comparison({f"comparison.{name}": value for name, value in found.items()})


def _nulls(
    alignment: Alignment, draws: Sequence[Mapping[str, Rows]], progress: Progress | None
) -> dict[str, list[float]]:
    """Figure and null → its value for every random pair."""
    found: dict[str, list[float]] = {}
    for done, drawn in enumerate(draws, start=1):
        for name, random in drawn.items():
            rows = alignment.counted(random)
            if name == "null_anywhere":
                found.setdefault("overlap_null", []).append(effect_overlap(*alignment.sides, rows))
            else:
                found.setdefault(f"similarity_{name}", []).append(alignment.similarity(rows))
                found.setdefault(f"cka_{name}", []).append(alignment.cka(rows))
        if progress is not None:
            progress(done, len(draws))
    return found


def _draws(first: Side, second: Side, n: int, seed: int) -> list[dict[str, Rows]]:
    """Null → candidates of a random pair, n times."""
    sides = []
    for side, number in ((first, 0), (second, 1)):
        circuits = {
            "null": random_matched(side.graph, side.circuit, n, [seed, number]),
            "null_active": random_matched(side.graph, side.circuit, n, [seed, number], _activity(side.graph)),
            "null_anywhere": random_circuits(side.graph, len(side.circuit), n, [seed, number]),
        }
        sides.append({name: [side.rows(circuit) for circuit in drawn] for name, drawn in circuits.items()})
    return [{name: (sides[0][name][i], sides[1][name][i]) for name in sides[0]} for i in range(n)]


def _activity(graph: AttributionGraph) -> np.ndarray:
    """Quarter of each candidate by firing frequency."""
    frequency = graph.nodes.frequency[: graph.n_candidates]
    edges = np.quantile(frequency, np.arange(1, _ACTIVITY_CLASSES) / _ACTIVITY_CLASSES)
    return np.searchsorted(edges, frequency, side="left")


def _against(name: str, ours: float, values: np.ndarray) -> dict[str, float]:
    spread = float(values.std(ddof=1)) if len(values) > 1 else 0.0
    return {
        **of_draws(values.tolist()).named(name),
        f"{name}.z": (ours - float(values.mean())) / spread if spread else float("nan"),
        f"{name}.p": float(1 + (values >= ours).sum()) / (1 + len(values)),
    }


@dataclass(frozen=True)
class Matched:
    """Nodes of one kind and slot that were matched: column `first[i]` with column `second[i]` of the group."""

    group: Group
    first: np.ndarray
    second: np.ndarray


class Alignment:
    """Correlations between the candidates of two graphs, by kind and slot; see `compare`."""

    def __init__(self, first: Side, second: Side, matching: Sequence[Prompts], measuring: Sequence[Prompts]) -> None:
        self.sides = (first, second)
        matched = tuple(Profiles(side, matching) for side in (first, second))
        self._measured = [Profiles(side, measuring) for side in (first, second)]
        self._varies = [a.varies & b.varies for a, b in zip(matched, self._measured, strict=True)]
        self._groups = sorted(set(matched[0].groups) & set(matched[1].groups))
        self._fit = {group: _products(matched[0], matched[1], group) for group in self._groups}
        one, two = self._measured
        self._between = {group: _products(one, two, group) for group in self._groups}
        self._within = [{group: _products(side, side, group) for group in self._groups} for side in self._measured]

    def counted(self, rows: Rows) -> Rows:
        """Those that vary, on the prompts that match and on those that measure."""
        one, two = (each[varies[each]] for each, varies in zip(rows, self._varies, strict=True))
        return one, two

    def match(self, rows: Rows) -> list[Matched]:
        """The one-to-one matching with the largest sum of correlations over the matching prompts, all positive."""
        found = []
        for group in self._groups:
            columns = self._columns(group, rows)
            r = self._fit[group][np.ix_(*columns)].clip(min=0)
            i, j = linear_sum_assignment(r, maximize=True)
            positive = r[i, j] > 0
            found.append(Matched(group, columns[0][i[positive]], columns[1][j[positive]]))
        return found

    def matched(self, pairs: Sequence[Matched], prompts: np.ndarray) -> float:
        """Sum of the correlations of matched nodes over the measuring prompts of these numbers, repetitions allowed.

        Pairs of which neither node varies on them are taken to be like the others.
        """
        one, two = self._measured
        total, defined = 0.0, 0
        for each in pairs:
            x, y = one.of(each.group, each.first, prompts), two.of(each.group, each.second, prompts)
            total += float((x * y).sum())
            defined += int((x.any(0) | y.any(0)).sum())
        return total / defined * sum(len(each.first) for each in pairs) if defined else float("nan")

    def similarity(self, rows: Rows) -> float:
        """`2 Σ r / (n_1 + n_2)` of nodes that vary; NaN without any."""
        n = sum(map(len, rows))
        total = sum(float(self._between[each.group][each.first, each.second].sum()) for each in self.match(rows))
        return 2 * total / n if n else float("nan")

    def cka(self, rows: Rows) -> float:
        """`‖XᵀY‖² / (‖XᵀX‖ ‖YᵀY‖)` by kind and slot, mean weighted by nodes; a group on one side alone counts 0."""
        total = 0.0
        for group in self._groups:
            one, two = self._columns(group, rows)
            own = [
                np.linalg.norm(within[group][np.ix_(columns, columns)])
                for within, columns in zip(self._within, (one, two), strict=True)
            ]
            if min(own) > 0:
                shared = np.square(self._between[group][np.ix_(one, two)]).sum()
                total += (len(one) + len(two)) * float(shared / (own[0] * own[1]))
        n = sum(map(len, rows))
        return total / n if n else float("nan")

    def _columns(self, group: Group, rows: Rows) -> Rows:
        one, two = (profiles.columns(group, each) for profiles, each in zip(self._measured, rows, strict=True))
        return one, two


def _products(one: Profiles, two: Profiles, group: Group) -> np.ndarray:
    """Correlations of all candidates of the group of one graph with all of the other; float32, to hold large graphs."""
    correlations: np.ndarray = (one.of(group).T @ two.of(group)).astype(np.float32)
    return correlations


def effect_overlap(first: Side, second: Side, rows: Rows) -> float:
    """`Σ min / Σ max` of the shares of attribution by (kind, slot, relative depth); NaN without nodes.

    Depth is cut into as many equal parts as the shallower model has layers.
    """
    if not any(map(len, rows)):
        return float("nan")
    parts = min(first.patched.lm.n_layers, second.patched.lm.n_layers)
    one, two = (_effect_shares(side, each, parts) for side, each in zip((first, second), rows, strict=True))
    shares = np.array([[one.get(cell, 0.0), two.get(cell, 0.0)] for cell in sorted(set(one) | set(two))])
    return float(shares.min(1).sum() / shares.max(1).sum())


def _effect_shares(side: Side, rows: np.ndarray, parts: int) -> dict[tuple[int, int, int], float]:
    nodes = side.graph.nodes
    depth = ((nodes.layer[rows] + 0.5) / side.patched.lm.n_layers * parts).astype(int)
    weight = np.abs(nodes.attribution[rows]).astype(float)
    shares: dict[tuple[int, int, int], float] = {}
    for kind, slot, part, value in zip(nodes.kind[rows], nodes.slot[rows], depth, weight / weight.sum(), strict=True):
        cell = int(kind), int(slot), int(part)
        shares[cell] = shares.get(cell, 0.0) + float(value)
    return shares
