"""One training step on one CUDA device, at the size of a large model: `python benchmarks/transcoders_gpu.py`.

One layer, d = 4096, m = 32768, k = 64, selection in bfloat16, float32 products of `d × d` matrices in TensorFloat-32
(as with `trainer=gpu`), fused Adam. The step runs with the sparse products as Triton kernels, which gather rows in
float32 or (`trainer.precision=bf16-mixed`) in bfloat16, the latter also with selection in float8, and as torch
operators, beside the dense bfloat16 product `x W_encᵀ` alone. All of them take turns on the same weights; the median
turn counts. `selection` is the product, the top k (with torch operators in two stages) and their values. Before that,
both ways are compared with a dense step in double precision at a small size. `least` is what no step with that product
can do without: it, Adam, and rows in bfloat16 gathered three times, once to decode and once for each gradient.

`--heads` times a step of two layers instead: without a prediction head, and with one of two kinds, all `bf16-mixed`
with selection in float8.

`--device cpu --tiny` runs everything at a tiny size, with the kernels in Triton's interpreter. Its times say nothing;
it shows that the script works.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from contenders import Training
from dense_step import dense_step
from timed_turns import Row, Work, in_turns
from timing_worker import synthetic
from torch import Tensor

from hagd.config.transcoder import PredictionHeadKind, Selection, TranscoderConfig
from hagd.transcoders.initialise import initialise
from hagd.transcoders.objective import Scaling, StackedTranscoders
from hagd.transcoders.sparse import products, selection, top_of_rows
from hagd.transcoders.sparse.device_kernels import triton_kernels
from hagd.transcoders.sparse.products import decode, gather_dot, sum_by_feature
from hagd.transcoders.sparse.support import Support

SIZE = Training(d=4096, m=32768, k=64, batch=32768, steps=0)
BATCHES = (4096, 8192, 32768, 131072)
TINY = Training(d=8, m=32, k=4, batch=8, steps=0)
SMALL = Training(d=96, m=768, k=16, batch=256, steps=0)
BACKENDS = ("triton", "torch")
HALF = "triton, bf16-mixed"
FLOAT8 = "triton, bf16-mixed, float8"
STEPS_OF = (*BACKENDS, HALF, FLOAT8)
ADAM = "Adam"
HEADS: tuple[PredictionHeadKind | None, ...] = (None, "tied", "low_rank")
ROUNDS = 9


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Sparse products and top k run as Triton kernels, of rows in float32 or in bfloat16, or as torch operators."""
    kernels, top = (None if name == "torch" else triton_kernels(each) for each in ("products", "selection"))
    half = name in (HALF, FLOAT8) and torch.cuda.is_available()
    with (
        mock.patch.object(products, "product_kernels", lambda m, *operands: kernels),
        mock.patch.object(
            top_of_rows, "selection_kernels", lambda pre, k: top if top and top.can_hold(pre, k) else None
        ),
        torch.autocast("cuda", torch.bfloat16, enabled=half),
    ):
        yield


def config_of(size: Training, selection: str) -> TranscoderConfig:
    """Settings of the timed step."""
    return TranscoderConfig.model_validate({"k": size.k, "expansion": size.m // size.d, "selection": selection})


def batches_of(size: Training, device: torch.device, n: int) -> list[tuple[Tensor, Tensor]]:
    """Inputs and targets `[1, B, d]`, scaled as in a training."""
    scaled = []
    for x, y in synthetic(size, n, device):
        x, y = x[None], y[None]
        scaled.append((Scaling.of(x)(x), Scaling.of(y)(y)))
    return scaled


def training_step(size: Training, device: torch.device) -> Callable[[str], Work]:
    """A function from a backend to one step with it, or `ADAM` to that alone; all train the same weights."""
    stacked, optimizer, batches = _started(config_of(size, "bfloat16"), 1, size, device)
    done = 0

    def step(name: str) -> None:
        nonlocal done
        for dictionary in stacked.dictionaries:
            dictionary.config = config_of(size, "float8" if name == FLOAT8 else "bfloat16")
        _step(name, stacked, optimizer, batches[done % len(batches)], done)
        done += 1

    return lambda name: optimizer.step if name == ADAM else lambda: step(name)


def step_with_head(size: Training, device: torch.device, kind: PredictionHeadKind | None) -> Work:
    """One step of two layers and a prediction head between them, or none."""
    config = config_of(size, "float8").model_copy(
        update={"lambda_prediction": 0.0} if kind is None else {"prediction_head": kind}
    )
    stacked, optimizer, batches = _started(config, 2, size, device)
    return lambda: _step(FLOAT8, stacked, optimizer, batches[0], 0)


def _started(
    config: TranscoderConfig, n_layers: int, size: Training, device: torch.device
) -> tuple[StackedTranscoders, torch.optim.Optimizer, list[tuple[Tensor, Tensor]]]:
    """Dictionaries that have started from data, their optimiser, and two batches `[L, B, d]`."""
    stacked = StackedTranscoders(config, n_layers, size.d, seed=0).to(device)
    batches = [(x.expand(n_layers, -1, -1), y.expand(n_layers, -1, -1)) for x, y in batches_of(size, device, 2)]
    with backend("triton"):
        initialise(stacked, *batches[0])
    return stacked, torch.optim.Adam(stacked.parameters(), lr=1e-4, fused=True), batches


def _step(
    name: str,
    stacked: StackedTranscoders,
    optimizer: torch.optim.Optimizer,
    batch: tuple[Tensor, Tensor],
    number: int,
) -> None:
    with backend(name):
        loss = stacked.losses(*batch, number).total
    optimizer.zero_grad()
    with backend("torch" if name == "torch" else "triton"):  # outside of autocast, as in a trainer
        loss.backward()
    optimizer.step()


def sparse_products(size: Training, device: torch.device) -> dict[str, Work]:
    """Each product alone; biases make some features far more frequent than others."""
    g = torch.Generator().manual_seed(0)
    x = batches_of(size, device, 1)[0][0][0]
    weight = torch.nn.functional.normalize(torch.randn(size.m, size.d, generator=g), dim=1).to(device)
    bias = torch.randn(size.m, generator=g).to(device)
    with backend("triton"):
        support, values = selection.top_k(x, weight, bias, size.k, "bfloat16")
    _note(f"pairs a feature: mean {len(values) / size.m:.0f}, most {int(support.index.bincount().max())}")

    def sorting() -> object:
        return Support(support.index, support.offsets, support.m).by_feature

    def selecting(name: str) -> Work:
        rows = x.bfloat16() if name in (HALF, FLOAT8) else x
        by: Selection = "float8" if name == FLOAT8 else "bfloat16"
        return _with_backend(name, partial(selection.top_k, rows, weight, bias, size.k, by))

    named: dict[str, Work] = {f"selection, {name}": selecting(name) for name in STEPS_OF}
    named["sort by feature"] = sorting
    for name in (*BACKENDS, HALF):
        a, matrix = (each.bfloat16() if name == HALF else each for each in (x, weight))
        named[f"decode, {name}"] = _with_backend(name, partial(decode, values, support, matrix))
        named[f"gather_dot, {name}"] = _with_backend(name, partial(gather_dot, x, support, matrix, bias))
        named[f"sum_by_feature, {name}"] = _with_backend(name, partial(sum_by_feature, values, support, a))
    return named


def _with_backend(name: str, work: Work) -> Work:
    def wrapped() -> None:
        with backend(name):
            work()

    return wrapped


def encoder_product(size: Training, device: torch.device) -> Work:
    """`x W_encᵀ` in bfloat16, all B × m of it."""
    x = torch.randn(size.batch, size.d, device=device).bfloat16()
    weight = torch.randn(size.m, size.d, device=device).bfloat16()
    return lambda: x @ weight.T


def differences(size: Training, device: torch.device) -> dict[str, float]:
    """By backend, the largest relative error of the loss and of any gradient against a dense step in float64."""
    stacked = StackedTranscoders(config_of(size, "exact"), 1, size.d, seed=0).to(device)
    x, y = batches_of(size, device, 1)[0]
    with torch.no_grad():
        stacked.dictionaries[0].b_enc.normal_(generator=torch.Generator(device).manual_seed(0))
    names, parameters = zip(*stacked.named_parameters(), strict=True)
    wanted = [name.removeprefix("layers.0.") for name in names]
    dense = dense_step(stacked, wanted, x[0], y[0])
    found = {}
    for name in BACKENDS:
        with backend(name):
            loss = stacked.losses(x, y, 0).total
            step = [loss.detach(), *torch.autograd.grad(loss, parameters)]
        found[name] = max(float((a.double() - b).abs().max() / b.abs().max()) for a, b in zip(step, dense, strict=True))
    return found


def table(title: str, rows: Sequence[Row], floor: Row) -> str:
    """Markdown."""
    lines = [title, "", "| | ms | spread | ÷ encoder product | peak GB |", "| --- | --- | --- | --- | --- |"]
    for row in rows:
        if row.error:
            lines.append(f"| {row.name} | failed: {row.error} | | | |")
            continue
        ratio = f"{row.median / floor.median:.2f}" if floor.ms else "–"
        lines.append(
            f"| {row.name} | {row.median:.3f} | {min(row.ms):.3f}–{max(row.ms):.3f} "
            f"| {ratio} | {row.peak_bytes / 1e9:.2f} |"
        )
    return "\n".join(lines)


def measure(size: Training, device: torch.device, rounds: int) -> list[Row]:
    """Steps, then products alone, at one size."""
    floor = encoder_product(size, device)
    step = training_step(size, device)
    named = {"encoder product, bf16": floor, **{f"step, {b}": step(b) for b in STEPS_OF}, ADAM: step(ADAM)}
    steps = in_turns(named, device, rounds)
    del step
    return steps + in_turns(sparse_products(size, device), device, rounds)


def measure_heads(size: Training, device: torch.device, rounds: int) -> list[Row]:
    """Steps of two layers. All three stacks are in memory at once, so that no peak would be one step's own."""
    named: dict[str, Work] = {"encoder product, bf16": encoder_product(size, device)}
    for kind in HEADS:
        named[f"step of two layers, {kind or 'no'} head"] = step_with_head(size, device, kind)
    return [replace(row, peak_bytes=0) for row in in_turns(named, device, rounds)]


def summary(rows: Sequence[Row]) -> dict[str, Any]:
    """Medians, the steps' ratios to the encoder product, and their peaks."""
    ms = {row.name: row.median for row in rows if row.ms}
    found: dict[str, Any] = {"ms": {name: round(value, 4) for name, value in ms.items()}}
    floor = ms.get("encoder product, bf16")
    steps = {row.name.removeprefix("step, "): row for row in rows if row.name.startswith("step")}
    if floor:
        found["step_over_encoder_product"] = {b: round(s.median / floor, 3) for b, s in steps.items() if s.ms}
    if floor and ADAM in ms:
        least = [floor, ms.get(ADAM), *[ms.get(f"decode, {HALF}")] * 3]
        found["least_over_encoder_product"] = round(sum(filter(None, least)) / floor, 3)
        selections = {b: f"selection, {b}" for b in STEPS_OF}
        found["selection_over_encoder_product"] = {b: round(ms[s] / floor, 3) for b, s in selections.items() if s in ms}
    found["peak_gb"] = {b: round(s.peak_bytes / 1e9, 3) for b, s in steps.items()}
    found["failed"] = {row.name: row.error for row in rows if row.error}
    return found


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help=f"d = {TINY.d}, m = {TINY.m}, {TINY.batch} tokens only")
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES, help="tokens a step (without --tiny)")
    parser.add_argument("--heads", action="store_true", help="steps of two layers, with and without prediction heads")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="turns of everything that is timed")
    parser.add_argument("--json", type=Path, help="file for every figure")
    arguments = parser.parse_args()
    if arguments.device == "cpu":
        if not arguments.tiny:
            parser.error("--device cpu interprets the kernels, which takes hours at full size; add --tiny")
        os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported, which happens at its first use
    elif not torch.cuda.is_available():
        parser.error("expected a CUDA device, found none; --device cpu --tiny only shows that the script works")
    if triton_kernels("products") is None:
        parser.error(
            "expected the package triton, which comes with CUDA builds of torch, found none; pip install triton"
        )
    return arguments


def main() -> None:
    """See the module's docstring."""
    arguments = _arguments()
    device = torch.device(arguments.device)
    on = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU, kernels interpreted"
    result: dict[str, Any] = {"device": on, "torch": torch.__version__}
    result["largest_relative_error"] = differences(TINY if arguments.tiny else SMALL, device)
    print(f"{on}\nlargest relative error against a dense step in float64: {result['largest_relative_error']}\n")
    torch.set_float32_matmul_precision("high")
    every: list[dict[str, Any]] = []
    for size in (TINY,) if arguments.tiny else [replace(SIZE, batch=batch) for batch in arguments.batches]:
        rows = (measure_heads if arguments.heads else measure)(size, device, arguments.rounds)
        title = f"d = {size.d}, m = {size.m}, k = {size.k}, {size.batch} tokens a step, {on}"
        print(table(title, rows, rows[0]), end="\n\n", flush=True)
        result[f"B{size.batch}"] = summary(rows)
        every += [{"batch": size.batch, **asdict(row)} for row in rows]
        if arguments.json:
            arguments.json.write_text(json.dumps({"rows": every, **result}, indent=1))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
