"""Times of what takes turns on a device."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

WARM_UP, STEPS = 5, 5
"""Calls of a turn: of the first, and of the others."""

Work = Callable[[], object]


@dataclass(frozen=True)
class Row:
    """What was timed.

    Attributes:
        ms: milliseconds a call, one figure a turn; empty where it failed.
        peak_bytes: most memory that was allocated during a turn, weights and Adam's state included; 0 on a CPU.
        error: why it failed.
    """

    name: str
    ms: tuple[float, ...] = ()
    peak_bytes: int = 0
    error: str = ""

    @property
    def median(self) -> float:
        """Milliseconds."""
        return statistics.median(self.ms)


def in_turns(named: dict[str, Work], device: torch.device, rounds: int) -> list[Row]:
    """Time all of them, `rounds` turns each; one that fails is left out of further turns."""
    rows = {name: Row(name) for name in named}
    for turn in range(-1, rounds):  # the first turn warms up: kernels are compiled and tuned
        for name, work in named.items():
            row = rows[name]
            if row.error:
                continue
            try:
                ms, peak = _timed(work, device, WARM_UP if turn < 0 else STEPS)
            except RuntimeError as error:  # torch.OutOfMemoryError is one
                rows[name] = Row(name, error=str(error).splitlines()[0])
                continue
            if turn >= 0:
                rows[name] = replace(row, ms=(*row.ms, ms), peak_bytes=max(row.peak_bytes, peak))
    return list(rows.values())


def _timed(work: Work, device: torch.device, calls: int) -> tuple[float, int]:
    """Milliseconds a call, and most bytes that were allocated meanwhile."""
    if device.type == "cpu":
        start = time.perf_counter()
        for _ in range(calls):
            work()
        return (time.perf_counter() - start) * 1e3 / calls, 0
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    begin.record()
    for _ in range(calls):
        work()
    end.record()
    torch.cuda.synchronize(device)
    return begin.elapsed_time(end) / calls, torch.cuda.max_memory_allocated(device)
