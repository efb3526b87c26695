"""Edges on disk: written batch by batch, read in pieces, so that memory never holds them all.

`sources.bin` (int32) and `values.bin` (float32) hold the edges of one target after the other, targets in the order in
which they were computed.

Shape legend: r targets, E edges.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np

SOURCES, VALUES = "sources.bin", "values.bin"
EDGE_BYTES = 8
"""Of one edge on disk."""

_AT_ONCE = 2**20
"""Edges that are read together, where one target has no more."""


@dataclass(frozen=True)
class Block:
    """Edges of some targets of one depth.

    Attributes:
        row: int64 `[e]`, place of each edge's target in `targets`.
        targets: int64, nodes.
        source: int32 `[e]`, nodes.
        value: float32 `[e]`.
    """

    row: np.ndarray
    targets: np.ndarray
    source: np.ndarray
    value: np.ndarray


@dataclass(frozen=True)
class StoredEdges:
    """All edges of a prompt.

    Attributes:
        folder: of the two files.
        targets: int64 `[r]`, nodes. depths: int64 `[r]`, above those of all that enters them.
        bounds: int64 `[r + 1]`, the edges of target i are `bounds[i]` to `bounds[i + 1]`.
    """

    folder: Path
    targets: np.ndarray
    depths: np.ndarray
    bounds: np.ndarray

    def __len__(self) -> int:
        return int(self.bounds[-1])

    def from_above(self, wanted: np.ndarray | None = None) -> Iterator[Block]:
        """Blocks from the last depth down; `wanted`: bool by node, targets that are read."""
        for depth in np.unique(self.depths)[::-1]:
            rows = np.flatnonzero(self.depths == depth)
            if wanted is not None:
                rows = rows[wanted[self.targets[rows]]]
            size = (self.bounds[rows + 1] - self.bounds[rows]).cumsum()
            for part in np.split(
                rows, np.searchsorted(size, np.arange(_AT_ONCE, size[-1] if len(size) else 0, _AT_ONCE))
            ):
                if len(part):
                    yield self._block(part)

    def _block(self, rows: np.ndarray) -> Block:
        runs = np.split(rows, np.flatnonzero(np.diff(rows) != 1) + 1)
        spans = [(int(self.bounds[run[0]]), int(self.bounds[run[-1] + 1])) for run in runs]
        source, value = (
            np.concatenate([self._read(name, dtype, first, last) for first, last in spans])
            for name, dtype in ((SOURCES, np.int32), (VALUES, np.float32))
        )
        counts = self.bounds[rows + 1] - self.bounds[rows]
        return Block(np.repeat(np.arange(len(rows)), counts), self.targets[rows], source, value)

    def _read(self, name: str, dtype: type, first: int, last: int) -> np.ndarray:
        size = np.dtype(dtype).itemsize
        return np.fromfile(self.folder / name, dtype, last - first, offset=first * size)


class EdgeWriter:
    """Writes the files; within `with`. `stored` describes what has been written so far."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._files = [(folder / name).open("wb") for name in (SOURCES, VALUES)]
        self._targets: list[np.ndarray] = []
        self._depths: list[np.ndarray] = []
        self._counts: list[np.ndarray] = [np.zeros(1, dtype=np.int64)]

    def __enter__(self) -> EdgeWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        for file in self._files:
            file.close()

    def append(self, depth: int, targets: np.ndarray, sources: np.ndarray, values: np.ndarray) -> None:
        """Edges `values` `[R, k]` from `sources` `[k]` or `[R, k]` into `targets` `[R]` of one depth."""
        np.ascontiguousarray(np.broadcast_to(sources, values.shape), dtype=np.int32).tofile(self._files[0])
        np.ascontiguousarray(values, dtype=np.float32).tofile(self._files[1])
        self._targets.append(targets)
        self._depths.append(np.full(len(targets), depth))
        self._counts.append(np.full(len(targets), values.shape[1]))

    def stored(self) -> StoredEdges:
        """What is in the files."""
        for file in self._files:
            file.flush()
        bounds = np.concatenate(self._counts).cumsum()
        return StoredEdges(self._folder, np.concatenate(self._targets), np.concatenate(self._depths), bounds)
