"""What an extraction computes again, and what it takes from earlier ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hagd.config.load import load_config
from hagd.config.run import ExtractConfig
from hagd.pipeline.pipeline import Pipeline
from hagd.pipeline.stage_list import STAGES
from tests.builders import tiny_extract
from tests.pipeline.extractions import BEFORE_SEARCH, PARTS, QUIET, extract, reused

pytestmark = pytest.mark.usefixtures("undrawn")


def test_a_second_run_reuses_every_stage(tiny_runs: Path, tmp_path: Path) -> None:
    again = extract(tiny_extract(tiny_runs), tmp_path)
    assert reused(tmp_path) == set(PARTS)
    first = json.loads((tiny_runs / "first" / "metrics.json").read_text())
    costs = {"time.total_s", "time.wall_s", "memory.peak_mb"}
    assert {key: again[key] for key in again.keys() - costs} == {key: first[key] for key in first.keys() - costs}
    assert again["time.total_s"] == pytest.approx(first["time.total_s"])  # what the stages took when they ran


def test_a_reused_report_shows_the_settings_of_its_own_run(tiny_runs: Path, tmp_path: Path) -> None:
    extract(tiny_extract(tiny_runs, tracking__tags=["distinctive"]), tmp_path)
    assert reused(tmp_path) == set(PARTS)
    assert "distinctive" in (tmp_path / "report.html").read_text()


def test_another_search_computes_from_the_search_on(
    tiny_runs: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    extract(tiny_extract(tiny_runs, search__pruning_budget=20), tmp_path)
    assert reused(tmp_path) == BEFORE_SEARCH
    warned = "search.pruning_budget=20 leaves 10 for the reported circuit: not pruned; set search.pruning_budget to at"
    assert warned in caplog.text and warned in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(
    ("change", "kept"),
    [
        ({"validation__n_random": 4}, BEFORE_SEARCH | {"search"}),
        ({"hierarchy__branching": 3}, BEFORE_SEARCH - {"hierarchy"}),
        ({"graph__edge_prompts": 5}, BEFORE_SEARCH - {"graph", "hierarchy"}),
        ({"task__only_correct": False}, {"task", "lm"}),
        ({"transcoder__fvu_warning": 0.5}, set(PARTS) - {"report"}),
        ({"transcoder__bandwidth": 0.2, "transcoder__head_rank": 3}, set(PARTS)),
        ({"transcoder__dead_fraction": 0.1}, {"task", "lm", "prompts"}),
        ({"seed": 1}, set()),
        ({"trainer__checkpoint_every": 7, "tracking__tags": ["x"], "graph__batch_size": 9}, set(PARTS)),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_change_reaches_only_what_depends_on_it(tiny_runs: Path, change: dict[str, Any], kept: set[str]) -> None:
    before, after = (Pipeline(tiny_extract(tiny_runs, **c), QUIET) for c in ({}, change))
    assert {name for name in PARTS if before.key(name) == after.key(name)} == kept


def test_group_tests_that_overran_their_budget_have_a_new_address(tmp_path: Path) -> None:
    def newer(**changes: Any) -> bool:
        return "traversal_version" in STAGES["search"].config(Pipeline(tiny_extract(tmp_path, **changes), QUIET))

    assert newer(search__traversal=True) and not newer(search__traversal=True, search__loss="divergence")
    assert not newer(search__traversal=False)


def test_the_key_follows_the_files_of_a_model_in_the_home_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    weights = tmp_path / "model" / "model.safetensors"
    weights.parent.mkdir()
    sections = {"model": {"kind": "pretrained", "name": "tiny", "path": "~/model"}, "task": {"name": "ioi"}}
    keys = set()
    for content in ("", "other weights"):
        weights.write_text(content)
        keys.add(Pipeline(load_config(ExtractConfig, sections), QUIET).key("task"))
    assert len(keys) == 2


def test_the_same_seed_gives_the_same_result_bitwise(tiny_runs: Path, tmp_path: Path) -> None:
    pipeline = Pipeline(tiny_extract(tmp_path), QUIET)
    pipeline.get("report")
    other = Pipeline(tiny_extract(tiny_runs), QUIET)
    for name in PARTS:
        ours, theirs = pipeline.get(name), other.get(name)
        if name in ("search", "report"):  # these also hold times
            continue
        files = [store.used[name].path / "tensors.safetensors" for store in (pipeline, other)]
        assert files[0].is_file() == files[1].is_file()
        assert not files[0].is_file() or files[0].read_bytes() == files[1].read_bytes(), name
        assert type(ours) is type(theirs)
    assert [c.nodes.tolist() for c in pipeline.get("search").circuits] == [
        c.nodes.tolist() for c in other.get("search").circuits
    ]
    assert np.array_equal(pipeline.get("search").score, other.get("search").score)
    assert pipeline.get("validation").metrics == other.get("validation").metrics
