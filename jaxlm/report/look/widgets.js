// Tables, bars, heat maps and curves of `jaxlm look`, and the arrays they read.

// ---- Arrays ----
const range = (n) => [...Array(n).keys()];
function halves(bits) {
  const out = new Float32Array(bits.length);
  for (let i = 0; i < bits.length; i++) {
    const sign = bits[i] >> 15 ? -1 : 1, exponent = (bits[i] >> 10) & 31, rest = bits[i] & 1023;
    if (exponent === 31) out[i] = rest ? NaN : sign * Infinity;
    else out[i] = sign * (exponent ? 2 ** (exponent - 15) * (1 + rest / 1024) : 2 ** -24 * rest);
  }
  return out;
}
// An array with its shape: `at(i, j)` is a number, `row(i)` the numbers below an index.
class Numbers {
  constructor(values, shape) { this.values = values; this.shape = shape; }
  at(...indices) {
    let flat = 0;
    indices.forEach((index, i) => { flat = flat * this.shape[i] + index; });
    return this.values[flat];
  }
  row(...indices) {
    let flat = 0;
    indices.forEach((index, i) => { flat = flat * this.shape[i] + index; });
    const size = this.shape.slice(indices.length).reduce((a, b) => a * b, 1);
    return this.values.subarray(flat * size, (flat + 1) * size);
  }
  nested() {
    const build = (...indices) => indices.length === this.shape.length ? this.at(...indices)
      : indices.length === this.shape.length - 1 ? [...this.row(...indices)]
      : range(this.shape[indices.length]).map((i) => build(...indices, i));
    return build();
  }
}
async function unpack(json, text) {
  const packed = Uint8Array.from(atob(text.trim()), (c) => c.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  const bytes = await new Response(stream).arrayBuffer();
  const kinds = { float32: Float32Array, int32: Int32Array, float16: Uint16Array };
  const walk = (value) => {
    if (Array.isArray(value)) return value.map(walk);
    if (value === null || typeof value !== "object") return value;
    if (Array.isArray(value.array)) {
      const [kind, shape, start] = value.array;
      const made = new kinds[kind](bytes, start, shape.reduce((a, b) => a * b, 1));
      return new Numbers(kind === "float16" ? halves(made) : made, shape);
    }
    return Object.fromEntries(Object.entries(value).map(([name, item]) => [name, walk(item)]));
  };
  return walk(json);
}

// ---- Numbers and tokens in words ----
function percent(p) {
  if (!isFinite(p)) return "–";
  const v = 100 * p;
  return (v === 0 ? "0" : v >= 99.95 && v < 99.9995 ? v.toFixed(3) : v >= 9.95 ? v.toFixed(1) : v >= 0.01 ? v.toPrecision(2) : v.toExponential(0)) + "\u00a0%";
}
function number(v) {
  if (v === null || v === undefined || !isFinite(v)) return "–";
  const size = Math.abs(v);
  if (size && (size < 1e-3 || size >= 1e6)) return v.toExponential(2).replace("-", "−").replace("e−", "e-");
  return String(Number(v.toPrecision(size >= 1000 ? 6 : 4))).replace("-", "−");
}
function shown(text) {
  if (text === "") return "(nothing)";
  return text.replace(/ /g, "␣").replace(/\n/g, "⏎").replace(/\t/g, "⇥").replace(/\r/g, "␍")
    .replace(/[\p{C}\p{Z}]/gu, (c) => "U+" + c.codePointAt(0).toString(16).toUpperCase().padStart(4, "0"));
}

// ---- Colours ----
// One hue from the ground to blue, or orange through the ground to blue: both are told
// apart by colour-blind readers, and by lightness alone.
const dark = matchMedia("(prefers-color-scheme: dark)");
function palette() {
  return dark.matches
    ? { none: [28, 32, 38], high: [112, 196, 246], low: [255, 150, 80], ink: "#e6e9ed", line: "#4a535e", panel: "#1c2026", chosen: "#e6c84b" }
    : { none: [255, 255, 255], high: [0, 92, 160], low: [190, 76, 0], ink: "#1b1f24", line: "#c9cfd6", panel: "#f6f7f9", chosen: "#1b1f24" };
}
function shade(share) {
  const { none, high, low } = palette(), end = share < 0 ? low : high;
  const part = Math.min(1, Math.abs(share));
  return none.map((v, i) => Math.round(v + (end[i] - v) * part));
}
const css = (rgb) => `rgb(${rgb.join(" ")})`;
const inkOn = ([r, g, b]) => 0.3 * r + 0.6 * g + 0.1 * b > 125 ? "#10151b" : "#ffffff";

// ---- What a pointer or the keyboard is at ----
function hint(lines, x, y) {
  const tip = byId("tip");
  tip.hidden = !lines;
  if (!lines) return;
  tip.replaceChildren();
  for (const line of lines) element("div", "", tip, line);
  const width = tip.offsetWidth, height = tip.offsetHeight;
  tip.style.left = Math.max(4, Math.min(innerWidth - width - 4, x + 14)) + "px";
  tip.style.top = (y + height + 24 > innerHeight ? Math.max(4, y - height - 10) : y + 16) + "px";
}

// ---- Tables and bars ----
// rows: arrays of text or of {bar: share of the width, text}; the first cell names the row.
function table(parent, head, rows, options = {}) {
  const box = element("div", "scroll", parent), made = element("table", options.name || "", box);
  const top = element("tr", "", element("thead", "", made));
  for (const name of head) element("th", "", top, name).scope = "col";
  const body = element("tbody", "", made);
  rows.forEach((cells, r) => {
    const line = element("tr", options.mark && options.mark(r) || "", body);
    cells.forEach((cell, c) => {
      const at = element(c ? "td" : "th", "", line);
      if (!c) at.scope = "row";
      if (cell && cell.bar !== undefined) {
        const bar = element("span", "bar" + (cell.bar < 0 ? " negative" : ""), at);
        bar.style.width = Math.min(100, Math.abs(100 * cell.bar)) + "%";
        element("span", "figure", at, cell.text);
        at.className = "barred";
      } else at.textContent = cell;
    });
  });
  return made;
}
function folded(parent, title) {
  const details = element("details", "numbers", parent);
  element("summary", "", details, title);
  return details;
}
// The numbers as a table, made when it is opened.
function asTable(parent, head, rows) {
  const details = folded(parent, "as a table");
  details.addEventListener("toggle", () => {
    if (details.open && details.children.length < 2) table(details, head, rows());
  });
}

// ---- A heat map ----
// options: title, rows, columns, value(r, c) in [-1, 1], null if unknown, undefined if
// there is none, text(r, c), tip(r, c),
// rowName(r), columnName(c), chosen() -> [r, c], choose(r, c), groups (columns of a group),
// wide (of a cell, at least), high, figure(r, c) for the table.
class Grid {
  constructor(parent, options) {
    this.o = { wide: 16, high: 16, ...options };
    this.figure = element("figure", "heat", parent);
    element("figcaption", "", this.figure, options.title + (options.top ? ` (strongest colour: ${number(options.top)})` : ""));
    const box = this.box = element("div", "scroll", this.figure);
    box.addEventListener("scroll", () => this.draw());
    const canvas = this.canvas = element("canvas", "", box);
    canvas.tabIndex = 0;
    canvas.setAttribute("role", "img");
    canvas.setAttribute("aria-label", options.title + ". Arrow keys move, Enter chooses.");
    canvas.addEventListener("pointermove", (e) => this.point(e));
    canvas.addEventListener("pointerleave", () => this.leave());
    canvas.addEventListener("click", (e) => { const cell = this.cell(e); if (cell) { this.o.choose(...cell); hint(this.o.tip(...cell), e.clientX, e.clientY); } });
    canvas.addEventListener("keydown", (e) => this.key(e));
    canvas.addEventListener("blur", () => this.leave());
    const { rows, columns, rowName, columnName, figure } = this.o;
    asTable(this.figure, ["", ...range(columns).map((c) => columnName(c))], () =>
      range(rows).map((r) => [rowName(r), ...range(columns).map((c) => figure(r, c))]));
    // When what stands beside it has its room; the chosen column is in sight.
    queueMicrotask(() => { this.draw(); box.scrollLeft = this.left + (options.chosen()[1] + 2) * this.size - box.clientWidth; });
  }
  draw() {
    const { rows, columns, value, text, rowName, columnName, groups, high } = this.o;
    const room = Math.max(200, this.figure.clientWidth - 44), colours = palette();
    const sheet = this.canvas.getContext("2d");
    sheet.font = "11px system-ui, sans-serif";
    const names = range(rows).map((r) => rowName(r));
    this.left = Math.min(130, Math.max(...names.map((n) => sheet.measureText(n).width)) + 8);
    const least = Math.max(this.o.wide, 3), fits = (room - this.left) / columns;
    this.size = Math.min(this.o.widest || 120, fits > 0.8 * least ? fits : least);
    this.top = this.size >= 34 || this.o.shortColumns ? 18 : 62;
    const width = Math.ceil(this.left + this.size * columns) + (this.top > 18 ? 27 : 1), height = this.top + rows * high + 1;
    const scale = devicePixelRatio || 1;
    this.canvas.width = width * scale; this.canvas.height = height * scale;
    this.canvas.style.width = width + "px"; this.canvas.style.height = height + "px";
    sheet.scale(scale, scale);
    sheet.font = "11px system-ui, sans-serif";
    sheet.textBaseline = "middle";
    sheet.fillStyle = colours.ink;
    const every = this.o.shortColumns ? Math.ceil(22 / this.size) : Math.ceil(12 / this.size);
    for (let c = 0; c < columns; c += every) {
      sheet.save();
      if (this.top === 18) {
        sheet.textAlign = "center";
        sheet.fillText(this.fit(sheet, columnName(c), this.size * every - 2), this.left + (c + 0.5) * this.size, 9);
      } else {
        sheet.translate(this.left + (c + 0.5) * this.size, this.top - 4);
        sheet.rotate(-Math.PI / 3);
        sheet.fillText(this.fit(sheet, columnName(c), 62), 0, 0);
      }
      sheet.restore();
    }
    sheet.textAlign = "center";
    for (let r = 0; r < rows; r++) for (let c = 0; c < columns; c++) {
      const share = value(r, c), x = this.left + c * this.size, y = this.top + r * high;
      if (share === undefined) continue;
      if (share === null) {
        sheet.strokeStyle = colours.line;
        sheet.beginPath(); sheet.moveTo(x + 2, y + high - 2); sheet.lineTo(x + this.size - 2, y + 2); sheet.stroke();
        continue;
      }
      sheet.fillStyle = css(shade(share));
      sheet.fillRect(x, y, this.size - (this.size > 6 ? 1 : 0), high - (high > 6 ? 1 : 0));
      if (text && this.size >= 34) {
        sheet.fillStyle = inkOn(shade(share));
        sheet.fillText(this.fit(sheet, text(r, c), this.size - 4), x + this.size / 2, y + high / 2);
      }
    }
    sheet.strokeStyle = colours.ink;
    if (groups > 1) for (let c = 0; c <= columns; c += groups) {
      const x = Math.round(this.left + c * this.size) - 0.5;
      sheet.beginPath(); sheet.moveTo(x, this.top); sheet.lineTo(x, height); sheet.stroke();
    }
    const mark = (cell, thick) => {
      if (!cell || cell[1] < 0 || cell[0] < 0) return;
      sheet.lineWidth = thick;
      sheet.strokeStyle = colours.chosen;
      sheet.strokeRect(this.left + cell[1] * this.size, this.top + cell[0] * high, this.size, high);
    };
    mark(this.o.chosen(), 2.5);
    mark(this.at, 1.5);
    // Names of rows stay in sight, over what is scrolled away.
    const { scrollLeft } = this.box;
    sheet.fillStyle = colours.panel; sheet.textAlign = "left";
    sheet.fillRect(scrollLeft, this.top - 1, this.left - 2, height);
    sheet.fillStyle = colours.ink;
    for (let r = 0; r < rows; r++) if (high >= 11 || r % Math.ceil(11 / high) === 0)
      sheet.fillText(this.fit(sheet, names[r], this.left - 6), scrollLeft, this.top + (r + 0.5) * high);
  }
  fit(sheet, text, room) {
    if (sheet.measureText(text).width <= room) return text;
    while (text.length > 1 && sheet.measureText(text + "…").width > room) text = text.slice(0, -1);
    return text.length > 1 || room > 12 ? text + "…" : "";
  }
  cell(event) {
    const box = this.canvas.getBoundingClientRect();
    const c = Math.floor((event.clientX - box.left - this.left) / this.size);
    const r = Math.floor((event.clientY - box.top - this.top) / this.o.high);
    return r >= 0 && c >= 0 && r < this.o.rows && c < this.o.columns ? [r, c] : null;
  }
  point(event) {
    const cell = this.cell(event);
    if (String(cell) !== String(this.at)) { this.at = cell; this.draw(); }
    hint(cell && this.o.tip(...cell), event.clientX, event.clientY);
  }
  leave() { this.at = null; hint(null); this.draw(); }
  key(event) {
    const moves = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
    const from = this.at || this.o.chosen();
    if (event.key === "Enter" || event.key === " ") { this.o.choose(...from); event.preventDefault(); return; }
    if (event.key === "Escape") return this.leave();
    const move = moves[event.key];
    if (!move) return;
    event.preventDefault();
    this.at = [Math.min(this.o.rows - 1, Math.max(0, from[0] + move[0])), Math.min(this.o.columns - 1, Math.max(0, from[1] + move[1]))];
    this.draw();
    const box = this.canvas.getBoundingClientRect(), lines = this.o.tip(...this.at);
    hint(lines, box.left + this.left + this.at[1] * this.size, box.top + this.top + this.at[0] * this.o.high);
    byId("spoken").textContent = lines.join("; ");
  }
}

// ---- Curves over layers or tokens ----
// options: title, names (of x), series [{label, values}], log, zero, chosen, choose(i), form.
function curves(parent, options) {
  const { names, series, log, form = number, ticks: marks = names } = options;
  const figure = element("figure", "curves", parent);
  element("figcaption", "", figure, options.title);
  const keys = element("p", "keys", figure);
  series.forEach((s, i) => key(keys, s.label, `s${i % 6} ${s.dash || ""}`));
  const width = Math.max(260, figure.clientWidth - 16), height = 220, n = names.length;
  const svg = node("svg", { viewBox: `0 0 ${width} ${height}`, height, tabindex: 0, role: "img", "aria-label": options.title + ". Arrow keys read the values." }, figure);
  const all = series.flatMap((s) => [...s.values]).filter((v) => isFinite(v) && (!log || v > 0));
  let low = Math.min(...all, ...(options.zero ? [0] : [])), high = Math.max(...all, ...(options.zero ? [0] : []));
  if (!(high > low)) { low = log ? low / 2 : low - 1; high = log ? high * 2 : high + 1; }
  const scale = log ? Math.log : (v) => v, left = 58, right = width - 20, top = 8, bottom = height - 30;
  const px = (i) => n > 1 ? left + i / (n - 1) * (right - left) : (left + right) / 2;
  const py = (v) => bottom - (scale(v) - scale(low)) / (scale(high) - scale(low)) * (bottom - top);
  for (const y of log ? logTicks(low, high) : ticks(low, high, 5)) {
    node("line", { x1: left, x2: right, y1: py(y), y2: py(y), class: "grid" }, svg);
    node("text", { x: left - 6, y: py(y) + 4, "text-anchor": "end" }, svg, form(y));
  }
  const every = Math.ceil(n / Math.max(2, Math.floor((right - left) / 56)));
  for (let i = 0, last = -every; i < n; i++) if (i - last >= every && marks[i]) {
    last = i;
    node("text", { x: px(i), y: bottom + 16, "text-anchor": "middle" }, svg, marks[i].length > 7 ? marks[i].slice(0, 6) + "…" : marks[i]);
  }
  node("line", { x1: left, x2: right, y1: bottom, y2: bottom, class: "axis" }, svg);
  series.forEach((s, k) => node("path", { class: `curve s${k % 6} ${s.dash || ""}`, "stroke-linecap": "round",
    d: path(names.map((_, i) => i), [...s.values].map((v) => isFinite(v) && (!log || v > 0) ? v : null), (x, y) => [px(x), py(y)]) }, svg));
  const cursor = node("line", { y1: top, y2: bottom, class: "cursor", x1: -9, x2: -9 }, svg);
  let at = options.chosen === undefined ? n - 1 : options.chosen;
  const show = (i, x, y) => {
    at = i;
    cursor.setAttribute("x1", px(i)); cursor.setAttribute("x2", px(i));
    const lines = [names[i], ...series.map((s) => `${s.label} ${form(s.values[i])}`)];
    hint(lines, x, y);
    byId("spoken").textContent = lines.join("; ");
  };
  if (options.chosen !== undefined) { cursor.setAttribute("x1", px(at)); cursor.setAttribute("x2", px(at)); }
  const index = (event) => {
    const x = (event.clientX - svg.getBoundingClientRect().left) * width / svg.getBoundingClientRect().width;
    return Math.max(0, Math.min(n - 1, Math.round((x - left) / (right - left) * (n - 1))));
  };
  svg.addEventListener("pointermove", (e) => show(index(e), e.clientX, e.clientY));
  svg.addEventListener("pointerleave", () => hint(null));
  svg.addEventListener("blur", () => hint(null));
  if (options.choose) svg.addEventListener("click", (e) => options.choose(index(e)));
  svg.addEventListener("keydown", (e) => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[e.key];
    if (!step) return;
    e.preventDefault();
    const box = svg.getBoundingClientRect(), i = Math.max(0, Math.min(n - 1, at + step));
    show(i, box.left + px(i), box.top + 60);
  });
  asTable(figure, ["", ...series.map((s) => s.label)], () => names.map((name, i) => [name, ...series.map((s) => form(s.values[i]))]));
}

// ---- A cloud of points, with the diagonal where both are the same ----
function cloud(parent, options) {
  const { points, xName, yName } = options, figure = element("figure", "cloud", parent);
  element("figcaption", "", figure, options.title);
  const width = Math.min(420, Math.max(260, figure.clientWidth - 16)), height = width * 0.75;
  const svg = node("svg", { viewBox: `0 0 ${width} ${height}`, height, role: "img", "aria-label": options.title }, figure);
  svg.style.maxWidth = width + "px";
  const all = points.flatMap((p) => [p.x, p.y]);
  let low = Math.min(0, ...all), high = Math.max(0, ...all);
  if (!(high > low)) { low -= 1; high += 1; }
  const left = 50, right = width - 8, top = 8, bottom = height - 34;
  const px = (v) => left + (v - low) / (high - low) * (right - left), py = (v) => bottom - (v - low) / (high - low) * (bottom - top);
  for (const v of ticks(low, high, 7)) {
    node("line", { x1: left, x2: right, y1: py(v), y2: py(v), class: "grid" }, svg);
    node("text", { x: left - 5, y: py(v) + 4, "text-anchor": "end" }, svg, number(v));
    node("text", { x: px(v), y: bottom + 14, "text-anchor": "middle" }, svg, number(v));
  }
  node("line", { x1: px(low), y1: py(low), x2: px(high), y2: py(high), class: "axis" }, svg);
  node("text", { x: (left + right) / 2, y: height - 4, "text-anchor": "middle" }, svg, `${xName} (across) and ${yName} (up)`);
  for (const p of points) {
    const dot = node("circle", { cx: px(p.x), cy: py(p.y), r: 3.5, class: "point s0" }, svg);
    dot.addEventListener("pointermove", (e) => hint([p.name, `${xName} ${number(p.x)}`, `${yName} ${number(p.y)}`], e.clientX, e.clientY));
    dot.addEventListener("pointerleave", () => hint(null));
  }
  asTable(figure, ["", xName, yName], () => points.map((p) => [p.name, number(p.x), number(p.y)]));
}

// ---- Controls ----
function choices(parent, label, options, chosen, change) {
  const set = element("fieldset", "choices", parent);
  element("legend", "", set, label);
  const name = "c" + choices.made++;
  for (const [value, text] of options) {
    const line = element("label", "", set), input = element("input", "", line);
    input.type = "radio"; input.name = name; input.value = value; input.checked = value === chosen;
    line.append(" " + text);
    input.addEventListener("change", () => change(value));
  }
}
choices.made = 0;
function slider(parent, label, { low, high, step, value, form }, change) {
  const line = element("label", "slider", parent, label + " "), input = element("input", "", line);
  Object.assign(input, { type: "range", min: low, max: high, step, value });
  const out = element("output", "", line, form(value));
  input.addEventListener("input", () => { out.textContent = form(Number(input.value)); change(Number(input.value)); });
}
addEventListener("scroll", () => hint(null), { passive: true });
