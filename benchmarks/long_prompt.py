"""All edges of a long prompt in bounded memory: `python benchmarks/long_prompt.py`.

A random two-layer GPT-2 (d 64, 4 heads) with TopK transcoders, 2,048 tokens: every active feature is a target, its
influence counts all of its edges, and the strongest of them are kept. Prints the plan first, and ends with one line of
JSON: what was planned and what was measured. One thread; memory is the largest resident size of the process, Python
and PyTorch included.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import psutil
import torch
from rich.console import Console

from hagd.artifacts.manifest import peak_rss_mb, reset_peak_rss
from hagd.attribution.prompt.graph import build_prompt_graph
from hagd.attribution.prompt.logits import likely
from hagd.attribution.prompt.plan import PromptShape, plan_prompt
from hagd.attribution.prompt.trace import trace
from hagd.config.model import MiniModel
from hagd.config.stages import GraphConfig
from hagd.models.mini import build_mini
from hagd.pipeline.prompt_plan import plan_table
from hagd.transcoders.records import Transcoder, TranscoderSet

VOCABULARY, N_LAYERS, D, HEADS, M = 1000, 2, 64, 4, 512


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--k", type=int, default=16, help="active features a token and layer")
    parser.add_argument("--strongest", type=int, default=64, help="edges kept a target")
    parser.add_argument("--plan", action="store_true", help="the plan alone")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    positions, k = arguments.tokens, arguments.k
    shape = PromptShape(
        n_layers=N_LAYERS,
        d=D,
        heads=HEADS,
        kv_heads=HEADS,
        head=D // HEADS,
        parameters=N_LAYERS * 12 * D * D + 2 * VOCABULARY * D,
        weight_bytes=4,
        positions=positions,
        decomposed=tuple(range(N_LAYERS)),
        m=M,
        k=k,
        skip_first=True,
        cross_layer=False,
        strongest=arguments.strongest,
        most=None,
        logits=10,
    )
    plan = plan_prompt(shape, torch.device("cpu"), psutil.Process().memory_info().rss / 2**20)
    Console().print(plan_table(plan))
    if arguments.plan:
        return
    generator = torch.Generator().manual_seed(0)

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator)

    reset_peak_rss()
    start = time.process_time()
    lm = build_mini(MiniModel(n_layers=N_LAYERS, d_model=D, n_heads=HEADS, d_mlp=4 * D), VOCABULARY, positions, 0)
    found = TranscoderSet(
        lm.name, "mlp", tuple(Transcoder(i, k, draw(M, D), draw(M), draw(M, D) / 100, draw(D)) for i in range(N_LAYERS))
    )
    run = trace(lm, torch.randint(VOCABULARY, (positions,), generator=generator))
    config = GraphConfig(scope="prompt", prompt="random", skip_first=True, strongest=arguments.strongest)
    with tempfile.TemporaryDirectory() as folder:
        graph = build_prompt_graph(lm, found, run, likely(lm, run, 10, 0.95), config, Path(folder))
    seconds = time.process_time() - start
    figures = {
        "tokens": positions,
        "active_features": graph.n_active,
        "edges_kept": graph.n_edges,
        "cpu_seconds": round(seconds, 1),
        "planned_seconds": round(plan.total_seconds, 1),
        "peak_mb": round(peak_rss_mb()),
        "planned_mb": round(plan.peak_mb),
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
