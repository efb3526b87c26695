"""Memory of each process when dictionaries are divided over processes: `python benchmarks/sharded_memory.py`.

Trains 16 layers (d = 256, m = 16,384, 136 M weights in all) for three steps of 64 synthetic tokens, in one process that
holds everything and then in two with `trainer.strategy=fsdp`. A line a process: bytes of its weights, of Adam's
moments, and the growth of its resident set over what it was before the dictionaries were built. Linux only (`/proc`).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytorch_lightning
import torch
import torch._dynamo  # FSDP2 loads it
from timing_worker import resident
from torch import Tensor
from torch.distributed.tensor import DTensor

from hagd.config.run import TrainerConfig
from hagd.config.transcoder import TranscoderConfig
from hagd.training.fit import fit
from hagd.training.loader import StepLoader
from hagd.transcoders.initialise import initialise
from hagd.transcoders.module import TranscoderTraining
from hagd.transcoders.objective import Scaling, StackedTranscoders
from hagd.transcoders.sharded import ShardedTraining

LAYERS, D, EXPANSION, K, TOKENS, STEPS = 16, 256, 64, 32, 64, 3


class Watched:
    """Adds to a training what its optimiser holds when it ends."""

    moments = 0

    def on_train_end(self) -> None:
        state = self.optimizers().optimizer.state.values()  # type: ignore[attr-defined]
        self.moments = size(value for entry in state for value in entry.values() if value.ndim)


class Whole(Watched, TranscoderTraining):
    """Every weight in this process."""


class Sharded(Watched, ShardedTraining):
    """This process's part of every weight."""


def size(tensors: Iterator[Tensor]) -> int:
    """Bytes that this process holds of them."""
    return sum((t.to_local() if isinstance(t, DTensor) else t).nbytes for t in tensors)


def measure(devices: int) -> None:
    """Train, and print this process's line."""
    torch.set_num_threads(1)
    assert pytorch_lightning.__version__ and torch._dynamo  # loaded before memory is read
    config = TranscoderConfig(k=K, expansion=EXPANSION, steps=STEPS, batch_size=TOKENS)
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(LAYERS, TOKENS, D, generator=generator) for _ in range(2))
    scalings = Scaling.of(x), Scaling.of(y)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    module: Whole | Sharded
    if devices == 1:
        stacked = StackedTranscoders(config, LAYERS, D, seed=0)
        initialise(stacked, scalings[0](x), scalings[1](y))
        module = Whole(stacked, *scalings)
    else:
        module = Sharded(config, 0, *scalings, (x, y))
    trainer = TrainerConfig(devices=devices, strategy="auto" if devices == 1 else "fsdp")
    with tempfile.TemporaryDirectory() as folder:
        loader = StepLoader(lambda _: (x, y), STEPS)
        fit(module, loader, trainer, STEPS, Path(folder) / "checkpoints", joint=devices > 1)
    line = {
        "processes": devices,
        "weights_mb": size(module.parameters()) / 1e6,
        "moments_mb": module.moments / 1e6,
        "peak_growth_mb": (resident("VmHWM") - before) / 1e6,
    }
    print(json.dumps({key: round(value, 1) for key, value in line.items()}), flush=True)


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, help="measure with this many only")
    arguments = parser.parse_args()
    if arguments.processes:
        measure(arguments.processes)
        return
    # glibc would keep freed matrices of this size for itself, and the resident set would show what was, not what is.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1000000"}
    for processes in (1, 2):
        subprocess.run([sys.executable, __file__, f"--processes={processes}"], check=True, env=environment)


if __name__ == "__main__":
    main()
