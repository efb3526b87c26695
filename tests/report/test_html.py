from __future__ import annotations

import json
import shutil
import subprocess
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from hagd.report.chart import curve_charts
from hagd.report.figures import write_figures
from hagd.report.fragments import metrics_table, reconstruction_table
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
    write_report(report, write_figures(replace(report, nodes=report.nodes[:0], edges=no_edges()), tmp_path), path)
    page = Page(path.read_text(encoding="utf-8"))
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    links = [value for _, a in page.elements for name, value in a.items() if name in ("src", "href", "action", "data")]
    assert all(value and value.startswith(("#", "data:image/png;base64,")) for value in links)
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
    bare = replace(report, nodes=(), edges=no_edges(), curves=(), search=(), reconstruction=(), levels=())
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


DRIVE = """<script>addEventListener("load", () => {
  const view = Report.view, canvas = document.getElementById("circuit"), out = { supernodes: view.items.length };
  const press = (key) => canvas.dispatchEvent(new KeyboardEvent("keydown", { key }));
  const sum = () => view.edges.reduce((total, edge) => total + edge.weight, 0);
  const all = () => view.circuit.edges.weight.reduce((a, b) => a + b, 0);
  press("ArrowUp");
  view.selected = view.items.find((item) => item.level >= 0).key;
  press("Enter");
  out.opened = view.items.length;
  press("Escape");
  out.closed = view.items.length;
  const level = document.getElementById("level");
  level.value = String(view.circuit.levels.length);
  level.dispatchEvent(new Event("change"));
  out.nodes = view.items.length;
  out.weights = Math.abs(sum() - all()) < 1e-6 * view.edges.length;
  const size = document.getElementById("size");
  view.circuit.shown = 50;
  view.rebuild();
  out.shown = view.items.length;
  const search = document.getElementById("search");
  search.value = "L1 =";
  search.dispatchEvent(new Event("input"));
  out.found = document.querySelectorAll("#results button").length;
  document.querySelector("#results button").click();
  out.details = document.querySelector("#details h4").textContent;
  const started = performance.now();
  for (let i = 0; i < 5; i++) view.paint();
  out.paintMs = (performance.now() - started) / 5;
  document.body.dataset.result = JSON.stringify(out);
});</script></body>"""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed")
@pytest.mark.parametrize(("n_nodes", "n_edges", "n_layers"), [(200, 2000, 2), (5000, 50_000, 12)])
def test_page_works_in_a_browser(
    make_report: Callable[..., ReportData], tmp_path: Path, n_nodes: int, n_edges: int, n_layers: int
) -> None:
    path = tmp_path / "report.html"
    path.write_text(render(make_report(n_nodes, n_edges, n_layers)).replace("</body>", DRIVE), encoding="utf-8")
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
    command += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1400,1000", "--dump-dom", path.as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    body = next(attributes for tag, attributes in _elements(dom) if tag == "body")
    result = json.loads(body["data-result"] or "")
    assert result["supernodes"] < result["opened"] <= n_nodes
    assert result["closed"] == result["supernodes"]
    assert result["nodes"] == n_nodes and result["shown"] == 50
    assert result["weights"]
    assert 0 < result["found"] <= 40
    assert result["details"] in ("Promotes", "Most active on", "Strongest inputs", "Prompts of highest activation")
    assert result["paintMs"] < 200


def _elements(text: str) -> list[tuple[str, dict[str, str | None]]]:
    parser = HTMLParser()
    found: list[tuple[str, dict[str, str | None]]] = []
    parser.handle_starttag = lambda tag, attrs: found.append((tag, dict(attrs)))  # type: ignore[method-assign]
    parser.feed(text)
    return found


def no_edges() -> Edges:
    return Edges(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.float32))
