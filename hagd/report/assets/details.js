// The panel that describes the selected node or supernode. Text is always set as text, never as HTML.
"use strict";

Report.format = (value) => {
  if (value === null || value === undefined) return "–";
  const size = Math.abs(value);
  return size !== 0 && (size < 0.001 || size >= 1e5) ? value.toExponential(1) : String(+value.toPrecision(3));
};

Report.element = (tag, attributes = {}, ...children) => {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes))
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value);
  element.append(...children.filter((child) => child !== null));
  return element;
};

Report.token = (text) => {
  const shown = text.replaceAll("\n", "↵").replaceAll("\t", "⇥");
  return Report.element("code", { class: "token" }, /^\s|\s$/.test(shown) ? shown.replaceAll(" ", "␣") : shown);
};

Report.Details = class {
  // `actions`: select(key), selectNode(node), open(level, group), close(level, group).
  constructor(element, view, actions) {
    Object.assign(this, { element, view, actions, circuit: view.circuit });
  }

  show(item) {
    const empty = Report.element("p", { class: "quiet" }, "Select a node or a supernode to see what it does.");
    this.element.replaceChildren(...(item ? (item.level < 0 ? this.node(item) : this.supernode(item)) : [empty]));
  }

  node(item) {
    const n = this.circuit.nodes, i = item.nodes[0], kind = n.kind[i], E = Report.element;
    const index = kind === "feature" || kind === "head" ? ` ${n.feature[i].toLocaleString("en")}` : "";
    return [
      E("h3", {}, n.label[i]),
      E("p", { class: "quiet" }, `${kind}${index} · ${this.circuit.place(i)}`),
      this.path(i),
      this.facts([
        this.membership(i),
        ["Score", Report.format(n.score[i])],
        ...(kind in this.circuit.values ? [[this.circuit.values[kind], Report.format(n.mean[i])]] : []),
        ...(n.effect[i] === null ? [] : [["Ablated alone, raises KL(model ‖ circuit) by", Report.format(n.effect[i])]]),
      ]),
      this.bars("Promotes", n.promoted[i]),
      this.bars("Most active on", n.inputs[i]),
      this.prompts(n.prompts[i]),
      this.links(item),
    ].filter(Boolean);
  }

  // Circuits that hold a node, or its rank where there are none.
  membership(node) {
    const { circuits, isEnd, rank, size } = this.circuit;
    if (!circuits.length) return ["Rank", `${rank[node] + 1} of ${size.toLocaleString("en")}`];
    const sizes = circuits.filter(({ nodes }) => nodes.includes(node)).map(({ nodes }) => nodes.length.toLocaleString("en"));
    return ["In circuits of", isEnd[node] ? "all sizes" : sizes.join(", ")];
  }

  supernode(item) {
    const { circuit } = this, E = Report.element, members = circuit.members[item.level][item.group];
    const here = item.nodes.length, children = item.level + 1 < circuit.levels.length
      ? new Set(members.map((node) => circuit.nodes.path[node][item.level + 1])).size : members.length;
    const inside = item.level + 1 < circuit.levels.length ? "sub-supernodes" : "nodes";
    const cells = new Set(members.map((node) => circuit.place(node))).size;
    return [
      E("h3", {}, circuit.title(item)),
      E("p", { class: "quiet" }, `supernode ${item.group + 1}, level ${item.level + 1} · ${circuit.place(item.nodes[0])}`),
      this.path(item.nodes[0], item.level),
      E("button", { class: "primary", onclick: () => this.actions.open(item.level, item.group) }, `Open: ${children} ${inside}`),
      this.facts([
        ["Nodes in this cell", here.toLocaleString("en")],
        ["Nodes in all", `${members.length.toLocaleString("en")} in ${cells} cells`],
        ["Score in this cell", Report.format(item.score)],
      ]),
      this.bars("Its members are most active on", circuit.levels[item.level].inputs[item.group]),
      this.bars("Its members together promote", circuit.levels[item.level].promoted[item.group]),
      this.prompts(circuit.levels[item.level].prompts[item.group]),
      this.list("Most important nodes here", item.nodes.slice(0, 8).map((node) => ({
        text: circuit.nodes.label[node], value: Report.format(circuit.nodes.score[node]),
        action: () => this.actions.selectNode(node),
      }))),
      this.links(item),
    ].filter(Boolean);
  }

  // The supernodes that hold a node; a button closes one again.
  path(node, below = Infinity) {
    const path = this.circuit.nodes.path[node], size = (level) => this.circuit.members[level][path[level]].length;
    const levels = path.map((_, level) => level).filter((level) => level < below && (level === 0 || size(level) < size(level - 1)));
    if (!levels.length) return null;
    const buttons = levels.map((level) => Report.element("li", {}, Report.element("button", {
      class: "link", title: "Close this supernode", onclick: () => this.actions.close(level, path[level], node),
    }, this.circuit.levels[level].labels[path[level]])));
    return Report.element("ol", { class: "path", "aria-label": "Supernodes that hold it, coarse to fine" }, ...buttons);
  }

  facts(rows) {
    const E = Report.element;
    return E("dl", {}, ...rows.flatMap(([name, value]) => [E("dt", {}, name), E("dd", {}, value)]));
  }

  bars(title, pairs) {
    if (!pairs.length) return null;
    const E = Report.element, most = Math.max(...pairs.map((pair) => Math.abs(pair[1])), 1e-12);
    const rows = pairs.map(([text, value]) => E("li", {},
      Report.token(text),
      E("span", { class: value < 0 ? "bar negative" : "bar", style: `--share:${Math.abs(value) / most}`, "aria-hidden": "true" }),
      E("span", { class: "value" }, Report.format(value))));
    return E("section", {}, E("h4", {}, title), E("ul", { class: "bars" }, ...rows));
  }

  prompts(prompts) {
    if (!prompts.length) return null;
    const E = Report.element;
    const rows = prompts.map(([index, position, activation]) => E("li", {},
      E("span", { class: "prompt" }, ...this.circuit.prompts[index].map((text, i) =>
        i === position ? E("mark", {}, Report.token(text)) : Report.token(text))),
      E("span", { class: "value" }, Report.format(activation))));
    return E("section", {}, E("h4", {}, "Prompts of highest activation"), E("ol", { class: "prompts" }, ...rows));
  }

  links(item) {
    const E = Report.element;
    const side = (title, end, other) => this.list(title, this.view.edges.strongest(6, item.index, [end]).map((edge) => {
      const target = this.view.items[edge[other]];
      return { text: this.circuit.title(target), where: this.circuit.place(target.nodes[0]), value: Report.format(edge.weight),
        sign: edge.weight > 0 ? "positive" : "negative", action: () => this.actions.select(target.key) };
    }));
    return E("div", {}, ...[side("Strongest inputs", "to", "from"), side("Strongest outputs", "from", "to")].filter(Boolean));
  }

  list(title, rows) {
    if (!rows.length) return null;
    const E = Report.element;
    return E("section", {}, E("h4", {}, title), E("ul", { class: "links" }, ...rows.map((row) => E("li", {},
      E("button", { class: "link", onclick: row.action }, row.text, row.where ? E("small", {}, row.where) : null),
      E("span", { class: `value ${row.sign || ""}` }, row.value)))));
  }
};
