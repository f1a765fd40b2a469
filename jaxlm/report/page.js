// Draws the curves and samples of the report, with drawing.js.
(() => {
const { runs, live } = JSON.parse(document.getElementById("data").textContent);
// What a person chose outlives the reloads of a page in progress.
const kept = history.state || {};
const state = { axis: "step", log: false, smoothing: 20, range: null, ...kept.state, hidden: new Set(kept.hidden) };
const several = runs.length > 1;

const CHARTS = [
  { title: "Loss (nats per token)", curves: ["train", "eval"], big: true, log: true, smooth: true },
  { title: "Learning rate", curves: ["lr"], form: short },
  { title: "Gradient norm (before clipping)", curves: ["grad_norm"], log: true, smooth: true },
  { title: "Tokens per second", curves: ["tokens_per_s"], smooth: true, zero: true, form: count },
  { title: "MFU (model FLOPs utilization: share of the peak FLOP/s)", curves: ["mfu"], smooth: true, zero: true,
    form: (v) => short(100 * v) + " %" },
  { title: "Tokens of the busiest expert (multiple of the mean)", curves: ["expert_load"], smooth: true, zero: true },
  { title: "Best previous-token and induction head (probability)", curves: ["previous", "induction"], zero: true },
  { title: "Entropy of a sentence (nats)", curves: ["entropy"], zero: true },
  { title: "Layers until the logit lens has the answer", curves: ["lens_depth"], zero: true },
  { title: "What feed-forwards add to the next token's logit", curves: ["memory"], zero: true },
];
const CURVE_NAMES = { train: "train", eval: "held-out", lr: "learning rate",
  grad_norm: "gradient norm", tokens_per_s: "tokens/s", mfu: "MFU", expert_load: "busiest expert", entropy: "entropy",
  lens_depth: "layers", previous: "previous token", induction: "induction",
  memory: "feed-forwards" };

function clock(v) {
  if (v > 0 && v < 10 && v % 1) return v.toFixed(1) + " s";
  const s = Math.round(v), h = Math.floor(s / 3600), two = (n) => String(n).padStart(2, "0");
  if (h >= 48) return Number((v / 86400).toFixed(2)) + " d";
  const m = Math.floor(s / 60) % 60;
  return h ? `${h}:${two(m)}:${two(s % 60)}` : `${m}:${two(s % 60)}`;
}
const AXIS_FORM = { step: (v) => String(Number(v.toPrecision(7))), tokens: count, time: clock };
const AXIS_NAME = { step: "step", tokens: "tokens seen", time: "training time" };
const TIME_STEPS = [1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 21600, 43200, 86400];

// ---- Curves ----
// The same as `smooth` in curves.py: a centered moving mean, applied twice.
function smoothed(values, half) {
  const n = values.length, good = values.map((v) => v !== null);
  for (let pass = 0; pass < 2; pass++) {
    const sums = new Float64Array(n + 1), counts = new Int32Array(n + 1);
    for (let i = 0; i < n; i++) {
      sums[i + 1] = sums[i] + (good[i] ? values[i] : 0);
      counts[i + 1] = counts[i] + (good[i] ? 1 : 0);
    }
    values = values.map((v, i) => {
      if (!good[i]) return null;
      const h = Math.min(i, half), a = i - h, b = Math.min(i + h + 1, n);
      return (sums[b] - sums[a]) / Math.max(1, counts[b] - counts[a]);
    });
  }
  return values;
}
function seriesOf(chart) {
  const found = [];
  runs.forEach((run, r) => chart.curves.forEach((name) => {
    const curve = run.curves[name];
    if (!curve || !curve.y.length || state.hidden.has(several ? r : name)) return;
    const isEval = name === "eval", second = chart.curves.indexOf(name) > 0;
    const series = { x: curve[state.axis], y: curve.y, curve, points: isEval,
      colour: "s" + (several ? r % 6 : second ? 1 : 0),
      dash: several && second ? "dashed" : r >= 6 ? "dotted" : "",
      label: several ? run.name + (chart.curves.length > 1 ? ", " + CURVE_NAMES[name] : "") : CURVE_NAMES[name] };
    if (chart.smooth && !isEval && state.smoothing > 0) {
      const base = curve.mean || curve;
      const half = Math.floor(state.smoothing * base.y.length / 1000);
      if (half) series.smooth = { x: base[state.axis], y: smoothed(base.y, half) };
    }
    found.push(series);
  }));
  return found;
}
function extent(series, logarithmic, zero) {
  let x0 = Infinity, x1 = -Infinity, y0 = Infinity, y1 = -Infinity;
  for (const s of series) for (const x of s.x) { x0 = Math.min(x0, x); x1 = Math.max(x1, x); }
  if (x0 > 0 && x0 < 0.1 * x1) x0 = 0;
  if (state.range) [x0, x1] = state.range;
  for (const s of series) s.y.forEach((y, i) => {
    if (y === null || s.x[i] < x0 || s.x[i] > x1 || (logarithmic && y <= 0)) return;
    y0 = Math.min(y0, y); y1 = Math.max(y1, y);
  });
  if (!(x1 > x0)) { x0 -= 1; x1 += 1; }
  if (y0 > y1) return null;
  if (zero) y0 = Math.min(0, y0);
  if (y0 === y1) { const d = Math.abs(y0) * 0.1 || 1; if (!logarithmic) y0 -= d; else y0 /= 1.1; y1 += d; }
  else if (logarithmic) { const d = (y1 / y0) ** 0.04; y0 /= d; y1 *= d; }
  else { const d = (y1 - y0) * 0.04; if (!zero) y0 -= d; y1 += d; }
  return { x0, x1, y0, y1 };
}
// ---- One chart ----
const MARGIN = { left: 62, right: 14, top: 10, bottom: 38 };
class Chart {
  constructor(chart) {
    this.chart = chart;
    this.figure = element("figure", chart.big ? "big" : "", byId("charts"));
    element("figcaption", "", this.figure, chart.title);
    if (!chart.big && chart.curves.length > 1)
      chart.curves.forEach((name, i) => key(this.figure, CURVE_NAMES[name], several ? i ? "dashed" : "" : "s" + i));
    this.svg = node("svg", { tabindex: 0, role: "img", "aria-label": chart.title + "; arrow keys read its values" }, this.figure);
    this.tip = element("div", "tip", this.figure);
    this.tip.hidden = true;
    this.svg.addEventListener("pointermove", (e) => this.pointed(e));
    this.svg.addEventListener("pointerleave", () => { if (!this.drag) this.leave(); });
    this.svg.addEventListener("pointerdown", (e) => {
      if (e.pointerType === "mouse" && e.button === 0 && this.frame) {
        this.drag = this.valueAt(e); this.svg.setPointerCapture(e.pointerId);
      }
    });
    this.svg.addEventListener("pointerup", (e) => this.dropped(e));
    this.svg.addEventListener("dblclick", () => zoom(null));
    this.svg.addEventListener("keydown", (e) => this.key(e));
    this.svg.addEventListener("blur", () => this.leave());
  }
  draw() {
    const width = Math.max(260, this.figure.clientWidth - 16), height = this.chart.big ? 400 : 230;
    this.svg.replaceChildren();
    this.svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    this.svg.setAttribute("height", height);
    this.tip.hidden = true;
    this.series = seriesOf(this.chart);
    const logarithmic = this.logarithmic = Boolean(this.chart.log && state.log);
    const frame = this.frame = extent(this.series, logarithmic, this.chart.zero);
    this.box = { left: MARGIN.left, right: width - MARGIN.right, top: MARGIN.top, bottom: height - MARGIN.bottom };
    if (!frame) {
      node("text", { x: width / 2, y: height / 2, "text-anchor": "middle" }, this.svg, this.series.length ? "no finite values here" : "nothing to draw yet");
      if (!this.series.length) return;
    }
    const box = this.box, scale = logarithmic ? Math.log : (v) => v;
    this.px = (x) => box.left + (x - frame.x0) / (frame.x1 - frame.x0) * (box.right - box.left);
    this.py = (y) => box.bottom - (scale(y) - scale(frame.y0)) / (scale(frame.y1) - scale(frame.y0)) * (box.bottom - box.top);
    if (!frame) return;
    this.drawAxes(width, height);
    const clip = "clip" + CHARTS.indexOf(this.chart);
    node("rect", { x: box.left, y: box.top - 4, width: box.right - box.left + 4, height: box.bottom - box.top + 8 },
      node("clipPath", { id: clip }, this.svg));
    const area = node("g", { "clip-path": `url(#${clip})` }, this.svg);
    for (const s of this.series) this.drawSeries(s, area);
    this.overlay = node("g", {}, this.svg);
  }
  drawAxes(width, height) {
    const { box, frame } = this, form = this.chart.form || short;
    const ys = this.logarithmic ? logTicks(frame.y0, frame.y1) : ticks(frame.y0, frame.y1, this.chart.big ? 7 : 5);
    for (const y of ys) {
      node("line", { x1: box.left, x2: box.right, y1: this.py(y), y2: this.py(y), class: "grid" }, this.svg);
      node("text", { x: box.left - 6, y: this.py(y) + 4, "text-anchor": "end" }, this.svg, form(y));
    }
    const wanted = Math.max(2, Math.floor((box.right - box.left) / 110));
    for (const x of ticks(frame.x0, frame.x1, wanted, state.axis === "time" ? TIME_STEPS : null, state.axis === "step")) {
      node("line", { x1: this.px(x), x2: this.px(x), y1: box.bottom, y2: box.bottom + 4, class: "axis" }, this.svg);
      node("text", { x: this.px(x), y: box.bottom + 17, "text-anchor": "middle" }, this.svg, (state.axis === "step" && frame.x1 >= 1e4 ? count : AXIS_FORM[state.axis])(x));
    }
    node("line", { x1: box.left, x2: box.right, y1: box.bottom, y2: box.bottom, class: "axis" }, this.svg);
    node("text", { x: (box.left + box.right) / 2, y: height - 4, "text-anchor": "middle" }, this.svg, AXIS_NAME[state.axis]);
  }
  drawSeries(s, area) {
    const place = (x, y) => this.logarithmic && y <= 0 ? null : [this.px(x), this.py(y)];
    const draw = (xs, ys, classes) => node("path",
      { d: path(xs, ys, place), class: `curve ${s.colour} ${classes}`, "stroke-linecap": "round" }, area);
    draw(s.x, s.y, s.smooth ? "raw" : s.dash);
    if (s.smooth) draw(s.smooth.x, s.smooth.y, s.dash);
    s.y.forEach((y, i) => {
      const x = this.px(s.x[i]);
      if (y === null) {
        const b = this.box.bottom;
        node("title", {}, node("path", { d: `M${x} ${b - 9}l5 9h-10z`, class: "bad" }, area), "not finite");
      } else if ((s.points || s.y.length === 1) && s.y.length <= 100 && place(s.x[i], y))
        node("circle", { cx: x, cy: this.py(y), r: 3.5, class: "point " + s.colour }, area);
    });
  }
  valueAt(event) {
    const at = event.clientX - this.svg.getBoundingClientRect().left;
    const share = (at - this.box.left) / (this.box.right - this.box.left);
    return this.frame.x0 + Math.min(1, Math.max(0, share)) * (this.frame.x1 - this.frame.x0);
  }
  pointed(event) {
    if (!this.frame) return;
    const x = this.valueAt(event);
    this.show(x);
    if (this.drag !== undefined && this.drag !== null) {
      const a = this.px(Math.min(x, this.drag)), b = this.px(Math.max(x, this.drag));
      node("rect", { x: a, y: this.box.top, width: b - a, height: this.box.bottom - this.box.top, class: "band" }, this.overlay);
    }
  }
  dropped(event) {
    if (this.drag === undefined || this.drag === null) return;
    const x = this.valueAt(event), start = this.drag;
    this.drag = null;
    if (Math.abs(this.px(x) - this.px(start)) > 8) zoom([Math.min(x, start), Math.max(x, start)]);
  }
  leave() { this.tip.hidden = true; if (this.overlay) this.overlay.replaceChildren(); }
  show(x) {
    this.overlay.replaceChildren();
    this.tip.replaceChildren();
    const lines = [], form = this.chart.form || short;
    let where = null;
    for (const s of this.series) {
      const i = nearest(s.x, x), y = s.y[i];
      if (!where || Math.abs(s.x[i] - x) < Math.abs(where.x - x))
        where = { x: s.x[i], step: s.curve.step[i], tokens: s.curve.tokens[i], time: s.curve.time[i] };
      let text = `${s.label} ${form(y)}`;
      if (s.smooth) text += `, smoothed ${form(s.smooth.y[nearest(s.smooth.x, x)])}`;
      if (s.points) text += ` (step ${s.curve.step[i]})`;
      lines.push(text);
      if (y !== null && (!this.logarithmic || y > 0) && s.x[i] >= this.frame.x0 && s.x[i] <= this.frame.x1)
        node("circle", { cx: this.px(s.x[i]), cy: this.py(y), r: 4, class: "point " + s.colour }, this.overlay);
    }
    if (!where) return;
    const head = `step ${where.step} · ${count(where.tokens)} tokens · ${clock(where.time)}`;
    for (const line of [head, ...lines]) element("div", "", this.tip, line);
    const at = Math.min(this.box.right, Math.max(this.box.left, this.px(where.x)));
    node("line", { x1: at, x2: at, y1: this.box.top, y2: this.box.bottom, class: "cursor" }, this.overlay);
    this.tip.hidden = false;
    const right = at > (this.box.left + this.box.right) / 2;
    this.tip.style.left = right ? "" : at + 20 + "px";
    this.tip.style.right = right ? this.figure.clientWidth - at + 8 + "px" : "";
    this.tip.style.top = "44px";
    this.at = where.x;
    this.said = [head, ...lines].join("; ");
  }
  key(event) {
    const s = this.series && this.series[0];
    if (!s || !this.frame) return;
    const { x0, x1 } = this.frame;
    let i = this.at === undefined ? s.x.length - 1 : nearest(s.x, this.at);
    const stride = event.shiftKey ? 10 : 1;
    if (event.key === "ArrowLeft") i -= stride;
    else if (event.key === "ArrowRight") i += stride;
    else if (event.key === "Home") i = 0;
    else if (event.key === "End") i = s.x.length - 1;
    else if (event.key === "Escape") return this.leave();
    else if (event.key === "0") return zoom(null);
    else if (event.key === "+" || event.key === "-" || event.key === "=") {
      event.preventDefault();
      const middle = s.x[i], half = (x1 - x0) * (event.key === "-" ? 1 : 0.25);
      return zoom([Math.max(0, middle - half), middle + half]);
    } else return;
    event.preventDefault();
    this.show(s.x[Math.min(s.x.length - 1, Math.max(0, i))]);
    byId("spoken").textContent = this.said;
  }
}

// ---- The page ----
const charts = CHARTS.filter((c) => c.big || runs.some((r) => c.curves.some((n) => r.curves[n] && r.curves[n].y.length)))
  .map((c) => new Chart(c));
function redraw() {
  byId("whole").hidden = !state.range;
  byId("smoothing-value").textContent = state.smoothing / 5 + " % of the run";
  for (const chart of charts) chart.draw();
}
function zoom(range) { state.range = range; redraw(); }
function legend() {
  const entries = several ? runs.map((run, r) => [r, run.name, r % 6, r >= 6])
    : ["train", "eval"].map((name, i) => [name, CURVE_NAMES[name] + " loss", i, false]);
  for (const [key, text, colour, dotted] of entries) {
    const button = element("button", "", byId("legend"));
    button.type = "button";
    button.setAttribute("aria-pressed", String(!state.hidden.has(key)));
    const sign = node("svg", { width: 24, height: 8, "aria-hidden": "true" }, button);
    node("path", { d: "M1 4h22", class: `curve s${colour} ${dotted ? "dotted" : ""}` }, sign);
    button.append(text);
    button.addEventListener("click", () => {
      const hide = !state.hidden.has(key);
      if (hide) state.hidden.add(key); else state.hidden.delete(key);
      button.setAttribute("aria-pressed", String(!hide));
      redraw();
    });
  }
  if (several) element("span", "hint", byId("legend"), "solid: train, dashed: held-out");
}
const sampleSteps = () => [...new Set(runs.flatMap((run) => run.samples.map((s) => s.step)))].sort((a, b) => a - b);
function samples() {
  const steps = sampleSteps();
  if (!steps.length) return;
  byId("samples").hidden = false;
  byId("sample-control").hidden = steps.length < 2;
  const slider = byId("sample-step");
  slider.max = steps.length - 1;
  const show = () => {
    const step = steps[slider.value], place = byId("sample-texts");
    byId("sample-value").textContent = `${step} (${Number(slider.value) + 1} of ${steps.length})`;
    slider.setAttribute("aria-valuetext", "step " + step);
    place.replaceChildren();
    for (const run of runs) {
      const before = run.samples.filter((s) => s.step <= step);
      if (!before.length) continue;
      const last = before[before.length - 1].step, part = element("div", "", place);
      if (several || steps.length === 1) element("h3", "", part, (several ? run.name + ", " : "") + "step " + last);
      for (const sample of before.filter((s) => s.step === last)) {
        const text = element("pre", "", part);
        text.tabIndex = 0;
        element("span", "prompt", text, sample.prompt);
        element("span", "", text, sample.text);
      }
      if (run.omitted) element("p", "hint", part, `${run.omitted} samples between these are in metrics.jsonl only`);
    }
  };
  slider.addEventListener("input", show);
  const before = steps.indexOf(kept.sample);
  slider.value = before < 0 ? steps.length - 1 : before;
  show();
}
function controls() {
  for (const radio of document.querySelectorAll("input[name=axis]")) radio.addEventListener("change", () => {
    state.axis = radio.value; state.range = null;
    for (const chart of charts) chart.at = undefined;
    redraw();
  });
  byId("log").addEventListener("change", (e) => { state.log = e.target.checked; redraw(); });
  byId("smoothing").addEventListener("input", (e) => { state.smoothing = Number(e.target.value); redraw(); });
  byId("whole").addEventListener("click", () => zoom(null));
  byId("controls").addEventListener("submit", (e) => e.preventDefault());
  byId("differing").hidden = !several;
  byId("only-differing").addEventListener("change", (e) => byId("config").classList.toggle("only-differing", e.target.checked));
  byId("controls").reset();
  document.querySelector(`input[name=axis][value=${state.axis}]`).checked = true;
  byId("log").checked = state.log;
  byId("smoothing").value = state.smoothing;
  let waiting = 0, width = innerWidth;
  addEventListener("resize", () => {
    if (innerWidth === width) return;  // phones hide their bar while scrolling
    width = innerWidth;
    cancelAnimationFrame(waiting); waiting = requestAnimationFrame(redraw);
  });
}

// ---- A run in progress ----
// The longer the next page is overdue, the more rarely it is looked for, and after 40
// times the expected wait no more: the run was killed, or its machine's clock differs.
let touched = 0;
for (const kind of ["pointermove", "pointerdown", "keydown"]) addEventListener(kind, () => { touched = Date.now(); });
function follow() {
  if (!live) return;
  const age = Math.max(0, Date.now() / 1000 - live.written_s), at = new Date(1000 * live.written_s).toLocaleString();
  if (age > 40 * live.next_s) {
    byId("live").textContent = `Written at ${at}, while the run was in progress, and nothing came since: reload to look again.`;
    return;
  }
  byId("live").textContent = `In progress: written at ${at}; this page reloads itself.`;
  setTimeout(reload, 1000 * Math.max(live.next_s + 1 - age, age / 4, 1));
}
function reload() {
  // Not while a person points, types or marks text.
  if (Date.now() - touched < 5000 || !getSelection().isCollapsed) return setTimeout(reload, 1000);
  const { hidden, ...rest } = state, slider = byId("sample-step");
  history.replaceState({
    state: rest, hidden: [...hidden], sample: slider.value === slider.max ? null : sampleSteps()[slider.value],
    open: [...document.querySelectorAll("details")].map((d) => d.open),
  }, "");
  location.reload();
}
controls();
legend();
redraw();
samples();
document.querySelectorAll("details").forEach((d, i) => { d.open = Boolean(kept.open && kept.open[i]); });
follow();
})();
