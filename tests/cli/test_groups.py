"""Groups of the configuration that are chosen as null or by no name."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra._internal.config_repository import ConfigRepository
from hydra._internal.config_search_path_impl import ConfigSearchPathImpl
from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from hagd.cli.groups import OPTIONAL, _settle, settle_groups
from hagd.errors import ConfigError
from tests.config.composed import CONF


def composed(*overrides: str) -> Any:
    settle_groups()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return OmegaConf.to_container(compose("extract", overrides=list(overrides)))


def test_groups_without_a_default_are_the_optional_ones() -> None:
    defaults = yaml.safe_load((CONF / "base.yaml").read_text())["defaults"]
    none = [name for each in defaults if isinstance(each, dict) for name, option in each.items() if option is None]
    assert sorted(none) == sorted(OPTIONAL)


def test_null_chooses_no_file() -> None:
    assert composed(*(f"{group}=null" for group in OPTIONAL)) == composed()
    assert composed("comparison=llama_mini")["comparison"] is not None


@pytest.mark.parametrize(
    ("override", "found"), [("model=null", "null"), ("task=[3]", "[3]"), ("tracking=3", "3"), ("hydra=null", "null")]
)
def test_what_names_no_file_is_refused(override: str, found: str) -> None:
    group = override.partition("=")[0]
    with pytest.raises(ConfigError) as caught:
        composed(override)
    said = str(caught.value)
    assert said.startswith(f"{group}: expected one of ") and said.endswith(
        f", found {found}; choose one, or leave it out"
    )


def test_a_sweep_is_checked_before_its_jobs() -> None:
    repo, parse = ConfigRepository(ConfigSearchPathImpl()), OverridesParser.create().parse_override
    repo.sources.append(FileConfigSource("test", str(CONF)))
    for allowed in (
        "comparison=null,half_width",
        "model=glob(*_mini)",
        "model=gpt2_mini,'pythia_mini'",
        "search=[hagd],[gates]",
    ):
        _settle(repo, parse(allowed))
    with pytest.raises(ConfigError, match=r"model: expected one of .*, found null,gpt2_mini; choose one"):
        _settle(repo, parse("model=null,gpt2_mini"))


def test_workers_of_launchers_choose_alike() -> None:
    """They import the module of the job's function, and compose without the command's `main`."""
    code = "import hagd.cli.{0}\nfrom hydra._internal import config_loader_impl as c\nprint(c.create_defaults_list)"
    for entry in ("extract", "train"):
        done = subprocess.run([sys.executable, "-c", code.format(entry)], capture_output=True, text=True)
        assert "_settled" in done.stdout


def test_sections_lists_of_names_and_deletions_stay_hydras() -> None:
    assert composed("search={n_nodes: 3}")["search"]["n_nodes"] == 3
    assert composed("tracking=[disabled]")["tracking"]["mode"] == "disabled"
    assert "report" not in composed("~report")
