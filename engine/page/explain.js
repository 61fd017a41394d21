"use strict";
// Shows what explain.py has computed. This program computes softmax, temperature, top-k and top-p.
// Texts of tokens reach the page by textContent only, so nothing in them can be executed.

const data = JSON.parse(document.getElementById("data").textContent);
const T = data.ids.length, L = data.n_layer, H = data.n_head;
const state = { checkpoint: data.checkpoints.length - 1, position: 0, layer: 0, head: 0,
                temperature: 1, topK: 0, topP: 1, hovered: -1, all: false };
const $ = (id) => document.getElementById(id);
const name = (id) => data.vocab[id];
const percent = (p) => p >= 0.9995 ? "100%" : p >= 0.1 ? (100 * p).toFixed(1) + "%" :
  p === 0 ? "0" : p < 0.0001 ? "<0.01%" : (100 * p).toFixed(2) + "%";

function element(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children);
  return node;
}

// --- Numbers of the model ---

function bytes(base64) {
  return Uint8Array.from(atob(base64), (c) => c.charCodeAt(0)).buffer;
}

function numbers(encoded) {
  if (encoded.float32 !== undefined) return new Float32Array(bytes(encoded.float32));
  return Float32Array.from(new Int16Array(bytes(encoded.int16)), (i) => i * encoded.scale);
}

for (const checkpoint of data.checkpoints)
  for (const key of ["scores", "values", "messages", "logits"])
    checkpoint[key] = numbers(checkpoint[key]);

const now = () => data.checkpoints[state.checkpoint];

// q · k of row t with columns 0 ... t; the rows of a table are stored one after the other.
function scores(layer, head, t) {
  const start = (layer * H + head) * T * (T + 1) / 2 + t * (t + 1) / 2;
  return now().scores.subarray(start, start + t + 1);
}

function softmax(numbers) {
  const max = Math.max(...numbers);
  const exponentials = Array.from(numbers, (x) => Math.exp(x - max));
  const sum = exponentials.reduce((a, b) => a + b, 0);
  return exponentials.map((e) => e / sum);
}

function attentionWeights(layer, head, t) {
  return softmax(scores(layer, head, t).map((s) => s / Math.sqrt(data.head_dim)));
}

function channels(which, layer, head, t) {
  const n = now().channels, start = ((layer * H + head) * T + t) * n;
  return now()[which].subarray(start, start + n);
}

// The probabilities to sample from, in the order of logit_ids: the likeliest token first.
// As sampling_probs() in engine/inference.py: temperature, then top-k, softmax, then top-p.
function samplingProbs(t, temperature, topK, topP) {
  const n = now().logits.length / T;
  let logits = Array.from(now().logits.subarray(t * n, (t + 1) * n), (x) => x / temperature);
  // The tokens beyond these n together: the logarithm of the sum of their exponentials.
  const tail = now().tails[t][data.temperatures.indexOf(temperature)];
  let rest = tail === null ? -Infinity : tail;
  if (topK > 0 && topK <= n) {
    logits = logits.map((x) => x < logits[topK - 1] ? -Infinity : x);
    rest = -Infinity;
  }
  const probs = softmax([...logits, rest]);
  if (topP < 1) {
    let before = 0, kept = 0;
    for (let i = 0; i < probs.length; i++) {
      const p = probs[i];
      if (i > 0 && before >= topP) probs[i] = 0;
      before += p;
      kept += probs[i];
    }
    return probs.slice(0, n).map((p) => p / kept);
  }
  return probs.slice(0, n);
}

// --- Colors ---

function color(variable) {
  const hex = getComputedStyle(document.documentElement).getPropertyValue(variable).trim();
  return [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));
}

function mix(variable, fraction) {
  const from = color("--empty"), to = color(variable);
  return from.map((c, i) => Math.round(c + (to[i] - c) * Math.min(Math.max(fraction, 0), 1)));
}

function luminance(rgb) {
  const [r, g, b] = rgb.map((c) => c / 255 <= 0.04045 ? c / 255 / 12.92 :
    ((c / 255 + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}

const css = (rgb) => `rgb(${rgb.join(",")})`;
const textColor = (rgb) => luminance(rgb) > 0.179 ? "#000000" : "#ffffff";

// --- 1. Text ---

const MAX_LOSS = 5;

function buildText() {
  data.ids.forEach((id, t) => {
    const token = element("button", { class: "token", type: "button", "data-position": t }, name(id));
    token.addEventListener("click", () => select({ position: t }));
    token.addEventListener("mouseenter", () => select({ hovered: t }));
    token.addEventListener("mouseleave", () => select({ hovered: -1 }));
    $("text").append(token);
    if (name(id).includes("↵")) $("text").append(element("br"));
  });
}

function showText() {
  const losses = now().losses;
  for (const token of $("text").querySelectorAll(".token")) {
    const t = Number(token.dataset.position);
    const rgb = mix("--loss", t > 0 ? losses[t - 1] / MAX_LOSS : 0);
    token.style.background = css(rgb);
    token.style.color = textColor(rgb);
    token.classList.toggle("selected", t === state.position);
    token.classList.toggle("hovered", t === state.hovered);
    token.tabIndex = t === state.position ? 0 : -1;
    token.title = t > 0 ? `position ${t}, loss ${losses[t - 1].toFixed(2)}` : "the first token";
  }
  const mean = losses.reduce((a, b) => a + b, 0) / losses.length;
  const swatch = element("span", { class: "swatch" });
  swatch.style.background = `linear-gradient(to right, ${css(mix("--loss", 0))}, ${css(mix("--loss", 1))})`;
  $("legend").replaceChildren("loss 0", swatch, `${MAX_LOSS} or more`,
    ` · mean loss of this passage: ${mean.toFixed(4)} nats per token`);
  for (const node of document.querySelectorAll(".selected-token"))
    node.textContent = name(data.ids[state.position]);
}

function showSurprises() {
  const losses = now().losses, order = losses.map((_, i) => i).sort((a, b) => losses[b] - losses[a]);
  const buttons = order.slice(0, 3).map((i) => {
    const button = element("button", { type: "button" },
      `${name(data.ids[i + 1])} after ${name(data.ids[i])} (position ${i + 1}): ${losses[i].toFixed(2)}`);
    button.addEventListener("click", () => select({ position: i }));
    return button;
  });
  $("surprises").replaceChildren("The largest losses: ", ...buttons);
}

// --- 2. Prediction ---

function showPrediction() {
  const { position: t, temperature, topK, topP } = state;
  const ids = now().logit_ids[t], probs = samplingProbs(t, temperature, topK, topP);
  const actual = t + 1 < T ? data.ids[t + 1] : null;
  const order = probs.map((p, i) => i).slice(0, 10);
  const place = ids.indexOf(actual);
  if (place >= 10) order.push(place);
  const rows = order.map((i) => {
    const bar = element("span", { class: "bar" });
    bar.style.width = `${100 * probs[i]}%`;
    const row = element("tr", { "data-id": ids[i], "data-probability": probs[i] },
      element("td", { class: "tokens" }, name(ids[i])),
      element("td", { class: "number" }, percent(probs[i])), element("td", { class: "bar-cell" }, bar),
      element("td", {}, ids[i] === actual ? `← actual next token${i >= 10 ? `, rank ${i + 1}` : ""}` : ""));
    if (ids[i] === actual) row.className = "actual";
    return row;
  });
  if (actual !== null && place < 0)
    rows.push(element("tr", { class: "actual" }, element("td", { class: "tokens" }, name(actual)),
      element("td", { colspan: 3 }, `actual next token, not among the ${ids.length} likeliest`)));
  $("prediction").replaceChildren(...rows);
  $("temperature-value").textContent = temperature.toFixed(1);
  $("top-k-value").textContent = topK === 0 ? "all" : topK;
  $("top-p-value").textContent = topP.toFixed(2);
}

function buildSliders() {
  const n = now().logit_ids[0].length;
  Object.assign($("temperature"), { min: 0, max: data.temperatures.length - 1, step: 1,
                                    value: data.temperatures.indexOf(1) });
  // The last place of the slider stands for "all tokens".
  Object.assign($("top-k"), { min: 1, max: Math.min(n, 200) + 1, step: 1, value: Math.min(n, 200) + 1 });
  $("temperature").addEventListener("input", () =>
    select({ temperature: data.temperatures[Number($("temperature").value)] }));
  $("top-k").addEventListener("input", () =>
    select({ topK: $("top-k").value === $("top-k").max ? 0 : Number($("top-k").value) }));
  $("top-p").addEventListener("input", () => select({ topP: Number($("top-p").value) }));
  if (data.checkpoints.length > 1) {
    $("training").hidden = false;
    Object.assign($("checkpoint"), { max: data.checkpoints.length - 1, value: state.checkpoint });
    $("checkpoint").addEventListener("input", () => select({ checkpoint: Number($("checkpoint").value) }));
  }
}

// --- 3. Layer by layer ---

function showLayers() {
  const t = state.position;
  const head = element("tr", {}, element("th", {}, "after"), element("th", {}, "would predict"),
    element("th", { class: "bar-cell", colspan: 2 }, "p(actual next token)"));
  const rows = now().layers.map((layer, i) => {
    const guesses = layer.ids[t].map((id, j) => `${name(id)} ${percent(layer.probs[t][j])}`);
    const actual = layer.actual[t], bar = element("span", { class: "bar" });
    bar.style.width = `${100 * (actual ?? 0)}%`;
    return element("tr", {}, element("td", {}, i === 0 ? "embedding" : `block ${i}`),
      element("td", { class: "tokens" }, guesses.join("  ")),
      element("td", { class: "number" }, actual === null ? "" : percent(actual)),
      element("td", { class: "bar-cell" }, bar));
  });
  $("layers").replaceChildren(head, ...rows);
}

// --- 4. Attention ---

function showGraph() {
  const t = state.position, height = 150, svgTag = "http://www.w3.org/2000/svg", centers = [];
  let width = 8;
  for (const id of data.ids) {
    const own = 8 * [...name(id)].length + 10;
    centers.push(width + own / 2);
    width += own;
  }
  const x = (i) => centers[i], svg = document.createElementNS(svgTag, "svg");
  svg.setAttribute("width", width);
  svg.setAttribute("height", height + 24);
  svg.setAttribute("role", "img");
  svg.setAttribute("aria-label", "arcs from the selected token to the tokens that it attends to");
  attentionWeights(state.layer, state.head, t).forEach((weight, s) => {
    if (weight < 0.002) return;
    const path = document.createElementNS(svgTag, "path"), rise = s === t ? 16 :
      Math.min(20 + 6 * Math.sqrt(x(t) - x(s)), height - 6);
    const [a, b, y] = [x(s), x(t), height];
    path.setAttribute("d", s === t ? `M${a - 5} ${y} C${a - 14} ${y - rise * 1.6} ${a + 14} ${y - rise * 1.6} ${a + 5} ${y}` :
      `M${a} ${y} C${a} ${y - rise * 1.3} ${b} ${y - rise * 1.3} ${b} ${y}`);
    path.setAttribute("stroke-width", Math.max(12 * weight, 0.5));
    path.setAttribute("stroke-opacity", s === state.hovered ? 1 : 0.35 + 0.5 * weight);
    svg.append(path);
  });
  data.ids.forEach((id, i) => {
    const label = document.createElementNS(svgTag, "text");
    label.setAttribute("x", x(i));
    label.setAttribute("y", height + 16);
    label.setAttribute("text-anchor", "middle");
    if (i === t || i === state.hovered) label.setAttribute("class", "chosen");
    label.textContent = name(id);
    label.addEventListener("click", () => select({ position: i }));
    svg.append(label);
  });
  const before = $("graph").scrollLeft;
  $("graph").replaceChildren(svg);
  const center = x(t) - $("graph").clientWidth / 2;
  $("graph").scrollLeft = state.hovered >= 0 ? before : center;
}

function paint(canvas, layer, head, size) {
  const context = canvas.getContext("2d"), shades = [];
  for (let i = 0; i <= 20; i++) shades.push(css(mix("--attention", i / 20)));
  canvas.width = canvas.height = size * T;
  context.fillStyle = shades[0];
  context.fillRect(0, 0, canvas.width, canvas.height);
  for (let t = 0; t < T; t++)
    attentionWeights(layer, head, t).forEach((weight, s) => {
      context.fillStyle = shades[Math.round(20 * Math.sqrt(weight))];  // sqrt: shows small weights
      context.fillRect(size * s, size * t, size, size);
    });
  return context;
}

function showTable() {
  const size = Math.max(2, Math.floor(420 / T)), context = paint($("table"), state.layer, state.head, size);
  context.strokeStyle = getComputedStyle(document.documentElement).getPropertyValue("--loss");
  context.strokeRect(0.5, size * state.position + 0.5, size * T - 1, size - 1);
  if (state.hovered >= 0 && state.hovered <= state.position)
    context.strokeRect(size * state.hovered + 0.5, size * state.position + 0.5, size - 1, size - 1);
  for (const node of document.querySelectorAll(".current-head"))
    node.textContent = `layer ${state.layer + 1} of ${L}, head ${state.head + 1} of ${H}`;
}

function cellAt(event) {
  const box = $("table").getBoundingClientRect();
  const place = (offset, length) => Math.min(T - 1, Math.max(0, Math.floor(offset / length * T)));
  return [place(event.clientY - box.top, box.height), place(event.clientX - box.left, box.width)];
}

function buildTable() {
  $("table").addEventListener("mousemove", (event) => {
    const [t, s] = cellAt(event);
    $("cell").textContent = s > t ? `${name(data.ids[t])} (${t}) cannot see ${name(data.ids[s])} (${s}): the future` :
      `${name(data.ids[t])} (${t}) ← ${name(data.ids[s])} (${s}): ${percent(attentionWeights(state.layer, state.head, t)[s])}`;
    select({ hovered: s });
  });
  $("table").addEventListener("mouseleave", () => { $("cell").textContent = ""; select({ hovered: -1 }); });
  $("table").addEventListener("click", (event) => select({ position: cellAt(event)[0] }));
  for (let layer = 0; layer < L; layer++) {
    const row = element("div", { class: "head-row" }, element("span", {}, `layer ${layer + 1}`));
    for (let head = 0; head < H; head++) {
      const button = element("button", { type: "button", "data-layer": layer, "data-head": head,
        "aria-label": `layer ${layer + 1}, head ${head + 1}` }, element("canvas"));
      button.addEventListener("click", () => select({ layer, head }));
      row.append(button);
    }
    $("heads").append(row);
  }
}

function showHeads(repaint) {
  const side = Math.max(28, Math.min(72, Math.floor(440 / H)));
  for (const button of $("heads").querySelectorAll("button")) {
    const layer = Number(button.dataset.layer), head = Number(button.dataset.head);
    button.setAttribute("aria-pressed", layer === state.layer && head === state.head);
    if (repaint) {
      paint(button.firstChild, layer, head, 1);
      button.firstChild.style.width = button.firstChild.style.height = `${side}px`;
    }
  }
}

// --- 5. One message ---

function cells(numbers) {
  const largest = Math.max(...numbers.map(Math.abs), 1e-9);
  const node = element("span", { class: "cells", title: Array.from(numbers, (x) => x.toFixed(2)).join(", ") });
  for (const x of numbers) {
    const cell = element("i");
    cell.style.background = css(mix(x < 0 ? "--loss" : "--attention", Math.abs(x) / largest));
    node.append(cell);
  }
  return node;
}

function showMessage() {
  const { layer, head, position: t } = state, SHORT = 8;
  const raw = scores(layer, head, t), weights = attentionWeights(layer, head, t);
  let order = weights.map((_, s) => s).sort((a, b) => weights[b] - weights[a] || a - b);
  if (!state.all) order = order.slice(0, SHORT);
  const shown = `first ${now().channels} of ${data.head_dim} channels; blue: above 0, orange: below`;
  const header = element("tr", {}, ...["from token", "position", "query · key", `÷ √${data.head_dim}`,
    "softmax", `value (${shown})`].map((text) => element("th", {}, text)));
  const rows = order.map((s) => {
    const row = element("tr", { "data-position": s }, element("td", { class: "tokens" }, name(data.ids[s])),
      ...[s, raw[s].toFixed(2), (raw[s] / Math.sqrt(data.head_dim)).toFixed(2), percent(weights[s])]
        .map((text) => element("td", { class: "number" }, String(text))),
      element("td", {}, cells(channels("values", layer, head, s))));
    row.addEventListener("mouseenter", () => select({ hovered: s }));
    return row;
  });
  const sum = element("tr", { class: "summary" }, element("td", { colspan: 4 }, "the message: sum of weight × value"),
    element("td", { class: "number" }, percent(weights.reduce((a, b) => a + b, 0))),
    element("td", {}, cells(channels("messages", layer, head, t))));
  $("message").replaceChildren(header, ...rows, sum);
  $("more").hidden = t < SHORT;
  $("more").textContent = state.all ? "show the largest weights only" : `show all ${t + 1} tokens`;
}

// --- Putting it together ---

function select(changes) {
  const before = { ...state };
  Object.assign(state, changes);
  const changed = Object.keys(state).filter((key) => state[key] !== before[key]);
  if (changed.length === 0) return;
  if (changed.length === 1 && changed[0] === "hovered") { showText(); showGraph(); showTable(); return; }
  show(changed.includes("checkpoint"));
}

function show(repaint) {
  $("checkpoint-label").textContent = now().label;
  showText();
  showSurprises();
  showPrediction();
  showLayers();
  showGraph();
  showTable();
  showHeads(repaint);
  showMessage();
}

document.addEventListener("keydown", (event) => {
  if (event.target instanceof HTMLInputElement || event.ctrlKey || event.metaKey || event.altKey) return;
  const moves = {
    ArrowLeft: () => ({ position: Math.max(0, state.position - 1) }),
    ArrowRight: () => ({ position: Math.min(T - 1, state.position + 1) }),
    l: () => ({ layer: (state.layer + 1) % L }), L: () => ({ layer: (state.layer + L - 1) % L }),
    h: () => ({ head: (state.head + 1) % H }), H: () => ({ head: (state.head + H - 1) % H }),
  };
  if (!(event.key in moves)) return;
  event.preventDefault();
  const inText = document.activeElement.classList.contains("token");
  select(moves[event.key]());
  if (inText) $("text").querySelector(".selected").focus();
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => show(true));
$("more").addEventListener("click", () => select({ all: !state.all }));

$("model").textContent = `${data.title} · ${L} layers, ${H} heads, ${T} tokens`;
state.position = Math.min(T - 1, Math.floor(T / 2));
buildText();
buildSliders();
buildTable();
show(true);
