"""The plan of a prompt's graph against the graph itself."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch

from hagd.artifacts.manifest import peak_rss_mb, reset_peak_rss
from hagd.attribution.prompt.graph import build_prompt_graph
from hagd.attribution.prompt.logits import likely
from hagd.attribution.prompt.plan import PromptPlan, plan_prompt
from hagd.attribution.prompt.records import PromptGraph
from hagd.attribution.prompt.shape import PromptShape
from hagd.attribution.prompt.trace import trace
from hagd.config.model import Architecture, MiniModel
from hagd.config.stages import GraphConfig
from hagd.models.language_model import LanguageModel
from hagd.models.mini import build_mini
from hagd.transcoders.records import Transcoder, TranscoderSet

CPU = torch.device("cpu")
VOCABULARY = 100
EVERY = {"skip_first": True, "logits": {"most": 10, "probability": 1.0}}


def shape_of(lm: LanguageModel, positions: int, m: int, k: int, **changes: Any) -> PromptShape:
    heads, layers = lm.model.config.num_attention_heads, tuple(range(lm.n_layers))
    head = lm.d_model // heads
    parameters = sum(p.numel() for p in lm.model.parameters())
    known: dict[str, Any] = {"skip_first": True, "cross_layer": False, "strongest": None, "most": None, "logits": 10}
    known["parallel"] = lm.adapter.name == "gpt_neox"
    known |= {"decomposed": layers, "m": m, "k": k, "positions": positions} | changes
    return PromptShape(lm.n_layers, lm.d_model, heads, heads, head, parameters, 4, **known)


def dictionaries(lm: LanguageModel, layers: tuple[int, ...], m: int, k: int) -> TranscoderSet:
    g = torch.Generator().manual_seed(0)
    d = lm.d_model

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=g)

    made = (Transcoder(i, k, draw(m, d), torch.full((m,), 9.0), draw(m, d) / 100, draw(d)) for i in layers)
    return TranscoderSet(lm.name, "mlp", tuple(made))


def measured(lm: LanguageModel, shape: PromptShape, folder: Path) -> PromptGraph:
    tokens = torch.randint(VOCABULARY, (shape.positions,), generator=torch.Generator().manual_seed(1))
    run = trace(lm, tokens, shape.head_layers)
    options = {**EVERY, "strongest": shape.strongest, "max_features": shape.most}
    config = GraphConfig(scope="prompt", prompt="any", **options)
    found = dictionaries(lm, shape.decomposed, shape.m, shape.k)
    return build_prompt_graph(lm, found, run, likely(lm, run, 10, 1.0), config, folder)


def planned(shape: PromptShape) -> PromptPlan:
    return plan_prompt(shape, CPU, 300.0)


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        ("gpt2", {}),
        ("gpt2", {"strongest": 20}),
        ("gpt2", {"decomposed": (1, 2)}),
        ("gpt2", {"head_layers": (0, 1, 2)}),
        ("gpt2", {"head_layers": (1, 2), "strongest": 20, "decomposed": (0, 2)}),
        ("gpt_neox", {"head_layers": (0, 2)}),
    ],
    ids=["all", "strongest", "two layers", "heads", "some heads", "heads beside MLPs"],
)
def test_features_and_edges_are_counted_before_they_exist(
    tmp_path: Path, architecture: Architecture, changes: dict[str, Any]
) -> None:
    config = MiniModel(architecture=architecture, n_layers=3, d_model=16, n_heads=2, d_mlp=16)
    lm = build_mini(config, VOCABULARY, 12, 0)
    shape = shape_of(lm, 12, 40, 5, **changes)
    plan, found = planned(shape), measured(lm, shape, tmp_path)
    assert plan.active == found.n_active == len(shape.decomposed) * 5 * 11
    assert plan.edges == found.n_edges
    assert plan.disk_mb == plan.edges * 8 / 2**20
    assert plan.peak_mb == pytest.approx(sum(plan.memory_mb.values())) and plan.memory_mb["process"] == 300


def test_more_costs_more() -> None:
    lm = build_mini(MiniModel(n_layers=2, d_model=16, n_heads=2, d_mlp=16), VOCABULARY, 128, 0)
    small, long = planned(shape_of(lm, 16, 40, 5)), planned(shape_of(lm, 128, 40, 5))
    assert long.peak_mb > small.peak_mb and long.edges > 30 * small.edges
    assert long.seconds["edges"] > 4 * small.seconds["edges"] > 0
    fewer = planned(shape_of(lm, 128, 40, 5, most=50))
    assert fewer.seconds["edges"] < 0.5 * long.seconds["edges"] and fewer.edges < long.edges
    with_heads = planned(shape_of(lm, 16, 40, 5, head_layers=(0, 1)))
    assert with_heads.edges > small.edges and with_heads.memory_mb["heads"] > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("n_layers", "d_model", "n_heads", "positions", "m", "k", "head_layers"),
    [(4, 128, 4, 32, 1024, 48, ()), (6, 256, 4, 64, 2048, 32, ()), (6, 256, 4, 96, 2048, 32, (2, 3, 4, 5))],
)
def test_time_and_memory_are_forecast_within_a_quarter(
    tmp_path: Path,
    n_layers: int,
    d_model: int,
    n_heads: int,
    positions: int,
    m: int,
    k: int,
    head_layers: tuple[int, ...],
) -> None:
    """CPU seconds on one thread; memory beyond what the process has before."""
    torch.set_num_threads(1)
    config = MiniModel(n_layers=n_layers, d_model=d_model, n_heads=n_heads, d_mlp=4 * d_model)
    with torch.device("meta"):  # imports what a model needs, as `mode=plan` does
        build_mini(config, VOCABULARY, positions, 0)
    reset_peak_rss()
    before = peak_rss_mb()
    lm = build_mini(config, VOCABULARY, positions, 0)
    shape = shape_of(lm, positions, m, k, head_layers=head_layers)
    start = time.process_time()
    measured(lm, shape, tmp_path)
    seconds, peak = time.process_time() - start, peak_rss_mb()
    plan = plan_prompt(shape, CPU, before)
    assert plan.total_seconds == pytest.approx(seconds, rel=0.25)
    assert plan.peak_mb == pytest.approx(peak, rel=0.25)
