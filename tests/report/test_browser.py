"""The page in headless Chromium, used as a reader does: mouse and keys, no call into its scripts but to look."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import CHROMIUM, Browser
from synthetic_report import build_report

from hagd.report.html import write_report

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium, chromium-browser or google-chrome on the PATH"),
]

ITEMS = "Report.view.items.length"
SELECTED = "Report.view.byKey.get(Report.view.selected)?.nodes[0] ?? null"
SUMS = """(() => {
  const { circuit, edges, items } = Report.view, itemOf = circuit.itemOf, { source, target, weight } = circuit.edges;
  let expected = 0;
  weight.forEach((w, e) => {
    const a = itemOf[source[e]], b = itemOf[target[e]];
    if (a >= 0 && b >= 0 && a !== b) expected += w;
  });
  return [edges.weight.reduce((a, b) => a + b, 0), expected, edges.length, items.length];
})()"""
LARGEST = """(() => {
  const view = Report.view, box = view.element.getBoundingClientRect();
  const item = view.items.filter((each) => each.level >= 0).sort((a, b) => b.nodes.length - a.nodes.length)[0];
  const { x, y } = view.screen(item);
  return [x + box.left, y + box.top, item.nodes.length];
})()"""
COLOURS = """(() => {
  const { width, height } = Report.view.element, canvas = new OffscreenCanvas(width, height);
  const c = canvas.getContext("2d", { willReadFrequently: true });
  c.drawImage(Report.view.element, 0, 0);
  return new Set(new Uint32Array(c.getImageData(0, 0, width, height).data.buffer)).size;
})()"""


@pytest.fixture(scope="module", params=[(200, 2000, 2), (5000, 50_000, 12)], ids=["200 nodes", "5,000 nodes"])
def file(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    write_report(build_report(*request.param), path)
    return path


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with Browser() as running:
        yield running


@pytest.fixture
def page(browser: Browser, file: Path) -> Iterator[Browser]:
    """The page, opened anew with the circuit in view; no errors and no requests are accepted."""
    browser.errors.clear()
    browser.requests.clear()
    browser.resize(1400, 1000)
    browser.dark(False)
    browser.open(file)
    browser.run("document.getElementById('circuit-view').scrollIntoView()")
    browser.frame()
    yield browser
    assert browser.errors == [] and browser.requests == []


def text(page: Browser, selector: str) -> str:
    return str(page.run(f"document.querySelector({selector!r}).textContent"))


def test_opens_in_light_and_dark_and_in_a_small_window(page: Browser) -> None:
    background = "getComputedStyle(document.body).backgroundColor"
    assert "preserves 94.8 % [92.7, 96.9]" in text(page, "h1")
    light = page.run(background)
    assert page.run(COLOURS) > 20
    page.dark(True)
    page.frame()
    assert page.run(background) != light and page.run(COLOURS) > 20
    page.dark(False)
    page.resize(400, 800)
    page.frame()
    assert page.run("document.documentElement.scrollWidth") <= 400
    assert page.run(COLOURS) > 20


def test_a_double_click_opens_a_supernode_and_escape_closes_it(page: Browser) -> None:
    before = page.run(ITEMS)
    x, y, members = page.run(LARGEST)
    page.click(x, y)
    assert text(page, "#details .primary").startswith("Open:")
    assert f"supernode of {members} nodes here" in text(page, "#status")
    page.click(x, y, count=2)
    page.frame()
    assert page.run(ITEMS) > before
    summed, expected, _, _ = page.run(SUMS)
    assert summed == pytest.approx(expected, abs=1e-6)
    page.press("Escape")
    page.frame()
    assert page.run(ITEMS) == before


def test_supernodes_open_down_to_nodes_that_say_what_they_do(page: Browser) -> None:
    page.run("document.getElementById('circuit').focus()")
    x, y, _ = page.run(LARGEST)
    page.click(x, y)
    for _ in range(len(page.run("Report.view.circuit.levels"))):
        page.press("Enter")
    assert page.run("Report.view.byKey.get(Report.view.selected).level") == -1
    titles = page.run("Array.from(document.querySelectorAll('#details h4'), (each) => each.textContent)")
    assert {"Promotes", "Most active on", "Prompts of highest activation"} <= set(titles)
    facts = page.run("Array.from(document.querySelectorAll('#details dt'), (each) => each.textContent)")
    assert facts[0] == "In circuits of"


def test_arrows_walk_and_the_status_tells_where(page: Browser) -> None:
    page.run("document.getElementById('circuit').focus()")
    visited = []
    for key in ("ArrowUp", "ArrowUp", "ArrowRight", "ArrowDown"):
        page.press(key)
        visited.append((page.run(SELECTED), text(page, "#status")))
    assert len({node for node, _ in visited}) >= 2
    assert all(" · " in said for _, said in visited)
    zoom = page.run("Report.view.zoom")
    page.press("+")
    assert page.run("Report.view.zoom") > zoom
    page.press("0")
    assert page.run("Report.view.fitted")


def test_search_from_the_keyboard(page: Browser) -> None:
    page.press("/")
    page.type("l1 feature =")
    assert page.run("document.getElementById('search').value") == "l1 feature ="
    places = page.run("Array.from(document.querySelectorAll('#results small'), (each) => each.textContent)")
    assert places and set(places) == {"feature · layer 1 · ="}
    page.press("ArrowDown")
    page.press("ArrowDown")
    page.press("Enter")
    page.frame()
    node = page.run(SELECTED)
    listed = page.run("Report.view.circuit.search('l1 feature =', 2).found")
    assert node == listed[1]
    assert page.run("Report.view.inView(Report.view.byKey.get(Report.view.selected))")


def test_the_slider_shows_the_circuit_of_each_size(page: Browser) -> None:
    page.run("document.getElementById('size').focus()")
    sizes = page.run("Report.view.circuit.circuits.map((each) => each.nodes.length)")
    assert text(page, "#size-value").startswith(f"{sizes[-1]:,} nodes")
    for size in reversed(sizes[:-1]):
        page.press("ArrowLeft")
        page.frame()
        preserved = 100 * (1 - 5 / (5 + size))
        assert text(page, "#size-value") == f"{size:,} nodes · preserves {preserved:.1f} %"
        shown = page.run("Report.view.items.flatMap((item) => item.nodes)")
        ends = page.run("Report.view.circuit.isEnd")
        assert sum(not ends[node] for node in shown) == size
    summed, expected, _, _ = page.run(SUMS)
    assert summed == pytest.approx(expected, abs=1e-6)


def test_dragging_and_the_wheel_move_the_circuit(page: Browser) -> None:
    before = page.run("[Report.view.panX, Report.view.panY, Report.view.zoom]")
    left, top = page.run(
        "[Report.view.element.getBoundingClientRect().left, Report.view.element.getBoundingClientRect().top]"
    )
    page.drag(left + 300, top + 200, left + 350, top + 230)
    after = page.run("[Report.view.panX, Report.view.panY, Report.view.zoom]")
    assert after[:2] == pytest.approx([before[0] + 50, before[1] + 30], abs=1)
    page.wheel(left + 300, top + 200, -100)
    page.frame()
    assert page.run("Report.view.zoom") > before[2]
