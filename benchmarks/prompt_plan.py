"""Plans of prompt graphs against measured runs: `python benchmarks/prompt_plan.py [--only NAME] [--json FILE]`.

Random GPT-2 weights and TopK transcoders at several sizes, one of them a prompt of 2,048 tokens. Every active feature
is a target. Each size is a process of its own on one thread that makes its plan first, as `extract.py mode=plan` does,
and then runs: clean run, edges, pruning. Seconds are CPU seconds without loading; memory is the largest resident size
of the process, Python and PyTorch included. Ends with one line of JSON: measured over planned, by size.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from contenders import one_thread
from rich.console import Console
from rich.table import Table

from hagd.artifacts.manifest import peak_rss_mb, reset_peak_rss
from hagd.attribution.prompt.graph import build_prompt_graph
from hagd.attribution.prompt.logits import likely
from hagd.attribution.prompt.plan import plan_prompt
from hagd.attribution.prompt.shape import PromptShape
from hagd.attribution.prompt.trace import trace
from hagd.config.model import MiniModel
from hagd.config.stages import GraphConfig
from hagd.models.mini import build_mini
from hagd.transcoders.records import Transcoder, TranscoderSet


@dataclass(frozen=True)
class Size:
    """One graph; `k` active features a token and layer, `strongest` edges kept a target (None = all), `head_layers`
    whose heads are nodes."""

    n_layers: int
    d: int
    heads: int
    vocabulary: int
    tokens: int
    m: int
    k: int
    strongest: int | None = None
    head_layers: tuple[int, ...] = ()

    def shape(self) -> PromptShape:
        """What the plan is made from."""
        layer = 12 * self.d**2 + 13 * self.d
        return PromptShape(
            n_layers=self.n_layers,
            d=self.d,
            heads=self.heads,
            kv_heads=self.heads,
            head=self.d // self.heads,
            parameters=self.n_layers * layer + (2 * self.vocabulary + self.tokens) * self.d,
            weight_bytes=4,
            positions=self.tokens,
            decomposed=tuple(range(self.n_layers)),
            m=self.m,
            k=self.k,
            skip_first=True,
            cross_layer=False,
            strongest=self.strongest,
            most=None,
            logits=10,
            head_layers=self.head_layers,
        )


SIZES = {
    "S-1984": Size(4, 128, 4, 1000, 32, 1024, 16),
    "S-5952": Size(4, 128, 4, 1000, 32, 1024, 48),
    "S-15872": Size(4, 128, 4, 1000, 32, 1024, 128),
    "S-15872, 64 edges a target": Size(4, 128, 4, 1000, 32, 1024, 128, 64),
    "6 layers, d 256, 128 tokens": Size(6, 256, 8, 1000, 128, 2048, 16),
    "G-2880": Size(12, 768, 12, 50257, 16, 6144, 16),
    "2,048 tokens": Size(2, 64, 4, 1000, 2048, 512, 16, 64),
    "heads of all layers": Size(6, 256, 8, 1000, 128, 2048, 16, None, tuple(range(6))),
    "heads of two layers": Size(6, 256, 8, 1000, 128, 2048, 16, None, (3, 4)),
}


def measure(size: Size) -> dict[str, float]:
    """Plan and run in this process."""
    torch.set_num_threads(1)
    with torch.device("meta"):  # imports what a model needs, as `mode=plan` does
        build_mini(MiniModel(), size.vocabulary, size.tokens, 0)
    plan = plan_prompt(size.shape(), torch.device("cpu"), psutil.Process().memory_info().rss / 2**20)
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    d, m, layers = size.d, size.m, range(size.n_layers)
    config = MiniModel(n_layers=size.n_layers, d_model=d, n_heads=size.heads, d_mlp=4 * d)
    lm = build_mini(config, size.vocabulary, size.tokens, 0)
    dictionaries = tuple(Transcoder(i, size.k, draw(m, d), draw(m), draw(m, d) / 100, draw(d)) for i in layers)
    found = TranscoderSet(lm.name, "mlp", dictionaries)
    options = GraphConfig(scope="prompt", prompt="random", skip_first=True, strongest=size.strongest)
    reset_peak_rss()
    start = time.process_time()
    run = trace(lm, torch.randint(size.vocabulary, (size.tokens,), generator=generator), size.head_layers)
    with tempfile.TemporaryDirectory() as folder:
        graph = build_prompt_graph(lm, found, run, likely(lm, run, 10, 0.95), options, Path(folder))
    return {
        "active_features": graph.n_active,
        "planned_seconds": plan.total_seconds,
        "cpu_seconds": time.process_time() - start,
        "planned_mb": plan.peak_mb,
        "peak_mb": peak_rss_mb(),
    }


def in_own_process(name: str) -> dict[str, float]:
    """What this file prints for one size."""
    command = [sys.executable, __file__, "--measure", name]
    done = subprocess.run(command, env=one_thread(), capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{name}: expected exit code 0, found {done.returncode}: {done.stderr[-3000:]}")
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="sizes whose name starts so")
    parser.add_argument("--json", type=Path, help="file for every figure")
    parser.add_argument("--measure", choices=SIZES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(SIZES[arguments.measure])))
        return
    results: dict[str, dict[str, Any]] = {}
    table = Table("size", "active", "planned s", "CPU s", "ratio", "planned MB", "peak MB", "ratio")
    for name, size in SIZES.items():
        if arguments.only and not name.startswith(arguments.only):
            continue
        found = in_own_process(name)
        ratios = found["cpu_seconds"] / found["planned_seconds"], found["peak_mb"] / found["planned_mb"]
        results[name] = {**asdict(size), **found, "seconds_ratio": ratios[0], "memory_ratio": ratios[1]}
        seconds, mb = (
            (found[key], found[other], ratio)
            for key, other, ratio in (
                ("planned_seconds", "cpu_seconds", ratios[0]),
                ("planned_mb", "peak_mb", ratios[1]),
            )
        )
        table.add_row(
            name,
            f"{found['active_features']:,.0f}",
            *(f"{x:.2f}" for x in seconds),
            *(f"{x:,.0f}" for x in mb[:2]),
            f"{mb[2]:.2f}",
        )
        if arguments.json:
            arguments.json.write_text(json.dumps(results, indent=1))
    Console().print(table)
    print(
        json.dumps({name: [round(r["seconds_ratio"], 3), round(r["memory_ratio"], 3)] for name, r in results.items()})
    )


if __name__ == "__main__":
    main()
