"""Configuration files of a user that cannot be read: one line, exit code 1, from every command."""

from __future__ import annotations

from pathlib import Path

import pytest
from hydra._internal import utils

from hagd.cli.config_files import refuse_unreadable_files
from hagd.cli.train import _section
from hagd.errors import ConfigError
from hagd.tables import definition
from hagd.tables.command import main
from tests.cli.jobs import run_command
from tests.tables.cases import conf_with_tiny

TAB = "# @package _global_\nsearch:\n\tn_nodes: 5\n"


def own(root: Path, content: str, group: str = "experiment") -> Path:
    """A file `mine` of a folder of configuration that a user has beside that of HAGD."""
    file = root / "own" / group / "mine.yaml"
    file.parent.mkdir(parents=True)
    file.write_text(content)
    return file


@pytest.mark.parametrize(
    ("entry", "arguments"),
    [
        ("extract.py", ["--config-dir", "own", "experiment=mine"]),
        ("extract.py", ["-m", "--config-dir", "own", "experiment=mine,main"]),
        ("extract.py", ["--config-dir", "own", "--info", "defaults", "experiment=mine"]),
        ("train.py", ["hydra.searchpath=[file://own]", "experiment=mine"]),
    ],
    ids=["run", "sweep", "info", "train"],
)
def test_a_slip_in_an_experiment_is_one_line(tmp_path: Path, entry: str, arguments: list[str]) -> None:
    file = own(tmp_path, TAB)
    done = run_command(tmp_path, *arguments, entry=entry)
    assert done.returncode == 1
    assert done.stderr.replace(str(tmp_path) + "/", "") == (
        f"error: {file.relative_to(tmp_path)}, line 3: expected YAML, found '\\tn_nodes: 5' (found character '\\t' "
        "that cannot start any token); indent by spaces, not by tabs\n"
    )


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (
            "seed: 1\nseed: 2\n",
            "line 2: expected YAML, found 'seed: 2' (while constructing a mapping that begins in line 1: ",
        ),
        ("defaults:\n  override /model: hf\n", "expected a configuration file, found: Invalid defaults list in "),
        (
            "# @package\nseed: 1\n",
            "expected a configuration file, found: Expected header format: KEY VALUE, got '@package'",
        ),
        ("3\n", "expected a configuration file, found: Invalid loaded object type: int"),
        ("- n_nodes: ???\n", "expected keys with values, found a list; write key: value in each line, without a dash"),
    ],
    ids=["twice", "defaults", "header", "number", "list"],
)
def test_what_hydra_alone_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], content: str, said: str
) -> None:
    conf = conf_with_tiny(tmp_path / "conf", tmp_path / "runs")
    monkeypatch.setattr(definition, "conf_dir", lambda: conf)
    (conf / "search" / "mine.yaml").write_text(content)
    with pytest.raises(SystemExit) as stop:
        main(["list", "tiny", "search=mine"])
    shown = capsys.readouterr().err
    assert stop.value.code == 1 and shown.startswith(f"error: {conf / 'search' / 'mine.yaml'}") and said in shown


def test_tables_answer_an_unknown_option_with_the_nearest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    conf = conf_with_tiny(tmp_path / "conf", tmp_path / "runs")
    monkeypatch.setattr(definition, "conf_dir", lambda: conf)
    experiment = conf / "experiment" / "tiny.yaml"
    with pytest.raises(SystemExit):
        main(["list", "tiny", "search=gate"])
    assert capsys.readouterr().err.strip().endswith(", found gate; did you mean search=gates?")
    experiment.write_text(f"{experiment.read_text()}\n\tseed: 1\n")
    with pytest.raises(SystemExit):
        main([])
    assert capsys.readouterr().err.startswith(f"error: {experiment}, line ")


def test_a_slip_in_a_file_of_the_scorers_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = own(tmp_path, "name: a\n\tb: 1\n", "model")
    monkeypatch.setattr("hagd.cli.train.conf_dir", lambda: tmp_path / "own")
    with pytest.raises(ConfigError, match=rf"{file}, line 2: expected YAML, .*; indent by spaces"):
        _section("model", "mine")


@pytest.mark.parametrize(("content", "found"), [("- name: a\n", "a list"), ("", "None"), ("name a\n", "'name a'")])
def test_a_file_of_the_scorers_models_without_keys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str, found: str
) -> None:
    file = own(tmp_path, content, "model")
    monkeypatch.setattr("hagd.cli.train.conf_dir", lambda: tmp_path / "own")
    with pytest.raises(ConfigError, match=rf"{file}: expected keys with values, found {found}; write key: value"):
        _section("model", "mine")


def test_a_list_in_place_of_an_experiment_is_named(tmp_path: Path) -> None:
    file = own(tmp_path, "# @package _global_\n- seed: 1\n")
    done = run_command(tmp_path, "--config-dir", "own", "experiment=mine")
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {file}: expected keys with values, found a list; ")


def test_other_errors_keep_their_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    refuse_unreadable_files()

    def fail() -> None:
        raise RuntimeError("a bug")

    with pytest.raises(SystemExit):
        utils.run_and_report(fail)
    shown = capsys.readouterr().err
    assert "Traceback" in shown and "RuntimeError: a bug" in shown
