"""How long parts of a prompt's graph take on a device: the real code on a few batches of targets, through one or two
layers of random weights of the model's shape.

Shape legend: P places (positions), L layers, d = d_model, H heads, e width of a head.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from hagd.attribution.prompt.compute import Calculation
from hagd.attribution.prompt.edge_file import EdgeWriter
from hagd.attribution.prompt.frozen_model import FrozenModel, frozen_layer
from hagd.attribution.prompt.layout import Sources
from hagd.attribution.prompt.rows import Targets, batch_rows
from hagd.attribution.prompt.shape import PlannedBatch, PromptShape
from hagd.attribution.prompt.trace import ActiveFeatures
from hagd.models.linear_parts import LinearAttention, LinearNorm
from hagd.transcoders.records import Transcoder, TranscoderSet

_PLACES = (0.25, 0.5, 1.0)
"""Shares of the prompt's length at which batches are timed."""

_TURNS = 4

Kind = Literal["through", "own", "heads"]
"""Rows of features whose gradients go through attention; rows of features where heads are nodes, so that gradients
stay at their own position; rows of heads."""


@dataclass(frozen=True)
class Rates:
    """Measured seconds.

    Attributes:
        rows: kind → `[P, 3]`, of a batch's row at each of `places`: what does not depend on the layer, and what each
            layer below adds without and with a dictionary. Without heads that are nodes only `through`.
        places: `[P]`, positions.
        reading: of an edge that is read back. product: of a multiplication in a large product.
    """

    rows: dict[Kind, np.ndarray]
    places: np.ndarray
    reading: float
    product: float

    def batch(self, batch: PlannedBatch, shape: PromptShape) -> float:
        """Of a batch of targets."""
        layer, position = batch.layer, int(batch.positions[-1])
        at = {kind: [float(np.interp(position, self.places, x)) for x in rows.T] for kind, rows in self.rows.items()}
        if not shape.head_layers:
            base, plain, decomposed = at["through"]
            below = shape.decomposed_below(layer)
            return len(batch.positions) * (base + below * decomposed + (layer - below) * plain)
        passes = layer < shape.n_layers and layer not in shape.head_layers and not shape.parallel
        kind: Kind = "heads" if batch.of_heads else "through" if passes else "own"
        seconds = at[kind][0]
        for below in range(layer - 1, -1, -1):
            column = 1 + int(below in shape.decomposed)
            if below in shape.head_layers:
                seconds += at["own" if kind == "own" else "heads"][column]
            elif kind == "own":  # the first attention that a row goes through
                seconds += at["own"][column] + max(at["through"][0] - at["own"][0], 0)
                kind = "through"
            else:
                seconds += at["through"][column]
        return len(batch.positions) * seconds

    def clean_run(self, shape: PromptShape) -> float:
        """Of two forward passes, the encoders and the decoders; where heads are nodes, of their gradient, too."""
        passes = 4 if shape.head_layers else 2
        products = shape.positions * (passes * shape.parameters + 2 * len(shape.decomposed) * shape.m * shape.d)
        return products * self.product


def measure(shape: PromptShape, device: torch.device) -> Rates:
    """Time batches of the shape on the device."""
    places = np.unique([max(int(shape.skip_first), round(share * (shape.positions - 1))) for share in _PLACES])
    kinds: tuple[Kind, ...] = ("through", "own", "heads") if shape.head_layers else ("through",)
    rows = {}
    for kind in kinds:
        one, two, mixed = (_times(shape, places, device, *case, kind) for case in ((1, 1), (2, 2), (2, 1)))
        decomposed, plain = np.maximum(two - one, 0), np.maximum(mixed - one, 0)
        rows[kind] = np.stack([np.maximum(one - decomposed, 0), plain, decomposed], axis=1)
    return Rates(rows, places, _reading(), _product(shape, device))


def _times(
    shape: PromptShape, places: np.ndarray, device: torch.device, layers: int, decomposed: int, kind: Kind
) -> np.ndarray:
    """Seconds a row of a batch at each of `places`, above `layers` layers whose last `decomposed` have a dictionary."""
    own = tuple(range(layers - decomposed, layers + 1))
    heads = () if kind == "through" else tuple(range(layers + 1))
    calculation = _synthetic(replace(shape, n_layers=layers + 1, decomposed=own, head_layers=heads), device)
    found = []
    with tempfile.TemporaryDirectory() as folder, EdgeWriter(Path(folder)) as writer:
        for place in places.tolist():
            batch = (_heads if kind == "heads" else _features)(calculation.sources, shape, place)
            taken = []
            for _ in range(_TURNS):
                start = _clock(device)
                calculation.add(batch, writer, len(batch))
                taken.append((_clock(device) - start) / len(batch))
            found.append(min(taken))
    return np.array(found)


def _features(sources: Sources, shape: PromptShape, place: int) -> Targets:
    """A batch of the last layer's features at `place` and before."""
    top = sources.n_layers - 1
    own = torch.arange(sources.features_below(top), sources.n_features, device=sources.embedding.device)
    own = own[sources.active.position[own] <= place]
    rows = batch_rows(torch.full_like(own, place), sources.width_below(top), shape.d)
    nodes = own[-rows:]
    vectors = torch.ones(len(nodes), shape.d, device=nodes.device)
    return Targets(top, nodes, sources.active.position[nodes], vectors)


def _heads(sources: Sources, shape: PromptShape, place: int) -> Targets:
    """A batch of the last layer's heads at `place` and before."""
    top = sources.n_layers - 1
    own = torch.arange((place + 1) * shape.heads, device=sources.embedding.device)
    rows = batch_rows(torch.full_like(own, place), sources.width_below(top), shape.d)
    own = own[-rows:]
    vectors = torch.ones(len(own), shape.d, device=own.device)
    nodes = own + sources.n_features + sources.heads_below(top)
    return Targets(top, nodes, own // shape.heads, vectors, "heads", own % shape.heads)


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
    model = FrozenModel([layer] * shape.n_layers, norm, norm.scale(stream), False, shape.head_layers)
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
    written = {i: draw(shape.positions, shape.heads, shape.d) for i in shape.head_layers}
    sources = Sources(stream, active, [stream] * shape.n_layers, transcoders, written)
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
