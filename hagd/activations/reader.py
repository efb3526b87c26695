"""Brings the activations of a shard into memory: from its files, or from the model.

Shape legend: L layers, n tokens of a shard, T positions, d = d_model.
"""

from __future__ import annotations

import threading
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from hagd.activations.capture import Site, not_finite, visit
from hagd.activations.part_files import read_part, write_part
from hagd.activations.plan import Part, Sequences, Shard
from hagd.models.language_model import LanguageModel, rows_a_pass
from hagd.training.device import copied_aside


class Cancelled(Exception):
    """The shard is no longer wanted."""


@dataclass(frozen=True)
class ShardActivations:
    """The tokens of one shard.

    Attributes:
        x: inputs `[L, n, d]`, in the precision that is kept.
        y: outputs `[L, n, d]`; the same tensor as `x` at site `resid`.
        x_norm: norms of the inputs before rounding, `[L, n]` float32.
        y_norm: norms of the outputs.
    """

    x: Tensor
    y: Tensor
    x_norm: Tensor
    y_norm: Tensor

    def on(self, device: torch.device) -> ShardActivations:
        """With a copy of inputs and outputs on a device; norms stay where they are."""
        y = copied_aside(self.y, device)
        return replace(self, x=y if self.x is self.y else copied_aside(self.x, device), y=y)

    def sides(self) -> dict[str, Tensor]:
        """What has to be stored, by name."""
        found = {"y": self.y, "y_norm": self.y_norm}
        return found if self.x is self.y else {**found, "x": self.x, "x_norm": self.x_norm}


class ShardReader:
    """Reads shards of one plan.

    Args:
        lm: the model.
        sequences: the sources of the plan.
        shards: the plan.
        site: what is captured.
        layers: at these layers, ascending.
        dtype: precision that is kept.
        folder: where captured parts are stored; None: nowhere.
    """

    def __init__(
        self,
        lm: LanguageModel,
        sequences: Sequence[Sequences],
        shards: tuple[Shard, ...],
        site: Site,
        layers: Sequence[int],
        dtype: torch.dtype,
        folder: Path | None = None,
    ) -> None:
        self.lm = lm
        self.sequences = sequences
        self.shards = shards
        self.site: Site = site
        self.layers = tuple(layers)
        self.dtype = dtype
        self.folder = folder
        self._checked: set[tuple[int, int]] = set()

    def read(
        self, index: int, report: Callable[[int], None] | None = None, stop: threading.Event | None = None
    ) -> ShardActivations:
        """The activations of a shard; what has to be captured is stored part by part. The checksums of files are
        compared at the first reading: an epoch later they would take longer than the reading.

        Args:
            index: of the shard.
            report: called with the sequences that are there.
            stop: ends the capture when it is set.

        Raises:
            NumericalError: an activation is NaN or infinite.
            Cancelled: `stop` was set.
        """
        shard = self.shards[index]
        into = self._empty(shard.n_tokens)
        missing = [k for k in range(len(shard.parts)) if not self._load(index, k, into)]
        if self.lm.streams_layers:
            # Each pass reads all weights, so there is one for all parts of a source.
            units = [
                [k for k, part in enumerate(shard.parts) if part.source == source]
                for source in sorted({shard.parts[k].source for k in missing})
            ]
        else:
            units = [[k] for k in missing]
        done = shard.n_sequences - sum(len(shard.parts[k].rows) for unit in units for k in unit)
        for unit in units:
            parts = [shard.parts[k] for k in unit]

            def captured(rows: int, before: int = done) -> None:
                if report is not None:
                    report(before + rows)

            self._capture(parts, into, captured, stop)
            done += sum(len(part.rows) for part in parts)
            for k in unit:
                self._store(index, k, into)
        if report is not None:
            report(shard.n_sequences)
        return into

    def stored(self, index: int) -> bool:
        """Whether all parts of a shard have files (they may still turn out to be damaged)."""
        return all(self._path(index, k).exists() for k in range(len(self.shards[index].parts)))

    def _empty(self, n: int) -> ShardActivations:
        y = torch.empty(len(self.layers), n, self.lm.d_model, dtype=self.dtype)
        y_norm = torch.empty(len(self.layers), n)
        if self.site == "resid":
            return ShardActivations(y, y, y_norm, y_norm)
        return ShardActivations(torch.empty_like(y), y, torch.empty_like(y_norm), y_norm)

    def _capture(
        self,
        parts: Sequence[Part],
        into: ShardActivations,
        report: Callable[[int], None],
        stop: threading.Event | None,
    ) -> None:
        """Of consecutive parts of one source."""
        rows = torch.cat([torch.from_numpy(part.rows) for part in parts])
        tokens, keep = self.sequences[parts[0].source].take(rows.numpy())
        ends = parts[0].first + torch.cat([torch.zeros(1, dtype=torch.int64), keep.sum(1).cumsum(0)])
        step = len(tokens) if self.lm.streams_layers else rows_a_pass(tokens.shape[1])
        for start in range(0, len(tokens), step):
            chunk = tokens[start : start + step]

            def copy(i: int, seen: slice, x: Tensor, y: Tensor, start: int = start, size: int = len(chunk)) -> None:
                if stop is not None and stop.is_set():
                    raise Cancelled
                chosen = slice(start + seen.start, start + seen.stop)
                to = slice(int(ends[chosen.start]), int(ends[chosen.stop]))
                pairs = [(y, into.y, into.y_norm)]
                if self.site == "mlp":
                    pairs.append((x, into.x, into.x_norm))
                for value, kept, norms in pairs:
                    here = value[keep[chosen].to(value.device)].float()
                    norms[i, to] = here.norm(dim=-1).to(norms.device)
                    kept[i, to] = here.to(kept.device, kept.dtype)
                    if not norms[i, to].isfinite().all():
                        raise not_finite(self.lm, self.site, self.layers[i])
                layers_done = self.layers[i] / (self.layers[-1] + 1)
                report(start + int(size * layers_done + seen.stop / (self.layers[-1] + 1)))

            visit(self.lm, chunk.to(self.lm.device), self.site, self.layers, copy)

    def _path(self, index: int, k: int) -> Path:
        assert self.folder is not None
        return self.folder / f"activations-{index:05d}-{k:03d}.safetensors"

    def _load(self, index: int, k: int, into: ShardActivations) -> bool:
        if self.folder is None:
            return False
        part = self.shards[index].parts[k]
        found = read_part(self._path(index, k), self._identity(part), check=(index, k) not in self._checked)
        if found is None:
            return False
        self._checked.add((index, k))
        for name, whole in into.sides().items():
            whole[:, part.first : part.first + part.n_tokens] = found[name]
        return True

    def _store(self, index: int, k: int, into: ShardActivations) -> None:
        if self.folder is None:
            return
        part = self.shards[index].parts[k]
        sides = {
            name: whole[:, part.first : part.first + part.n_tokens].contiguous() for name, whole in into.sides().items()
        }
        write_part(self._path(index, k), sides, self._identity(part))

    def _identity(self, part: Part) -> str:
        """Everything that a part's activations depend on, but for the weights."""
        tokens, keep = self.sequences[part.source].take(part.rows)
        content = zlib.crc32(keep.numpy().data, zlib.crc32(tokens.numpy().data))
        return f"{self.lm.name} {self.site} {list(self.layers)} {self.dtype} {tuple(tokens.shape)} {content}"
