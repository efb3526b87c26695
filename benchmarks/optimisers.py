"""What the optimisers cost: `python benchmarks/optimisers.py [--batches N …] [--json FILE]`.

CPU seconds of a training step of one layer (selection in bfloat16), d = 576, m = 4,608, k = 64, on one thread, with
each optimiser in turns, medians; and the bytes of its state. `adam8bit` needs the extra `optim8bit` and a C++ compiler.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import get_args

import torch

from hagd.config.transcoder import Optimiser, TranscoderConfig
from hagd.transcoders.initialise import initialise
from hagd.transcoders.module import TranscoderTraining
from hagd.transcoders.objective import Scaling, StackedTranscoders

D, M, K, ROUNDS = 576, 4608, 64, 7


def stepper(optimiser: str, x: torch.Tensor, y: torch.Tensor) -> tuple[Callable[[], None], torch.optim.Optimizer]:
    """One training step, and the optimiser whose state it keeps."""
    settings = {"k": K, "expansion": M // D, "batch_size": x.shape[1], "optimiser": optimiser, "selection": "bfloat16"}
    stacked = StackedTranscoders(TranscoderConfig.model_validate(settings), 1, D, seed=0)
    scalings = Scaling.of(x), Scaling.of(y)
    initialise(stacked, scalings[0](x), scalings[1](y))
    module = TranscoderTraining(stacked, *scalings)
    configured = module.configure_optimizers()["optimizer"]

    def step() -> None:
        module.training_step((x, y), 0)["loss"].backward()
        configured.step()
        module.on_train_batch_end()

    return step, configured


def state_bytes(optimiser: torch.optim.Optimizer) -> int:
    """Of all tensors, those inside quantised ones included."""
    found = 0
    for state in optimiser.state.values():
        for value in state.values():
            if isinstance(value, torch.Tensor):
                inner = getattr(value, "__tensor_flatten__", None)
                names = inner()[0] if inner is not None else ()
                found += sum(getattr(value, name).nbytes for name in names) if names else value.nbytes
    return found


def measure(batch: int) -> dict[str, tuple[float, int]]:
    """Optimiser → CPU seconds a step and bytes of state."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(1, batch, D, generator=g)
    y = torch.randn(1, batch, D, generator=g)
    steps = {name: stepper(name, x, y) for name in get_args(Optimiser)}
    for step, _ in steps.values():
        step()  # warm-up, and compilation
        step()
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(ROUNDS):
        for name, (step, _) in steps.items():
            start = time.process_time()
            step()
            seconds[name].append(time.process_time() - start)
    return {name: (median(seconds[name]), state_bytes(configured)) for name, (_, configured) in steps.items()}


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=[256, 4096], help="tokens a step")
    parser.add_argument("--json", type=Path, help="file for every figure")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    print("| tokens | optimiser | CPU s | ÷ adam | state, MB |\n| --- | --- | --- | --- | --- |")
    for batch in arguments.batches:
        found = measure(batch)
        for name, (seconds, size) in found.items():
            rows.append({"tokens": batch, "optimiser": name, "cpu_s": round(seconds, 4), "state_bytes": size})
            print(f"| {batch} | {name} | {seconds:.3f} | {seconds / found['adam'][0]:.2f} | {size / 2**20:.1f} |")
    if arguments.json:
        arguments.json.write_text(json.dumps({"command": "benchmarks/optimisers.py", "rows": rows}, indent=1) + "\n")
    print(json.dumps({f"{row['optimiser']}_{row['tokens']}": row["cpu_s"] for row in rows}))


if __name__ == "__main__":
    main()
