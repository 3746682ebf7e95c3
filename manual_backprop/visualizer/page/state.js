"use strict";
// The state of the view, which is kept in the address; requests to the server, or to an exported file; helpers.

const inside = document.getElementById("exported");
const answers = inside ? JSON.parse(inside.textContent) : null;
const $ = (id) => document.getElementById(id);
const TABS = ["choose", "curves", "compute", "tables", "samples", "model"];
const SHAPES = [ // plotly's symbols, in the order of style.py
  "M6 0a6 6 0 1 0 .01 0z", "M1 1h10v10h-10z", "M6 0l6 6-6 6-6-6z", "M6 0l6 11h-12z", "M4 0h4v4h4v4h-4v4h-4v-4h-4v-4h4z",
  "M6 0l2 4 4 .5-3 3 1 4.500-4-2-4 2 1-4.500-3-3 4-.5z", "M3 1h6l3 5-3 5h-6l-3-5z", "M6 11l-6-11h12z"];
const TICK = 2000; // [ms]
const LIVE = !answers;
const loaded = new Promise((done) => addEventListener("load", done, { once: true })); // plotly's script is the last one: requests are sent before it is loaded

let rows = []; // the table of all runs
let axes = {};
let colours = [];
let known = {}; // version, status and resumes of each chosen run at the last tick
let yRange = null; // the zoomed range of losses, for the ticks of perplexity
let turn = 0; // an answer that arrives after a newer request is dropped

// The state of the view: the part of the address after #

const state = { runs: null, n: 4, tab: "choose", x: "step", lx: 0, ly: 0, s: 0, z: "", also: "", q: "", sort: "started", down: 1, budget: "", step: "", text: "", asked: "" };
const FIRST = { ...state };

function readAddress() {
  const given = new URLSearchParams(location.hash.slice(1) || (answers && answers.state) || "");
  for (const key of Object.keys(state)) {
    if (key === "runs") state.runs = given.has("runs") ? given.get("runs").split(",").filter(Boolean) : null;
    else state[key] = given.has(key) ? (typeof FIRST[key] === "number" ? Number(given.get(key)) || 0 : given.get(key)) : FIRST[key];
  }
  if (!TABS.includes(state.tab)) state.tab = "choose";
  if (!(state.x in axes)) state.x = "step";
  state.n = Math.max(1, state.n);
}

function address() {
  const given = new URLSearchParams();
  for (const [key, value] of Object.entries(state)) {
    if (key === "runs" ? value !== null : value !== FIRST[key]) given.set(key, key === "runs" ? value.join(",") : value);
  }
  return given.toString().replaceAll("%2C", ",");
}

function remember(push) {
  const target = "#" + address();
  if (target !== (location.hash || "#")) history[push ? "pushState" : "replaceState"](null, "", target);
}

// Requests

async function ask(path, pairs = []) {
  const response = await fetch("api/" + path + "?" + new URLSearchParams(pairs));
  const content = await response.json();
  if (!response.ok) throw new Error(content.error || response.statusText);
  return content;
}

const chosen = () => state.runs.filter((id) => byId(id) || !LIVE);
const byId = (id) => rows.find((row) => row.id === id);
const runPairs = () => chosen().map((id) => ["run", id]);
const viewPairs = () => [["x", state.x], ["log_x", state.lx], ["log_y", state.ly], ["smoothing", state.s], ["strong", state.n],
  ...(state.z ? [["low", state.z.split(",")[0]], ["high", state.z.split(",")[1]]] : [])];

const get = {
  curves: (only) => (answers ? answers.curves[state.x]
    : ask("curves", [...runPairs(), ...viewPairs(), ...state.also.split(",").filter(Boolean).map((name) => ["also", name]),
      ...(only ? [["only", only]] : []), ...(yRange ? [["low_y", yRange[0]], ["high_y", yRange[1]]] : [])])),
  compute: () => (answers ? answers.compute : ask("compute", [...runPairs(), ["strong", state.n]])),
  tables: () => (answers ? answers.tables : ask("tables", runPairs())),
  samples: () => (answers ? answers.samples[state.step] || answers.samples[""] : ask("samples", [...runPairs(), ...(state.step ? [["step", state.step]] : [])])),
  pictures: () => (answers ? answers.pictures : ask("pictures", runPairs())),
};

// Small helpers

function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (value !== null && value !== false) made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined).map((child) => (typeof child === "object" ? child : String(child))));
  return made;
}

function swatch(place) {
  const picture = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  picture.setAttribute("class", "swatch");
  picture.setAttribute("viewBox", "0 0 12 12");
  picture.setAttribute("aria-hidden", "true");
  const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
  path.setAttribute("d", SHAPES[place % SHAPES.length]);
  path.setAttribute("fill", colours[place % colours.length]);
  if (place >= state.n) path.setAttribute("opacity", "0.45");
  picture.append(path);
  return picture;
}

function short(number) {
  if (number === null || number === undefined) return "–";
  if (typeof number !== "number") return String(number);
  for (const [size, unit] of [[1e12, "T"], [1e9, "G"], [1e6, "M"], [1e4, "k"]]) {
    if (Math.abs(number) >= size) return size === 1e4 ? (number / 1e3).toPrecision(3) + unit : number >= 1e15 ? number.toExponential(2) : (number / size).toPrecision(3) + unit;
  }
  return Number.isInteger(number) ? number.toLocaleString("en") : number.toPrecision(4);
}

function age(started) {
  const seconds = (Date.now() - Date.parse(started)) / 1000;
  if (!(seconds >= 0)) return "–";
  for (const [size, unit] of [[86400, "d"], [3600, "h"], [60, "min"]]) if (seconds >= size) return Math.floor(seconds / size) + " " + unit;
  return Math.floor(seconds) + " s";
}

function scientific(number) {
  return number.toExponential(2).replace("e+", "e");
}

function say(text) {
  $("news").textContent = text;
}

function fail(error) {
  $("error").hidden = !error;
  $("error").textContent = error ? error.message || String(error) : "";
}

// Pictures

const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

function dressed(layout, legend = false) {
  const made = structuredClone(layout);
  made.font = { ...made.font, color: css("--faint") };
  if (made.title) made.title.font = { ...made.title.font, color: css("--ink") };
  made.hoverlabel = { ...made.hoverlabel, bgcolor: css("--raised"), bordercolor: css("--line"), font: { color: css("--ink"), size: 12 } };
  made.showlegend = legend;
  made.autosize = true;
  return made;
}

async function draw(place, figure, controlled = false) {
  await loaded;
  const layout = dressed(figure.layout);
  if (answers && controlled) { // the server has applied these settings; an exported file has one picture of each kind
    layout.xaxis.type = state.lx ? "log" : "linear";
    for (const axis of ["yaxis", "yaxis2"]) if (layout[axis]) layout[axis].type = state.ly ? "log" : "linear";
  }
  await Plotly.react(place, figure.data, layout, { displaylogo: false, responsive: true, modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"] });
}

function zoomed(place, key) {
  place.on("plotly_relayout", (change) => {
    const low = change["xaxis.range[0]"], high = change["xaxis.range[1]"];
    if (key === "validation") yRange = "yaxis.range[0]" in change ? [change["yaxis.range[0]"], change["yaxis.range[1]"]].map((edge) => (state.ly ? 10 ** edge : edge)) : null;
    if (low !== undefined) {
      const edge = (value) => (state.lx ? 10 ** value : value);
      state.z = [edge(low), edge(high)].join(",");
    } else if (change["xaxis.autorange"]) state.z = "";
    else return;
    remember();
    if (LIVE) show();
  });
}
