from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from hagd.config.load import field_names
from hagd.config.run import ExtractConfig
from hagd.errors import ConfigError
from hagd.tracking.workspace import SWEPT, as_json, comparison_workspace, main, save


def axes(definition: dict[str, Any]) -> list[tuple[str, str]]:
    sections = definition["section"]["panelBankConfig"]["sections"]
    configs = [panel["config"] for section in sections for panel in section["panels"]]
    return [(config["xAxis"], config["yAxis"]) for config in configs if "xAxis" in config]


def test_the_definition_shows_what_runs_log(tiny_runs: Path) -> None:
    pytest.importorskip("wandb_workspaces")
    shown = axes(as_json(comparison_workspace("team", "hagd")))
    logged = json.loads((tiny_runs / "first" / "metrics.json").read_text())
    summaries = {axis.removeprefix("summary:") for pair in shown for axis in pair if axis.startswith("summary:")}
    assert summaries <= set(logged) and ("summary:circuit.nodes", "summary:validation.preservation") in shown
    swept = [x.removeprefix("config:").replace(".value", "", 1) for x, _ in shown if x.startswith("config:")]
    assert set(swept) == set(SWEPT) <= set(field_names(ExtractConfig))
    for key in SWEPT:
        section, _, name = key.partition(".")
        assert (f"config:{section}.value.{name}", "summary:validation.preservation") in shown


def test_the_command_writes_the_definition(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb_workspaces")
    monkeypatch.setattr(sys, "argv", ["workspace", "--json", str(tmp_path / "view.json")])
    main()
    written = json.loads((tmp_path / "view.json").read_text())
    assert len(axes(written)) == 4 + 3 * len(SWEPT)
    assert "extract" in json.dumps(written["section"]["runSets"])


def test_without_login_it_says_what_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb_workspaces")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    with pytest.raises(ConfigError, match=r"did not save it.*wandb login.*wandb sync.*--json"):
        save(comparison_workspace("team", "hagd"))


def test_without_the_package_it_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb_workspaces.reports.v2", None)
    monkeypatch.setitem(sys.modules, "wandb_workspaces", None)
    with pytest.raises(ConfigError, match=r"hagd\[workspaces\]"):
        comparison_workspace("team", "hagd")
