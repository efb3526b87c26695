from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from pytorch_lightning.loggers import CSVLogger, Logger
from scipy.stats import spearmanr

from hagd.artifacts.codec import load_record, save_record
from hagd.config.run import GNNConfig, TrainerConfig
from hagd.errors import ArtifactError, ConfigError
from hagd.search.scorer.apply import build_network, load_network, score
from hagd.search.scorer.inputs import INPUTS
from hagd.search.scorer.module import GraphBatch, ScorerTraining, correlation_with_ranks
from hagd.search.scorer.records import ScoredGraph, TrainedScorer
from hagd.search.scorer.training import spearman, standardised_ranks, train_scorer
from tests.search.scorer.family import N_LAYERS, member

UNSEEN = 99
SETTINGS = {"edges": True, "hidden": 16, "heads": 2, "n_layers": 2, "learning_rate": 1e-2}


def train(folder: Path, n_graphs: int = 7, loggers: Sequence[Logger] = (), **options: Any) -> TrainedScorer:
    graphs = [member(seed).scored(f"graph{seed}") for seed in range(n_graphs)]
    config = GNNConfig(**{**SETTINGS, "epochs": 20, **options})
    return train_scorer(graphs, config, 0, TrainerConfig(), folder / "checkpoint", loggers)


def logged(folder: Path, name: str) -> list[float]:
    header, *rows = (folder / "log" / "metrics.csv").read_text().splitlines()
    position = header.split(",").index(name)
    return [float(row.split(",")[position]) for row in rows if row.split(",")[position]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("gat")


@pytest.fixture(scope="module")
def gat(folder: Path) -> TrainedScorer:
    return train(folder, loggers=[CSVLogger(folder, "log", "")])


@pytest.fixture(scope="module")
def control(tmp_path_factory: pytest.TempPathFactory) -> TrainedScorer:
    return train(tmp_path_factory.mktemp("control"), edges=False)


def test_training_lowers_the_loss(gat: TrainedScorer) -> None:
    graph = member(0).scored()
    batch = GraphBatch(
        graph.inputs,
        graph.edge_index,
        graph.edge_type,
        graph.edge_attr,
        graph.target,
        standardised_ranks(member(0).target),
    )
    config = GNNConfig(**SETTINGS)
    untrained, trained = (
        ScorerTraining(network, config, 1).training_step(batch, 0)
        for network in (build_network(gat.config), load_network(gat))
    )
    assert untrained["loss"] > 0.5
    assert trained["loss"] < 0.4 * untrained["loss"]


def test_loss_and_correlations_are_logged(gat: TrainedScorer, folder: Path) -> None:
    assert 0 < logged(folder, "gnn/loss")[-1] < 0.3  # above 0.5 before training
    assert logged(folder, "gnn/correlation")[-1] > 0.8
    assert logged(folder, "gnn/validation_correlation") == [pytest.approx(gat.validation_correlation)]


def test_edges_beat_importance_and_the_control_on_graphs_never_seen(gat: TrainedScorer, control: TrainedScorer) -> None:
    unseen = [member(seed) for seed in range(UNSEEN, UNSEEN + 4)]
    importance, with_edges, without = (
        np.mean([spearman(scores(*each), each[2]) for each in unseen])
        for scores in (
            lambda graph, hierarchy, target: graph.nodes.importance[: len(target)],
            lambda graph, hierarchy, target: score(gat, graph, hierarchy, N_LAYERS),
            lambda graph, hierarchy, target: score(control, graph, hierarchy, N_LAYERS),
        )
    )
    assert with_edges > 0.8
    assert with_edges > importance + 0.2
    assert with_edges > without + 0.2
    assert without > importance - 0.15


def test_the_last_graph_is_held_out_and_reported(gat: TrainedScorer) -> None:
    assert gat.trained_on == tuple(f"graph{seed}" for seed in range(6))
    assert gat.validation_graph == "graph6"
    graph, hierarchy, target = member(6)
    scores = score(gat, graph, hierarchy, N_LAYERS)
    assert gat.validation_correlation == pytest.approx(spearmanr(scores, target).statistic)
    alone = spearmanr(graph.nodes.importance[: len(target)], target).statistic
    assert gat.importance_correlation == pytest.approx(alone)


def test_two_graphs_are_both_trained_on(tmp_path: Path) -> None:
    trained = train(tmp_path, n_graphs=2, epochs=1)
    assert trained.trained_on == ("graph0", "graph1")
    assert trained.validation_graph is trained.validation_correlation is trained.importance_correlation is None


def test_same_seed_same_weights(tmp_path: Path) -> None:
    first, again = (train(tmp_path / name, n_graphs=3, epochs=2) for name in ("first", "again"))
    assert all(torch.equal(first.state[name], again.state[name]) for name in first.state)


def test_no_graphs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="at least one graph"):
        train(tmp_path, n_graphs=0)


def test_heads_divide_the_width() -> None:
    with pytest.raises(ValidationError, match=r"multiple of gnn\.heads=4, found 30"):
        GNNConfig(hidden=30, heads=4)


def test_a_scorer_survives_the_disk_bit_for_bit(gat: TrainedScorer, tmp_path: Path) -> None:
    save_record(gat, tmp_path)
    loaded = load_record(TrainedScorer, tmp_path)
    assert list(loaded.state) == list(gat.state)
    assert all(torch.equal(loaded.state[name], gat.state[name]) for name in gat.state)
    assert dataclasses.replace(loaded, state={}) == dataclasses.replace(gat, state={})
    graph, hierarchy, _ = member(UNSEEN)
    assert np.array_equal(score(loaded, graph, hierarchy, N_LAYERS), score(gat, graph, hierarchy, N_LAYERS))


def test_a_graph_survives_the_disk_bit_for_bit(tmp_path: Path) -> None:
    scored = member(0).scored()
    save_record(scored, tmp_path)
    loaded = load_record(ScoredGraph, tmp_path)
    for field in dataclasses.fields(ScoredGraph):
        before, after = getattr(scored, field.name), getattr(loaded, field.name)
        assert torch.equal(before, after) if isinstance(before, torch.Tensor) else before == after


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"inputs": INPUTS[:-1]}, "expected the inputs importance_rank"),
        ({"inputs": tuple(name for name in INPUTS if name != "head")}, "feature, head, error.*found .*feature, error"),
        (
            {"config": {"n_inputs": len(INPUTS), "hidden": 32, "heads": 2, "n_layers": 2, "edges": True}},
            "size mismatch",
        ),
        ({"config": {"n_inputs": len(INPUTS), "hidden": 16, "heads": 2, "n_layers": 2, "edges": False}}, "Missing key"),
        ({"config": {"width": 3}}, "width"),
        (
            {"config": {"n_inputs": len(INPUTS), "hidden": 16, "heads": 0, "n_layers": 2, "edges": True}},
            "modulo|division",
        ),
        ({"state": {}}, "Missing key"),
    ],
)
def test_a_scorer_that_does_not_fit_is_refused(gat: TrainedScorer, change: dict[str, Any], message: str) -> None:
    graph, hierarchy, _ = member(UNSEEN)
    with pytest.raises(ArtifactError, match=message) as error:
        score(dataclasses.replace(gat, **change), graph, hierarchy, N_LAYERS)
    assert "search.scorer=null" in str(error.value)


def test_a_scorer_with_a_nan_is_refused(gat: TrainedScorer) -> None:
    graph, hierarchy, _ = member(UNSEEN)
    state = {**gat.state, "gain": torch.full((2,), torch.nan)}
    with pytest.raises(ArtifactError, match="finite scores"):
        score(dataclasses.replace(gat, state=state), graph, hierarchy, N_LAYERS)


def test_spearman_is_scipys_and_nan_for_a_constant() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.random(50), rng.integers(0, 3, 50)
    assert spearman(a, b) == pytest.approx(spearmanr(a, b).statistic)
    assert np.isnan(spearman(a, np.zeros(50)))


def test_the_correlation_while_training_is_spearmans() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.random(50), rng.integers(0, 3, 50)
    found = correlation_with_ranks(torch.from_numpy(a), standardised_ranks(b))
    assert float(found) == pytest.approx(spearmanr(a, b).statistic, abs=1e-5)


@pytest.mark.slow
def test_heavy_libraries_are_imported_late() -> None:
    code = (
        "import sys, hagd.search.scorer.training, hagd.search.scorer.inputs;"
        "print([name for name in ('torch_geometric', 'pytorch_lightning') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
