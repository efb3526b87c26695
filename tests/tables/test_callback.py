"""The table at the end of a sweep."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import CompactHydraException
from omegaconf import DictConfig

from hagd.cli.sweep_end import sweep_ends
from hagd.tables import definition
from tests.tables.cases import conf_with_tiny
from tests.tracking.read_back import inspect, offline_runs


def refuse(composed: DictConfig) -> float:
    """A job that fails."""
    raise CompactHydraException("search.memory_limit_mb: too little")


def sweep(conf: Path, *overrides: str) -> None:
    """`extract.py experiment=tiny`, of which every job fails."""
    with sweep_ends(), initialize_config_dir(str(conf), version_base="1.3"):
        hydra = GlobalHydra.instance().hydra
        assert hydra is not None
        with pytest.raises(CompactHydraException):
            hydra.multirun("extract", refuse, ["experiment=tiny", *overrides], with_log_configuration=False)


def test_a_failed_job_does_not_stop_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    conf = conf_with_tiny(tmp_path / "conf", tmp_path / "runs")
    monkeypatch.setattr(definition, "conf_dir", lambda: conf)
    sweep(conf)
    assert (tmp_path / "runs" / "tables" / "tiny.md").read_text().count("0 of 1") == 2
    shown = capsys.readouterr().out
    assert shown.count("Tiny & small") == 1 and shown.count("0 of 2 jobs done") == 1


def test_a_sweep_of_other_settings_has_a_table_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    conf = conf_with_tiny(tmp_path / "conf", tmp_path / "runs", tracking={"mode": "offline"})
    monkeypatch.setattr(definition, "conf_dir", lambda: conf)
    runs = tmp_path / "elsewhere"
    tables = runs / "tables"
    tables.mkdir(parents=True)
    (tables / "tiny.md").write_text("of the experiment's settings")
    where = [f"paths.runs={runs}", "tracking.mode=disabled"]
    sweep(conf, *where, "search.pruning=true", "search.n_nodes=4", "trainer.threads=2")
    assert offline_runs(runs) == []
    assert (tables / "tiny.md").read_text() == "of the experiment's settings"
    (written,) = tables.glob("tiny-*.md")
    assert "Settings other than the experiment’s: search.n_nodes=4 trainer.threads=2." in written.read_text()
    settings = json.loads(written.with_suffix(".json").read_text())["settings"]
    assert settings == ["search.n_nodes=4", "trainer.threads=2"]


def test_a_table_is_tracked_as_its_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    conf = conf_with_tiny(tmp_path / "conf", tmp_path / "runs", tracking={"mode": "offline"})
    monkeypatch.setattr(definition, "conf_dir", lambda: conf)
    sweep(conf, "tracking.project=other")
    (run,) = offline_runs(tmp_path / "runs")
    records = [json.loads(line) for line in inspect(run).splitlines()]
    assert [record["run"]["project"] for record in records if record["type"] == "run"] == ["other"]
