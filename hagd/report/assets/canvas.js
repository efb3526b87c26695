// Draws the circuit on a canvas: only what lies in the viewport, only the strongest edges.
"use strict";

Report.Canvas = class {
  static colours = ["#44AA99", "#CC6677", "#DDCC77", "#AA4499", "#88CCEE", "#999933", "#3C9A5B", "#B0507A"];
  static gutter = { left: 66, top: 26 };

  constructor(element, circuit) {
    this.element = element;
    this.context = element.getContext("2d");
    this.circuit = circuit;
    this.texts = new Map();
    this.plan(element.getBoundingClientRect());
    this.edgeLimit = 300;
    this.selected = null; // key of an item
    this.hovered = null;
    this.frame = 0;
    this.readTheme();
    this.rebuild();
  }

  // Cells for a canvas of this size.
  plan({ width, height }) {
    const { left, top } = Report.Canvas.gutter;
    this.aspect = (width - left) / (height - top);
    this.layout = new Report.Layout(this.circuit, this.aspect);
  }

  readTheme() {
    const style = getComputedStyle(document.documentElement);
    const names = ["ink", "muted", "surface", "cell", "veil", "positive", "negative", "plain", "focus"];
    this.theme = Object.fromEntries(names.map((name) => [name, style.getPropertyValue(`--${name}`).trim()]));
    this.font = style.getPropertyValue("--sans");
  }

  // After supernodes opened or the size changed.
  rebuild() {
    this.items = this.circuit.items();
    this.layout.arrange(this.items, this.circuit);
    this.edges = this.circuit.itemEdges(this.items.length);
    this.byKey = new Map(this.items.map((item) => [item.key, item]));
    this.draw();
  }

  resize() {
    const box = this.element.getBoundingClientRect(), ratio = window.devicePixelRatio || 1;
    this.width = box.width;
    this.height = box.height;
    this.element.width = Math.round(box.width * ratio);
    this.element.height = Math.round(box.height * ratio);
    this.ratio = ratio;
    const { left, top } = Report.Canvas.gutter, change = (box.width - left) / (box.height - top) / this.aspect;
    if (this.fitted && Math.abs(Math.log(change)) > 0.25) {
      this.plan(box);
      this.layout.arrange(this.items, this.circuit);
    }
    if (!this.zoom || this.fitted) this.fit();
    this.paint(); // at once: the new size has emptied the canvas
  }

  fit() {
    const { left, top } = Report.Canvas.gutter, margin = 14;
    const across = (this.width - left - margin) / this.layout.width;
    const up = (this.height - top - margin) / this.layout.height;
    this.zoom = Math.max(0.02, Math.min(across, up, 2.2));
    this.panX = left + (this.width - left - this.layout.width * this.zoom) / 2;
    this.panY = top + (this.height - top - this.layout.height * this.zoom) / 2;
    this.fitted = true;
    this.draw();
  }

  zoomBy(factor, x = this.width / 2, y = this.height / 2) {
    const zoom = Math.min(12, Math.max(0.02, this.zoom * factor)), change = zoom / this.zoom;
    this.panX = x - (x - this.panX) * change;
    this.panY = y - (y - this.panY) * change;
    this.zoom = zoom;
    this.fitted = false;
    this.draw();
  }

  panBy(x, y) {
    this.panX += x;
    this.panY += y;
    this.fitted = false;
    this.draw();
  }

  // Bring an item into view, near enough to read.
  centre(item, least = 1) {
    this.zoom = Math.max(this.zoom, least);
    this.panX = this.width / 2 - item.x * this.zoom;
    this.panY = this.height / 2 - item.y * this.zoom;
    this.fitted = false;
    this.draw();
  }

  screen(item) {
    return { x: item.x * this.zoom + this.panX, y: item.y * this.zoom + this.panY, r: item.radius * this.zoom };
  }

  inView(item, margin = 0) {
    const { x, y, r } = this.screen(item);
    return x > -r - margin && x < this.width + r + margin && y > -r - margin && y < this.height + r + margin;
  }

  itemAt(x, y) {
    let best = null, nearest = Infinity;
    for (const item of this.items) {
      const at = this.screen(item), distance = Math.hypot(at.x - x, at.y - y);
      if (distance < Math.max(at.r, 6) + 2 && distance < nearest) [best, nearest] = [item, distance];
    }
    return best;
  }

  // The nearest item in a direction (dx, dy), for the arrow keys.
  neighbour(item, dx, dy) {
    let best = null, least = Infinity;
    for (const other of this.items) {
      const along = (other.x - item.x) * dx + (other.y - item.y) * dy;
      const aside = Math.abs((other.x - item.x) * dy) + Math.abs((other.y - item.y) * dx);
      if (other === item || along < 1) continue;
      const cost = along + 2.5 * aside;
      if (cost < least) [best, least] = [other, cost];
    }
    return best;
  }

  // Edges to draw: those of the selected or hovered item, else the strongest overall.
  visibleEdges() {
    const focus = this.byKey.get(this.selected) || this.byKey.get(this.hovered);
    return this.edges.strongest(this.edgeLimit, focus ? focus.index : -1);
  }

  draw() {
    if (!this.zoom || this.frame) return;
    this.frame = requestAnimationFrame(() => {
      this.frame = 0;
      this.paint();
    });
  }

  paint() {
    const started = performance.now(), c = this.context;
    c.setTransform(this.ratio, 0, 0, this.ratio, 0, 0);
    c.fillStyle = this.theme.surface;
    c.fillRect(0, 0, this.width, this.height);
    this.paintCells(c);
    const edges = this.visibleEdges();
    this.paintEdges(c, edges);
    this.paintItems(c, edges);
    this.paintGutters(c);
    this.paintMs = performance.now() - started;
  }

  paintCells(c) {
    const { left, top, widths, heights } = this.layout, pad = 5;
    c.fillStyle = this.theme.cell;
    for (let row = 0; row < heights.length; row++)
      for (let slot = 0; slot < widths.length; slot++)
        c.fillRect(
          (left[slot] - pad) * this.zoom + this.panX, (top[row] - pad) * this.zoom + this.panY,
          (widths[slot] + 2 * pad) * this.zoom, (heights[row] + 2 * pad) * this.zoom);
  }

  // Edges leave upwards and arrive from below; weak ones are painted first.
  paintEdges(c, edges) {
    const strongest = edges.length ? Math.abs(edges[0].drawn) || 1 : 1;
    for (let i = edges.length - 1; i >= 0; i--) {
      const edge = edges[i], a = this.screen(this.items[edge.from]), b = this.screen(this.items[edge.to]);
      if (Math.max(a.x, b.x) < 0 || Math.min(a.x, b.x) > this.width) continue;
      if (Math.max(a.y, b.y) < 0 || Math.min(a.y, b.y) > this.height) continue;
      const strength = Math.sqrt(Math.abs(edge.drawn) / strongest), bend = (a.y - b.y) / 2;
      c.globalAlpha = 0.12 + 0.6 * strength;
      c.lineWidth = 0.4 + 3.4 * strength * strength;
      c.strokeStyle = edge.weight > 0 ? this.theme.positive : this.theme.negative;
      c.beginPath();
      c.moveTo(a.x, a.y);
      c.bezierCurveTo(a.x, a.y - bend, b.x, b.y + bend, b.x, b.y);
      c.stroke();
    }
    c.globalAlpha = 1;
  }

  paintItems(c, edges) {
    const focus = this.byKey.get(this.selected) || this.byKey.get(this.hovered);
    const near = focus ? new Set(edges.flatMap((edge) => [edge.from, edge.to]).concat(focus.index)) : null;
    c.textAlign = "center";
    for (const item of this.items) {
      if (!this.inView(item, 40)) continue;
      c.globalAlpha = !near || near.has(item.index) ? 1 : 0.25;
      this.paintItem(c, item);
    }
    c.globalAlpha = 1;
  }

  paintItem(c, item) {
    const { x, y, r } = this.screen(item), node = item.nodes[0], kind = this.circuit.nodes.kind[node];
    const group = this.circuit.colourOf(node), { colours } = Report.Canvas;
    const end = kind === "token" || kind === "logit", hollow = item.level < 0 && (end || kind === "error");
    if (end && item.room * this.zoom > 30 && this.layout.heights[item.row] * this.zoom > 22) return this.paintEnd(c, item, x, y);
    c.beginPath();
    if (item.level >= 0) c.roundRect(x - r, y - r, 2 * r, 2 * r, r * 0.45);
    else if (kind === "error") this.diamond(c, x, y, r);
    else if (kind === "head") this.triangle(c, x, y, r);
    else if (end) c.rect(x - r, y - r, 2 * r, 2 * r);
    else c.arc(x, y, r, 0, 2 * Math.PI);
    c.fillStyle = hollow ? this.theme.surface : group < 0 ? this.theme.plain : colours[group % colours.length];
    c.fill();
    if (hollow || r > 4 || item.key === this.selected || this.sameSupernode(item)) this.outline(c, item, hollow);
    this.paintLabel(c, item, x, y, r);
  }

  outline(c, item, hollow) {
    const chosen = item.key === this.selected, same = this.sameSupernode(item);
    c.lineWidth = chosen ? 3 : same ? 2 : 1;
    c.strokeStyle = chosen ? this.theme.focus : same || hollow ? this.theme.ink : this.theme.surface;
    c.stroke();
  }

  // Tokens and logits are their own labels.
  paintEnd(c, item, x, y) {
    c.font = `12px ${this.font}`;
    const { text, width: inner } = this.shorten(c, this.circuit.title(item), item.room * this.zoom - 16), width = inner + 14;
    c.beginPath();
    c.roundRect(x - width / 2, y - 11, width, 22, 5);
    c.fillStyle = this.theme.surface;
    c.fill();
    this.outline(c, item, true);
    c.fillStyle = this.theme.ink;
    c.textBaseline = "middle";
    c.fillText(text, x, y + 0.5);
  }

  diamond(c, x, y, r) {
    c.moveTo(x, y - r);
    c.lineTo(x + r, y);
    c.lineTo(x, y + r);
    c.lineTo(x - r, y);
    c.closePath();
  }

  triangle(c, x, y, r) {
    c.moveTo(x, y - r);
    c.lineTo(x + r, y + 0.8 * r);
    c.lineTo(x - r, y + 0.8 * r);
    c.closePath();
  }

  // Other cells' parts of the supernode that is selected or under the pointer.
  sameSupernode(item) {
    const focus = this.byKey.get(this.hovered) || this.byKey.get(this.selected);
    return focus && item.level >= 0 && focus.level === item.level && focus.group === item.group;
  }

  paintLabel(c, item, x, y, r) {
    if (item.level >= 0 && r > 8) {
      c.fillStyle = "#111";
      c.font = `600 ${Math.min(15, r * 0.8)}px ${this.font}`;
      c.textBaseline = "middle";
      c.fillText(item.nodes.length, x, y + 0.5);
    }
    const room = item.room * this.zoom - 6;
    if (room < 44 || r < 5) return;
    c.font = `11px ${this.font}`;
    c.textBaseline = "top";
    const { text, width } = this.shorten(c, this.circuit.title(item), room);
    c.fillStyle = this.theme.veil;
    c.fillRect(x - width / 2 - 2, y + r + 1, width + 4, 14);
    c.fillStyle = this.theme.ink;
    c.fillText(text, x, y + r + 3);
  }

  // The part of a text that fits, and its width. Measuring is slow, so what was found is kept until the zoom changes.
  shorten(c, text, room) {
    if (this.textsZoom !== this.zoom) this.texts.clear();
    this.textsZoom = this.zoom;
    const key = `${c.font}|${room}|${text}`;
    let fits = this.texts.get(key);
    if (fits === undefined) {
      const part = this.cut(c, text, room);
      this.texts.set(key, (fits = { text: part, width: c.measureText(part).width }));
    }
    return fits;
  }

  cut(c, text, room) {
    if (c.measureText(text).width <= room) return text;
    const end = "…" + (/\d{1,2}$/.exec(text)?.[0] ?? ""); // a number tells neighbours apart
    let length = Math.min(text.length, Math.floor(room / 4));
    while (length > 1 && c.measureText(text.slice(0, length) + end).width > room) length--;
    return text.slice(0, length) + end;
  }

  // Names of rows and slots stay in view.
  paintGutters(c) {
    const { left, top } = Report.Canvas.gutter, { layout } = this;
    c.fillStyle = this.theme.surface;
    c.globalAlpha = 0.92;
    c.fillRect(0, 0, left - 4, this.height);
    c.fillRect(0, 0, this.width, top - 4);
    c.globalAlpha = 1;
    c.fillStyle = this.theme.muted;
    c.font = `12px ${this.font}`;
    c.textAlign = "right";
    c.textBaseline = "middle";
    let last = Infinity;
    this.circuit.rows.forEach((name, row) => {
      const y = (layout.top[row] + layout.heights[row] / 2) * this.zoom + this.panY;
      if (y < top || last - y < 13) return;
      c.fillText(name, left - 12, y);
      last = y;
    });
    c.textAlign = "center";
    c.font = `600 12px ${this.font}`;
    this.circuit.slots.forEach((name, slot) => {
      const x = (layout.left[slot] + layout.widths[slot] / 2) * this.zoom + this.panX;
      if (x > left) c.fillText(this.shorten(c, name, layout.widths[slot] * this.zoom).text, x, top / 2 - 1);
    });
  }
};
