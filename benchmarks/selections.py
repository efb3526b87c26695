"""Ways of finding the k largest pre-activations: `python benchmarks/selections.py [--site mlp|resid] [--json FILE]`.

CPU milliseconds of the selection alone on one thread, and on how many tokens a way picks another feature than a product
in float64, for the encoder of a dictionary after `STEPS` steps on synthetic activations (`timing_worker.py`),
d = 576, m = 4,608, k = 64, 4,096 tokens. The ways take turns; medians.
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
from contenders import Training
from timing_worker import synthetic
from torch import Tensor

from hagd.config.transcoder import Selection, TranscoderConfig
from hagd.transcoders.initialise import initialise
from hagd.transcoders.module import TranscoderTraining
from hagd.transcoders.objective import Scaling, StackedTranscoders
from hagd.transcoders.sparse import selection
from hagd.transcoders.sparse.selection import top_k

SIZE = Training(d=576, m=4608, k=64, batch=4096, steps=0)
STEPS, ROUNDS = 60, 9


def trained(site: str) -> tuple[Tensor, Tensor, Tensor]:
    """Turned tokens that no step has seen, encoder and bias."""
    batches = synthetic(SIZE, 5)
    pairs = [(x[None], (x if site == "resid" else y)[None]) for x, y in batches]
    config = TranscoderConfig(k=SIZE.k, expansion=SIZE.m // SIZE.d, steps=STEPS, batch_size=SIZE.batch)
    stacked = StackedTranscoders(config, 1, SIZE.d, seed=0)
    scalings = Scaling.of(pairs[0][0]), Scaling.of(pairs[0][1])
    initialise(stacked, scalings[0](pairs[0][0]), scalings[1](pairs[0][1]))
    module = TranscoderTraining(stacked, *scalings)
    configured = module.configure_optimizers()
    for step in range(STEPS):
        module.training_step(pairs[step % 4], step)["loss"].backward()
        configured["optimizer"].step()
        configured["lr_scheduler"]["scheduler"].step()
        module.on_train_batch_end()
    dictionary = stacked.dictionaries[0]
    return dictionary.turned(scalings[0](pairs[4][0])[0]), dictionary.W_enc.detach(), dictionary.b_enc.detach()


def ways(x: Tensor, weight: Tensor, bias: Tensor) -> dict[str, Callable[[], Tensor]]:
    """By name, what gives the features `[B, k]`."""
    found: dict[str, Callable[[], Tensor]] = {
        "exact, product in float32": lambda: selection._top(x, weight, bias, SIZE.k, torch.float32)[1]
    }
    for by in get_args(Selection):
        found[by] = lambda by=by: top_k(x, weight, bias, SIZE.k, by)[0].index.view(-1, SIZE.k)
    return found


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--site", choices=["mlp", "resid"], default="mlp", help="transcoder, or autoencoder")
    parser.add_argument("--json", type=Path, help="file for the figures")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    x, weight, bias = trained(arguments.site)
    exact = (x.double() @ weight.double().T + bias).topk(SIZE.k).indices.sort().values
    named = ways(x, weight, bias)
    wrong = {name: float((way().sort().values != exact).any(1).float().mean()) for name, way in named.items()}
    times: dict[str, list[float]] = {name: [] for name in named}
    for _ in range(ROUNDS):
        for name, way in named.items():
            start = time.process_time()
            way()
            times[name].append(1e3 * (time.process_time() - start))
    result = {name: {"ms": round(median(times[name]), 1), "wrong": wrong[name]} for name in named}
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1))
    print(json.dumps({"site": arguments.site, **result}))


if __name__ == "__main__":
    main()
