"""What the cross-layer prediction term costs: `python benchmarks/prediction_heads.py [--json FILE]`.

CPU seconds of a training step (Adam included) of two layers, d = 576, m = 4,608, k = 64, 1,024 tokens, on one thread,
with each head and without any, in turns; medians. `sampled`: the loss is estimated on the active features and 512
others; `exact`: on all features (the dense head computes all of them either way).
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch

from hagd.config.transcoder import TranscoderConfig
from hagd.transcoders.initialise import initialise
from hagd.transcoders.objective import StackedTranscoders

D, M, K, TOKENS, ROUNDS = 576, 4608, 64, 1024, 5
HEADS: dict[str, dict[str, object]] = {
    "none": {"lambda_prediction": 0.0},
    "tied, sampled": {"prediction_head": "tied", "head_negatives": 512},
    "tied, exact": {"prediction_head": "tied", "head_negatives": M},
    "low_rank 64, sampled": {"prediction_head": "low_rank", "head_negatives": 512},
    "tied_low_rank 64, sampled": {"prediction_head": "tied_low_rank", "head_negatives": 512},
    "dense, exact": {"prediction_head": "dense", "head_negatives": M},
}


def stepper(settings: dict[str, object], x: torch.Tensor, y: torch.Tensor) -> tuple[Callable[[], None], int]:
    """One training step, and the number of the head's parameters."""
    config = TranscoderConfig.model_validate({"k": K, "expansion": M // D, "batch_size": TOKENS, **settings})
    stacked = StackedTranscoders(config, 2, D, seed=0)
    initialise(stacked, x, y)
    optimiser = torch.optim.Adam(stacked.parameters(), lr=1e-3, fused=True)

    def step() -> None:
        optimiser.zero_grad()
        stacked.losses(x, y, 0).total.backward()
        optimiser.step()

    return step, sum(parameter.numel() for parameter in stacked.heads.parameters())


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, TOKENS, D, generator=generator)
    y = torch.randn(2, TOKENS, D, generator=generator)
    steppers = {name: stepper(settings, x, y) for name, settings in HEADS.items()}
    seconds: dict[str, list[float]] = {name: [] for name in HEADS}
    for _ in range(ROUNDS + 1):
        for name, (step, _) in steppers.items():
            began = time.process_time()
            step()
            seconds[name].append(time.process_time() - began)
    without = median(seconds["none"][1:])
    rows = [
        {"head": name, "parameters": steppers[name][1], "seconds": (s := median(values[1:])), "over_none": s / without}
        for name, values in seconds.items()
    ]
    for row in rows:
        print("{head:26} {parameters:>12,} parameters  {seconds:7.3f} s a step  {over_none:6.2f} x".format(**row))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
