"""Do dictionaries mean the same here and in the peers' own code? `python benchmarks/format_compatibility.py`.

For every architecture of each layout: dictionaries saved here are loaded, applied and saved again by the peer; those
saved by the peer are loaded, applied and saved again here, and applied once more by the peer. Features and
reconstructions are compared on the same inputs, weights bit by bit where nothing was folded. Exits with 1 if anything
differs. Tokens on which a feature is within rounding of its threshold or of the k-th largest are left out and counted.
The graph of a prompt, as it is written for Neuronpedia, is read by circuit-tracer's own models.

Shape legend: L layers, n tokens, d = d_model, m dictionary size.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
from made_prompt_graph import made_graph, made_report
from peers_environment import peers_python
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from torch import Tensor

from hagd.config.stages import GraphPruningConfig
from hagd.report.prompt.neuronpedia import neuronpedia_graph
from hagd.transcoders.formats import circuit_tracer, saelens, sparsify
from hagd.transcoders.formats.checks import in_precision
from hagd.transcoders.records import Transcoder, TranscoderSet

LOAD = {"sparsify": sparsify.load, "saelens": saelens.load, "circuit_tracer": circuit_tracer.load}
SAVE = {"sparsify": sparsify.save, "saelens": saelens.save, "circuit_tracer": circuit_tracer.save}
D, M, K, TOKENS = 32, 128, 8, 512
LAYERS = {"sparsify": (2, 10, 11), "saelens": (2, 10, 11), "circuit_tracer": (0, 1, 2)}
TOLERANCE = 2e-6
"""Largest error over largest value, in single precision."""

TIE = 1e-5
"""Distance from a change of the active features, over the largest pre-activation, below which a token is left out."""


@dataclass(frozen=True)
class Case:
    """One kind of dictionary that this project has."""

    layout: str
    name: str
    site: str = "mlp"
    activation: str = "topk"
    skip: bool = False
    cross_layer: bool = False
    dtype: torch.dtype = torch.float32


CASES = (
    Case("sparsify", "TopK"),
    Case("sparsify", "TopK, skip", skip=True),
    Case("sparsify", "TopK, bfloat16", dtype=torch.bfloat16),
    Case("sparsify", "TopK autoencoder", site="resid"),
    Case("saelens", "TopK"),
    Case("saelens", "TopK autoencoder", site="resid"),
    Case("saelens", "JumpReLU autoencoder", site="resid", activation="jumprelu"),
    Case("saelens", "ReLU autoencoder", site="resid", activation="relu"),
    Case("saelens", "ReLU", activation="relu"),
    Case("saelens", "ReLU, skip", activation="relu", skip=True),
    Case("saelens", "JumpReLU", activation="jumprelu"),
    Case("saelens", "JumpReLU, skip", activation="jumprelu", skip=True),
    Case("saelens", "JumpReLU, bfloat16", activation="jumprelu", dtype=torch.bfloat16),
    Case("circuit_tracer", "ReLU", activation="relu"),
    Case("circuit_tracer", "ReLU, skip", activation="relu", skip=True),
    Case("circuit_tracer", "JumpReLU", activation="jumprelu"),
    Case("circuit_tracer", "JumpReLU, skip", activation="jumprelu", skip=True),
    Case("circuit_tracer", "JumpReLU, bfloat16", activation="jumprelu", dtype=torch.bfloat16),
    Case("circuit_tracer", "cross-layer, ReLU", activation="relu", cross_layer=True),
    Case("circuit_tracer", "cross-layer, JumpReLU", activation="jumprelu", cross_layer=True),
)


def build(case: Case, generator: torch.Generator) -> TranscoderSet:
    """Random dictionaries, every part of which matters."""

    def draw(*shape: int) -> Tensor:
        return (torch.randn(*shape, generator=generator) / shape[-1] ** 0.5).to(case.dtype)

    layers = LAYERS[case.layout]
    built = []
    for i, layer in enumerate(layers):
        threshold = torch.zeros(M) if case.activation == "relu" else 0.5 + draw(M).float().abs()
        built.append(
            Transcoder(
                layer=layer,
                k=K if case.activation == "topk" else None,
                W_enc=draw(M, D),
                b_enc=draw(M),
                W_dec=draw(M, D),
                b_dec=draw(D),
                threshold=None if case.activation == "topk" else threshold.to(case.dtype),
                W_skip=draw(D, D) if case.skip else None,
                W_later=tuple(draw(M, D) for _ in layers[i + 1 :]) if case.cross_layer else (),
            )
        )
    return TranscoderSet("some/model", "mlp" if case.site == "mlp" else "resid", tuple(built))


def applied(found: TranscoderSet, x: Tensor) -> tuple[Tensor, Tensor]:
    """Features `[L, n, m]` and reconstructions `[L, n, d]` of inputs `[L, n, d]`."""
    features = [each.encode(row) for each, row in zip(found.transcoders, x, strict=True)]
    return torch.stack(features), torch.stack([found.reconstruct(i, features, row) for i, row in enumerate(x)])


def clear(found: TranscoderSet, x: Tensor) -> Tensor:
    """Boolean `[n]`: rounding cannot change which features are active, in any layer."""
    far = torch.ones(x.shape[1], dtype=torch.bool)
    for each, row in zip(found.transcoders, x.double(), strict=True):
        pre = in_precision(each, torch.float64).preactivations(row)
        if each.k is not None:
            best = pre.topk(each.k + 1).values
            distance = best[:, -2] - best[:, -1]
        else:
            assert each.threshold is not None
            distance = (pre - each.threshold).abs().min(-1).values
        far &= distance > TIE * pre.abs().max()
    return far


def same_bits(a: TranscoderSet, b: TranscoderSet) -> bool:
    """Whether all tensors are, and everything else is."""
    for one, other in zip(a.transcoders, b.transcoders, strict=True):
        for field in fields(Transcoder):
            values = [getattr(each, field.name) for each in (one, other)]
            pairs = zip(*values, strict=True) if field.name == "W_later" else [values]
            for left, right in pairs:
                if isinstance(left, Tensor) and isinstance(right, Tensor):
                    if left.dtype != right.dtype or not torch.equal(left, right):
                        return False
                elif left is not right and left != right:
                    return False
    return (a.model, a.site) == (b.model, b.site)


@dataclass(frozen=True)
class Line:
    """One line of the table: errors over the largest value, tokens whose active features differ, equal bits."""

    layout: str
    case: str
    way: str
    features: float | None = None
    outputs: float | None = None
    support: int = 0
    ties: int = 0
    bits: bool | None = None

    @property
    def agrees(self) -> bool:
        """Whether nothing differs."""
        errors = [error for error in (self.features, self.outputs) if error is not None]
        return all(error <= TOLERANCE for error in errors) and self.support == 0 and self.bits is not False


def peers_output(folder: Path) -> tuple[Tensor, Tensor]:
    """Features and reconstructions that a peer found for the dictionaries in `folder`."""
    stored = load_file(folder.with_name(f"{folder.name}.out"))
    return stored["features"], stored["outputs"]


def compared(
    folder: Path,
    way: str,
    output: tuple[Tensor, Tensor],
    expected: tuple[Tensor, Tensor],
    keep: Tensor,
    bits: bool | None,
) -> Line:
    """Two pairs of features `[L, n, m]` and reconstructions `[L, n, d]` on the tokens `keep` `[n]`."""
    pairs = [(found[:, keep], wanted[:, keep]) for found, wanted in zip(output, expected, strict=True)]
    errors = [float((found - wanted).abs().max() / wanted.abs().max()) for found, wanted in pairs]
    support = int(((pairs[0][0] > 0) != (pairs[0][1] > 0)).any(-1).sum())
    return Line(folder.parent.name, folder.name, way, *errors, support, int((~keep).sum()), bits)


def run_peers(what: str, folder: Path) -> None:
    """`format_peers.py` in the peers' environment."""
    worker = Path(__file__).resolve().parent / "format_peers.py"
    subprocess.run([peers_python(), worker, what, folder], check=True, stdout=sys.stderr)


def from_here(folder: Path, x: Tensor) -> Iterator[Line]:
    """Saved here, read by the peer, saved by the peer, read here."""
    generator = torch.Generator().manual_seed(0)
    sets = {case: build(case, generator) for case in CASES}
    for case, found in sets.items():
        SAVE[case.layout](found, folder / case.layout / case.name)
    run_peers("read", folder)
    for case, found in sets.items():
        path = folder / case.layout / case.name
        own = same_bits(LOAD[case.layout](path), found)
        if case.dtype == torch.float32:
            yield compared(path, "ours, there", peers_output(path), applied(found, x), clear(found, x), own)
        else:
            yield Line(case.layout, case.name, "ours, there", bits=own)
        if (case.layout, case.site) != ("sparsify", "resid"):  # sparsify rounds what was folded into the bias
            back = LOAD[case.layout](path.with_name(f"{path.name}.again"))
            bits = same_bits(replace(back, model=found.model), found)  # sparsify names models in another file
            yield Line(case.layout, case.name, "ours, there, here", bits=bits)


def from_there(folder: Path, x: Tensor) -> Iterator[Line]:
    """Saved by the peer, read here, saved here, read by the peer."""
    theirs, copies = folder / "theirs", folder / "copies"
    run_peers("make", theirs)
    paths = sorted(path for layout in LOAD for path in (theirs / layout).iterdir() if not path.suffix)
    for path in paths:
        layout = path.parent.name
        SAVE[layout](LOAD[layout](path), copies / layout / path.name)
    run_peers("read", copies)
    for path in paths:
        layout = path.parent.name
        found, copy = LOAD[layout](path), copies / layout / path.name
        keep = clear(found, x)
        yield compared(path, "theirs, here", applied(found, x), peers_output(path), keep, None)
        bits = same_bits(LOAD[layout](copy), found)
        yield compared(path, "theirs, here, there", peers_output(copy), peers_output(path), keep, bits)


def main() -> int:
    """Exit code: 0 if all agree."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        x = torch.randn(3, TOKENS, D, generator=torch.Generator().manual_seed(2))
        save_file({"x": x}, folder / "inputs.safetensors")
        lines = [*from_here(folder / "ours", x), *from_there(folder, x)]
        graph = made_graph()
        file = folder / "neuronpedia.json"
        file.write_text(json.dumps(neuronpedia_graph(graph, made_report(graph), GraphPruningConfig())))
        run_peers("graph", file)
    table = Table("layout", "dictionary", "way", "features", "reconstruction", "other support", "ties", "same bits", "")
    for line in lines:
        errors = ["–" if error is None else f"{error:.1e}" for error in (line.features, line.outputs)]
        bits = {True: "yes", False: "NO", None: "–"}[line.bits]
        counts = [str(line.support), str(line.ties)]
        table.add_row(line.layout, line.case, line.way, *errors, *counts, bits, "" if line.agrees else "DIFFERS")
    console = Console(width=150)
    console.print(table)
    differing = sum(not line.agrees for line in lines)
    console.print(f"{len(lines) - differing} of {len(lines)} comparisons agree (tolerance {TOLERANCE:g})")
    console.print("circuit-tracer reads the graph of a prompt, and names and numbers its nodes alike")
    return int(differing > 0)


if __name__ == "__main__":
    sys.exit(main())
