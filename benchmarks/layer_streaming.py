"""Captures activations of a model of Pythia-1.4B's shape, layer by layer from disk, and reports memory and time.

`python benchmarks/layer_streaming.py` writes random weights to a temporary folder (5.7 GB in float32), captures,
deletes them, and ends with one line of JSON. One thread. Pages of the files are dropped from the system's cache first,
so that they are read from the disk. Memory is the largest resident size of the process while it captures, Python and
PyTorch included.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import GPTNeoXConfig

from hagd.activations.capture import capture
from hagd.artifacts.manifest import peak_rss_mb, reset_peak_rss
from hagd.models.layer_streaming import (
    INDEX,
    SINGLE,
    StoredWeights,
    StreamedLanguageModel,
    model_without_weights,
    weight_files,
)

_STD = 0.02


def write_random_model(config: GPTNeoXConfig, dtype: torch.dtype, folder: Path) -> int:
    """Random weights, one file a layer, with at most one layer in memory; returns the number of parameters."""
    config.save_pretrained(folder)
    by_file: dict[str, dict[str, torch.Size]] = {}
    for name, parameter in model_without_weights(config, dtype).named_parameters():
        parts = name.split(".")
        group = parts[2] if parts[1:2] == ["layers"] else parts[-2]
        by_file.setdefault(f"{Path(SINGLE).stem}-{group}.safetensors", {})[name] = parameter.shape
    generator = torch.Generator().manual_seed(0)
    n_parameters = 0
    for file, shapes in by_file.items():
        tensors = {name: _random(name, shape, dtype, generator) for name, shape in shapes.items()}
        save_file(tensors, folder / file, {"format": "pt"})
        n_parameters += sum(tensor.numel() for tensor in tensors.values())
    weight_map = {name: file for file, shapes in by_file.items() for name in shapes}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return n_parameters


def _random(name: str, shape: torch.Size, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    if len(shape) > 1:
        return torch.empty(shape, dtype=dtype).normal_(0, _STD, generator=generator)
    return torch.full(shape, 1.0 if "norm" in name and name.endswith("weight") else 0.0, dtype=dtype)


def _drop_from_cache(folder: Path) -> None:
    for file in folder.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--sequences", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--layers", type=int, nargs="+", default=[6, 12, 23])
    parser.add_argument("--folder", type=Path, help="where the temporary folder is made (default: the system's)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    dtype = getattr(torch, arguments.dtype)
    config = GPTNeoXConfig(
        hidden_size=2048,
        num_hidden_layers=24,
        num_attention_heads=16,
        intermediate_size=8192,
        vocab_size=50304,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        architectures=["GPTNeoXForCausalLM"],
    )
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        n_parameters = write_random_model(config, dtype, folder)
        _drop_from_cache(folder)
        writing_mb = peak_rss_mb()
        reset_peak_rss()
        began, cpu = time.perf_counter(), time.process_time()
        files = weight_files(lambda file: folder / file if (folder / file).is_file() else None)
        lm = StreamedLanguageModel(model_without_weights(config, dtype), StoredWeights(files))
        tokens = torch.randint(
            config.vocab_size, (arguments.sequences, arguments.length), generator=torch.Generator().manual_seed(1)
        )
        x, y = capture(lm, tokens, "mlp", arguments.layers)
        seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - cpu
        gib = sum(file.stat().st_size for file in files) / 2**30
    result = {
        "parameters": n_parameters,
        "weights_gib": round(gib, 2),
        "dtype": arguments.dtype,
        "tokens": tokens.numel(),
        "activations": [list(x.shape), list(y.shape)],
        "seconds": round(seconds, 1),
        "cpu_seconds": round(cpu_seconds, 1),
        "peak_mb": round(peak_rss_mb()),
        "peak_mb_of_writing": round(writing_mb),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
