"""The report's own canvas against graph-drawing libraries, on what it draws at 5,000 nodes.

`npm install cytoscape sigma graphology` in any folder, then `python benchmarks/graph_libraries.py FOLDER/node_modules`.
All draw the same nodes at the same places and the same strongest edges, without labels, at the same zoom, in headless
Chromium without a GPU (Sigma needs WebGL, which then runs in software: its figures say nothing about a machine with a
GPU). Prints, for each number of edges, milliseconds until the first frame, median milliseconds between frames while the
view is dragged, and CPU milliseconds a frame of all processes of the browser, which a busy machine changes less.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from browser import Browser
from report_page import HELPERS
from synthetic_report import build_report

from hagd.report.html import write_report

EDGES = (300, 3000)
DRAWN = """(() => {
  const view = Report.view, style = getComputedStyle(document.documentElement);
  bench.set("level", String(view.circuit.levels.length), "change");
  view.fit();
  const colours = Report.Canvas.colours, places = view.items.map((item) => ({ x: item.x, y: item.y, r: item.radius,
    colour: colours[Math.max(0, view.circuit.colourOf(item.nodes[0])) % colours.length] }));
  return { nodes: places, edges: view.edges.strongest(3000),
    width: view.width, height: view.height, zoom: view.zoom, x: view.panX, y: view.panY };
})()"""

FRAME = """<!DOCTYPE html><meta charset="utf-8"><body style="margin:0">
<div id="stage" style="width:{width}px;height:{height}px"></div>{scripts}
<script>
const graph = {graph}, stage = document.getElementById("stage");
const frame = () => new Promise(requestAnimationFrame);
async function drag(pan, frames) {{
  const intervals = [];
  let last = await frame();
  for (let i = 0; i < frames; i++) {{
    pan(i % 20 < 10 ? 7 : -7, i % 20 < 10 ? 3 : -3);
    const now = await frame();
    intervals.push(now - last);
    last = now;
  }}
  return intervals;
}}
{start}
const ready = performance.now();
</script>"""

STARTS = {
    "cytoscape": """
const strongest = Math.abs(graph.edges[0].drawn);
const nodes = graph.nodes.map(({ x, y, r, colour }, i) =>
  ({ data: { id: "n" + i, size: 2 * r, colour }, position: { x, y } }));
const edges = graph.edges.map(({ from, to, drawn }, i) => ({ data: { id: "e" + i, source: "n" + from, target: "n" + to,
  width: 0.4 + 3.4 * Math.abs(drawn) / strongest, colour: drawn > 0 ? "#0072b2" : "#c24e00" } }));
const edgeStyle = { width: "data(width)", "line-color": "data(colour)", opacity: 0.4, "curve-style": "haystack" };
const cy = cytoscape({ container: stage, layout: { name: "preset" }, elements: [...nodes, ...edges], style: [
  { selector: "node", style: { width: "data(size)", height: "data(size)", "background-color": "data(colour)" } },
  { selector: "edge", style: edgeStyle },
] });
cy.zoom(graph.zoom);
cy.pan({ x: graph.x, y: graph.y });
const pan = (x, y) => cy.panBy({ x, y });
""",
    "sigma": """
const made = new graphology.Graph();
graph.nodes.forEach(({ x, y, r, colour }, i) =>
  made.addNode("n" + i, { x, y: -y, size: Math.max(1, r * graph.zoom), color: colour }));
graph.edges.forEach(({ from, to, drawn }) =>
  made.mergeEdge("n" + from, "n" + to, { size: 1, color: drawn > 0 ? "#0072b2" : "#c24e00" }));
const renderer = new Sigma(made, stage, { renderLabels: false }), camera = renderer.getCamera();
const pan = (x, y) => {
  const at = camera.getState();
  camera.setState({ x: at.x + x / 1000, y: at.y + y / 1000 });
};
""",
}
SCRIPTS = {
    "cytoscape": ("cytoscape/dist/cytoscape.min.js",),
    "sigma": ("graphology/dist/graphology.umd.min.js", "sigma/dist/sigma.min.js"),
}


def page(library: str, modules: Path, graph: dict[str, Any]) -> str:
    """A page that draws the graph with a library and nothing else."""
    scripts = "".join(f"<script>{(modules / name).read_text()}</script>" for name in SCRIPTS[library])
    start = STARTS[library]
    return FRAME.format(
        width=graph["width"], height=graph["height"], scripts=scripts, graph=json.dumps(graph), start=start
    )


def library_figures(library: str, modules: Path, graph: dict[str, Any], folder: Path, frames: int) -> dict[str, float]:
    """First frame, frame interval and CPU a frame of one library."""
    file = folder / f"{library}.html"
    file.write_text(page(library, modules, graph), encoding="utf-8")
    with Browser(webgl=True) as browser:
        browser.open(file, seconds=300)
        found = {"first": browser.run("frame().then(() => frame()).then(() => performance.now())")}
        return found | _dragged(browser, f"drag(pan, {frames})", frames)


def own_figures(report: Path, edges: int, frames: int) -> dict[str, float]:
    """The same of the report itself, which loads everything else on its page besides."""
    with Browser() as browser:
        browser.open(report)
        browser.run(HELPERS + "undefined")
        found = {"first": browser.run("bench.frame().then(() => bench.frame()).then(() => performance.now())")}
        browser.run(f"{DRAWN}; bench.view.edgeLimit = {edges}; bench.view.paintLabel = () => {{}}; bench.view.draw()")
        return found | _dragged(browser, f"bench.drag({frames})", frames)


def _dragged(browser: Browser, script: str, frames: int) -> dict[str, float]:
    before = browser.cpu_seconds()
    intervals = browser.run(script)
    return {
        "frame": float(np.median(intervals)),
        "CPU a frame": 1000 * (browser.cpu_seconds() - before) / frames,
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modules", type=Path, help="folder node_modules with cytoscape, sigma and graphology")
    parser.add_argument("--frames", type=int, default=30)
    options = parser.parse_args()
    with TemporaryDirectory() as name:
        folder = Path(name)
        report = folder / "report.html"
        write_report(build_report(5000, 50_000, 12), report)
        with Browser() as browser:
            browser.open(report)
            browser.run(HELPERS + "undefined")
            graph = browser.run(DRAWN)
        for edges in EDGES:
            shown = {**graph, "edges": graph["edges"][:edges]}
            rows = {"own canvas": own_figures(report, edges, options.frames)}
            rows |= {
                library: library_figures(library, options.modules, shown, folder, options.frames) for library in STARTS
            }
            for library, row in rows.items():
                print(
                    f"{edges:>6,} edges  {library:12}",
                    *(f"{key} {value:8.1f}" for key, value in row.items()),
                    flush=True,
                )


if __name__ == "__main__":
    main()
