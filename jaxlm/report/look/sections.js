// The eleven sections of `jaxlm look`: what the chosen token, layer and head show.
(async () => {
let view;
try {
  view = await unpack(JSON.parse(byId("data").textContent), byId("arrays").textContent);
} catch (error) {
  byId("problem").hidden = false;
  byId("problem").textContent = `The numbers of this page cannot be unpacked (${error}): open it in a newer browser.`;
  return;
}
const { text, answer, choice, streams, cache, heads, units, additions, causes, comparison, model } = view;
const T = text.rows.length, L = model.num_layers, N = model.num_heads, K = model.num_kv_heads, G = N / K;
const state = { position: view.position, layer: Math.floor(L / 2), head: 0 };
const piece = (id) => shown(view.pieces[id] === undefined ? `<${id}>` : view.pieces[id]);
const token = (t) => piece(text.rows[t].id);
const named = (t) => `${t} ${token(t)}`;
const layers = range(L), tokens = range(T), [ours, theirs] = causes.tokens.map(piece);
const most = (values) => { let m = 0; for (const v of values) if (isFinite(v)) m = Math.max(m, Math.abs(v)); return m || 1; };
const headAt = new Map();
for (let i = 0; i < heads.heads.shape[0]; i++) headAt.set(heads.heads.at(i, 0) * N + heads.heads.at(i, 1), i);
// Maps of all heads; a w marks layers with a window.
const HEADS = { rows: L, columns: N, high: L > 40 ? 9 : 14, wide: 10, widest: 60, groups: G, shortColumns: true, columnName: String,
  rowName: (l) => `layer ${l}` + (heads.windows[l] ? " w" : ""), chosen: () => [state.layer, state.head], choose: (layer, head) => select({ layer, head }) };

// ---- State ----
const updates = [];
function select(change) {
  Object.assign(state, change);
  const active = document.activeElement, middle = innerHeight / 2;
  // What stands above may become longer: the section that is looked at stays in its place.
  const top = () => seen.body.getBoundingClientRect().top;
  const seen = updates.find((u) => u.body.getBoundingClientRect().bottom > middle) || updates[0], before = top();
  for (const { body, update } of updates) {
    const find = () => [...body.querySelectorAll("canvas, svg[tabindex], [role=button], input, button, summary")];
    const at = find().indexOf(active);
    update();
    if (at >= 0 && !active.isConnected && find()[at]) find()[at].focus({ preventScroll: true });
  }
  strip();
  queueMicrotask(() => scrollBy(0, top() - before));
}
// Titles and introductions stand in the page.
function section(id, make) {
  const body = byId(id), link = element("a", "", byId("contents"), body.querySelector("h2").textContent);
  link.href = "#" + id;
  updates.push({ body, update: make(body) || (() => {}) });
}
// A part of a section that follows what is chosen.
function redrawn(body, draw) {
  const part = element("div", "", body);
  return () => {
    const kept = (name, read) => [...part.querySelectorAll(name)].map(read);
    const open = kept("details", (d) => d.open), scrolled = kept(".scroll", (b) => b.scrollLeft), first = !part.firstChild;
    part.replaceChildren();
    draw(part);
    kept("details", (d, i) => { d.open = Boolean(open[i]); });
    if (!first) queueMicrotask(() => kept(".scroll", (b, i) => { b.scrollLeft = scrolled[i] || 0; }));
  };
}
// Cells of a table with a bar: a probability, or a number beside the largest.
const share = (p) => ({ bar: p, text: percent(p) }), bar = (v, largest) => ({ bar: v / largest, text: number(v) });
const scaled = (get, largest) => (r, c) => get(r, c) === null ? null : get(r, c) / largest;
const note = (parent, words) => element("p", "hint", parent, words), say = (parent, id) => note(parent, byId("about-" + id).textContent);

// ---- The strip of tokens ----
function strip() {
  const box = byId("strip");
  if (!box.children.length) tokens.forEach((t) => {
    const one = element("button", t < text.num_prompt ? "" : "new", box, token(t));
    one.type = "button";
    one.setAttribute("role", "option");
    one.addEventListener("click", () => select({ position: t }));
  });
  [...box.children].forEach((one, t) => {
    const chosen = t === state.position;
    one.setAttribute("aria-selected", String(chosen));
    one.tabIndex = chosen ? 0 : -1;
    if (!chosen) return;
    const left = one.offsetLeft - box.offsetLeft;
    if (left < box.scrollLeft || left + one.offsetWidth > box.scrollLeft + box.clientWidth) box.scrollLeft = left - box.clientWidth / 2;
  });
}
byId("strip").addEventListener("keydown", (e) => {
  const to = { ArrowLeft: state.position - 1, ArrowRight: state.position + 1, Home: 0, End: T - 1 }[e.key];
  if (to === undefined) return;
  e.preventDefault();
  select({ position: Math.max(0, Math.min(T - 1, to)) });
  byId("strip").children[state.position].focus();
});
const first = answer.ids.at(view.position, 0);
byId("facts").textContent = `After ${named(view.position)} the model expects ${piece(first)}, with a probability of ${percent(answer.probabilities.at(view.position, 0))}. `
  + `${T} tokens; ${count(model.parameters)} parameters, ${L} layers of width ${model.model_dim}, ${N} query heads on ${K} key heads, ${model.dtype}.`;

// ---- 1 ----
section("map", (body) => {
  const two = element("div", "two", body), picture = element("div", "", two), panel = element("div", "panel", two), stages = view.stages;
  panel.setAttribute("aria-live", "polite");
  const high = 40, svg = node("svg", { viewBox: `0 0 390 ${stages.length * high + 8}`, class: "map" }, picture);
  const inside = range(stages.length).filter((i) => stages[i].in_layer);
  node("rect", { x: 1, y: inside[0] * high + 2, width: 388, height: inside.length * high + 2, rx: 8, class: "layer" }, svg);
  node("text", { x: 384, y: inside[0] * high + 18, "text-anchor": "end" }, svg, `× ${L}`);
  node("line", { x1: 30, x2: 30, y1: high * 1.5, y2: (stages.length - 1.5) * high, class: "stream" }, svg);
  const show = (i) => {
    [...svg.querySelectorAll("[role=button]")].forEach((b, k) => b.setAttribute("aria-pressed", String(k === i)));
    panel.replaceChildren();
    element("h3", "", panel, stages[i].name);
    table(panel, ["value", "shape", "here", "what it is"], stages[i].sites.map((s) => [s.name, s.letters, s.shape.join(" × "),
      s.description + (s.edit_instead ? `; to change it, edit ${s.edit_instead}` : "")]));
    if (stages[i].weights.length) table(panel, ["weight", "shape", "numbers"], stages[i].weights.map((w) => [w.path, w.shape.join(" × "), count(w.shape.reduce((a, b) => a * b, 1))]));
  };
  stages.forEach(({ name, place, size }, i) => {
    const y = i * high + 6;
    const box = node("g", { role: "button", tabindex: 0, "aria-pressed": "false", class: "stage on-" + place }, svg);
    if (place !== "branch") node("line", { x1: 30, x2: 60, y1: y + 15, y2: y + 15, class: "reads" }, svg);
    if (place === "adds") node("circle", { cx: 30, cy: y + 15, r: 8, class: "plus" }, svg), node("path", { d: `M25 ${y + 15}h10M30 ${y + 10}v10`, class: "reads" }, svg);
    if (i && (place === "branch" || place === "adds")) node("path", { d: `M90 ${y - 10}v10m-3 -4l3 4l3 -4`, class: "reads" }, svg);
    node("rect", { x: 60, y, width: 280, height: 30, rx: 6 }, box);
    node("text", { x: 70, y: y + 19 }, box, name);
    node("text", { x: 333, y: y + 19, "text-anchor": "end", class: "faint" }, box, size);
    box.addEventListener("click", () => show(i));
    box.addEventListener("keydown", (e) => { if (e.key === "Enter" || e.key === " ") { e.preventDefault(); show(i); } });
  });
  show(Math.min(1, stages.length - 1));
});

// ---- 2 ----
section("tokens", (body) => redrawn(body, (part) => {
  const largest = most(text.surprise.values);
  table(part, ["", "text", "id", "surprise", "rank", "characters", "bytes"], tokens.map((t) => {
    const r = text.rows[t], s = text.surprise.at(t);
    return [String(t), token(t), String(r.id), isFinite(s) ? { bar: s / largest, text: s.toFixed(2) } : "–", t ? String(text.rank.at(t)) : "–",
      `${r.first_character}–${r.last_character}`, r.data];
  }), { mark: (t) => t === state.position ? "chosen" : "" });
  note(part, text.num_prompt < T ? `Tokens from ${text.num_prompt} on were generated.` : "");
}));

// ---- 3 ----
section("answer", (body) => redrawn(body, (part) => {
  const t = state.position, n = Math.min(12, answer.ids.shape[1]), next = t + 1 < T ? text.rows[t + 1].id : null;
  let rest = 1;
  const rows = range(n).map((k) => {
    const p = answer.probabilities.at(t, k);
    rest -= p;
    return [piece(answer.ids.at(t, k)), share(p), number(answer.logits.at(t, k)), answer.ids.at(t, k) === next ? "is what follows" : ""];
  });
  rows.push([`${count(model.vocab_size - n)} others`, share(Math.max(0, rest)), "", ""]);
  table(part, ["after " + named(t), "probability", "logit", ""], rows, { name: "bars" });
  note(part, `Entropy ${answer.entropy.at(t).toFixed(2)} nats: as open as a choice among ${number(Math.exp(answer.entropy.at(t)))} equal pieces.`
    + (next === null ? "" : ` What follows in the text, ${piece(next)}, has rank ${text.rank.at(t + 1)} and surprise ${text.surprise.at(t + 1).toFixed(2)}.`));
  if (T > 1) curves(part, { title: "Entropy of the next token, surprise at the token itself (nats)", names: tokens.map(token), zero: true, chosen: t, choose: (i) => select({ position: i }),
    series: [{ label: "entropy", values: answer.entropy.values }, { label: "surprise", values: text.surprise.values, dash: "dashed" }] });
}));

// ---- 4 ----
// The rules of jaxlm/infer/sampling.py, in their order.
function chosenFrom(logits, { temperature, top_k, top_p, min_p }) {
  const n = logits.length, steps = [], alive = new Uint8Array(n).fill(1);
  const scaled = Float64Array.from(logits, (x) => x / (temperature || 1));
  const spread = () => {
    let top = -Infinity, sum = 0;
    for (let i = 0; i < n; i++) if (alive[i]) top = Math.max(top, scaled[i]);
    const p = scaled.map((x, i) => alive[i] ? Math.exp(x - top) : 0);
    for (const x of p) sum += x;
    return p.map((x) => x / sum);
  };
  let p = spread();
  const rule = (name, keep) => {
    let removed = 0, kept = 0;
    for (let i = 0; i < n; i++) {
      if (alive[i] && !keep(i)) { alive[i] = 0; removed += p[i]; }
      kept += alive[i];
    }
    p = spread();
    steps.push([name, String(kept), percent(removed)]);
  };
  const order = [...scaled.keys()].sort((a, b) => scaled[b] - scaled[a]);
  if (temperature === 0) rule("temperature 0", (i) => i === order[0]);
  else {
    if (top_k) rule(`top-k ${top_k}`, (i) => scaled[i] >= scaled[order[Math.min(top_k, n) - 1]]);
    if (top_p < 1) {
      let sum = 0, cut = 0;
      while (cut < n - 1 && (sum += p[order[cut]]) < top_p) cut++;
      rule(`top-p ${top_p}`, (i) => scaled[i] >= scaled[order[cut]]);
    }
    if (min_p) rule(`min-p ${min_p}`, (i) => scaled[i] >= scaled[order[0]] + Math.log(min_p));
  }
  return { p, alive, order, steps };
}
section("choosing", (body) => {
  const settings = { ...choice.settings }, controls = element("form", "", body);
  controls.addEventListener("submit", (e) => e.preventDefault());
  let update = () => {};
  const set = (name) => (value) => { settings[name] = value; update(); };
  slider(controls, "temperature", { low: 0, high: 2, step: 0.05, value: settings.temperature, form: (v) => v.toFixed(2) }, set("temperature"));
  slider(controls, "top-k", { low: 0, high: 100, step: 1, value: settings.top_k, form: (v) => v ? String(v) : "off" }, set("top_k"));
  slider(controls, "top-p", { low: 0.01, high: 1, step: 0.01, value: settings.top_p, form: (v) => v < 1 ? v.toFixed(2) : "off" }, set("top_p"));
  slider(controls, "min-p", { low: 0, high: 0.5, step: 0.01, value: settings.min_p, form: (v) => v ? v.toFixed(2) : "off" }, set("min_p"));
  update = redrawn(body, (part) => {
    const all = [...choice.positions.values], at = all.indexOf(state.position), t = at < 0 ? view.position : state.position;
    if (at < 0) note(part, `All logits were kept for ${all.length === 1 ? "one token" : `tokens ${all[0]} to ${all.at(-1)}`}; this is token ${named(t)}.`);
    const logits = choice.logits.row(at < 0 ? all.indexOf(t) : at);
    const before = chosenFrom(logits, { temperature: 1, top_k: 0, top_p: 1, min_p: 0 }).p;
    const { p, alive, order, steps } = chosenFrom(logits, settings);
    const next = t + 1 < T ? text.rows[t + 1].id : null;
    table(part, ["after " + named(t), "of the model", "to draw from", ""], order.slice(0, 20).map((i) => [piece(i), share(before[i]),
      alive[i] ? share(p[i]) : "removed", i === next ? (t + 1 < text.num_prompt ? "is what follows" : "was drawn") : ""]),
      { name: "bars", mark: (r) => alive[order[r]] ? "" : "removed" });
    table(part, ["rule", "tokens left", "probability removed"], [["all tokens", String(logits.length), ""], ...steps]);
  });
  return update;
});

// ---- 5 ----
section("streams", (body) => {
  let measure = "probability", update = () => {}, lens = view.jacobian || streams;
  if (view.jacobian) choices(body, "read by", [["jacobian", "Jacobian lens"], ["streams", "logit lens"]], "jacobian", (v) => { lens = view[v]; update(); });
  choices(body, "colour", [["probability", "probability of its first choice"], ["entropy", "entropy"], ["rank", "rank of the final answer: strong is first"]], measure, (v) => { measure = v; update(); });
  const M = L + 1, name = (m) => m ? `after layer ${m - 1}` : "embedding";
  update = redrawn(body, (part) => {
    const highest = Math.log(model.vocab_size), forms = {
      probability: (m, t) => lens.probabilities.at(m, t, 0),
      entropy: (m, t) => lens.entropy.at(m, t) / highest,
      rank: (m, t) => 1 - Math.log(1 + lens.answer_rank.at(m, t)) / highest,
    };
    const lines = (m, t) => [`token ${named(t)}, ${name(m)}`, ...range(lens.ids.shape[2]).map((k) => `${piece(lens.ids.at(m, t, k))} ${percent(lens.probabilities.at(m, t, k))}`),
      `entropy ${lens.entropy.at(m, t).toFixed(2)} nats`, `the final answer has rank ${lens.answer_rank.at(m, t)}`, `length ${number(lens.lengths.at(m, t))}`];
    // The last layer is on top: the stream flows upwards.
    new Grid(part, { title: "What each stream would answer", rows: M, columns: T, high: 18, wide: T > 24 ? 40 : 52, value: (r, t) => forms[measure](L - r, t),
      text: (r, t) => piece(lens.ids.at(L - r, t, 0)), tip: (r, t) => lines(L - r, t), rowName: (r) => name(L - r), columnName: token,
      figure: (r, t) => `${piece(lens.ids.at(L - r, t, 0))} ${percent(lens.probabilities.at(L - r, t, 0))}`,
      chosen: () => [L - 1 - state.layer, state.position], choose: (r, t) => select({ position: t, layer: Math.max(0, L - 1 - r) }) });
    if (view.jacobian) say(part, "jacobian");
    const median = range(M).map((m) => [...lens.lengths.row(m)].sort((a, b) => a - b)[T >> 1]);
    const along = (t) => range(M).map((m) => lens.lengths.at(m, t));
    const series = [{ label: named(state.position), values: along(state.position) }, { label: "median of all tokens", values: median, dash: "dashed" }];
    if (state.position) series.push({ label: "first token", values: along(0), dash: "dotted" });
    curves(part, { title: "Length of the stream after each layer, on a log scale", names: range(M).map((m) => m ? String(m - 1) : "start"), log: true, series,
      choose: (m) => select({ layer: Math.max(0, m - 1) }) });
    table(folded(part, `all layers at ${named(state.position)}`), ["layers read", "first choices of " + named(state.position), "entropy", "rank of answer", "length"], range(M).map((m) => [name(m),
      range(lens.ids.shape[2]).map((k) => `${piece(lens.ids.at(m, state.position, k))} ${percent(lens.probabilities.at(m, state.position, k))}`).join(" · "),
      lens.entropy.at(m, state.position).toFixed(2), String(lens.answer_rank.at(m, state.position)), number(lens.lengths.at(m, state.position))]),
      { name: "long", mark: (m) => m === state.layer + 1 ? "chosen" : "" });
  });
  return update;
});

// ---- 6 ----
section("cache", (body) => {
  const sizes = [["a token", 1], ["this text", T], [`all ${model.context_length.toLocaleString("en")} tokens of a full context`, model.context_length]];
  const bytes = (n) => n >= 2 ** 30 ? number(n / 2 ** 30) + " GiB" : n >= 2 ** 20 ? number(n / 2 ** 20) + " MiB" : number(n / 1024) + " KiB";
  const tiles = element("dl", "tiles", body);
  for (const [words, n] of sizes) { const tile = element("div", "", tiles); element("dt", "", tile, words); element("dd", "", tile, bytes(n * cache.bytes_per_token)); }
  note(body, `2 (key and value) × ${L} layers × ${K} key heads × ${model.head_dim} numbers, in ${model.dtype}.` + (heads.windows.some((w) => w) ? ` Layers with a window read its last ${heads.windows.find((w) => w)} tokens only.` : ""));
  let measure = "read", update = () => {};
  choices(body, "colour", [["read", "how much it was read"], ["key_lengths", "length of keys"], ["value_lengths", "length of values"]], measure, (v) => { measure = v; update(); });
  const mean = (array, l, t) => { const row = array.row(l, t); return row.reduce((a, b) => a + b, 0) / row.length; };
  update = redrawn(body, (part) => {
    const value = measure === "read" ? (l, t) => cache.read.at(l, t) : (l, t) => mean(cache[measure], l, t);
    const largest = most(layers.flatMap((l) => tokens.map((t) => value(l, t))));
    new Grid(part, { title: "What the cache holds, by layer and token", top: largest, rows: L, columns: T, high: L > 40 ? 9 : 14, wide: 14, widest: 90,
      value: (l, t) => cache.visible.at(l, t) ? Math.sqrt(value(l, t) / largest) : null, rowName: (l) => `layer ${l}`, columnName: token,
      tip: (l, t) => [`layer ${l}, token ${named(t)}`, `read with ${percent(cache.read.at(l, t))}`,
        `keys of length ${number(mean(cache.key_lengths, l, t))}`, `values of length ${number(mean(cache.value_lengths, l, t))}`,
        cache.visible.at(l, t) ? "the next token can read it" : "outside the window of the next token"],
      figure: (l, t) => number(value(l, t)), chosen: () => [state.layer, state.position], choose: (l, t) => select({ layer: l, position: t }) });
    if (T < 2) return;
    const others = (array, l) => number(tokens.slice(1).reduce((sum, t) => sum + mean(array, l, t), 0) / (T - 1)), l = state.layer;
    say(part, "sink");
    note(part, `In layer ${l} the first token is read with ${percent(cache.read.at(l, 0))}; its keys have the length ${number(mean(cache.key_lengths, l, 0))}, those of the others ${others(cache.key_lengths, l)} on average, and its values ${number(mean(cache.value_lengths, l, 0))} beside ${others(cache.value_lengths, l)}.`);
  });
  return update;
});

// ---- 7 ----
const triangle = (t, s) => t * (t + 1) / 2 + s;
const probability = (i, t, s) => heads.probabilities.at(i, triangle(t, s));
const brings = (i, t, s) => probability(i, t, s) * heads.value_lengths.at(i, s);
const sumOf = (i, t) => tokens.slice(0, t).reduce((sum, s) => sum + brings(i, t, s), 0);
const repeats = tokens.filter((t) => tokens.slice(0, t).some((s) => text.rows[s].id === text.rows[t].id)).length;
section("attention", (body) => {
  let kind = "brings", update = () => {};
  const kindName = () => KINDS.find((k) => k[0] === kind)[1], KINDS = [["brings", "length of what they bring to the token"], ["previous", "previous token"], ["duplicate", "duplicate"], ["induction", "induction"], ["sink", "mass on the first token"]];
  choices(body, "heads by", KINDS, kind, (v) => { kind = v; update(); });
  const overview = redrawn(body, (part) => {
    const t = state.position, column = { previous: 0, duplicate: 1, induction: 2, sink: 3 }[kind];
    const value = (i) => kind === "brings" ? sumOf(i, t) : heads.kinds.at(i, column);
    const found = new Map([...headAt].map(([key, i]) => [key, value(i)])), largest = kind === "brings" ? most(found.values()) : 1;
    const get = (l, n) => found.has(l * N + n) ? found.get(l * N + n) : null;
    new Grid(part, { title: `All heads, by ${kindName()}` + (G > 1 ? `; lines separate groups of ${G} that share keys and values` : ""), ...HEADS, value: scaled(get, largest),
      tip: (l, n) => get(l, n) === null ? [`layer ${l}, head ${n}: left out`] : [`layer ${l}, head ${n}, keys of group ${Math.floor(n / G)}`, `${kindName()}: ${number(get(l, n))}`],
      figure: (l, n) => number(get(l, n)), top: kind === "brings" ? largest : undefined });
    if (column === 1 || column === 2) note(part, `A mean over ${repeats} of ${T} tokens, those that were there before.`), say(part, "repeats");
  });
  let map = "brings";
  const one = element("div", "", body), title = element("h3", "", one);
  choices(one, "map", [["brings", "what is brought: p × |v W_O|"], ["probability", "probability"], ["score", "score"]], map, (v) => { map = v; update(); });
  const detail = redrawn(one, (part) => {
    const i = headAt.get(state.layer * N + state.head), t = state.position;
    title.textContent = `Layer ${state.layer}, head ${state.head}` + (G > 1 ? `, one of ${G} on key head ${Math.floor(state.head / G)}` : "") + (heads.windows[state.layer] ? `, window of ${heads.windows[state.layer]} tokens` : "");
    if (i === undefined) { note(part, "This head was left out to keep the page small."); return; }
    const score = (q, k) => Math.log(probability(i, q, k)) + heads.lse.at(i, q);
    const get = { brings: (q, k) => brings(i, q, k), probability: (q, k) => probability(i, q, k), score }[map];
    const all = tokens.flatMap((q) => tokens.slice(0, q + 1).map((k) => get(q, k))), largest = map === "probability" ? 1 : most(all);
    const two = element("div", "two", part), left = element("div", "", two), right = element("div", "", two);
    new Grid(left, { title: "Rows read columns", rows: T, columns: T, high: Math.max(5, Math.min(22, 420 / T)), wide: Math.max(5, Math.min(22, 300 / T)), widest: 26,
      value: (q, k) => k > q ? undefined : isFinite(get(q, k)) ? get(q, k) / largest : 0, rowName: token, columnName: token,
      tip: (q, k) => k > q ? [`${named(q)} cannot see ${named(k)}`] : [`${named(q)} reads ${named(k)}`, `score ${number(score(q, k))}`, `probability ${percent(probability(i, q, k))}`, `length of value ${number(heads.value_lengths.at(i, k))}`, `brings ${number(brings(i, q, k))}`],
      figure: (q, k) => k > q ? "" : number(get(q, k)), chosen: () => [t, -1], choose: (q) => select({ position: q }) });
    const keys = tokens.slice(0, t + 1), longest = most(heads.value_lengths.row(i)), best = most(keys.map((k) => brings(i, t, k)));
    const signed = causes.keys && t === causes.position, strongest = signed && most(causes.keys.row(state.layer, state.head));
    const words = element("p", "shaded", right);
    for (const k of keys) { const word = element("span", "", words, token(k)); const tone = shade(brings(i, t, k) / best); word.style.background = css(tone); word.style.color = inkOn(tone); }
    const seen = keys.reduce((sum, k) => sum + probability(i, t, k), 0);
    const first = [...keys].sort((a, b) => brings(i, t, b) - brings(i, t, a)).slice(0, 24).sort((a, b) => a - b);
    table(right, [`${named(t)} reads` + (t < 24 ? "" : " most"), "score", "probability", "length of value", "brings", ...(signed ? [`to ${ours} − ${theirs}`] : [])], first.map((k) => [named(k), number(score(t, k)), share(probability(i, t, k)),
      bar(heads.value_lengths.at(i, k), longest), bar(brings(i, t, k), best), ...(signed ? [bar(causes.keys.at(state.layer, state.head, k), strongest)] : [])]), { name: "bars" });
    say(right, "steps");
    if (seen < 0.995) note(right, `The probabilities are ${percent(seen)} in sum: the rest is a learned sink.`);
    if (signed) say(right, "signed");
  });
  update = () => { overview(); detail(); };
  return update;
});

// ---- 8 ----
// Which experts the router gave each token to.
function experts(part) {
  const { ids, weights } = view.experts, n = ids.shape[2], largest = most(weights.values), l = state.layer;
  const all = (layer, t) => range(n).map((k) => `expert ${ids.at(layer, t, k)}: ${number(weights.at(layer, t, k))}`);
  new Grid(part, { title: `First of ${n} experts of each token, by its weight`, rows: L, columns: T, high: 16, wide: T > 24 ? 26 : 34, widest: 60, value: (l, t) => weights.at(l, t, 0) / largest,
    text: (l, t) => String(ids.at(l, t, 0)), rowName: (l) => `layer ${l}`, columnName: token, figure: (l, t) => all(l, t).join(", "),
    tip: (l, t) => [`layer ${l}, ${named(t)}`, ...all(l, t)], chosen: () => [l, state.position], choose: (layer, t) => select({ layer, position: t }) });
  const used = range(model.num_experts).map((e) => [e, tokens.filter((t) => ids.row(l, t).includes(e))]).filter(([, at]) => at.length).sort((a, b) => b[1].length - a[1].length);
  table(part, [`expert of layer ${l}`, `${T} tokens × ${n}`, "which"], used.map(([e, at]) => [String(e), bar(at.length, T), at.map(token).join(" · ")]), { name: "bars long" });
}
section("memory", (body) => redrawn(body, (part) => {
  if (view.experts) experts(part);
  if (!units) { note(part, `There are no units here: ${view.units_refusal}.`); return; }
  const all = [...units.positions.values], at = all.indexOf(state.position), t = at < 0 ? view.position : state.position, p = all.indexOf(t);
  if (at < 0) note(part, `Units were kept for tokens ${all[0]} to ${all.at(-1)}; this is token ${named(t)}.`);
  const n = units.units.shape[1], largest = most(units.parts.row(p));
  table(part, ["layer · unit", `adds to ${piece(answer.ids.at(t, 0))}`, "activation", "what it makes likelier"], range(n).map((u) => {
    const activation = units.activations.at(p, u, t);
    return [`${units.layers.at(p, u)} · ${units.units.at(p, u)}`, bar(units.parts.at(p, u), largest), number(activation),
      [...units.promotes.row(p, u)].map(piece).join(" · ")];
  }), { name: "bars long" });
  note(part, `Together they add ${number(units.parts.row(p).reduce((a, b) => a + b, 0))} of the ${number(units.totals.at(p))} that all units of all layers add.`);
  const strongest = most(units.activations.row(p));
  new Grid(part, { title: "On which tokens these units fire (activation)", top: strongest, rows: n, columns: T, high: 16, wide: 14, widest: 80, value: (u, s) => units.activations.at(p, u, s) / strongest,
    rowName: (u) => `${units.layers.at(p, u)}, ${units.units.at(p, u)}`, columnName: token, figure: (u, s) => number(units.activations.at(p, u, s)),
    tip: (u, s) => [`layer ${units.layers.at(p, u)}, unit ${units.units.at(p, u)}`, `at ${named(s)}: ${number(units.activations.at(p, u, s))}`],
    chosen: () => [-1, -1], choose: (u, s) => select({ position: s, layer: units.layers.at(p, u) }) });
}));

// ---- 9 ----
section("adding", (body) => redrawn(body, (part) => {
  const t = state.position, over = (array) => array ? layers.map((l) => array.at(l, t)) : layers.map(() => NaN), names = layers.map(String);
  const choose = (l) => select({ layer: l });
  const before = layers.map((l) => streams.lengths.at(l, t));
  curves(part, { title: `Lengths at ${named(t)}, by layer, on a log scale`, names, log: true, chosen: state.layer, choose, series: [{ label: "stream", values: before },
    { label: "attention adds", values: over(additions.attention), dash: "dashed" }, { label: "feed-forward adds", values: over(additions.feed_forward), dash: "dotted" }] });
  curves(part, { title: "Direction of what is added: 1 along the stream, 0 across, −1 against it", names, zero: true, chosen: state.layer, choose, series: [
    { label: "attention", values: over(additions.attention_alignment) }, { label: "feed-forward", values: over(additions.feed_forward_alignment), dash: "dashed" }] });
  table(folded(part, "as a table, with the divisors of the norms"), ["layer", "stream", "divisor", "attention reads", "attention adds", "divisor", "feed-forward reads", "feed-forward adds"], layers.map((l) => [String(l), before[l], additions.attention_divisor && additions.attention_divisor.at(l, t),
    additions.attention_input.at(l, t), additions.attention.at(l, t), additions.feed_forward_divisor && additions.feed_forward_divisor.at(l, t), additions.feed_forward_input.at(l, t), additions.feed_forward.at(l, t)].map((v, c) => c ? number(v) : v)));
  const i = headAt.get(state.layer * N + state.head), R = heads.rotary_dim;
  element("h3", "", part, `Rotation of the query of layer ${state.layer}, head ${state.head}, at ${named(view.position)}`);
  if (!R || i === undefined) { note(part, R ? "This head was left out of the page." : "This model does not rotate queries and keys."); return; }
  const dials = element("div", "dials", part), size = 48, q0 = heads.before_rotation.row(i), q1 = heads.after_rotation.row(i), pairs = R / 2;
  const rows = [];
  for (let k = 0; k < pairs; k++) {
    const svg = node("svg", { viewBox: `0 0 ${size} ${size}`, width: size, height: size, role: "img" }, dials), c = size / 2, scale = (c - 5) / (Math.hypot(q0[k], q0[k + pairs]) || 1);
    const turn = (Math.atan2(q1[k + pairs], q1[k]) - Math.atan2(q0[k + pairs], q0[k]) + 4 * Math.PI) % (2 * Math.PI);
    node("circle", { cx: c, cy: c, r: c - 3, class: "dial" }, svg);
    node("line", { x1: c, y1: c, x2: c + q0[k] * scale, y2: c - q0[k + pairs] * scale, class: "curve raw-query" }, svg);
    node("line", { x1: c, y1: c, x2: c + q1[k] * scale, y2: c - q1[k + pairs] * scale, class: "curve s0" }, svg);
    const words = `pair ${k}: turned by ${(turn * 180 / Math.PI).toFixed(1)}°, length ${number(Math.hypot(q1[k], q1[k + pairs]))}`;
    svg.setAttribute("aria-label", words);
    svg.addEventListener("pointermove", (e) => hint([words], e.clientX, e.clientY));
    svg.addEventListener("pointerleave", () => hint(null));
    rows.push([`${k}, ${k + pairs}`, number(q0[k]), number(q0[k + pairs]), number(q1[k]), number(q1[k + pairs]), (turn * 180 / Math.PI).toFixed(1) + "°"]);
  }
  say(part, "dials");
  asTable(part, ["dimensions", "before", "", "after", "", "turned, modulo 360°"], () => rows);
}));

// ---- 10 ----
section("causes", (body) => redrawn(body, (part) => {
  note(part, `This section is always about token ${named(causes.position)}, the last of the prompt. There ${ours} has a logit ${number(causes.difference)} above ${theirs}, ${comparison ? "which the other text makes likeliest" : "the second"}: that difference is taken apart here, not the probability.`);
  if (causes.refusal) note(part, `What is missing here: ${causes.refusal}.`);
  if (causes.parts) {
    const parts = [["embedding", causes.total.embedding], ...layers.flatMap((l) => [[`attn ${l}`, causes.parts.at(l, 0)], [`ffn ${l}`, causes.parts.at(l, 1)]])];
    const running = [];
    parts.reduce((sum, [, v]) => (running.push(sum + v), sum + v), 0);
    curves(part, { title: `Written so far to ${ours} − ${theirs} (logits), part by part`, names: parts.map((p) => p[0]), ticks: parts.map((p, i) => i % 2 ? String((i - 1) / 2) : ""), zero: true, series: [{ label: "sum so far", values: running }, { label: "part", values: parts.map((p) => p[1]), dash: "dotted" }],
      choose: (i) => i && select({ layer: Math.floor((i - 1) / 2) }) });
    note(part, `By layer: what its attention (attn) adds, then its feed-forward (ffn). All parts add up to ${number(causes.total.sum)}; the model's own difference is ${number(causes.difference)}.`);
    const largest = most(parts.map((p) => p[1])), ordered = [...parts].sort((a, b) => Math.abs(b[1]) - Math.abs(a[1])).slice(0, 10);
    table(part, ["largest parts", "adds"], ordered.map(([name, v]) => [name, bar(v, largest)]), { name: "bars" });
  }
  const removed = new Map(range(causes.ablated.shape[0]).map((i) => [causes.ablated.at(i, 0) * N + causes.ablated.at(i, 1), causes.ablation.at(i)]));
  const two = element("div", "two", part);
  const grid = (title, get, largest) => new Grid(two, { title, top: largest, ...HEADS, value: scaled(get, largest), figure: (l, n) => number(get(l, n)),
    tip: (l, n) => [`layer ${l}, head ${n}`, `adds ${number(causes.heads ? causes.heads.at(l, n) : NaN)}`, removed.has(l * N + n) ? `without it the difference falls by ${number(removed.get(l * N + n))}` : "not removed: its share is small"] });
  if (causes.heads) grid("What each head adds (attribution)", (l, n) => causes.heads.at(l, n), most(causes.heads.values));
  grid("What is lost without it (ablation)", (l, n) => removed.has(l * N + n) ? removed.get(l * N + n) : null, most(removed.values()));
  const damage = [...removed].sort((a, b) => Math.abs(b[1]) - Math.abs(a[1])).slice(0, 6), worst = most(damage.map((d) => d[1]));
  table(part, ["layer · head", "lost without it", ...(causes.heads ? ["adds"] : []), "then the difference is"], damage.map(([key, v]) => [`${Math.floor(key / N)} · ${key % N}`, bar(v, worst),
    ...(causes.heads ? [number(causes.heads.values[key])] : []), number(causes.difference - v) + (causes.difference - v < 0 ? `: ${theirs} wins` : "")]), { name: "bars" });
  say(part, "ablation");
  const agree = (r, n, what) => `Do they agree? Rank correlation ${r === null ? "–" : r.toFixed(2).replace("-", "−")}, over the ${n} ${what}`;
  if (causes.heads) cloud(part, { title: agree(causes.ablation_agreement, removed.size, "heads of the largest shares"), xName: "adds", yName: "lost without",
    points: [...removed].map(([key, v]) => ({ x: causes.heads.values[key], y: v, name: `layer ${Math.floor(key / N)}, head ${key % N}` })) });
  if (!comparison) { say(part, "against"); return; }
  element("h3", "", part, "What if: streams of another text");
  note(part, `The other text: ${view.against.map(shown).join(" ")}. There the difference is ${number(comparison.difference)}.`);
  const place = new Map([...answer.ids.row(causes.position)].map((id, k) => [id, answer.probabilities.at(causes.position, k)]));
  table(part, ["next token", "of the other text", "of this one"], [...comparison.ids.values].map((id, k) => [piece(id), share(comparison.probabilities.at(k)),
    place.has(id) ? share(place.get(id)) : "less"]), { name: "bars" });
  const patched = new Map(range(comparison.patched.shape[0]).map((i) => [comparison.patched.at(i, 0) * T + comparison.patched.at(i, 1), comparison.change.at(i)]));
  const change = most([...patched.values()]), both = element("div", "two", part);
  const measured = (l, t) => t < comparison.first ? 0 : patched.has(l * T + t) ? patched.get(l * T + t) : null;
  const plot = (title, get) => new Grid(both, { title, top: change, rows: L, columns: T, high: 14, wide: 14, widest: 44, rowName: (r) => `into layer ${L - 1 - r}`, columnName: token,
    value: scaled((r, t) => get(L - 1 - r, t), change), figure: (r, t) => number(get(L - 1 - r, t)), chosen: () => [L - 1 - state.layer, state.position], choose: (r, t) => select({ layer: L - 1 - r, position: t }),
    tip: (r, t) => [`layer ${L - 1 - r}, ${named(t)} from ${shown(view.against[t])}`, `estimate ${number(comparison.estimate.at(L - 1 - r, t))}`, t < comparison.first ? "the same in both texts" : `measured ${number(measured(L - 1 - r, t))}`] });
  plot("Change of the difference, estimated by one backward pass", (l, t) => comparison.estimate.at(l, t));
  plot("Change of the difference, measured", measured);
  cloud(part, { title: agree(comparison.agreement, patched.size, "patches of the largest estimates"), xName: "estimate", yName: "measured",
    points: [...patched].map(([key, v]) => ({ x: comparison.estimate.values[key], y: v, name: `layer ${Math.floor(key / T)}, ${named(key % T)}` })) });
  say(part, "estimate");
}));

// ---- 11 ----
section("notes", (body) => {
  element("h3", "", body, "How to make this page again");
  element("pre", "", body, view.call).tabIndex = 0;
  element("h3", "", body, "What was left out");
  element("p", "", body, view.left_out.length ? `To keep it small: ${view.left_out.join("; ")}.` : "Nothing.");
  const button = element("button", "", body, "Save the numbers as JSON");
  button.type = "button";
  button.addEventListener("click", () => {
    const words = JSON.stringify(view, (_, value) => value instanceof Numbers ? value.nested() : value);
    const link = element("a", "", body);
    link.href = URL.createObjectURL(new Blob([words], { type: "application/json" }));
    link.download = "inside.json";
    link.click();
    URL.revokeObjectURL(link.href);
    link.remove();
  });
  table(folded(body, "All values of this model that can be read"), ["value", "shape", "here", "what it is"], view.stages.flatMap((s) => s.sites).map((s) => [s.name, s.letters, s.shape.join(" × "), s.description]), { name: "long" });
  table(folded(body, "Configuration"), ["field", "value"], Object.entries(model).map(([name, value]) => [name, JSON.stringify(value)]), { name: "long" });
});

// The head without which most is lost, or that brings most.
let best = [0, 0, -1];
const lost = new Map(range(causes.ablated.shape[0]).map((i) => [causes.ablated.at(i, 0) * N + causes.ablated.at(i, 1), Math.abs(causes.ablation.at(i))]));
for (const [key, i] of headAt) {
  const size = lost.size ? lost.get(key) || 0 : sumOf(i, view.position);
  if (size > best[2]) best = [Math.floor(key / N), key % N, size];
}
select({ layer: best[0], head: best[1] });
let width = innerWidth, waiting = 0;
addEventListener("resize", () => {
  if (innerWidth === width) return;
  width = innerWidth;
  cancelAnimationFrame(waiting); waiting = requestAnimationFrame(() => select({}));
});
dark.addEventListener("change", () => select({}));
document.body.dataset.ready = "yes";
})();
