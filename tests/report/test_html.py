from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from hagd.report.chart import curve_charts
from hagd.report.fragments import comparison_bars, metrics_table, reconstruction_table, search_table
from hagd.report.html import render, write_report
from hagd.report.payload import payload
from hagd.report.records import Edges, LayerReconstruction, ReportData

VOID = {"meta", "input", "img", "br", "link", "hr"}


class Page(HTMLParser):
    """Checks that elements nest, and collects ids, references and the texts of scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "script":
            self.scripts.append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.scripts[-1] += data
        else:
            self.words.append(data)

    def data(self) -> dict:
        return json.loads(self.scripts[0])


def test_page_is_well_formed_and_needs_no_network(report: ReportData, tmp_path: Path) -> None:
    path = tmp_path / "deep" / "report.html"
    write_report(report, path)
    page = Page(path.read_text(encoding="utf-8"))
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    links = [value for _, a in page.elements for name, value in a.items() if name in ("src", "href", "action", "data")]
    assert all(value and value.startswith("#") for value in links)
    assert {value[1:] for value in links if value and value.startswith("#")} <= set(ids)
    policy = next(a["content"] for tag, a in page.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None and policy.startswith("default-src 'none'")
    assert list(path.parent.iterdir()) == [path]


def test_references_between_elements_resolve(report: ReportData) -> None:
    page = Page(render(report))
    ids = {attributes["id"] for _, attributes in page.elements if "id" in attributes}
    named = ("aria-labelledby", "aria-describedby", "for")
    wanted = {word for _, a in page.elements for name in named for word in (a.get(name) or "").split()}
    assert wanted and wanted <= ids


def test_circuit_round_trips_through_the_page(report: ReportData) -> None:
    found = Page(render(report)).data()
    assert found == payload(report)
    nodes, edges = found["nodes"], found["edges"]
    assert nodes["id"] == [node.id for node in report.nodes]
    assert [nodes["id"][i] for i in edges["source"]] == report.edges.source.tolist()
    assert [nodes["id"][i] for i in edges["target"]] == report.edges.target.tolist()
    np.testing.assert_allclose(edges["weight"], report.edges.weight, rtol=1e-3)
    node = report.nodes[50]
    prompt, position, activation = nodes["prompts"][50][0]
    assert tuple(found["prompts"][prompt]) == node.prompts[0].tokens
    assert (position, activation) == (node.prompts[0].position, pytest.approx(node.prompts[0].activation, rel=1e-3))
    assert {found["rows"][row] for row, kind in zip(nodes["row"], nodes["kind"], strict=True) if kind == "logit"} == {
        "logits"
    }


def test_ids_need_not_be_positions(report: ReportData) -> None:
    shifted = replace(
        report,
        circuits=(),
        nodes=tuple(replace(node, id=1000 - 3 * node.id) for node in report.nodes),
        edges=Edges(1000 - 3 * report.edges.source, 1000 - 3 * report.edges.target, report.edges.weight),
    )
    assert payload(shifted)["edges"] == payload(report)["edges"]


def test_edges_are_drawn_by_influence_where_it_is_known(report: ReportData) -> None:
    assert "drawn" not in payload(report)["edges"]
    influence = np.linspace(0, 1, len(report.edges.weight))
    found = payload(replace(report, edges=replace(report.edges, influence=influence)))["edges"]
    np.testing.assert_allclose(found["drawn"], np.sign(report.edges.weight) * influence, rtol=1e-3)
    np.testing.assert_allclose(found["weight"], report.edges.weight, rtol=1e-3)


def test_hostile_texts_stay_texts(report: ReportData) -> None:
    hostile = "</script><script>alert(1)</script><!--"
    node = replace(report.nodes[0], label=hostile)
    data = replace(
        report, nodes=(node, *report.nodes[1:]), model=hostile, warnings=(hostile,), settings={hostile: hostile}
    )
    page = Page(render(data))
    assert len(page.scripts) == len(Page(render(report)).scripts)
    assert page.data()["nodes"]["label"][0] == hostile


def test_values_that_are_not_finite_become_null(report: ReportData) -> None:
    node = replace(report.nodes[4], mean_activation=float("nan"), ablation_effect=float("inf"))
    found = Page(render(replace(report, nodes=(*report.nodes[:4], node, *report.nodes[5:])))).data()
    assert found["nodes"]["mean"][4] is None and found["nodes"]["effect"][4] is None


def test_headline_verdict_and_controls_stand_in_the_page(report: ReportData) -> None:
    words = " ".join(Page(render(report)).words)
    for part in ("94.8 % [92.7, 96.9]", "empty circuit", "10.2 % [9.0, 11.5]", "lies above", "27 % of the variance"):
        assert part in words


def test_an_empty_circuit_still_has_a_page(report: ReportData) -> None:
    bare = replace(report, nodes=(), edges=no_edges(), curves=(), search=(), reconstruction=(), levels=(), circuits=())
    words = " ".join(Page(render(bare)).words)
    assert "No curve was measured" in words and "No search ran" in words


def test_charts_are_valid_svg_with_one_line_a_method(report: ReportData) -> None:
    charts = ElementTree.fromstring(curve_charts(report))
    for svg in charts.iter("svg"):
        assert len(list(svg.iter("polyline"))) == len(report.curves)
        assert "empty circuit" in {text.text for text in svg.iter("text")}
    preservation, faithfulness = charts.iter("svg")
    assert len(list(preservation.iter("polygon"))) == len(report.curves)
    assert not list(faithfulness.iter("polygon"))


def test_one_size_and_missing_values_are_drawn(report: ReportData) -> None:
    curve = replace(report.curves[0], sizes=(5,), faithfulness=(float("nan"),), preservation=(0.5,), low=(), high=())
    preservation, faithfulness = ElementTree.fromstring(curve_charts(replace(report, curves=(curve,)))).iter("svg")
    assert len(list(preservation.iter("circle"))) == 1
    assert not list(faithfulness.iter("circle"))


@pytest.mark.parametrize(
    ("lowest", "grid"),
    [
        (0.0, ["0.0", "0.2", "0.4", "0.6", "0.8", "1.0"]),
        (-3.7, ["-4.0", "-3.5", "-3.0", "-2.5", "-2.0", "-1.5", "-1.0", "-0.5", "0.0", "0.5", "1.0"]),
        (-40.0, ["-40", "-35", "-30", "-25", "-20", "-15", "-10", "-5", "0", "5"]),
    ],
)
def test_an_outlier_leaves_few_grid_lines(report: ReportData, lowest: float, grid: list[str]) -> None:
    curve = replace(report.curves[0], faithfulness=(lowest, *report.curves[0].faithfulness[1:]))
    faithfulness = list(ElementTree.fromstring(curve_charts(replace(report, curves=(curve,)))).iter("svg"))[1]
    assert [text.text for text in faithfulness.iter("text") if text.get("text-anchor") == "end"] == grid
    assert len([line for line in faithfulness.iter("line") if line.get("class") == "grid"]) == len(grid)


def test_each_chart_has_room_for_its_own_values_and_the_empty_circuit(report: ReportData) -> None:
    curve = replace(report.curves[0], high=(1.9,) * len(report.curves[0].sizes))
    metrics = {**report.metrics, "empty.accuracy": 1.4 * report.metrics["model.accuracy"]}
    for curves, tops in (((curve,), ("2.0", "1.0")), (report.curves[:1], ("1.4", "1.0"))):
        charts = ElementTree.fromstring(curve_charts(replace(report, curves=curves, metrics=metrics)))
        for svg, top in zip(charts.iter("svg"), tops, strict=True):
            assert [text.text for text in svg.iter("text") if text.get("text-anchor") == "end"][-1] == top


def test_bars_have_room_for_their_intervals(report: ReportData) -> None:
    wide = replace(report, metrics={**report.metrics, "validation.preservation.high": 1.25})
    bars = ElementTree.fromstring(comparison_bars(wide))
    styles = [dict(part.split(":") for part in (b.get("style") or "").split(";")) for b in bars.iter("b")]
    left, width = (float(styles[0][key].rstrip("%")) for key in ("left", "width"))
    assert left + width == pytest.approx(100, abs=0.02) and left == pytest.approx(92.7 / 1.25, abs=0.1)


def test_the_first_column_names_the_row(report: ReportData) -> None:
    rows = ElementTree.fromstring(search_table(report)).findall(".//tbody/tr")
    assert [row[0].text for row in rows] == [part.name for part in report.search]
    assert all(row[0].tag == "th" and row[0].get("scope") == "row" for row in rows)
    assert all({cell.tag for cell in row[1:]} == {"td"} for row in rows)


def test_unknown_metrics_are_listed_by_key_and_bounds_are_folded(report: ReportData) -> None:
    text = metrics_table(replace(report, metrics={**report.metrics, "custom.share.low": 0.2}))
    assert "custom.share.low" in text
    assert "validation.preservation.low" not in text
    assert "[0.927, 0.969]" in text


def test_reconstruction_without_slots_keeps_its_columns(report: ReportData) -> None:
    text = reconstruction_table((LayerReconstruction(0, 0.01, 16.0, 0.0),), report.slot_names)
    row = ElementTree.fromstring(text).find(".//tbody/tr")
    assert row is not None and len(row) == 4 + len(report.slot_names)


def test_large_circuits_stay_small_files(make_report: Callable[..., ReportData]) -> None:
    text = render(make_report(5000, 50_000, n_layers=12))
    assert len(text) < 8_000_000
    assert len(Page(text).data()["edges"]["weight"]) == 50_000


def no_edges() -> Edges:
    return Edges(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.float32))
