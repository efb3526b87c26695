"""The table at the end of a sweep."""

from __future__ import annotations

from pathlib import Path

import pytest
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import CompactHydraException
from omegaconf import DictConfig

from hagd.cli.sweep_end import sweep_ends
from hagd.tables import definition
from tests.tables.cases import conf_with_tiny


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
