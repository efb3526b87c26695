"""What the loops in C save a training step on a CPU: `python benchmarks/compiled_loops.py [--threads N] [--json FILE]`.

Wall-clock milliseconds of a step (Adam included) of one transcoder, m = 8 d, k = 64, on synthetic activations
(`timing_worker.py`), with the loops and with the operators of torch and NumPy that run where there is no GCC. Both
train the same weights in turns; medians.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import torch
from contenders import Training
from timed_turns import Work, in_turns
from timing_worker import synthetic

from hagd.config.transcoder import TranscoderConfig
from hagd.transcoders.initialise import initialise
from hagd.transcoders.module import TranscoderTraining
from hagd.transcoders.objective import Scaling, StackedTranscoders
from hagd.transcoders.sparse import device_kernels

SIZES = ((576, 4096), (768, 2048))
SELECTIONS = ("exact", "bfloat16", "int8")
COMPILED, TORCH = "compiled", "torch"
ROUNDS = 5


@contextmanager
def loops(name: str) -> Iterator[None]:
    """Whether the compiled loops are there."""
    library = device_kernels.library if name == COMPILED else lambda: None
    with mock.patch.object(device_kernels, "library", library):
        yield


def steps(size: Training, selection: str) -> dict[str, Work]:
    """A training step with and without the loops, of the same training."""
    pairs = [(x[None], y[None]) for x, y in synthetic(size, 4)]
    settings = {"k": size.k, "expansion": size.m // size.d, "selection": selection, "batch_size": size.batch}
    stacked = StackedTranscoders(TranscoderConfig.model_validate(settings), 1, size.d, seed=0)
    scalings = Scaling.of(pairs[0][0]), Scaling.of(pairs[0][1])
    initialise(stacked, scalings[0](pairs[0][0]), scalings[1](pairs[0][1]))
    module = TranscoderTraining(stacked, *scalings)
    optimizer = module.configure_optimizers()["optimizer"]
    done = 0

    def step(name: str) -> None:
        nonlocal done
        with loops(name):
            module.training_step(pairs[done % len(pairs)], 0)["loss"].backward()
        optimizer.step()
        module.on_train_batch_end()
        done += 1

    return {name: lambda name=name: step(name) for name in (COMPILED, TORCH)}  # type: ignore[misc]


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--json", type=Path, help="file for every figure")
    options = parser.parse_args()
    if device_kernels.library() is None:
        parser.error("there is no GCC to compile the loops with")
    torch.set_num_threads(options.threads)
    found = []
    for d, batch in SIZES:
        for selection in SELECTIONS:
            training = Training(d=d, m=8 * d, k=64, batch=batch, steps=0)
            compiled, plain = in_turns(steps(training, selection), torch.device("cpu"), ROUNDS)
            row = {"d": d, "tokens": batch, "selection": selection}
            found.append(row | {"compiled_ms": compiled.ms, "torch_ms": plain.ms})
            ratio = plain.median / compiled.median
            print(*row.values(), f"{compiled.median:.0f} ms, {plain.median:.0f} without: {ratio:.2f} times", flush=True)
    if options.json:
        options.json.write_text(json.dumps({"threads": options.threads, "rows": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
