"""Traffic with a device for which neither side waits."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor


def sent_ahead(values: Tensor, device: torch.device) -> Tensor:
    """A copy of a CPU's tensor on a device; a CUDA device gets it without anyone waiting for what it does before."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)


def copied_aside(values: Tensor, device: torch.device) -> Tensor:
    """A copy of a CPU's tensor on a device, there when this returns; a CUDA device computes meanwhile."""
    if device.type != "cuda":
        return values.to(device)
    stream = _copying(device)
    with torch.cuda.stream(stream):
        copy = values.to(device)
    stream.synchronize()
    copy.record_stream(torch.cuda.default_stream(device))  # whose readers keep the memory from the next copy
    return copy


@cache
def _copying(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


class LateReading:
    """A number that a step reads off the device. A CUDA device tells the one of the step before, because this step's
    is not there yet and waiting for it would leave the device idle from then on."""

    def __init__(self) -> None:
        self._before: tuple[Tensor, torch.cuda.Event] | None = None

    def __call__(self, number: Tensor) -> int:
        if number.device.type != "cuda":
            return int(number)
        here = torch.empty((), dtype=number.dtype, pin_memory=True)
        here.copy_(number, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()
        told, there = self._before or (here, copied)
        self._before = here, copied
        there.synchronize()
        return int(told)
