"""What the graph of a prompt will cost, before anything of it runs.

Sizes follow from the shapes. Times come from a seconds-long measurement on the device itself: the real code computes
edges into a few batches of targets, through one or two layers of random weights of the model's shape, and these times
are carried over to all batches.

Shape legend: T positions, L layers, d = d_model, H heads, K heads of keys and values, e width of a head, m dictionary
size, k active features a token.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hagd.attribution.prompt.compute import Calculation
from hagd.attribution.prompt.edge_file import EDGE_BYTES, EdgeWriter
from hagd.attribution.prompt.frozen_model import FrozenModel, frozen_layer
from hagd.attribution.prompt.layout import Sources
from hagd.attribution.prompt.rows import Targets, batch_rows
from hagd.attribution.prompt.trace import ActiveFeatures
from hagd.models.linear_parts import LinearAttention, LinearNorm
from hagd.transcoders.records import Transcoder, TranscoderSet

_FLOAT = 4
_PLACES = (0.25, 0.5, 1.0)
"""Shares of the prompt's length at which batches are timed."""

_TURNS = 3

_READ = 0.5
"""Edges that pruning reads, over all: those into the nodes that are left, twice."""


@dataclass(frozen=True)
class PromptShape:
    """Everything that decides the cost.

    Attributes:
        n_layers, d, heads, kv_heads, head: L, d, H, K, e.
        parameters: of the model. weight_bytes: of each.
        positions: T.
        decomposed: layers with a dictionary.
        m, k: of the dictionaries.
        skip_first: no features at the first position.
        cross_layer: features write to every later decomposed layer.
        strongest: edges stored a target, None = all.
        most: features that are targets, None = all.
        logits: logit nodes, at most.
    """

    n_layers: int
    d: int
    heads: int
    kv_heads: int
    head: int
    parameters: int
    weight_bytes: int
    positions: int
    decomposed: tuple[int, ...]
    m: int
    k: int
    skip_first: bool
    cross_layer: bool
    strongest: int | None
    most: int | None
    logits: int

    @property
    def active(self) -> int:
        """Active features."""
        return len(self.decomposed) * self.k * (self.positions - int(self.skip_first))

    def decomposed_below(self, layer: int) -> int:
        """Dictionaries of lower layers."""
        return sum(own < layer for own in self.decomposed)


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
    rates = _measure(shape, device)
    edges, seconds = 0, 0.0
    for layer, positions in _batches(shape):
        seconds += rates.batch(layer, int(positions[-1]), len(positions), shape)
        edges += sum(_reachable(shape, layer, int(p)) for p in positions)
    if shape.most is not None and shape.most < shape.active:
        share = shape.most / shape.active
        seconds, edges = seconds * share, round(edges * share)
    times = {"clean run": rates.clean_run(shape), "edges": seconds, "pruning": _READ * edges * rates.reading}
    return PromptPlan(_memory(shape, process_mb), edges * EDGE_BYTES / 2**20, times, shape.active, edges)


def _memory(shape: PromptShape, process_mb: float) -> dict[str, float]:
    n_layers, d, positions = shape.n_layers, shape.d, shape.positions
    inner = shape.heads * shape.head
    pattern = shape.heads * positions**2
    writes = (len(shape.decomposed) + 1) / 2 if shape.cross_layer else 1
    dictionaries = len(shape.decomposed) * shape.m * d * (1 + writes)
    width = shape.active + (n_layers + 1) * positions
    rows = batch_rows(torch.full((shape.k * positions,), positions - 1), width, d)
    floats = {
        "dictionaries": dictionaries,
        # 7 of [T, d] a layer, the pattern and its scaled copy, and what softmax holds of one layer
        "clean run": 7 * n_layers * positions * d + 2 * n_layers * pattern + 3 * pattern,
        "frozen model": n_layers * 2 * inner * d * 2,
        "sources": writes * shape.active * d + 2 * n_layers * positions * d,
        # gradients above, inside and below an attention; edges, their sizes, those that are stored
        "one batch": 6 * rows * positions * max(d, inner) + 4 * rows * width,
        "pruning": min(_edges_at_most(shape), 2**20) * 12,
    }
    mb = {name: _FLOAT * value / 2**20 for name, value in floats.items()}
    return {"process": process_mb, "model": shape.parameters * shape.weight_bytes / 2**20, **mb}


def _edges_at_most(shape: PromptShape) -> int:
    return shape.active * _reachable(shape, shape.n_layers, shape.positions - 1)


def _batches(shape: PromptShape) -> Iterator[tuple[int, Tensor]]:
    """Layer and positions of the targets of each batch, as `feature_batches` makes them, and the logits."""
    last = shape.positions - 1
    yield shape.n_layers, torch.full((shape.logits,), last)
    every = torch.arange(int(shape.skip_first), shape.positions).repeat_interleave(shape.k)
    for layer in shape.decomposed:
        width = shape.k * shape.positions * shape.decomposed_below(layer) + (layer + 1) * shape.positions
        start = 0
        while start < len(every):
            count = batch_rows(every[start:], width, shape.d)
            yield layer, every[start : start + count]
            start += count


def _reachable(shape: PromptShape, layer: int, position: int) -> int:
    """Edges stored into one target."""
    features = shape.decomposed_below(layer) * shape.k * (position + 1 - int(shape.skip_first))
    count = features + (layer + 1) * (position + 1)
    return count if shape.strongest is None else min(count, shape.strongest)


@dataclass(frozen=True)
class _Rates:
    """Measured seconds.

    Attributes:
        rows: `[P, 3]`, of a batch's row at each of `places`: what does not depend on the layer, and what each layer
            below adds with and without a dictionary.
        places: `[P]`, positions.
        reading: of an edge that is read back. product: of a multiplication in a large product.
    """

    rows: np.ndarray
    places: np.ndarray
    reading: float
    product: float

    def batch(self, layer: int, position: int, count: int, shape: PromptShape) -> float:
        """Of a batch of `count` targets up to `position`."""
        base, plain, decomposed = (np.interp(position, self.places, column) for column in self.rows.T)
        below = shape.decomposed_below(layer)
        return float(count * (base + below * decomposed + (layer - below) * plain))

    def clean_run(self, shape: PromptShape) -> float:
        """Of the forward pass, the encoders and the decoders."""
        products = shape.positions * (shape.parameters + 2 * len(shape.decomposed) * shape.m * shape.d)
        return products * self.product


def _measure(shape: PromptShape, device: torch.device) -> _Rates:
    places = np.unique([max(int(shape.skip_first), round(share * (shape.positions - 1))) for share in _PLACES])
    one, two, mixed = (_times(shape, places, device, *case) for case in ((1, 1), (2, 2), (2, 1)))
    decomposed, plain = np.maximum(two - one, 0), np.maximum(mixed - one, 0)
    rows = np.stack([np.maximum(one - decomposed, 0), plain, decomposed], axis=1)
    return _Rates(rows, places, _reading(), _product(shape, device))


def _times(shape: PromptShape, places: np.ndarray, device: torch.device, layers: int, decomposed: int) -> np.ndarray:
    """Seconds a row of a batch at each of `places`, above `layers` layers whose last `decomposed` have a dictionary."""
    own = tuple(range(layers - decomposed, layers + 1))
    calculation = _synthetic(replace(shape, n_layers=layers + 1, decomposed=own, most=None), device)
    found = []
    with tempfile.TemporaryDirectory() as folder, EdgeWriter(Path(folder)) as writer:
        for place in places.tolist():
            batch = _targets(calculation.sources, shape, place)
            taken = []
            for _ in range(_TURNS):
                start = _clock(device)
                calculation.add(batch, writer, len(batch))
                taken.append((_clock(device) - start) / len(batch))
            found.append(float(np.median(taken)))
    return np.array(found)


def _targets(sources: Sources, shape: PromptShape, place: int) -> Targets:
    """A batch of the last layer's features at `place` and before."""
    top = sources.n_layers - 1
    own = torch.arange(sources.features_below(top), sources.n_features, device=sources.embedding.device)
    own = own[sources.active.position[own] <= place]
    rows = batch_rows(torch.full_like(own, place), sources.width_below(top), shape.d)
    nodes = own[-rows:]
    vectors = torch.ones(len(nodes), shape.d, device=nodes.device)
    return Targets(top, nodes, sources.active.position[nodes], vectors)


def _synthetic(shape: PromptShape, device: torch.device) -> Calculation:
    """Random weights, patterns and features of a shape."""
    g = torch.Generator(device).manual_seed(0)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=g, device=device)

    norm = LinearNorm(torch.ones(shape.d, device=device), torch.zeros(shape.d, device=device), True, 1e-5)
    stream = draw(shape.positions, shape.d)
    attention = LinearAttention(
        draw(shape.kv_heads, shape.d, shape.head),
        draw(shape.kv_heads, shape.head),
        draw(shape.heads, shape.head, shape.d),
        draw(shape.d),
    )
    pattern = torch.rand(shape.heads, shape.positions, shape.positions, generator=g, device=device).tril()
    layer = frozen_layer(attention, pattern, (norm, stream), (norm, stream))
    model = FrozenModel([layer] * shape.n_layers, norm, norm.scale(stream), parallel=False)
    dictionaries = tuple(
        Transcoder(i, shape.k, draw(shape.k, shape.d), draw(shape.k), draw(shape.k, shape.d), draw(shape.d))
        for i in shape.decomposed
    )
    transcoders = TranscoderSet("", "mlp", dictionaries)
    first = int(shape.skip_first)
    position = torch.arange(first, shape.positions, device=device).repeat_interleave(shape.k)
    n = len(shape.decomposed)
    layers = torch.tensor(shape.decomposed, device=device).repeat_interleave(len(position))
    feature = torch.arange(shape.k, device=device).repeat(n * (shape.positions - first))
    active = ActiveFeatures(layers, position.repeat(n), feature, torch.ones(len(layers), device=device))
    sources = Sources(stream, active, [stream] * shape.n_layers, transcoders)
    logits = Targets(shape.n_layers, torch.tensor([len(sources)]), position[-1:], draw(1, shape.d))
    return Calculation(model, sources, transcoders, logits, np.ones(1), shape.strongest)


def _product(shape: PromptShape, device: torch.device) -> float:
    """Seconds of one multiplication of the clean run's products."""
    x = torch.randn(min(shape.positions, 256), shape.d, device=device)
    weight = torch.randn(shape.d, 2048, device=device)
    taken = []
    for _ in range(_TURNS):
        start = _clock(device)
        (x @ weight).sum().item()
        taken.append(_clock(device) - start)
    return min(taken) / (x.numel() * weight.shape[1])


def _reading() -> float:
    """Seconds of an edge in one pass of pruning."""
    n = 2**18
    source = np.random.default_rng(0).integers(0, 10_000, n).astype(np.int32)
    value = np.ones(n, dtype=np.float32)
    row = np.repeat(np.arange(n // 64), 64)
    start = _clock(torch.device("cpu"))
    size = np.abs(value)
    total = np.bincount(row, size)
    np.bincount(source, (1 / total)[row] * size)
    return (_clock(torch.device("cpu")) - start) / n


def _clock(device: torch.device) -> float:
    """Seconds. On a CPU those of this process over its threads: what other processes take is no part of a forecast."""
    return time.process_time() / torch.get_num_threads() if device.type == "cpu" else time.perf_counter()
