// Connects data, canvas, controls and keyboard.
"use strict";

Report.start = () => {
  const data = JSON.parse(document.getElementById("circuit-data").textContent);
  const find = (id) => document.getElementById(id);
  if (!data.nodes.id.length) return;
  const circuit = new Report.Circuit(data), view = new Report.Canvas(find("circuit"), circuit);

  const say = (text) => (find("status").textContent = text);
  const describe = (item) => item.level < 0
    ? `${circuit.title(item)}, ${circuit.nodes.kind[item.nodes[0]]}, ${circuit.place(item.nodes[0])}`
    : `${circuit.title(item)}, supernode of ${item.nodes.length} nodes here, ${circuit.place(item.nodes[0])}, Enter opens it`;

  const select = (key, near = false) => {
    const item = view.byKey.get(key) || null;
    view.selected = item ? key : null;
    details.show(item);
    say(item ? describe(item) : summary());
    if (item && ((near && view.screen(item).r < 7) || !view.inView(item))) view.centre(item);
    else view.draw();
  };
  const summary = () =>
    `${circuit.shown.toLocaleString("en")} nodes, tokens and logits included, as ${view.items.length.toLocaleString("en")} items, ` +
    `${Math.min(view.edgeLimit, view.edges.length).toLocaleString("en")} of ${view.edges.length.toLocaleString("en")} edges drawn`;
  const itemOfNode = (node) => (circuit.itemOf[node] < 0 ? null : view.items[circuit.itemOf[node]]);

  // Redraw after the items changed and select the one that now holds `node`.
  const refresh = (node = null) => {
    view.rebuild();
    const item = node === null ? null : itemOfNode(node);
    select(item ? item.key : null);
  };
  const open = (level, group) => {
    const node = (view.byKey.get(view.selected) || { nodes: circuit.members[level][group] }).nodes[0] ?? null;
    circuit.open(level, group);
    find("level").value = "mixed";
    refresh(node);
  };
  const close = (level, group, node) => {
    circuit.close(level, group);
    find("level").value = "mixed";
    refresh(node);
  };
  const selectNode = (node) => {
    if (!circuit.inside[node]) setSize(circuit.positionOf(node));
    circuit.reveal(node);
    find("level").value = "mixed";
    view.rebuild();
    select(itemOfNode(node).key, true);
  };
  const details = new Report.Details(find("details"), view, { select: (key) => select(key), selectNode, open, close });

  const setSize = (position) => {
    circuit.choose(position);
    find("size").value = position;
    find("size").setAttribute("aria-valuetext", sizeText());
    find("size-value").textContent = sizeText();
  };
  const sizeText = () => {
    const chosen = circuit.circuits[circuit.position - 1], percent = (share) => `${(100 * share).toFixed(1)} %`;
    if (!chosen) return `${circuit.shown.toLocaleString("en")} of ${circuit.size.toLocaleString("en")}`;
    const measured = chosen.preservation === null ? "" : ` · preserves ${percent(chosen.preservation)}`;
    return `${chosen.nodes.length.toLocaleString("en")} nodes${measured}`;
  };

  Report.connectControls({ find, circuit, view, setSize, refresh, selectNode, select, open, close, summary, say });
  setSize(circuit.positionOfSize(data.reported));
  view.rebuild();
  details.show(null);
  view.resize();
  say(summary());
  Report.view = view;
};

Report.connectControls = ({ find, circuit, view, setSize, refresh, selectNode, select, open, close, summary, say }) => {
  const level = find("level"), E = Report.element;
  circuit.levels.forEach((record, l) => {
    if (l >= circuit.colourLevel)
      level.append(E("option", { value: l }, `level ${l + 1}: ${record.labels.length.toLocaleString("en")} supernodes`));
  });
  level.append(E("option", { value: circuit.levels.length }, "single nodes"));
  level.append(E("option", { value: "mixed", hidden: "" }, "as opened"));
  level.value = circuit.levels.length ? circuit.colourLevel : 0;
  level.addEventListener("change", () => {
    circuit.openLevels(Number(level.value));
    refresh();
  });

  find("size").max = circuit.sizes;
  let pending = 0;
  find("size").addEventListener("input", (event) => {
    setSize(Number(event.target.value));
    cancelAnimationFrame(pending);
    pending = requestAnimationFrame(() => refresh());
  });
  find("edge-limit").addEventListener("change", (event) => {
    view.edgeLimit = Number(event.target.value);
    view.draw();
    say(summary());
  });
  find("zoom-in").addEventListener("click", () => view.zoomBy(1.4));
  find("zoom-out").addEventListener("click", () => view.zoomBy(1 / 1.4));
  find("fit").addEventListener("click", () => view.fit());

  const search = () => {
    const { found, total } = circuit.search(find("search").value, 40);
    const rows = found.map((node) => E("li", {}, E("button", { class: "link", onclick: () => selectNode(node) },
      circuit.nodes.label[node], E("small", {}, `${circuit.nodes.kind[node]} · ${circuit.place(node)}`))));
    find("results").replaceChildren(...rows);
    const more = total > found.length ? `, the ${found.length} most important listed` : "";
    find("found").textContent = find("search").value.trim() ? `${total.toLocaleString("en")} found${more}` : "";
  };
  find("search").addEventListener("input", search);
  find("search").addEventListener("keydown", (event) => {
    if (event.key === "Enter") find("results").querySelector("button")?.click();
  });
  Report.connectResults(find);

  Report.connectPointer(view, select, open);
  Report.connectKeys(view, circuit, select, open, close);
  new ResizeObserver(() => view.resize()).observe(view.element);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
    view.readTheme();
    view.draw();
  });
};

// Arrows walk between the search field and its results; "/" anywhere on the page goes to the field.
Report.connectResults = (find) => {
  const search = find("search"), steps = { ArrowDown: 1, ArrowUp: -1 };
  search.closest("aside").addEventListener("keydown", (event) => {
    const stops = [search, ...find("results").querySelectorAll("button")], at = stops.indexOf(document.activeElement);
    if (at < 0 || !steps[event.key]) return;
    stops[Math.min(stops.length - 1, Math.max(0, at + steps[event.key]))].focus();
    event.preventDefault();
  });
  document.addEventListener("keydown", (event) => {
    if (event.key !== "/" || event.target.closest("input, select")) return;
    search.focus();
    event.preventDefault();
  });
};

Report.connectPointer = (view, select, open) => {
  const canvas = view.element;
  let drag = null;
  canvas.addEventListener("pointerdown", (event) => {
    canvas.setPointerCapture(event.pointerId);
    drag = { x: event.offsetX, y: event.offsetY, moved: 0 };
  });
  canvas.addEventListener("pointermove", (event) => {
    if (drag) {
      const x = event.offsetX - drag.x, y = event.offsetY - drag.y;
      drag = { x: event.offsetX, y: event.offsetY, moved: drag.moved + Math.abs(x) + Math.abs(y) };
      if (drag.moved > 4) view.panBy(x, y);
      return;
    }
    const item = view.itemAt(event.offsetX, event.offsetY), key = item ? item.key : null;
    canvas.style.cursor = item ? "pointer" : "grab";
    canvas.title = item ? view.circuit.title(item) : "";
    if (key !== view.hovered) {
      view.hovered = key;
      view.draw();
    }
  });
  canvas.addEventListener("pointerup", (event) => {
    const item = view.itemAt(event.offsetX, event.offsetY);
    if (drag && drag.moved <= 4) select(item ? item.key : null);
    drag = null;
  });
  canvas.addEventListener("pointercancel", () => (drag = null));
  canvas.addEventListener("pointerleave", () => {
    view.hovered = null;
    view.draw();
  });
  canvas.addEventListener("dblclick", (event) => {
    const item = view.itemAt(event.offsetX, event.offsetY);
    if (item && item.level >= 0) open(item.level, item.group);
  });
  // The wheel zooms once the canvas has the focus; before that it scrolls the page.
  canvas.addEventListener("wheel", (event) => {
    if (document.activeElement !== canvas && !event.ctrlKey) return;
    event.preventDefault();
    view.zoomBy(Math.exp(-event.deltaY / 400), event.offsetX, event.offsetY);
  }, { passive: false });
};

Report.connectKeys = (view, circuit, select, open, close) => {
  const arrows = { ArrowUp: [0, -1], ArrowDown: [0, 1], ArrowLeft: [-1, 0], ArrowRight: [1, 0] };
  view.element.addEventListener("keydown", (event) => {
    const item = view.byKey.get(view.selected);
    if (arrows[event.key]) {
      const next = item ? view.neighbour(item, ...arrows[event.key]) : view.items[0];
      if (next) select(next.key);
    } else if (event.key === "Enter" && item && item.level >= 0) open(item.level, item.group);
    else if (event.key === "Escape" && item) {
      const level = (item.level < 0 ? circuit.nodes.path[item.nodes[0]].length : item.level) - 1;
      if (level >= circuit.colourLevel) close(level, circuit.nodes.path[item.nodes[0]][level], item.nodes[0]);
      else select(null);
    } else if (event.key === "+" || event.key === "=") view.zoomBy(1.3);
    else if (event.key === "-") view.zoomBy(1 / 1.3);
    else if (event.key === "0") view.fit();
    else return;
    event.preventDefault();
  });
};

Report.start();
