// What the reader does: choose, look at a token, set the time, play. Goes on from page.js.

function set(changes, remember = true) {
  const moved = Object.keys(changes).some((name) => name !== "t" && changes[name] !== state[name]);
  Object.assign(state, changes);
  state.t = Math.min(Math.max(Math.round(state.t), 0), count - 1);
  if (moved) drawAll();
  else drawTime();
  const fragment = `#layer=${state.layer}&head=${state.head}&t=${state.t}${state.fade ? "" : "&fade=0"}`;
  if (remember) history.replaceState(null, "", fragment);
}
function readFragment() {
  const asked = new URLSearchParams(location.hash.slice(1));
  const one = (name, total) => (/^\d+$/.test(asked.get(name)) && +asked.get(name) < total ? +asked.get(name) : "mean");
  Object.assign(state, { layer: one("layer", layers), head: one("head", heads), fade: asked.get("fade") !== "0" });
  state.t = /^\d+$/.test(asked.get("t")) ? Math.min(+asked.get("t"), count - 1) : count - 1;
  seen = /^\d+$/.test(asked.get("token")) && +asked.get("token") < count ? +asked.get("token") : null;
  drawAll();
}
function fill(select, name, total) {
  const option = (value, text) => Object.assign(document.createElement("option"), { value, textContent: text });
  const single = Array.from({ length: total }, (_, place) => option(place, place));
  select.append(option("mean", "mean of all"), ...single);
  select.addEventListener("change", () => set({ [name]: select.value === "mean" ? "mean" : +select.value }));
}
fill(at("layer"), "layer", layers);
fill(at("head"), "head", heads);
at("last-layer").textContent = layers - 1;
const made = data.generated.split("1").length - 1;
at("made").textContent = made ? `${made.toLocaleString("en")} of them generated (bold)` : "";
at("most").textContent = count.toLocaleString("en");
at("time").max = count - 1;
at("time").addEventListener("input", () => (pause(), set({ t: +at("time").value }, false)));
at("time").addEventListener("change", () => set({ t: +at("time").value }));
at("fade").addEventListener("change", () => set({ fade: at("fade").checked }));

const tokenOf = (event) => (event.target.dataset.token === undefined ? null : +event.target.dataset.token);
at("text").addEventListener("pointerover", (event) => inspect(tokenOf(event)));
at("text").addEventListener("pointerleave", () => inspect(null));
at("text").addEventListener("click", (event) => tokenOf(event) !== null && (pause(), set({ t: tokenOf(event) })));
at("text").addEventListener("focusin", (event) => inspect(tokenOf(event)));
at("text").addEventListener("focusout", () => inspect(null));
let stop = 0; // the one token that Tab comes to
spans[0].tabIndex = 0;
at("text").addEventListener("keydown", (event) => {
  const steps = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: 10, ArrowUp: -10, Home: -count, End: count };
  if (event.key === "Enter") set({ t: stop });
  if (!(event.key in steps)) return;
  event.preventDefault();
  spans[stop].tabIndex = -1;
  stop = Math.min(Math.max(stop + steps[event.key], 0), count - 1);
  spans[stop].tabIndex = 0;
  spans[stop].focus();
});
for (const plot of [at("map"), at("chart")]) {
  const place = (event, size) => Math.min(Math.max(Math.floor(size * count), 0), count - 1);
  const move = (event) => {
    const box = plot.getBoundingClientRect();
    if (event.buttons) pause(), set({ t: place(event, (event.clientX - box.left) / box.width) }, false);
    if (plot.id === "map") inspect(place(event, (event.clientY - box.top) / box.height), plot);
  };
  plot.addEventListener("pointerdown", (event) => (plot.setPointerCapture(event.pointerId), move(event)));
  plot.addEventListener("pointermove", move);
  plot.addEventListener("pointerup", () => set({}));
  plot.addEventListener("pointerleave", () => inspect(null));
}

let playing = 0; // the animation frame that is waited for
function pause() {
  cancelAnimationFrame(playing);
  playing = 0;
  drawButton();
}
function play() {
  const from = state.t >= count - 1 ? 0 : state.t, started = performance.now();
  const rate = count / Math.min(Math.max(count / 40, 8), 40); // tokens a second
  const frame = (time) => {
    const t = Math.min(from + Math.max(time - started, 0) / 1000 * rate, count - 1);
    if (Math.round(t) !== state.t) set({ t }, false);
    spans[state.t].scrollIntoView({ block: "nearest" });
    if (t >= count - 1) return pause();
    playing = requestAnimationFrame(frame);
  };
  playing = requestAnimationFrame(frame);
  drawButton();
}
function drawButton() {
  at("play").setAttribute("aria-label", playing ? "Pause" : "Play");
  at("play").querySelector("path").setAttribute("d", playing ? "M3 2h4v12H3zM9 2h4v12H9z" : "M4 1.5v13l10-6.5z");
}
at("play").addEventListener("click", () => (playing ? (pause(), set({})) : play()));
addEventListener("hashchange", readFragment);
addEventListener("scroll", placeTip, { passive: true });
addEventListener("resize", placeTip);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
drawButton();
readFragment();
