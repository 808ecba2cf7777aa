"use strict";
// What the page shows: predictions and expiries of every key, of one head or of several at once, at a time `t`.
const data = JSON.parse(document.getElementById("data").textContent);
const { layers, heads, sinks, steps, scale, rules, budgets } = data;
const count = data.tokens.length;
const bytes = (text) => Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
const predictions = bytes(data.predictions); // [layers, heads, tokens], codes of scores, see `score`; NONE: no gates
const expiry = new Uint16Array(bytes(data.expiry).buffer); // first token that does not see the key
const NONE = 255, FOR_GOOD = 65535, UNDECIDED = 65534;
const score = (code) => scale.low + code / steps;
const place = (y) => Math.min(Math.max((y - scale.bottom) / (scale.top - scale.bottom), 0), 1); // of a score in the colours
const at = (id) => document.getElementById(id);
const number = (value) => value.toLocaleString("en", { maximumFractionDigits: value < 10 ? 1 : 0 });
const amount = (y) => { // of a score, with its unit
  const value = scale.base === null ? y : scale.base ** y, few = { maximumSignificantDigits: 2 };
  const shown = scale.unit === "tokens" ? number(value) : value.toLocaleString("en", Math.abs(value) < 10 ? few : {});
  return [shown, scale.unit ? ` ${scale.unit}` : ""];
};
const percent = (share) => `${(100 * share).toFixed(share < 0.0995 ? 1 : 0)} %`;

const state = { layer: "mean", head: "mean", t: count - 1, fade: true };
let chosen = []; // where the chosen heads' keys begin in `predictions` and `expiry`
let predicted = []; // mean score of each token over them, NaN without gates
let live = []; // their live keys at each time
let seen = null; // the token that is looked at
let anchored = null; // what the tip about it stands beside

// -- colours ----------------------------------------------------------------------------------------------------------

let theme = {};
function readTheme() {
  const style = getComputedStyle(document.documentElement);
  const rgb = (hex) => [1, 3, 5].map((place) => parseInt(hex.slice(place, place + 2), 16));
  const value = (name) => rgb(style.getPropertyValue(name).trim());
  const stops = style.getPropertyValue("--palette").trim().split(/\s+/);
  theme = { stops, rgb: stops.map(rgb), looks: new Map() };
  for (const name of ["paper", "muted", "none", "full"]) theme[name] = value(`--${name}`);
}
const mix = (a, b, share) => a.map((value, place) => value + (b[place] - value) * share);
const css = (rgb) => `rgb(${rgb.map(Math.round).join(" ")})`;
function colour(y) {
  if (Number.isNaN(y)) return theme.none;
  const last = theme.rgb.length - 1, between = place(y) * last;
  const below = Math.min(Math.floor(between), last - 1);
  return mix(theme.rgb[below], theme.rgb[below + 1], between - below);
}
function luminance(rgb) {
  const [r, g, b] = rgb.map((value) => ((value / 255 + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}
// background and ink of a token of which `share` of the heads hold the key: a chip, faded to an underline
function look(y, share) {
  [y, share] = [Math.round(y * 16) / 16, Math.round(share * 20) / 20]; // so few looks that each is made once
  const key = `${y} ${share}`;
  if (!theme.looks.has(key)) {
    const chip = mix(theme.paper, colour(y), share), faded = mix(theme.muted, theme.paper, 0.25);
    const bright = luminance(chip) > 0.22; // where black and white contrast alike, a little in favour of black
    const ink = mix(faded, bright ? [24, 25, 31] : [255, 255, 255], Math.min(1, 0.1 + 1.4 * share));
    const underline = css(mix(theme.paper, colour(y), 0.85)); // stays when the key is gone
    const line = share < 1 ? `linear-gradient(${underline},${underline}) 0 100%/100% 3px no-repeat ` : "";
    theme.looks.set(key, [line + (share > 0 ? css(chip) : "transparent"), css(share > 0 ? ink : faded)]);
  }
  return theme.looks.get(key);
}

// -- what is chosen ---------------------------------------------------------------------------------------------------

function choose() {
  const all = (chosenOne, total) => (chosenOne === "mean" ? [...Array(total).keys()] : [chosenOne]);
  chosen = all(state.layer, layers).flatMap((l) => all(state.head, heads).map((h) => (l * heads + h) * count));
  predicted = Array.from({ length: count }, (_, j) => meanPrediction(chosen, j));
  const change = new Int32Array(count + 1);
  for (const start of chosen)
    for (let j = 0; j < count; j++) {
      change[j]++;
      if (expiry[start + j] < count) change[expiry[start + j]]--;
    }
  let running = 0;
  live = Array.from({ length: count }, (_, t) => (running += change[t]));
}
function meanPrediction(starts, j) {
  let sum = 0, known = 0;
  for (const start of starts)
    if (predictions[start + j] !== NONE) (sum += score(predictions[start + j])), known++;
  return known ? sum / known : NaN;
}
function held(j, t) {
  let share = 0;
  for (const start of chosen) share += expiry[start + j] > t;
  return share / chosen.length;
}

// -- drawing ----------------------------------------------------------------------------------------------------------

const spans = data.tokens.map((token, j) => {
  const span = document.createElement("span");
  span.textContent = token;
  span.dataset.token = j;
  span.tabIndex = -1;
  if (data.generated[j] === "1") span.classList.add("generated");
  if (token.includes("\n")) span.classList.add("break");
  if (token === "") span.classList.add("part");
  return span;
});
// the space before a word stands outside, so that a line does not end with its colour
at("text").append(...spans.flatMap((span) => {
  const [space] = /^ *(?=[^ \n])/.exec(span.textContent) ?? [""];
  span.textContent = span.textContent.slice(space.length);
  return [space, span];
}));
const cells = [];
at("grid").style.gridTemplateColumns = `repeat(${layers}, 1fr)`;
for (let head = 0; head < heads; head++)
  for (let layer = 0; layer < layers; layer++) {
    const cell = document.createElement("i");
    cell.title = `layer ${layer}, head ${head}`;
    cell.addEventListener("click", () => set({ layer, head }));
    cells.push({ cell, layer, head, start: (layer * heads + head) * count });
  }
at("grid").append(...cells.map(({ cell }) => cell));

function drawTime() {
  const { t, fade } = state;
  const gone = [];
  for (let j = 0; j < count; j++) {
    const span = spans[j], share = j > t ? 0 : held(j, t), unread = j > t;
    const [background, ink] = unread ? ["", ""] : look(predicted[j], fade ? share : 1);
    if (span.look !== background + ink) {
      span.look = background + ink;
      span.style.background = background;
      span.style.color = ink;
    }
    span.classList.toggle("unread", unread);
    span.classList.toggle("evicted", fade && !unread && share === 0);
    span.classList.toggle("now", j === t && t < count - 1);
    let left = 0;
    for (const start of chosen) left += expiry[start + j] === t;
    if (left) gone.push([j, left]);
  }
  const full = (t + 1) * chosen.length, sum = live.slice(0, t + 1).reduce((a, b) => a + b, 0);
  at("share").textContent = percent(live[t] / full);
  at("at").textContent = t.toLocaleString("en");
  at("keys").textContent = `${number(live[t] / chosen.length)} of ${(t + 1).toLocaleString("en")}`;
  at("footprint").textContent = percent(sum / (chosen.length * (t + 1) * (t + 2) / 2));
  at("gone-at").textContent = t.toLocaleString("en");
  gone.sort((a, b) => b[1] - a[1]);
  at("gone-list").replaceChildren(...(gone.length ? gone.slice(0, 8).flatMap(chip) : ["nothing"]));
  at("time").value = t;
  at("time").setAttribute("aria-valuetext", `token ${t}: ${percent(live[t] / full)} of a full cache is held`);
  at("clock").innerHTML = `token <b>${t.toLocaleString("en")}</b> of ${(count - 1).toLocaleString("en")}`;
  for (const line of document.querySelectorAll(".plot .now")) line.style.left = `${(100 * (t + 0.5)) / count}%`;
}
function chip([j, left]) {
  const name = document.createElement("span"), note = document.createElement("small");
  name.textContent = visible(j);
  note.textContent = chosen.length > 1 ? ` ${left} of ${chosen.length} heads   ` : "   ";
  return [name, note];
}
function visible(j) {
  const token = data.tokens[j];
  return token.trim() || token.replace(/\n/g, "↵").replace(/ /g, "␣") || "part of a character";
}

function drawMap() {
  const step = Math.ceil(count / 800), size = Math.ceil(count / step), canvas = at("canvas");
  canvas.width = canvas.height = size;
  const context = canvas.getContext("2d"), image = context.createImageData(size, size);
  for (let row = 0; row < size; row++) {
    const change = new Int32Array(size + 1), first = row * step, last = Math.min(first + step, count);
    let sum = 0, known = 0;
    for (let j = first; j < last; j++) {
      if (!Number.isNaN(predicted[j])) (sum += predicted[j]), known++;
      for (const start of chosen) {
        change[row]++;
        const end = Math.ceil(expiry[start + j] / step);
        if (end < size) change[Math.max(end, row)]--;
      }
    }
    const tint = colour(known ? sum / known : NaN), all = (last - first) * chosen.length;
    for (let column = row, running = 0; column < size; column++) {
      running += change[column];
      const share = (running / all) ** 0.5; // a few heads of many shall still be seen
      image.data.set([...mix(theme.full, tint, share), 255], 4 * (row * size + column));
    }
  }
  context.putImageData(image, 0, 0);
}
function drawChart() {
  const step = (sum, t) => {
    const height = (count - sum / chosen.length).toFixed(2);
    return `L${t} ${height}L${t + 1} ${height}`;
  };
  at("chart").firstElementChild.setAttribute("viewBox", `0 0 ${count} ${count}`);
  at("full").setAttribute("d", `M0 ${count}L${count} 0L${count} ${count}Z`);
  at("live").setAttribute("d", `M0 ${count}${live.map(step).join("")}L${count} ${count}Z`);
}
function drawGrid() {
  for (const { cell, layer, head, start } of cells) {
    cell.style.background = css(colour(seen === null ? headMean(start) : meanPrediction([start], seen)));
    cell.classList.toggle("chosen", chosen.length < cells.length && chosen.includes(start));
  }
  const what = seen === null ? ": mean prediction" : ` on “${visible(seen)}”`;
  at("every-title").textContent = `All ${cells.length} heads${what}`;
}
function headMean(start) {
  let sum = 0, known = 0;
  for (let j = sinks; j < count; j++)
    if (predictions[start + j] !== NONE) (sum += score(predictions[start + j])), known++;
  return known ? sum / known : NaN;
}
function drawRule() {
  const alike = rules.every((other) => JSON.stringify(other) === JSON.stringify(rules[0]));
  const rule = state.layer === "mean" ? (alike ? rules[0] : null) : rules[state.layer];
  const price = rule?.price ?? null, show = price !== null;
  at("price").hidden = at("above").hidden = !show;
  if (show) {
    at("price").style.left = `${place(price) * 100}%`;
    at("price").title = `the price, ${amount(price).join("")}: a key above it stays`;
  }
  const ages = scale.ages.map((age) => age.toLocaleString("en")).join(", "), above = show && amount(price).join("");
  const dear = scale.ages.length
    ? `, then until the first age (${ages}) at which it is ${scale.said} no more than ${above}`
    : `, for good if ${scale.said} more than ${above}`;
  const longer = show ? dear : ", then for its own time";
  const words = {
    full: () => "every key is kept",
    window: () => `each key is kept ${rule.window} tokens`,
    gated: () => `each key is kept ${rule.window} tokens${longer}`,
  };
  const text = rule ? words[rule.rule]() : "rules differ by layer", cap = budget() ?? rules[0].cap;
  at("rule").textContent = cap ? `${text}, ${cap}` : text;
}
function budget() {
  const here = state.layer === "mean" ? budgets : [budgets[state.layer]];
  if (here.includes(null)) return null;
  const keys = here.reduce((sum, each) => sum + each, 0) / here.length;
  return `within a budget of ${Math.round(keys).toLocaleString("en")} keys a head`;
}
function drawAll() {
  readTheme();
  choose();
  const ends = [scale.ticks[0][1], scale.ticks.at(-1)[1]];
  at("caption").textContent = scale.caption;
  at("legend").ariaLabel = `Colours, by ${scale.caption}, from ${ends.join(" to ")}`;
  at("ticks").replaceChildren(...scale.ticks.map(([where, label]) => {
    const tick = Object.assign(document.createElement("span"), { textContent: label });
    tick.style.setProperty("--place", where);
    return tick;
  }));
  at("ramp").style.background = `linear-gradient(90deg, ${theme.stops.join(", ")})`;
  at("layer").value = state.layer;
  at("head").value = state.head;
  at("fade").checked = state.fade;
  for (const draw of [drawRule, drawMap, drawChart, drawGrid, drawTime]) draw();
  inspect(seen);
}

// -- one token --------------------------------------------------------------------------------------------------------

function inspect(j, anchor = j === null ? null : spans[j]) {
  if (seen !== null) spans[seen].classList.remove("seen");
  seen = j;
  drawGrid();
  const tip = at("tip"), row = document.querySelector(".plot .row");
  tip.hidden = row.hidden = j === null;
  if (j === null) return;
  spans[j].classList.add("seen");
  row.style.top = `${(100 * (j + 0.5)) / count}%`;
  const part = (kind, text) => Object.assign(document.createElement(kind), { textContent: text });
  const line = (text) => {
    const whole = document.createElement("div");
    whole.append(...text.split("|").map((piece, place) => part(place === 1 ? "em" : "span", piece)));
    return whole;
  };
  const origin = data.generated[j] === "1" ? ", generated" : "";
  const lines = [`token |${j.toLocaleString("en")}|${origin}`, judgement(j), fate(j)]; // strong between bars
  tip.replaceChildren(part("b", visible(j)), ...lines.map(line));
  anchored = anchor;
  placeTip();
}
function placeTip() {
  if (seen === null) return;
  const tip = at("tip"), box = anchored.getBoundingClientRect(), bottom = innerHeight - at("player").offsetHeight;
  tip.hidden = box.bottom < 0 || box.top > bottom;
  const size = tip.getBoundingClientRect(), below = box.bottom + 8, above = box.top - size.height - 8;
  tip.style.left = `${Math.min(Math.max(box.left, 12), innerWidth - size.width - 12)}px`;
  tip.style.top = `${below + size.height > bottom ? Math.max(above, 8) : below}px`;
}
function judgement(j) {
  const open = chosen.some((start) => expiry[start + j] === UNDECIDED);
  if (Number.isNaN(predicted[j])) return open ? "not predicted yet" : "no gates here";
  const [shown, unit] = amount(predicted[j]), age = scale.ages.length ? ` at age ${scale.ages.at(-1)}` : "";
  return `${scale.said} |${shown}|${unit}${age}${chosen.length > 1 ? ", on average" : ""}`;
}
function fate(j) {
  const ends = chosen.map((start) => expiry[start + j]), evicted = ends.filter((end) => end < UNDECIDED);
  const now = state.t.toLocaleString("en"), end = ends[0].toLocaleString("en");
  if (j < sinks && !evicted.length) return "|kept|: a sink always stays";
  if (j > state.t) return `not read yet at token ${now}`;
  if (chosen.length > 1)
    return `held by |${ends.filter((other) => other > state.t).length} of ${ends.length}| heads at token ${now}`;
  if (evicted.length && ends[0] >= count) return `will be evicted at token |${end}`;
  if (ends[0] === UNDECIDED) return "|in the window|, not decided yet";
  const age = (ends[0] - j).toLocaleString("en");
  return evicted.length ? `evicted at token |${end}|, after ${age}` : "|kept|";
}
