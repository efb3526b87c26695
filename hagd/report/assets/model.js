// The circuit as typed columns, and which supernodes are open. No drawing here.
"use strict";

const Report = {};

// Edges between the items that are shown, in columns. Objects are made only of those that are drawn or listed.
Report.ItemEdges = class {
  constructor(columns, length) {
    Object.assign(this, columns, { length });
    // Sorting numbers is several times as fast as sorting with a comparison: strength above, number of the edge below.
    const bits = new Uint32Array(Float32Array.from({ length }, (_, i) => Math.abs(columns.drawn[i])).buffer);
    const keys = Float64Array.from(bits, (strength, i) => strength * 2 ** 21 + i).sort();
    this.order = Int32Array.from(keys, (key) => key % 2 ** 21).reverse();
  }

  // The strongest first; all of them or those from or to one item.
  strongest(most, item = -1, ends = ["from", "to"]) {
    const found = [];
    for (const i of this.order) {
      if (found.length >= most) break;
      if (item >= 0 && !ends.some((end) => this[end][i] === item)) continue;
      found.push({ from: this.from[i], to: this.to[i], weight: this.weight[i], drawn: this.drawn[i] });
    }
    return found;
  }
};

Report.Circuit = class {
  constructor(data) {
    Object.assign(this, data);
    this.size = data.nodes.id.length;
    this.order = Array.from({ length: this.size }, (_, i) => i).sort((a, b) => data.nodes.score[b] - data.nodes.score[a]);
    this.rank = new Int32Array(this.size);
    this.order.forEach((node, rank) => (this.rank[node] = rank));
    this.isEnd = data.nodes.kind.map((kind) => kind !== "feature" && kind !== "head");
    this.sizes = data.circuits.length || this.size; // positions of the size slider
    this.opened = new Set(); // keys "level:supernode"
    this.choose(this.sizes);
    this.colourLevel = Math.max(0, data.levels.findIndex((level) => level.labels.length > 1));
    this.rowOf = data.nodes.row;
    this.openLevels(this.colourLevel);
  }

  // What the size slider shows: the circuit at a position, counted from 1, with what edges join to it; without
  // circuits, so many of the most important nodes.
  choose(position) {
    this.position = position;
    const circuit = this.circuits[position - 1];
    if (this.circuits.length) {
      this.inside = Uint8Array.from(this.isEnd);
      for (const node of circuit.nodes) this.inside[node] = 1;
    } else this.inside = Uint8Array.from(this.rank, (rank) => rank < position);
    this.shown = this.inside.reduce((a, b) => a + b, 0);
    this.members = this.levels.map((level) => level.labels.map(() => [])); // of each supernode, shown ones alone
    for (const node of this.order)
      if (this.inside[node]) this.nodes.path[node].forEach((group, level) => this.members[level][group].push(node));
  }

  // The first position of the size slider that shows a node.
  positionOf(node) {
    if (!this.circuits.length) return this.rank[node] + 1;
    return this.isEnd[node] ? this.position : this.circuits.findIndex((circuit) => circuit.nodes.includes(node)) + 1;
  }

  // The position of the circuit of so many nodes; the last where there is none.
  positionOfSize(size) {
    return this.circuits.findIndex((circuit) => circuit.nodes.length === size) + 1 || this.sizes;
  }

  // Open every supernode above `level`, so that supernodes of `level` show; the number of levels shows all nodes.
  openLevels(level) {
    this.opened.clear();
    for (let l = 0; l < level; l++) this.members[l].forEach((_, group) => this.opened.add(`${l}:${group}`));
  }

  open(level, group) {
    this.opened.add(`${level}:${group}`);
    const next = level + 1;
    if (next >= this.levels.length) return;
    const children = new Set(this.members[level][group].map((node) => this.nodes.path[node][next]));
    if (children.size === 1) this.open(next, [...children][0]); // a level that divides nothing
  }

  // Close a supernode and everything inside it.
  close(level, group) {
    this.opened.delete(`${level}:${group}`);
    for (const node of this.members[level][group])
      for (let l = level + 1; l < this.levels.length; l++) this.opened.delete(`${l}:${this.nodes.path[node][l]}`);
  }

  reveal(node) {
    this.nodes.path[node].forEach((group, level) => this.opened.add(`${level}:${group}`));
  }

  // The closed supernode that hides a node, as a level; -1 when the node itself shows.
  hiddenAt(node) {
    const path = this.nodes.path[node];
    for (let l = 0; l < path.length; l++)
      if (!this.opened.has(`${l}:${path[l]}`)) return this.members[l][path[l]].length === 1 ? -1 : l;
    return -1;
  }

  // Items to draw. A closed supernode shows once in every cell in which it has members.
  items() {
    const items = [], byKey = new Map();
    this.itemOf = new Int32Array(this.size).fill(-1);
    for (const node of this.order) {
      if (!this.inside[node]) continue;
      const level = this.hiddenAt(node), row = this.rowOf[node], slot = this.nodes.slot[node];
      const group = level < 0 ? -1 : this.nodes.path[node][level];
      const key = level < 0 ? `n${node}` : `${level}:${group}@${row}:${slot}`;
      let index = byKey.get(key);
      if (index === undefined) {
        index = items.length;
        byKey.set(key, index);
        items.push({ key, index, level, group, row, slot, nodes: [], score: 0 });
      }
      items[index].nodes.push(node);
      items[index].score += Math.max(0, this.nodes.score[node]);
      this.itemOf[node] = index;
    }
    return items;
  }

  // Edges between items: the same sums as supernode edges, divided among the cells.
  itemEdges(count) {
    const numbers = new Map(), { source, target, weight, drawn = weight } = this.edges, n = source.length;
    const sums = { from: new Int32Array(n), to: new Int32Array(n), weight: new Float64Array(n), drawn: new Float64Array(n) };
    for (let e = 0; e < n; e++) {
      const from = this.itemOf[source[e]], to = this.itemOf[target[e]];
      if (from < 0 || to < 0 || from === to) continue;
      const key = from * count + to;
      let i = numbers.get(key);
      if (i === undefined) {
        numbers.set(key, (i = numbers.size));
        sums.from[i] = from;
        sums.to[i] = to;
      }
      sums.weight[i] += weight[e];
      sums.drawn[i] += drawn[e];
    }
    return new Report.ItemEdges(sums, numbers.size);
  }

  colourOf(node) {
    const path = this.nodes.path[node];
    return path.length ? path[this.colourLevel] : -1;
  }

  place(node) {
    const row = this.rows[this.rowOf[node]];
    return `${row} · ${this.slots[this.nodes.slot[node]]}`;
  }

  // A token or logit that stands alone in its cell is named by itself, not by the supernode that holds it.
  title(item) {
    const first = item.nodes[0], alone = item.nodes.length === 1 && /^(token|logit)$/.test(this.nodes.kind[first]);
    if (item.level >= 0 && !alone) return this.levels[item.level].labels[item.group];
    return this.nodes.label[first];
  }

  // Text in which a search looks, made at the first search.
  haystack() {
    if (!this.texts)
      this.texts = this.order.map((node) => {
        const n = this.nodes, groups = n.path[node].map((group, level) => this.levels[level].labels[group]);
        const tokens = n.promoted[node].concat(n.inputs[node]).map((pair) => pair[0]);
        const layer = this.place(node).replace(/^layer (\d+)/, "L$1 layer $1");
        const words = [n.label[node], n.kind[node], layer, `#${n.feature[node]}`, ...groups, ...tokens];
        return { node, text: ` ${words.join(" ").toLowerCase()} ` };
      });
    return this.texts;
  }

  search(query, limit) {
    // Short words and numbers must match whole: "1" should not find "11".
    const whole = (word) => (word.length < 3 || /^\W?\d+$/.test(word) ? ` ${word} ` : word), found = [];
    const words = query.toLowerCase().split(/\s+/).filter(Boolean).map(whole);
    let total = 0;
    if (!words.length) return { found, total };
    for (const { node, text } of this.haystack())
      if (words.every((word) => text.includes(word)) && ++total <= limit) found.push(node);
    return { found, total };
  }
};
