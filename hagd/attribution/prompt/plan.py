"""What the graph of a prompt will cost, before anything of it runs.

Sizes follow from the shapes. Times come from a seconds-long measurement on the device itself
(`hagd.attribution.prompt.rates`), carried over to all batches.

Shape legend: T positions, L layers, d = d_model, H heads, e width of a head.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hagd.attribution.prompt.edge_file import EDGE_BYTES
from hagd.attribution.prompt.rates import measure
from hagd.attribution.prompt.rows import batch_rows
from hagd.attribution.prompt.shape import PromptShape

_FLOAT = 4

_READ = 0.5
"""Edges that pruning reads, over all: those into the nodes that are left, twice."""

_GRADIENT = 28
"""Activations of `[T, d]` that a layer keeps, beside its pattern, for the gradient at heads."""


@dataclass(frozen=True)
class PromptPlan:
    """The forecast.

    Attributes:
        memory_mb: largest resident size by what holds it; the sum is the peak.
        disk_mb: edges before pruning, deleted afterwards.
        seconds: by part, on a device that does nothing else.
        active: features. edges: before pruning.
    """

    memory_mb: dict[str, float]
    disk_mb: float
    seconds: dict[str, float]
    active: int
    edges: int

    @property
    def peak_mb(self) -> float:
        """Largest resident size."""
        return sum(self.memory_mb.values())

    @property
    def total_seconds(self) -> float:
        """Of all parts."""
        return sum(self.seconds.values())


def plan_prompt(shape: PromptShape, device: torch.device, process_mb: float) -> PromptPlan:
    """Forecast memory and time of a prompt's graph on `device`, in a process that has `process_mb` already."""
    rates = measure(shape, device)
    edges, seconds = 0, 0.0
    for batch in shape.batches():
        seconds += rates.batch(batch, shape)
        edges += sum(shape.reachable(batch.layer, int(p), batch.of_heads) for p in batch.positions)
    if shape.most is not None and shape.most < shape.inner:
        share = shape.most / shape.inner
        seconds, edges = seconds * share, round(edges * share)
    times = {"clean run": rates.clean_run(shape), "edges": seconds, "pruning": _READ * edges * rates.reading}
    return PromptPlan(_memory(shape, process_mb), edges * EDGE_BYTES / 2**20, times, shape.active, edges)


def _memory(shape: PromptShape, process_mb: float) -> dict[str, float]:
    n_layers, d, positions = shape.n_layers, shape.d, shape.positions
    inner = shape.heads * shape.head
    pattern = shape.heads * positions**2
    writes = (len(shape.decomposed) + 1) / 2 if shape.cross_layer else 1
    dictionaries = len(shape.decomposed) * shape.m * d * (1 + writes)
    rows = batch_rows(torch.full((shape.k * positions,), positions - 1), shape.width, d)
    # gradients above, inside and below an attention; edges, their sizes, those that are stored
    batch = 6 * rows * positions * max(d, inner) + 4 * rows * shape.width
    above = n_layers - min(shape.head_layers, default=n_layers)
    floats = {
        "dictionaries": dictionaries,
        # 7 of [T, d] a layer, the pattern and its scaled copy, and what softmax holds of one layer
        "clean run": 7 * n_layers * positions * d + 2 * n_layers * pattern + 3 * pattern,
        "frozen model": n_layers * 2 * inner * d * 2,
        "sources": writes * shape.active * d + 2 * n_layers * positions * d,
        "one batch": max(batch, above * (_GRADIENT * positions * d + pattern)),
        "pruning": min(_edges_at_most(shape), 2**20) * 12,
    }
    if shape.head_layers:  # what they write, their outputs and directions, and what those of one layer read along
        written = shape.heads * d
        floats["heads"] = positions * (len(shape.head_layers) * (written + 2 * inner) + written)
    mb = {name: _FLOAT * value / 2**20 for name, value in floats.items()}
    return {"process": process_mb, "model": shape.parameters * shape.weight_bytes / 2**20, **mb}


def _edges_at_most(shape: PromptShape) -> int:
    return shape.inner * shape.reachable(shape.n_layers, shape.positions - 1, False)
