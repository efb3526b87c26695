"""One contender as a process: trains on synthetic data, a few steps at a time, when it is told to.

`python timing_worker.py CONTENDER '{"d": …, "m": …, "k": …, "batch": …}'` runs the contender's own training loop and
stops it at each step's request for a batch until a line comes in:

- `memory`: two steps; answers by how many bytes the resident set grew over what it was before the first one;
- a number n: n steps; answers their CPU seconds (user and system, this process).

Answers are lines on standard output; what the packages print goes to standard error. Linux only (`/proc`).
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path
from typing import IO

import torch
from contenders import Training, training_loop
from torch import Tensor


def synthetic(training: Training, n_batches: int, device: str | torch.device = "cpu") -> list[tuple[Tensor, Tensor]]:
    """Batches whose inputs are sparse sums of 1,024 directions plus noise, and targets a fixed map of them."""
    generator = torch.Generator(device).manual_seed(0)
    with torch.device(device):
        return _synthetic(training, n_batches, generator)


def _synthetic(training: Training, n_batches: int, generator: torch.Generator) -> list[tuple[Tensor, Tensor]]:
    d, n_directions, active = training.d, 1024, 16
    directions = torch.nn.functional.normalize(torch.randn(n_directions, d, generator=generator), dim=1)
    turn = torch.randn(d, d, generator=generator) / d**0.5
    batches = []
    for _ in range(n_batches):
        index = torch.randint(n_directions, (training.batch, active), generator=generator)
        amounts = torch.empty(training.batch, active).exponential_(generator=generator)
        x = torch.nn.functional.embedding_bag(index, directions, per_sample_weights=amounts, mode="sum")
        x += 0.1 * torch.randn(training.batch, d, generator=generator) / d**0.5
        batches.append((x, (x @ turn).relu()))
    return batches


def commanded(
    batches: list[tuple[Tensor, Tensor]], commands: IO[str], answers: IO[str]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches, over and over, as the module's docstring says; ends the process when `commands` ends."""
    endless = cycle(batches)
    for line in commands:
        if line.strip() == "memory":
            before = resident("VmRSS")
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
            yield next(endless)
            yield next(endless)
            answer = float(resident("VmHWM") - before)
        else:
            start = time.process_time()
            for _ in range(int(line)):
                yield next(endless)
            answer = time.process_time() - start
        print(answer, file=answers, flush=True)
    os._exit(0)  # inside a training loop that would go on


def resident(key: str) -> int:
    """Bytes of `VmRSS` (now) or `VmHWM` (peak)."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[key].split()[0]) * 1024


def main() -> None:
    """See the module's docstring."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    torch.set_num_threads(1)
    train = training_loop(sys.argv[1])
    training = Training(steps=1_000_000, **json.loads(sys.argv[2]))
    small = Training(d=128, m=1024, k=8, batch=512, steps=8)
    train(small, lambda: iter(synthetic(small, small.steps)))  # so that code is loaded before memory is read
    batches = synthetic(training, 2)
    train(training, lambda: commanded(batches, sys.stdin, answers))


if __name__ == "__main__":
    main()
