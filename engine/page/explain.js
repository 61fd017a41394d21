"use strict";
// Shows what explain.py has computed. This program computes softmax, temperature, top-k and top-p.
// Texts of tokens reach the page by textContent only, so nothing in them can be executed.

const data = JSON.parse(document.getElementById("data").textContent);
const T = data.ids.length, L = data.n_layer, H = data.n_head;
// column: the token under the mouse, in the attention table or elsewhere; row: of the table.
// -1: none.
const state = { snapshot: data.snapshots.findIndex((snapshot) => snapshot.selected), position: 0,
                layer: 0, head: 0, temperature: 1, topK: 0, topP: 1, row: -1, column: -1, all: false };
const $ = (id) => document.getElementById(id);
const name = (id) => data.vocab[id];
const percent = (p) => p >= 0.9995 ? "100%" : p >= 0.1 ? (100 * p).toFixed(1) + "%" :
  p === 0 ? "0" : p < 0.0001 ? "<0.01%" : (100 * p).toFixed(2) + "%";

function element(tag, attributes = {}, ...children) {
  const isSvg = ["svg", "path", "text"].includes(tag);
  const node = isSvg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children);
  return node;
}

// A token with its position, as the sentences of the page name it: "R (0)", with a space that does not break.
const named = (t) => `${name(data.ids[t])}\u00a0(${t})`;
const framed = (id) => element("code", {}, name(id));  // a token in a sentence: it can be "." or ","
const bar = (p) => p > 0 ? element("span", { class: "bar", style: `width: ${100 * p}%` }) : "";

// --- Numbers of the model ---

function bytes(base64) {
  return Uint8Array.from(atob(base64), (c) => c.charCodeAt(0)).buffer;
}

function numbers(encoded) {
  if (encoded.float32 !== undefined) return new Float32Array(bytes(encoded.float32));
  return Float32Array.from(new Int16Array(bytes(encoded.int16)), (i) => i * encoded.scale);
}

for (const snapshot of data.snapshots)
  for (const key of ["scores", "values", "messages", "logits"])
    snapshot[key] = numbers(snapshot[key]);

const now = () => data.snapshots[state.snapshot];

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
    logits = logits.map((x, i) => i < topK ? x : -Infinity);
    rest = -Infinity;
  }
  const probs = softmax([...logits, rest]);
  if (topP < 1) {
    let before = 0, kept = 0;
    for (let i = 0; i < probs.length; i++) {
      const p = probs[i];
      if (i > 0 && before >= topP) probs[i] = 0;
      // All tokens beyond n: kept until the sum is topP. (In sampling, the sum exceeds topP by less than one token's probability.)
      else if (i === n) probs[i] = topP - before;
      before += p;
      kept += probs[i];
    }
    return probs.slice(0, n).map((p) => p / kept);
  }
  return probs.slice(0, n);
}

// --- Colors ---

let palette = {};

function readPalette() {
  const style = getComputedStyle(document.documentElement);
  for (const name of ["empty", "loss", "attention"]) {
    const hex = style.getPropertyValue(`--${name}`).trim();
    palette[name] = [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));
  }
}

function mix(name, fraction) {
  return palette.empty.map((c, i) => Math.round(c + (palette[name][i] - c) * Math.min(fraction, 1)));
}

// Relative luminance (WCAG 2). Above 0.179, black has more contrast than white.
function luminance(rgb) {
  const [r, g, b] = rgb.map((c) => c / 255 <= 0.04045 ? c / 255 / 12.92 :
    ((c / 255 + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}

const css = (rgb) => `rgb(${rgb.join(",")})`;
const swatch = (name) => element("span", { class: "swatch",
  style: `background: linear-gradient(to right, ${css(mix(name, 0))}, ${css(mix(name, 1))})` });
const textColor = (rgb) => luminance(rgb) > 0.179 ? "#000000" : "#ffffff";

// --- 1. Text ---

const MAX_LOSS = 5;

function buildText() {
  data.ids.forEach((id, t) => {
    $("text").append(element("button", { class: "token", type: "button", "data-position": t }, name(id)));
    if (name(id).includes("↵")) $("text").append(element("br"));
  });
}

function showText() {
  const losses = now().losses;
  for (const token of $("text").querySelectorAll(".token")) {
    const t = Number(token.dataset.position);
    const rgb = mix("loss", t > 0 ? losses[t - 1] / MAX_LOSS : 0);
    token.style.background = css(rgb);
    token.style.color = textColor(rgb);
    token.classList.toggle("selected", t === state.position);
    token.classList.toggle("hovered", t === state.column);
    token.tabIndex = t === state.position ? 0 : -1;
    token.title = `position ${t}, ${t > 0 ? `loss ${losses[t - 1].toFixed(2)}` : "no loss: nothing predicts it"}`;
  }
  $("legend").replaceChildren("loss 0", swatch("loss"), `${MAX_LOSS} or more`, element("span", {},
    `mean loss of this text: ${now().layers[L].mean_loss.toFixed(4)} nats per token (the first token has no loss)`));
  for (const node of document.querySelectorAll(".selected-token"))
    node.textContent = named(state.position);
}

function showSurprises() {
  const losses = now().losses, order = losses.map((_, i) => i).sort((a, b) => losses[b] - losses[a]);
  const buttons = order.slice(0, 3).map((i) => element("button", { type: "button", "data-position": i },
    `${named(i + 1)} after ${named(i)}: ${losses[i].toFixed(2)}`));
  $("surprises").replaceChildren("The largest losses: ", ...buttons);
}

// --- 2. Prediction ---

function showPrediction() {
  const { position: t, temperature, topK, topP } = state;
  const ids = now().logit_ids[t], probs = samplingProbs(t, temperature, topK, topP);
  const actual = t + 1 < T ? data.ids[t + 1] : null, place = ids.indexOf(actual), loss = now().losses[t];
  const order = probs.map((p, i) => i).slice(0, 10);
  if (place >= 10) order.push(place);
  const rows = order.map((i) => {
    const row = element("tr", { "data-id": ids[i], "data-probability": probs[i] },
      element("td", { class: "tokens" }, name(ids[i])),
      element("td", { class: "number" }, percent(probs[i])), element("td", { class: "bar-cell" }, bar(probs[i])),
      element("td", { class: "mark" }, ids[i] === actual ? "← actual" : ""));
    if (ids[i] === actual) row.className = "actual";
    return row;
  });
  $("prediction").replaceChildren(...rows);
  const rank = place < 0 ? `not among the ${ids.length.toLocaleString("en")} likeliest` : `rank ${place + 1}`;
  $("actual").replaceChildren(...actual === null ? ["The text ends here: no token is the actual next one."] :
    ["The actual next token is ", framed(actual), `: ${rank}, probability ${percent(now().layers[L].actual[t])}, ` +
     `loss ${loss.toFixed(2)} (before temperature, top-k, top-p).`]);
  $("temperature-value").textContent = temperature.toFixed(1);
  $("top-k-value").textContent = topK === 0 ? "all" : topK;
  $("top-p-value").textContent = topP.toFixed(2);
  // The last place of the slider top-k stands for "all tokens".
  $("temperature").value = data.temperatures.indexOf(temperature);
  $("top-k").value = topK === 0 ? $("top-k").max : topK;
  $("top-p").value = topP;
  $("reset").disabled = temperature === 1 && topK === 0 && topP === 1;
}

function buildSliders() {
  const n = now().logit_ids[0].length;
  Object.assign($("temperature"), { min: 0, max: data.temperatures.length - 1, step: 1 });
  Object.assign($("top-k"), { min: 1, max: Math.min(n, 200) + 1, step: 1 });
  $("temperature").addEventListener("input", () =>
    select({ temperature: data.temperatures[Number($("temperature").value)] }));
  $("top-k").addEventListener("input", () =>
    select({ topK: $("top-k").value === $("top-k").max ? 0 : Number($("top-k").value) }));
  $("top-p").addEventListener("input", () => select({ topP: Number($("top-p").value) }));
  $("reset").addEventListener("click", () => select({ temperature: 1, topK: 0, topP: 1 }));
  if (data.snapshots.length > 1) {
    $("training-slider").hidden = false;
    Object.assign($("snapshot"), { max: data.snapshots.length - 1, value: state.snapshot });
    $("snapshot").addEventListener("input", () => select({ snapshot: Number($("snapshot").value) }));
  }
}

// --- 3. Layer by layer ---

function showLayers() {
  const t = state.position, layers = now().layers;
  const head = element("tr", {}, element("th", {}, "after"), element("th", {}, "likeliest next tokens"),
    element("th", { colspan: 2 }, "p of the actual next token"), element("th", {}, "mean loss"));
  const rows = layers.map((layer, i) => {
    const guesses = layer.ids[t].map((id, j) =>
      element("span", {}, `${name(id)} ${percent(layer.probs[t][j])}`));
    const actual = layer.actual[t];
    return element("tr", {}, element("td", {}, i === 0 ? "embedding" : `layer ${i}`),
      element("td", { class: "tokens guesses" }, ...guesses),
      element("td", { class: "number" }, actual === null ? "" : percent(actual)),
      element("td", { class: "bar-cell" }, bar(actual)),
      element("td", { class: "number" }, layer.mean_loss.toFixed(4)));
  });
  $("layers").replaceChildren(head, ...rows);
  const first = layers.map((layer) => layer.ids[t][0]), final = first[L];
  let since = L;
  while (since > 0 && first[since - 1] === final) since--;
  const p = (i) => percent(layers[i].probs[t][0]), later = ` and after each later layer; at the end it has ${p(L)}`;
  $("sure").replaceChildren(framed(final), " is the likeliest token after ",
    `${since === 0 ? "the embedding" : `layer ${since}`} (${p(since)})${since < L ? later : ""}. `,
    t === T - 1 ? "" : `It is ${final === data.ids[t + 1] ? "" : "not "}the actual next token.`);
}

// --- 4. Attention ---

function showGraph() {
  const t = state.position, height = 150, centers = [];
  let width = 8;
  for (const id of data.ids) {
    const own = 8 * [...name(id)].length + 10;
    centers.push(width + own / 2);
    width += own;
  }
  const x = (i) => centers[i], svg = element("svg", { width, height: height + 24, role: "img",
    "aria-label": "arcs from the selected token to the tokens that it attends to" });
  const weights = attentionWeights(state.layer, state.head, t), farthest = Math.max(x(t) - x(0), 300);
  weights.forEach((weight, s) => {
    if (weight < 0.002) return;
    const a = x(s), b = x(t), y = height;
    const rise = 1.3 * (20 + (height - 28) * Math.sqrt((b - a) / farthest));
    const [left, right] = s === t ? [-14, 14] : [0, 0];  // a loop from the selected token to itself
    svg.append(element("path", {
      d: `M${a + left / 3} ${y} C${a + left} ${y - rise} ${b + right} ${y - rise} ${b + right / 3} ${y}`,
      "stroke-width": Math.max(12 * weight, 0.5),
      "stroke-opacity": s === state.column ? 1 : 0.35 + 0.5 * weight, "data-position": s }));
  });
  data.ids.forEach((id, i) => {
    svg.append(element("text", { x: x(i), y: height + 16, "data-position": i,
      class: i === t || i === state.column ? "chosen" : "" }, name(id)));
  });
  const before = $("graph").scrollLeft, moved = $("graph").dataset.selected !== String(t);
  $("graph").replaceChildren(svg);
  $("graph").dataset.selected = t;
  $("graph").scrollLeft = moved ? x(t) - $("graph").clientWidth / 2 : before;
  const order = weights.map((_, s) => s).sort((a, b) => weights[b] - weights[a]).slice(0, 4);
  $("largest").textContent = order.map((s) => `${named(s)}\u00a0${percent(weights[s])}`).join(", ");
}

// One pixel for each weight; the style sheet enlarges it. sqrt makes small weights visible.
function paint(canvas, layer, head) {
  canvas.width = canvas.height = T;
  const context = canvas.getContext("2d"), image = context.createImageData(T, T);
  for (let t = 0; t < T; t++)
    attentionWeights(layer, head, t).forEach((weight, s) =>
      image.data.set([...mix("attention", Math.sqrt(weight)), 255], 4 * (t * T + s)));
  context.putImageData(image, 0, 0);
}

// A box around cells of the table; in percent, because the table is smaller on a phone.
function moveBox(box, top, left, width) {
  const style = { top: 100 * top / T, left: 100 * left / T, width: 100 * width / T, height: 100 / T };
  for (const [key, value] of Object.entries(style)) box.style[key] = `${value}%`;
}

function showCell() {
  const t = state.row >= 0 ? state.row : state.position, s = state.column;
  moveBox($("row-box"), t, 0, t + 1);
  $("cell-box").hidden = s < 0;
  moveBox($("cell-box"), t, s, 1);
  $("cell").textContent = s < 0 ? "Point at a cell or touch it to read its weight. A click selects its row." :
    s > t ? `${named(t)} cannot attend to ${named(s)}: it comes later` :
    `${named(t)} attends to ${named(s)} with the weight ${percent(attentionWeights(state.layer, state.head, t)[s])}`;
}

function cellAt(event) {
  const box = $("table").getBoundingClientRect();
  const index = (offset, length) => Math.min(T - 1, Math.max(0, Math.floor(offset / length * T)));
  return { row: index(event.clientY - box.top, box.height), column: index(event.clientX - box.left, box.width) };
}

function buildTable() {
  $("table-box").style.width = `${Math.max(2, Math.floor(420 / T)) * T}px`;
  $("table").addEventListener("pointermove", (event) => select(cellAt(event)));
  $("table").addEventListener("click", (event) => select({ ...cellAt(event), position: cellAt(event).row }));
  $("heads").style.setProperty("--n", H);
  const numbers = Array.from({ length: H }, (_, head) => element("span", { class: "number" }, `${head + 1}`));
  $("heads").append(element("div", { class: "head-row" }, element("span", {}, "head"), ...numbers));
  for (let layer = 0; layer < L; layer++) {
    const row = element("div", { class: "head-row" }, element("span", {}, `layer ${layer + 1}`));
    for (let head = 0; head < H; head++) {
      const label = `layer ${layer + 1}, head ${head + 1}`;
      const button = element("button", { type: "button", "data-layer": layer, "data-head": head,
        "aria-label": label, title: label }, element("canvas"));
      button.addEventListener("click", () => select({ layer, head }));
      row.append(button);
    }
    $("heads").append(row);
  }
}

function showHeads(repaint) {
  paint($("table"), state.layer, state.head);
  $("scale").replaceChildren("weight 0", swatch("attention"), "100%",
    element("span", {}, "The scale is a square root: the middle color is 25%."));
  for (const button of $("heads").querySelectorAll("button")) {
    const layer = Number(button.dataset.layer), head = Number(button.dataset.head);
    button.setAttribute("aria-pressed", layer === state.layer && head === state.head);
    if (repaint) paint(button.firstChild, layer, head);
  }
  for (const node of document.querySelectorAll(".current-head"))
    node.textContent = `layer ${state.layer + 1} of ${L}, head ${state.head + 1} of ${H}`;
}

// --- 5. One message ---

function cells(numbers, largest) {
  const node = element("span", { class: "cells", title: Array.from(numbers, (x) => x.toFixed(2)).join(", ") });
  for (const x of numbers)
    node.append(element("i", { style:
      `background: ${css(mix(x < 0 ? "loss" : "attention", Math.abs(x) / largest))}` }));
  return node;
}

function showMessage() {
  const { layer, head, position: t } = state, SHORT = 8, scale = Math.sqrt(data.head_dim);
  const raw = scores(layer, head, t), weights = attentionWeights(layer, head, t);
  const values = weights.map((_, s) => channels("values", layer, head, s));
  const largest = Math.max(...values.map((value) => Math.max(...value.map(Math.abs))), 1e-9);
  let order = weights.map((_, s) => s).sort((a, b) => weights[b] - weights[a] || a - b);
  if (!state.all) order = order.slice(0, SHORT);
  const titles = ["from", "position", "query · key", `÷ √${data.head_dim}`, "softmax", "value"];
  const header = element("tr", {}, ...titles.map((text) => element("th", {}, text)));
  const rows = order.map((s) => element("tr", { "data-position": s },
    element("td", { class: "tokens" }, name(data.ids[s])),
    ...[String(s), raw[s].toFixed(2), (raw[s] / scale).toFixed(2), percent(weights[s])]
      .map((text) => element("td", { class: "number" }, text)),
    element("td", {}, cells(values[s], largest))));
  const sum = element("tr", { class: "summary" }, element("td", { colspan: 4 },
    `the message: sum of weight × value of ${t === 0 ? "1 token" : `all ${t + 1} tokens`}`),
    element("td", { class: "number" }, percent(weights.reduce((a, b) => a + b, 0))),
    element("td", {}, cells(channels("messages", layer, head, t), largest)));
  $("message").replaceChildren(header, ...rows, sum);
  $("values").textContent = `A value has ${data.head_dim} numbers; the first ${now().channels} are shown: ` +
    `blue above 0, orange below, the strongest color is ±${largest.toFixed(2)}.`;
  $("more").hidden = t < SHORT;
  $("more").textContent = state.all ? "show the largest weights only" : `show all ${t + 1} tokens`;
}

// --- Putting it together ---

function select(changes) {
  const before = { ...state };
  Object.assign(state, changes);
  const changed = Object.keys(state).filter((key) => state[key] !== before[key]);
  if (changed.length === 0) return;
  if (changed.some((key) => key !== "row" && key !== "column")) show(changed.includes("snapshot"));
  else { showText(); showGraph(); showCell(); }
}

function show(repaint) {
  $("snapshot-label").textContent = now().label;
  $("snapshot").setAttribute("aria-valuetext", now().label);
  showText();
  showSurprises();
  showPrediction();
  showLayers();
  showGraph();
  showHeads(repaint);
  showCell();
  showMessage();
}

document.addEventListener("mouseover", (event) => {
  if (event.target === $("table")) return;
  const node = event.target.closest("[data-position]");
  select({ row: -1, column: node ? Number(node.dataset.position) : -1 });
});
document.addEventListener("click", (event) => {
  const node = event.target.closest(".token, #surprises button, #graph [data-position]");
  if (node) select({ position: Number(node.dataset.position) });
});
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.target instanceof HTMLInputElement && event.key.startsWith("Arrow")) return;  // moves the slider
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
addEventListener("resize", () => { $("graph").dataset.selected = ""; showGraph(); });
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { readPalette(); show(true); });
$("more").addEventListener("click", () => select({ all: !state.all }));

$("tokens").textContent =
  `A token here is ${data.token}; (5) is its position, counted from 0; ␣ is a space, ↵ a new line.`;
$("model").textContent = `${data.title} · ${L} layers with ${H} heads each · ${T} tokens`;
state.position = Math.min(T - 1, Math.floor(T / 2));
readPalette();
buildText();
buildSliders();
buildTable();
show(true);
