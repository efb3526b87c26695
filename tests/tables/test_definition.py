from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

from hagd.cli.paths import conf_dir
from hagd.config.load import load_config
from hagd.errors import ConfigError
from hagd.tables.definition import TableSpec, descriptions, load_table, table_names
from tests.tables.cases import SPEC, conf_with_tiny

TABLES = table_names()


@pytest.fixture(scope="module")
def described() -> dict[str, tuple[TableSpec, dict[str, list[str]]]]:
    return descriptions()


def raw(name: str) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((conf_dir() / "experiment" / f"{name}.yaml").read_text())
    return content


@pytest.mark.parametrize("name", TABLES)
def test_labels_are_those_of_values(name: str, described: dict[str, tuple[TableSpec, dict[str, list[str]]]]) -> None:
    spec, swept = described[name]
    for axis, shown in spec.axes.items():
        rows = {each.row.get(axis) for each in spec.not_run} | set(swept[axis])
        if not name.startswith("quick/"):
            assert set(shown.values) <= rows, f"{axis}: labels of values that are not there"


def test_every_table_has_a_quick_one() -> None:
    full = {name for name in TABLES if "/" not in name}
    assert {f"quick/{name}" for name in full} == {name for name in TABLES if "/" in name}
    for name in full:
        assert raw(f"quick/{name}")["defaults"] == [f"/experiment/{name}"]


def test_published_figures_are_in_one_table_each() -> None:
    """Quick tables inherit those of the table that they are a selection of."""
    described = [raw(name)["hydra"]["callbacks"]["table"] for name in TABLES]
    published = Counter(
        (each["of"], each["source"], column, figure)
        for table in described
        for each in table.get("published", [])
        for column, figure in each["figures"].items()
    )
    assert published and set(published.values()) == {1}
    figures = " ".join(figure for _, _, _, figure in published)
    for known in (
        "0.97",
        "47",
        "0.82–0.97",
        "0.74–0.88",
        "0.91",
        "0.84",
        "out of memory",
        "0.15–0.20",
        "0.55–0.61",
        "O(n² log n)",
        "0.52–0.82",
        "below 0.50",
        "below 0.75",
        "above 0.25",
        "O(log_b n)",
    ):
        assert known in figures, known


def test_cells_are_the_jobs_of_the_sweep(tmp_path: Path) -> None:
    conf = conf_with_tiny(tmp_path / "conf", tmp_path / "runs")
    assert table_names(conf) == ["tiny"], "other experiments are no tables"
    found = load_table("tiny", [f"paths.runs={tmp_path / 'elsewhere'}"], conf=conf)
    assert [cell.values for cell in found.cells] == [{"search.pruning": "true"}, {"search.pruning": "false"}]
    for cell, pruning in zip(found.cells, (True, False), strict=True):
        (config,) = cell.configs.values()
        assert config.search.pruning is pruning and config.seed == 0 and config.model.name == "tiny"
        assert config.paths.runs == str(tmp_path / "elsewhere")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"published": [{"figures": {"x": "1"}, "of": "o", "source": "s"}]}, "expected a column .* found x"),
        ({"not_run": [{"row": {"seed": "1"}, "needs": "n"}]}, "expected the axes .* found seed"),
        ({"controls": {}}, "expected marks of controls .* found r"),
        ({"axes": {}}, "axes"),
        ({"colums": {}}, "columns"),
    ],
)
def test_a_wrong_description_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(TableSpec, {**SPEC, **change})


def test_settings_beside_those_of_the_experiment(tmp_path: Path) -> None:
    conf = conf_with_tiny(tmp_path / "conf", tmp_path / "runs")
    found = load_table("tiny", ["search.n_nodes=4", "tracking.project=other", "search.pruning=true", "seed=3"], conf)
    assert [cell.values for cell in found.cells] == [{"search.pruning": "true"}, {"search.pruning": "false"}]
    configs = [config for cell in found.cells for config in cell.configs.values()]
    assert {(config.search.n_nodes, config.tracking.project, config.seed) for config in configs} == {(4, "other", 0)}
    assert found.changed == ("search.n_nodes=4",) and found.stem.startswith("tiny-")
    same = load_table("tiny", ["trainer.threads=2", "graph.batch_size=32", "search.n_nodes=8"], conf)
    assert same.changed == () and same.stem == "tiny", "results are those of the experiment"
    limited = load_table("tiny", ["search.memory_limit_mb=5"], conf)
    assert limited.changed == ("search.memory_limit_mb=5",), "rows say that they are out of memory"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("search.n_node=3", "^search.n_node: expected a known key; did you mean search.n_nodes"),
        (
            "search.gates=true,false",
            "expected one value of search.gates, which makes no rows, found search.gates=true,",
        ),
        ("search.n_nodes=x", "^search.n_nodes: expected a valid integer"),
        ("--overwrite", "expected settings such as search.n_nodes=40, found --overwrite"),
    ],
)
def test_settings_that_do_not_fit_are_refused(tmp_path: Path, override: str, message: str) -> None:
    conf = conf_with_tiny(tmp_path / "conf", tmp_path / "runs")
    with pytest.raises(ConfigError, match=message):
        load_table("tiny", [override], conf)


def test_an_axis_without_description_is_refused(tmp_path: Path) -> None:
    conf = conf_with_tiny(tmp_path / "conf", tmp_path / "runs")
    file = conf / "experiment" / "tiny.yaml"
    file.write_text(file.read_text().replace("      seed: '0'", "      seed: 0,1\n      search.gates: true,false"))
    with pytest.raises(ConfigError, match=r"an axis for every key .*search\.gates.*found search\.pruning"):
        load_table("tiny", conf=conf)


def test_an_unknown_table(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"expected one of .*quick/main.*found manes"):
        load_table("manes")
