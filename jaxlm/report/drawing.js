"use strict";
// What the pages draw with. Text is inserted as text, never as HTML.
const SVG = document.getElementById("ns").namespaceURI;
const byId = (id) => document.getElementById(id);

function node(tag, attributes, parent, text) {
  const made = document.createElementNS(SVG, tag);
  for (const name in attributes) made.setAttribute(name, attributes[name]);
  if (text !== undefined) made.textContent = text;
  if (parent) parent.append(made);
  return made;
}
function element(tag, className, parent, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  if (parent) parent.append(made);
  return made;
}
// A short line in the style of a curve, and its name.
function key(parent, label, style) {
  const made = element("span", "key", parent), sign = node("svg", { width: 24, height: 8, "aria-hidden": "true" }, made);
  node("path", { d: "M1 4h22", class: "curve " + style }, sign);
  made.append(" " + label);
}

// ---- Numbers in words ----
function short(v) {
  if (v === null || !isFinite(v)) return "not finite";
  if (v === 0) return "0";
  const size = Math.abs(v);
  if (size < 1e-4 || size >= 1e6) return v.toExponential(2).replace(/\.?0+e/, "e");
  return String(Number(v.toPrecision(5)));
}
function count(v) {
  if (v === null || !isFinite(v)) return "not finite";
  for (const [unit, size] of [["T", 1e12], ["B", 1e9], ["M", 1e6], ["k", 1e3]])
    if (Math.abs(v) >= size) return Number((v / size).toPrecision(4)) + unit;
  return String(Number(v.toPrecision(4)));
}

// ---- Ticks ----
function ticks(low, high, wanted, steps, whole) {
  const rough = (high - low) / wanted;
  let step = steps && steps.find((s) => s >= rough);
  if (!step) {
    const power = 10 ** Math.floor(Math.log10(rough));
    step = power * [1, 2, 5, 10].find((m) => m * power >= rough * (1 - 1e-9));
    if (whole) step = Math.max(step, 1);
  }
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++)
    found.push(Number((i * step).toPrecision(12)));
  return found;
}
function logTicks(low, high) {
  const found = [], decades = Math.log10(high / low);
  const parts = decades > 5 ? [1] : decades > 1.5 ? [1, 2, 5] : [1, 1.5, 2, 3, 4, 5, 6, 8];
  for (let e = Math.floor(Math.log10(low)); e <= Math.log10(high); e++)
    for (const m of parts) {
      const v = Number((m * 10 ** e).toPrecision(6));
      if (v >= low && v <= high) found.push(v);
    }
  return found.length >= 3 ? found : ticks(low, high, 5);
}
// ---- Lines ----
function nearest(xs, x) {
  let low = 0, high = xs.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (xs[middle] < x) low = middle; else high = middle;
  }
  return Math.abs(xs[low] - x) <= Math.abs(xs[high] - x) ? low : high;
}
function path(xs, ys, place) {
  let text = "", pen = false;
  ys.forEach((y, i) => {
    const p = y === null ? null : place(xs[i], y);
    if (!p) { pen = false; return; }
    text += (pen ? "L" : "M") + p[0].toFixed(1) + " " + p[1].toFixed(1);
    // An isolated value is a dot: a line of length zero with round caps.
    if (!pen && (i + 1 >= ys.length || ys[i + 1] === null)) text += "h.01";
    pen = true;
  });
  return text;
}
