"""One contender's training on captured activations: `python training_worker.py REQUEST.json`.

The request names the contender, the file of tokens (`x`, and `y` unless the target is the input), the training and
the file for the weights. Standard output's last line is the CPU seconds of the whole training call.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from contenders import Training, training_loop
from safetensors.torch import load_file, save_file
from torch import Tensor


def main() -> None:
    """See the module's docstring."""
    torch.set_num_threads(1)
    request = json.loads(Path(sys.argv[1]).read_text())
    training = Training(**request["training"])
    tokens = load_file(request["tokens"])
    x, y = tokens["x"], tokens.get("y", tokens["x"])
    train = training_loop(request["contender"])

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for start in range(0, training.steps * training.batch, training.batch):
            chosen = slice(start, start + training.batch)
            yield x[chosen].clone(), y[chosen].clone()  # copies: dictionary_learning scales its inputs in place

    start = time.process_time()
    weights = train(training, batches)
    seconds = time.process_time() - start
    save_file({name: value.detach().contiguous() for name, value in weights.items()}, request["weights"])
    print(f"\n{seconds}")


if __name__ == "__main__":
    main()
