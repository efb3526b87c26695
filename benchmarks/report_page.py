"""How fast the page of a report is at 5,000 nodes and 50,000 edges, in headless Chromium.

`python benchmarks/report_page.py` writes the page of a made extraction through the report's own code, drives it with
its own controls and prints milliseconds. `frame` is the median and the 95th percentile of the time between frames while
the circuit is dragged without a pause (a 60 Hz display shows one every 16.7 ms), and the CPU time a frame of all
processes of the browser, which a busy machine changes less. All others are the time from an input to the end of the
next frame but one, the wait for the display included, which `nothing` measures alone. Ends with one line of JSON.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from browser import Browser
from synthetic_report import build_report

from hagd.report.html import write_report

HELPERS = """
const bench = {
  view: Report.view,
  canvas: document.getElementById("circuit"),
  frame: () => new Promise(requestAnimationFrame),
  set(id, value, kind) {
    const control = document.getElementById(id);
    control.value = value;
    control.dispatchEvent(new Event(kind));
  },
  async latency(act) {
    await bench.frame();
    const began = performance.now();
    act();
    await bench.frame();
    await bench.frame();
    return performance.now() - began;
  },
  // Intervals between frames while the canvas is dragged to and fro.
  async drag(frames) {
    const intervals = [];
    let last = await bench.frame();
    for (let i = 0; i < frames; i++) {
      bench.view.panBy(i % 20 < 10 ? 7 : -7, i % 20 < 10 ? 3 : -3);
      const now = await bench.frame();
      intervals.push(now - last);
      last = now;
    }
    return intervals;
  },
};
"""
LARGEST = "bench.view.items.filter((item) => item.level >= 0).sort((a, b) => b.nodes.length - a.nodes.length)[0]"
LEVELS = "bench.view.circuit.levels.length"
ACTIONS = {
    "nothing": "() => {}",
    "select": "() => bench.view.element.dispatchEvent(new KeyboardEvent('keydown', { key: 'ArrowUp' }))",
    "open": f"() => {{ bench.view.selected = {LARGEST}.key;"
    " bench.view.element.dispatchEvent(new KeyboardEvent('keydown', { key: 'Enter' })); }",
    "close": "() => bench.view.element.dispatchEvent(new KeyboardEvent('keydown', { key: 'Escape' }))",
    "search": "() => bench.set('search', 'l1 4', 'input')",
    "search again": "() => bench.set('search', 'l1 42', 'input')",
    "slider": "() => bench.set('size', Math.floor(document.getElementById('size').max / 2), 'input')",
    "slider back": "() => bench.set('size', document.getElementById('size').max, 'input')",
    "all nodes": f"() => bench.set('level', String({LEVELS}), 'change')",
}


def measure(page: Path, repeats: int) -> dict[str, Any]:
    """Milliseconds by what is done; `repeats` frames for each kind of dragging."""
    found: dict[str, Any] = {}
    with Browser() as browser:
        browser.open(page)
        found["load"] = round(browser.run("performance.getEntriesByType('navigation')[0].duration"))
        browser.run(HELPERS + "undefined")
        found["frame, supernodes"] = _frames(browser, repeats)
        for name, action in ACTIONS.items():
            found[name] = round(browser.run(f"bench.latency({action})"), 1)
        browser.run("bench.view.fit()")
        found["frame, all nodes"] = _frames(browser, repeats)
        browser.run("bench.set('edge-limit', '3000', 'change')")
        found["frame, all nodes, 3,000 edges"] = _frames(browser, repeats)
        found["slider, all nodes"] = round(browser.run(f"bench.latency({ACTIONS['slider']})"), 1)
        found["errors"] = browser.errors
    return found


def _frames(browser: Browser, repeats: int) -> dict[str, float]:
    before = browser.cpu_seconds()
    median, worst = np.percentile(browser.run(f"bench.drag({repeats})"), [50, 95]).round(1).tolist()
    return {"median": median, "p95": worst, "CPU": round(1000 * (browser.cpu_seconds() - before) / repeats, 1)}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=5000)
    parser.add_argument("--edges", type=int, default=50_000)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--frames", type=int, default=60)
    parser.add_argument("--page", type=Path, help="keep the page here")
    options = parser.parse_args()
    with TemporaryDirectory() as folder:
        page = options.page or Path(folder) / "report.html"
        write_report(build_report(options.nodes, options.edges, options.layers), page)
        found = {"MB": round(page.stat().st_size / 1e6, 2), **measure(page, options.frames)}
    for name, value in found.items():
        print(f"{name:34} {value}")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
