"""Graphs of one prompt against circuit-tracer, on one thread: `python benchmarks/attribution.py [--quick]`.

Both sides get the same random GPT-2 weights, TopK transcoders and tokens, and compute every direct edge and the
pruned graph. Each measurement is a process of its own; the two take turns. Figures are CPU seconds (user and system)
of the two calls, without imports and loading, and the largest resident size of the whole process, imports included.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from contenders import interpreter, one_thread

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import GPT2LMHeadModel

FOLDER = Path(__file__).resolve().parent
CONTENDERS = ("circuit_tracer", "ours")
ROUNDS = 3
QUICK_ROUNDS = 1
EXPLAINED = 0.8
"""Share of what an MLP writes that its features give."""


@dataclass(frozen=True)
class Setup:
    """One prompt, model and dictionaries.

    Attributes:
        k: active features a token; none at the first token, as in circuit-tracer.
        most: features whose incoming edges are computed; None = all.
    """

    name: str
    n_layers: int
    d: int
    heads: int
    vocabulary: int
    positions: int
    m: int
    k: int
    most: int | None = None

    @property
    def active(self) -> int:
        """Active features."""
        return self.n_layers * (self.positions - 1) * self.k


def small(k: int) -> Setup:
    """S: a few layers, as in tests."""
    return Setup("S", n_layers=4, d=128, heads=4, vocabulary=1000, positions=32, m=1024, k=k)


def gpt2(k: int, most: int | None = None) -> Setup:
    """G: the shape of GPT-2 small."""
    return Setup("G", 12, 768, 12, vocabulary=50257, positions=16, m=6144, k=k, most=most)


QUICK = small(48)
SETUPS = (small(16), small(48), small(128), gpt2(16), gpt2(48), gpt2(48, most=1000))


@dataclass(frozen=True)
class Measured:
    """One process."""

    contender: str
    attribution: float
    pruning: float
    peak_mb: float
    nodes: int
    edges: int


def write_inputs(setup: Setup, folder: Path) -> None:
    """`model/` in the layout of transformers, `transcoders.safetensors` and `setup.json`."""
    import torch
    from safetensors.torch import save_file
    from transformers import GPT2Config, GPT2LMHeadModel
    from transformers.utils import logging

    logging.disable_progress_bar()
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=setup.vocabulary,
        n_positions=setup.positions,
        n_embd=setup.d,
        n_layer=setup.n_layers,
        n_head=setup.heads,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = GPT2LMHeadModel(config)
    for parameter in model.parameters():  # transformers' own start is so small that nothing depends on anything
        noise = torch.randn(parameter.shape, generator=generator)
        scale = 0.1 if parameter.ndim == 1 else 1.5 / parameter.shape[0] ** 0.5
        parameter.data = parameter.data + scale * noise if parameter.ndim == 1 else scale * noise
    model.transformer.wte.weight.data *= setup.vocabulary**0.5 / 1.5
    model.save_pretrained(folder / "model")
    tokens = torch.randint(1, setup.vocabulary, (setup.positions,), generator=generator)
    tokens[0] = 0
    save_file(fitted_transcoders(setup, model, tokens, generator), folder / "transcoders.safetensors")
    (folder / "setup.json").write_text(json.dumps({**asdict(setup), "tokens": tokens.tolist()}))


def fitted_transcoders(
    setup: Setup, model: GPT2LMHeadModel, tokens: Tensor, generator: torch.Generator
) -> dict[str, Tensor]:
    """Random encoders, and decoders that give `EXPLAINED` of what each MLP writes on this prompt.

    With random decoders too, error nodes would carry everything and pruning would leave no features.
    """
    import torch

    from hagd.attribution.prompt.trace import trace
    from hagd.models.language_model import LanguageModel
    from hagd.transcoders.records import topk_relu

    clean = trace(LanguageModel(model), tokens)
    tensors = {}
    for layer in range(setup.n_layers):
        W_enc = torch.randn(setup.m, setup.d, generator=generator) / setup.d**0.5
        b_enc, b_dec = (0.1 * torch.randn(n, generator=generator) for n in (setup.m, setup.d))
        f = topk_relu(clean.mlp_in[layer] @ W_enc.T + b_enc, setup.k)[1:]
        W_dec = EXPLAINED * torch.linalg.pinv(f) @ (clean.mlp_out[layer][1:] - b_dec)
        own = {"W_enc": W_enc, "W_dec": W_dec, "b_enc": b_enc, "b_dec": b_dec}
        tensors |= {f"{name}_{layer}": tensor.contiguous() for name, tensor in own.items()}
    return tensors


def run(contender: str, folder: Path) -> tuple[Measured, dict[str, Any]]:
    """One process of `attribution_worker.py` and the edges that it wrote for comparison.

    Raises:
        RuntimeError: the process failed; the message ends with what it wrote.
    """
    out = folder / f"{contender}.npz"
    command = [interpreter("ours" if contender == "ours" else "peers"), FOLDER / "attribution_worker.py"]
    done = subprocess.run([*command, contender, folder, out], env=one_thread(), capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{contender}: expected exit code 0, found {done.returncode}: {done.stderr[-3000:]}")
    figures = json.loads(done.stdout.splitlines()[-1])
    return Measured(contender, **figures), dict(np.load(out))


def difference(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, float]:
    """How far the edges of sampled targets, the pruned nodes and the pruned edges are apart.

    `max_rel_edge_difference`: the largest difference over the largest edge into the same target.
    """
    if not np.array_equal(ours["active"], theirs["active"]):
        raise RuntimeError("the two sides have other active features; their edges cannot be compared")
    scale = np.abs(theirs["rows"]).max(1, keepdims=True)
    both = ours["nodes"] & theirs["nodes"]
    return {
        "max_rel_edge_difference": float((np.abs(ours["rows"] - theirs["rows"]) / scale).max()),
        "same_pruned_nodes": float(both.sum() / (ours["nodes"] | theirs["nodes"]).sum()),
        "scores_difference": float(np.abs(ours["scores"] - theirs["scores"]).max()),
    }


def measure(setup: Setup, rounds: int) -> tuple[list[Measured], dict[str, float]]:
    """Both contenders in turns, and the ratios of their medians."""
    rows: list[Measured] = []
    written: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as name:
        write_inputs(setup, Path(name))
        for turn in range(rounds):
            for contender in CONTENDERS[:: -1 if turn % 2 else 1]:
                measured, written[contender] = run(contender, Path(name))
                rows.append(measured)
                print(f"{setup.name} {setup.active}: {measured}", file=sys.stderr, flush=True)
    return rows, ratios(rows) | difference(written["ours"], written["circuit_tracer"])


def ratios(rows: Sequence[Measured]) -> dict[str, float]:
    """Medians of circuit-tracer's over ours, and ours over theirs for memory."""

    def median(contender: str, key: str) -> float:
        return statistics.median(getattr(row, key) for row in rows if row.contender == contender)

    def times(key: str) -> float:
        return median("circuit_tracer", key) / median("ours", key)

    def whole(contender: str) -> float:
        return median(contender, "attribution") + median(contender, "pruning")

    return {
        "x_circuit_tracer": times("attribution"),
        "x_circuit_tracer_pruning": times("pruning"),
        "x_circuit_tracer_both": whole("circuit_tracer") / whole("ours"),
        "memory_ratio": 1 / times("peak_mb"),
    }


def table(setup: Setup, rows: Sequence[Measured], found: dict[str, float]) -> str:
    """Markdown: one row a contender, then the ratios."""
    most = f", edges into {setup.most}" if setup.most else ""
    lines = [
        f"{setup.name}: {setup.n_layers} layers, d {setup.d}, {setup.positions} tokens, m {setup.m}, "
        f"{setup.active} active{most}",
        "",
        "| | attribution, CPU s | pruning, CPU s | peak RSS, MB | nodes left | edges left |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for contender in CONTENDERS:
        own = [row for row in rows if row.contender == contender]
        cells = (statistics.median(getattr(r, key) for r in own) for key in ("attribution", "pruning", "peak_mb"))
        lines.append(f"| {contender} | {' | '.join(f'{c:.2f}' for c in cells)} | {own[-1].nodes} | {own[-1].edges} |")
    return "\n".join([*lines, "", ", ".join(f"{key} {value:.3g}" for key, value in found.items())])


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help=f"S with {QUICK.active} active features; under 3 minutes")
    parser.add_argument("--rounds", type=int, help="turns of each contender")
    parser.add_argument("--only", help="setups whose name and active features start so, as in S-15872")
    parser.add_argument("--json", type=Path, help="file for every figure")
    arguments = parser.parse_args()
    setups = (QUICK,) if arguments.quick else SETUPS
    if arguments.only:
        setups = tuple(s for s in setups if f"{s.name}-{s.active}".startswith(arguments.only))
    if not setups:
        parser.error(f"--only: expected the start of a setup, as in S-15872, found {arguments.only}")
    interpreter("peers")  # their environment, before anything is timed
    rounds = arguments.rounds or (QUICK_ROUNDS if arguments.quick else ROUNDS)
    results = []
    for setup in setups:
        rows, found = measure(setup, rounds)
        results.append({"setup": asdict(setup), "rows": [asdict(row) for row in rows], "ratios": found})
        print(table(setup, rows, found), end="\n\n", flush=True)
        if arguments.json:
            arguments.json.write_text(json.dumps(results, indent=1))
    print(json.dumps({key: round(value, 9) for key, value in found.items()}))


if __name__ == "__main__":
    main()
