"""The scorers that come with HAGD."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from hagd.artifacts.codec import load_record
from hagd.pipeline.pipeline import Pipeline
from hagd.search.scorer.apply import score
from hagd.search.scorer.records import TrainedScorer
from hagd.search.scorer.shipped import SHIPPED
from tests.builders import tiny_extract
from tests.search.scorer.family import N_LAYERS, member

EVALUATED = {*range(5), *range(10, 15)}
"""Model seeds of the tables."""


@pytest.mark.parametrize("name", SHIPPED)
def test_it_ranks_and_has_seen_no_model_of_the_tables(name: str, tmp_path: Path) -> None:
    assert Pipeline(tiny_extract(tmp_path, search__scorer=name), Console(quiet=True)).scorer == SHIPPED[name]
    trained = load_record(TrainedScorer, SHIPPED[name])
    assert trained.config["edges"] == (name == "edges")
    models, tasks, seeds = (set(part) for part in zip(*(graph.split("-") for graph in trained.trained_on), strict=True))
    assert len(trained.trained_on) + 1 == 27 and len(models) == len(tasks) == 3
    assert EVALUATED.isdisjoint(map(int, seeds))
    one = member(0)
    scores = score(trained, one.graph, one.hierarchy, N_LAYERS)
    assert scores.shape == (one.graph.n_candidates,) and np.isfinite(scores).all() and np.ptp(scores) > 0
