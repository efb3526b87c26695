// Where cells and items lie, in world units: row 0 (tokens) at the bottom, slots left to right.
"use strict";

Report.Layout = class {
  static pitch = 24; // room of one node in its fullest cell
  static gap = 14;

  // Cells are sized once, by all nodes of the circuit, so that nothing jumps when supernodes open. Of several cell
  // shapes the one that fills a canvas of this `aspect` (width over height) best is taken, then stretched to it.
  constructor(circuit, aspect) {
    const { gap } = Report.Layout, sum = (sizes) => sizes.reduce((a, b) => a + b + gap, -gap);
    const counts = circuit.rows.map(() => new Array(circuit.slots.length).fill(0));
    for (let node = 0; node < circuit.size; node++) counts[circuit.rowOf[node]][circuit.nodes.slot[node]]++;
    const extent = (cells) => Math.max(sum(cells.widths) / aspect, sum(cells.heights));
    const shapes = [0.5, 1, 1.9, 3.5, 7, 14, 28].map((shape) => Report.Layout.cells(counts, shape));
    const { widths, heights } = shapes.reduce((best, cells) => (extent(cells) < extent(best) ? cells : best));
    const gaps = gap * (widths.length - 1), ends = heights[0] + heights.at(-1) + gap * (heights.length - 1);
    const wider = Report.Layout.stretch(sum(heights) * aspect - gaps, sum(widths) - gaps);
    const higher = Report.Layout.stretch(sum(widths) / aspect - ends, sum(heights) - ends);
    this.widths = widths.map((width) => width * wider);
    this.heights = heights.map((height, row) => (row === 0 || row === heights.length - 1 ? height : height * higher));
    this.width = sum(this.widths);
    this.height = sum(this.heights);
    this.left = this.widths.map((_, i) => sum(this.widths.slice(0, i)) + gap);
    this.top = this.heights.map((height, row) => this.height - sum(this.heights.slice(0, row)) - gap - height);
  }

  static cells(counts, shape) {
    const { pitch } = Report.Layout;
    const fullest = counts[0].map((_, slot) => Math.max(...counts.map((row) => row[slot])));
    const widths = fullest.map((n) => Math.max(150, pitch * Math.ceil(Math.sqrt(shape * n))));
    const lines = (n, slot) => Math.ceil(n / Math.floor(widths[slot] / pitch));
    return { widths, heights: counts.map((row) => Math.max(52, pitch * Math.max(...row.map(lines)))) };
  }

  static stretch(wanted, found) {
    return Math.min(2.5, Math.max(1, wanted / (found || 1)));
  }

  // Sets x, y and radius of each item. Items of one supernode stay together, the most important first.
  arrange(items, circuit) {
    const cells = new Map();
    for (const item of items) {
      const cell = item.row * circuit.slots.length + item.slot;
      if (!cells.has(cell)) cells.set(cell, []);
      cells.get(cell).push(item);
    }
    const largest = items.reduce((max, item) => Math.max(max, item.level < 0 ? item.score : 0), 1e-12);
    for (const members of cells.values()) {
      const { row, slot } = members[0], width = this.widths[slot], height = this.heights[row];
      const group = (item) => circuit.colourOf(item.nodes[0]);
      members.sort((a, b) => group(a) - group(b) || b.score - a.score);
      const columns = Report.Layout.columns(members.length, width, height);
      const lines = Math.ceil(members.length / columns);
      const room = Math.min(width / columns, height / lines, 64);
      members.forEach((item, i) => {
        item.x = this.left[slot] + (width * ((i % columns) + 0.5)) / columns;
        item.y = this.top[row] + (height * (Math.floor(i / columns) + 0.5)) / lines;
        item.room = width / columns;
        const share = item.level < 0 ? Math.sqrt(item.score / largest) : Math.sqrt(Math.min(1, item.nodes.length / 40));
        item.radius = Math.max(2.5, (room / 2) * (0.4 + 0.5 * share));
      });
    }
  }

  // The number of columns that leaves each of n items the most room.
  static columns(n, width, height) {
    let best = 1, room = 0;
    for (let columns = 1; columns <= n; columns++) {
      const fits = Math.min(width / columns, height / Math.ceil(n / columns));
      if (fits > room) [best, room] = [columns, fits];
      if (width / columns < room) break;
    }
    return best;
  }
};
