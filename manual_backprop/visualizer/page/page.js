"use strict";
// The page: it asks the server (or, in an exported file, what lies in it) and shows the answer. What is drawn is
// computed in Python; here are the controls, the address that remembers them, and the clock that looks for news.

const inside = document.getElementById("exported");
const answers = inside ? JSON.parse(inside.textContent) : null;
const $ = (id) => document.getElementById(id);
const TABS = ["choose", "curves", "compute", "tables", "samples", "model"];
const COLOURS = ["#2f7fc1", "#e08a00", "#009e73", "#cc5f9f", "#56b4e9", "#d55e00", "#8c79d9", "#8a8f98"]; // as figures.py
const SHAPES = ["M6 0a6 6 0 1 0 .01 0z", "M1 1h10v10h-10z", "M6 0l6 6-6 6-6-6z", "M6 0l6 11h-12z", "M4 0h4v4h4v4h-4v4h-4v-4h-4v-4h4z",
  "M6 0l2 4 4 .5-3 3 1 4.500-4-2-4 2 1-4.500-3-3 4-.5z", "M3 1h6l3 5-3 5h-6l-3-5z", "M6 11l-6-11h12z"];
const TICK = 2000; // [ms]
const LIVE = !answers;

let rows = []; // the table of all runs
let axes = {};
let known = {}; // of each chosen run, its version, status and resumes at the last tick
let yRange = null; // where one has zoomed into losses, for the ticks of perplexity
let turn = 0; // an answer that comes after the next question is dropped

// The state of the view, which is the part of the address behind #

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

// Asking

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
  path.setAttribute("fill", COLOURS[place % COLOURS.length]);
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

async function draw(place, figure) {
  const layout = dressed(figure.layout);
  if (state.ly && layout.yaxis && answers) layout.yaxis.type = "log";
  if (answers && layout.xaxis && place.id !== "compute-chart") layout.xaxis.type = state.lx ? "log" : "linear";
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

// The tabs

const views = {
  choose() {
    drawTable();
  },

  async curves(current) {
    const answer = await get.curves();
    if (!current()) return;
    const place = $("charts");
    const there = new Map([...place.querySelectorAll(".chart")].map((one) => [one.dataset.key, one]));
    place.querySelector(".empty")?.remove();
    for (const [key, one] of there) {
      if (!answer.charts.some((chart) => chart.key === key)) {
        Plotly.purge(one);
        one.remove();
      }
    }
    if (!answer.charts.length) place.append(element("p", { class: "empty" }, "No run is chosen, or none has logged anything yet."));
    for (const chart of answer.charts) {
      let one = there.get(chart.key);
      if (!one) {
        one = element("div", { class: "chart", role: "figure", "aria-label": chart.figure.layout.title.text, "data-key": chart.key });
        place.append(one);
        await draw(one, chart.figure);
        zoomed(one, chart.key);
      } else await draw(one, chart.figure);
    }
    const also = state.also.split(",").filter(Boolean);
    $("also").replaceChildren(element("option", { value: "" }, also.length ? `${also.length} more` : "metrics"), ...answer.more.map((name) => element("option", { value: name }, (also.includes(name) ? "✓ " : "") + name)));
    $("also").disabled = !LIVE || !answer.more.length;
    $("unzoom").hidden = !state.z;
    heard(answer.runs);
  },

  async compute(current) {
    const answer = await get.compute();
    if (!current()) return;
    views.computed = answer;
    await draw($("compute-chart"), answer.figure);
    const last = answer.table.budgets.length - 1;
    $("budget").max = Math.max(last, 0);
    $("budget").disabled = last < 1;
    const all = Object.values(answer.table.losses).filter((losses) => losses.some((loss) => loss !== null));
    const common = answer.table.budgets.findLastIndex((_, place) => all.every((losses) => losses[place] !== null));
    if (state.budget === "" || !(Number(state.budget) > 0)) $("budget").value = common >= 0 ? common : last; // where all can be compared
    else $("budget").value = nearest(answer.table.budgets, Number(state.budget));
    $("sentences").replaceChildren(...answer.sentences.map((line) => element("li", {}, line)));
    drawBudget();
    heard(answer.runs);
  },

  async tables(current) {
    const answer = await get.tables();
    if (!current()) return;
    const summary = Object.fromEntries(answer.summary.map((row) => [row.key, row.values]));
    $("cards").replaceChildren(...answer.names.map((name, place) => {
      const best = name === answer.best;
      return element("article", { class: best ? "card best" : "card" },
        element("h3", {}, swatch(place), element("span", {}, name), best ? element("span", { title: "the best", "aria-label": "the best" }, "★") : null),
        element("div", { class: "value" }, short(summary.best[place])),
        element("div", { class: "about" }, `best ${summary.metric[place].replace("validation/", "validation ").replaceAll("_", " ")}${summary["best at step"][place] === null ? "" : ", step " + summary["best at step"][place].toLocaleString("en")}`),
        element("div", { class: "about" }, `${short(summary.parameters[place])} parameters · ${short(summary.tokens[place])} tokens · ${short(summary["tokens a second"][place])} tokens a second`),
        element("div", { class: "about" }, `${short(summary.steps[place])} steps in ${duration(summary.seconds[place])}${summary.status[place] ? ", " + summary.status[place].toLowerCase() : ""}`));
    }));
    const head = () => element("tr", {}, element("th"), ...answer.names.map((name, place) => element("th", { scope: "col" }, swatch(place), " ", name)));
    $("summary").replaceChildren(head(), ...answer.summary.map((row) => element("tr", {}, element("th", { scope: "row" }, row.key), ...row.values.map((value) => element("td", {}, cell(row.key, value))))));
    const shown = answer.configs.filter((row) => row.differs || $("same").checked);
    $("configs").replaceChildren(head(), ...shown.map((row) => element("tr", {}, element("th", { scope: "row" }, row.key),
      ...row.values.map((value, place) => element("td", { class: row.differs ? "differs" : null }, value, row.sources[place] ? element("span", { class: "from" }, row.sources[place]) : null)))));
    if (!shown.length && answer.names.length) $("configs").append(element("tr", {}, element("td", { class: "faint" }, "Nothing differs.")));
    heard(answer.runs);
  },

  async samples(current) {
    const answer = await get.samples();
    const pictures = await get.pictures();
    if (!current()) return;
    const steps = answer.steps;
    $("step").max = Math.max(steps.length - 1, 0);
    $("step").value = Math.max(steps.indexOf(answer.step), 0);
    $("step").disabled = steps.length < 2;
    views.steps = steps;
    $("step-value").textContent = answer.step === null ? "" : answer.step.toLocaleString("en");
    $("texts").replaceChildren(...answer.samples.map((one, place) => element("div", { class: "column" },
      element("h3", {}, swatch(place), " ", one.name, one.step === null ? "" : `, step ${one.step.toLocaleString("en")}`),
      ...(one.texts.length ? one.texts.map((text) => element("pre", { tabindex: 0 }, text)) : [element("p", { class: "faint" }, "no samples")]))));
    const some = pictures.runs.some((run) => run.pictures.length);
    $("pictures-title").hidden = !some;
    $("pictures").replaceChildren(...(some ? pictures.runs.map((run, place) => element("div", { class: "column" },
      element("h3", {}, swatch(place), " ", run.name),
      ...run.pictures.map((name) => element("figure", { style: "margin:0" }, element("img", { src: run.inside ? run.inside[name] : `picture/${encodeURIComponent(run.id)}/${name.split("/").map(encodeURIComponent).join("/")}`, alt: name, loading: "lazy" }), element("figcaption", { class: "from" }, name))))) : []));
    heard(answer.runs);
  },

  model() {
    const place = $("asked");
    const wanted = state.asked || state.runs[0];
    place.replaceChildren(...chosen().map((id) => element("option", { value: id, selected: id === wanted }, label(id))));
    if (answers) {
      $("ask").hidden = true;
      if (answers.model) drawModel(answers.model);
      else $("model-line").textContent = "A text can be given when this is exported: visualize RUN --text \"...\" --export FILE.html";
      return;
    }
    if ($("text").value === "" && state.text) $("text").value = state.text;
    if (state.text && !views.looked) look();
  },
};

function duration(seconds) {
  if (seconds === null || seconds === undefined) return "–";
  return seconds < 100 ? seconds.toFixed(1) + " s" : seconds < 6000 ? (seconds / 60).toFixed(1) + " min" : (seconds / 3600).toFixed(1) + " h";
}

function cell(key, value) {
  if (value === null) return "–";
  if (key === "seconds") return duration(value);
  if (key === "FLOPs") return scientific(value);
  return typeof value === "number" ? (Number.isInteger(value) ? value.toLocaleString("en") : value.toPrecision(6)) : value;
}

function nearest(numbers, wanted) {
  let best = 0;
  numbers.forEach((number, place) => {
    if (Math.abs(Math.log(number / wanted)) < Math.abs(Math.log(numbers[best] / wanted))) best = place;
  });
  return best;
}

function drawBudget() {
  const { table, about } = views.computed;
  const place = Number($("budget").value);
  const budget = table.budgets[place];
  const body = $("budget-table").tBodies[0];
  if (budget === undefined) {
    $("budget-value").textContent = "";
    body.replaceChildren(element("tr", {}, element("td", { class: "faint" }, "No run has logged its FLOPs beside a validation.")));
    return;
  }
  $("budget-value").textContent = scientific(budget) + " FLOPs";
  const names = Object.keys(table.losses);
  const there = names.map((name) => table.losses[name][place]).filter((loss) => loss !== null);
  const least = Math.min(...there);
  body.replaceChildren(...names.map((name, run) => {
    const loss = table.losses[name][place];
    const range = table.ranges[name];
    const words = loss !== null ? loss.toFixed(4) + (loss === least && there.length > 1 ? " ★" : "")
      : range ? `not measured there (from ${scientific(range[0])} to ${scientific(range[1])})` : "no compute logged";
    return element("tr", {}, element("td", {}, swatch(run), " ", name), element("td", { class: loss === null ? "faint" : null, title: about }, words));
  }));
  const shapes = (views.computed.figure.layout.shapes || []).concat([{ type: "line", x0: budget, x1: budget, yref: "paper", y0: 0, y1: 1, line: { color: css("--ink"), width: 1.5 } }]);
  Plotly.relayout($("compute-chart"), { shapes });
}

async function look() {
  views.looked = true;
  fail();
  say("the model reads ...");
  $("maps").classList.add("busy");
  try {
    const response = await fetch("api/model", { method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify({ run: $("asked").value, text: $("text").value }) });
    const content = await response.json();
    if (!response.ok) throw new Error(content.error);
    drawModel(content);
    say("");
  } catch (error) {
    say("");
    fail(error);
  } finally {
    $("maps").classList.remove("busy");
  }
}

function drawModel(seen) {
  $("model-line").textContent = [seen.name + ":", seen.model, seen.note, answers ? `Text: ${seen.text}` : ""].filter(Boolean).join(" ");
  $("next").replaceChildren(element("h2", {}, "Likeliest next tokens"), element("table", {},
    element("tr", {}, element("th", {}, "place"), element("th", {}, "after"), ...seen.next[0].map((_, place) => element("th", {}, place + 1))),
    ...seen.tokens.map((token, place) => element("tr", {}, element("td", {}, place), element("td", {}, token),
      ...seen.next[place].map(([text, share]) => element("td", {}, text, element("span", {}, (100 * share).toFixed(share < 0.1 ? 1 : 0) + " %")))))));
  $("maps").replaceChildren();
  for (const map of seen.maps) {
    const place = element("div", { role: "figure", "aria-label": map.name, style: `height:${map.figure.layout.height}px;max-width:${320 * map.columns}px` });
    $("maps").append(element("h2", {}, map.name), place);
    draw(place, map.figure);
  }
}

// The table of all runs

const COLUMNS = [
  ["name", "Name", "name"], ["task", "Task", "wide-only"], ["architecture", "Architecture", "wide-only"], ["parameters", "Parameters", "number wide-only"],
  ["steps", "Steps", "number wide-only"], ["best", "Best", "number"], ["status", "Status", ""], ["started", "Age", "number wide-only"],
];

function label(id) {
  const row = byId(id);
  const name = row ? row.name : id;
  return rows.filter((other) => other.name === name).length > 1 ? `${name} (${id.slice(-6)})` : name;
}

function drawTable() {
  const words = state.q.toLowerCase().split(/\s+/).filter(Boolean);
  const shown = rows.filter((row) => {
    const text = [row.name, row.id, row.task, row.architecture, row.status, row.sweep, row.from].join(" ").toLowerCase();
    return words.every((word) => text.includes(word));
  });
  const [key, sign] = [state.sort, state.down ? -1 : 1];
  shown.sort((a, b) => {
    const [one, other] = [a[key], b[key]];
    if (one === other) return a.id < b.id ? 1 : -1;
    if (one === null || one === "" || one === undefined) return 1;
    if (other === null || other === "" || other === undefined) return -1;
    return (one < other ? -1 : 1) * sign;
  });
  const focused = document.activeElement && document.activeElement.dataset ? document.activeElement.dataset.focus : null;
  $("runs").tHead.replaceChildren(element("tr", {}, element("th"), ...COLUMNS.map(([name, title, kind]) => element("th", { class: kind, scope: "col", "aria-sort": state.sort === name ? (state.down ? "descending" : "ascending") : null },
    element("button", { "data-focus": "sort " + name, onclick: () => { state.down = state.sort === name ? 1 - state.down : Number(name !== "name"); state.sort = name; remember(); drawTable(); } }, title, state.sort === name ? (state.down ? " ↓" : " ↑") : "")))));
  $("runs").tBodies[0].replaceChildren(...shown.map((row) => {
    const place = state.runs.indexOf(row.id);
    const box = element("input", { type: "checkbox", id: "run " + row.id, "data-focus": "run " + row.id, "aria-label": "choose " + row.name, onchange: (event) => choose(row.id, event.target.checked) });
    box.checked = place >= 0;
    return element("tr", {}, element("td", {}, box),
      element("td", { class: "name" }, element("label", { for: "run " + row.id }, place >= 0 ? swatch(place) : null, place >= 0 ? " " : "", row.name),
        element("span", { class: "from" }, row.id === row.name ? "" : row.id, row.from ? `, from ${row.from}` : "", row.sweep ? " " : "", row.sweep && LIVE ? element("button", { class: "link", "data-focus": "sweep " + row.id, onclick: () => openSweep(row.sweep) }, "open its sweep") : null)),
      element("td", { class: "wide-only" }, row.task || "–"), element("td", { class: "wide-only" }, row.architecture || "–"),
      element("td", { class: "number wide-only" }, short(row.parameters)), element("td", { class: "number wide-only" }, short(row.steps)),
      element("td", { class: "number", title: row.metric }, row.best === null ? "–" : row.best.toPrecision(5)),
      element("td", { class: "status-" + row.status }, row.status === "DEAD" ? "its process is gone" : (row.status || "–").toLowerCase()), element("td", { class: "number wide-only", title: row.started }, age(row.started)));
  }));
  $("count").textContent = `${shown.length} of ${rows.length} runs, ${state.runs.length} chosen`;
  if (focused) [...document.querySelectorAll("[data-focus]")].find((one) => one.dataset.focus === focused)?.focus();
}

function choose(id, wanted) {
  state.runs = wanted ? [...state.runs.filter((one) => one !== id), id] : state.runs.filter((one) => one !== id);
  state.z = "";
  remember();
  drawChips();
  drawTable();
}

function openSweep(sweep) {
  state.runs = rows.filter((row) => row.sweep === sweep).map((row) => row.id);
  state.tab = "curves";
  state.z = "";
  remember(true);
  drawChips();
  show();
}

function drawChips() {
  const ids = state.runs;
  const chips = ids.map((id, place) => element("span", { class: place >= state.n ? "chip faint" : "chip", title: id },
    swatch(place), element("span", { class: "name" }, label(id)), element("span", { class: "status" }, ((known[id] || byId(id) || {}).status || "").toLowerCase()),
    LIVE ? element("button", { "aria-label": "leave out " + label(id), onclick: () => { choose(id, false); show(); } }, "×") : " "));
  if (ids.length > state.n && LIVE) {
    chips.push(element("button", { class: "quiet", onclick: () => { state.n += 4; remember(); drawChips(); show(); } }, `${ids.length - state.n} are faint: four more in full`));
  } else if (state.n > FIRST.n && LIVE) {
    chips.push(element("button", { class: "quiet", onclick: () => { state.n = FIRST.n; remember(); drawChips(); show(); } }, "only four in full"));
  }
  $("chips").replaceChildren(...chips);
}

function heard(runs) {
  const broken = (runs || []).filter((run) => run.damaged);
  const empty = (runs || []).filter((run) => run.empty);
  const parts = [...broken.map((run) => `${run.name}: ${run.damaged} broken ${run.damaged === 1 ? "line was" : "lines were"} left out`), ...empty.map((run) => `${run.name} has logged nothing yet`)];
  if (parts.length) say(parts.join("; "));
}

// Showing and looking for news

async function show() {
  const mine = ++turn;
  const current = () => mine === turn;
  for (const tab of TABS) $(tab).hidden = tab !== state.tab;
  for (const button of $("tabs").children) {
    if (button.dataset.tab === state.tab) button.setAttribute("aria-current", "page");
    else button.removeAttribute("aria-current");
  }
  $("x").value = state.x;
  $("log_x").checked = Boolean(state.lx);
  $("log_y").checked = Boolean(state.ly);
  $("smoothing").value = String(state.s);
  if ($("smoothing").value === "") $("smoothing").append(element("option", { value: state.s, selected: true }, `${state.s} points`));
  if ($("filter").value !== state.q) $("filter").value = state.q;
  fail();
  const place = $(state.tab);
  place.classList.add("busy");
  try {
    await views[state.tab](current);
    document.body.dataset.shown = `${state.tab} ${mine}`;
  } catch (error) {
    if (current()) fail(error);
  } finally {
    if (current()) place.classList.remove("busy");
  }
}

async function tick() {
  try {
    if (!document.hidden) {
      const answer = await ask("tick", runPairs());
      let news = false;
      for (const [id, now] of Object.entries(answer.runs)) {
        const before = known[id];
        known[id] = now;
        if (!before) continue;
        news ||= now.version !== before.version || now.status !== before.status;
        if (now.resumes.length > before.resumes.length) say(`${label(id)} was resumed after step ${now.resumes.at(-1).toLocaleString("en")}`);
        else if (now.status !== before.status) {
          const words = { FINISHED: "has finished", FAILED: "has failed", KILLED: "was stopped", DEAD: "has ended: its process is gone", RUNNING: "goes on" };
          say(`${label(id)} ${words[now.status] || now.status} at step ${now.step.toLocaleString("en")}`);
        }
      }
      if (news) {
        drawChips();
        if (["curves", "compute", "tables"].includes(state.tab)) await show();
      }
      if (state.tab === "choose" && ++tick.count % 3 === 0) {
        const table = await ask("runs");
        if (JSON.stringify(table.runs) !== JSON.stringify(rows)) {
          rows = table.runs;
          if (state.tab === "choose") drawTable();
        }
      }
      if (tick.lost) {
        tick.lost = false;
        say("");
      }
    }
  } catch (error) {
    tick.lost = true;
    say("the server does not answer: it was stopped, perhaps");
  }
  setTimeout(tick, TICK);
}
tick.count = 0;

// Controls

function control(id, event, change, push) {
  $(id).addEventListener(event, () => {
    change($(id));
    remember(push);
    show();
  });
}

$("tabs").addEventListener("click", (event) => {
  const tab = event.target.dataset.tab;
  if (!tab) return;
  state.tab = tab;
  remember(true);
  show();
});
control("x", "change", (one) => { state.x = one.value; state.z = ""; yRange = null; });
control("log_x", "change", (one) => { state.lx = Number(one.checked); state.z = ""; });
control("log_y", "change", (one) => { state.ly = Number(one.checked); yRange = null; });
control("smoothing", "change", (one) => { state.s = Number(one.value); });
control("also", "change", (one) => {
  const there = state.also.split(",").filter(Boolean);
  state.also = (there.includes(one.value) ? there.filter((name) => name !== one.value) : [...there, one.value]).filter(Boolean).join(",");
});
control("unzoom", "click", () => { state.z = ""; yRange = null; });
control("same", "change", () => {});
$("filter").addEventListener("input", () => { state.q = $("filter").value; remember(); drawTable(); });
$("none").addEventListener("click", () => { state.runs = []; remember(); drawChips(); drawTable(); });
$("budget").addEventListener("input", () => {
  state.budget = String(views.computed.table.budgets[Number($("budget").value)]);
  remember();
  drawBudget();
});
$("step").addEventListener("input", () => {
  state.step = String(views.steps[Number($("step").value)]);
  remember();
  show();
});
$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  state.text = $("text").value;
  state.asked = $("asked").value;
  remember();
  look();
});
$("export").addEventListener("click", () => {
  const link = element("a", { href: "api/export?" + new URLSearchParams([...runPairs(), ...viewPairs(), ["state", address()]]), download: "runs.html" });
  link.click();
});
addEventListener("popstate", () => { readAddress(); if (state.runs === null) state.runs = first; drawChips(); show(); });
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => show());

let first = [];

async function start() {
  const table = answers ? answers.table : await ask("runs");
  rows = table.runs;
  axes = table.axes;
  first = table.chosen;
  $("x").replaceChildren(...Object.entries(axes).map(([name, title]) => element("option", { value: name }, title)));
  readAddress();
  if (state.runs === null) {
    state.runs = first;
    if (table.named && !location.hash && !(answers && answers.state)) state.tab = "curves";
  }
  if (answers) {
    if (!new URLSearchParams(answers.state).has("tab") && !location.hash) state.tab = "curves";
    for (const id of ["export", "smoothing", "none"]) $(id).disabled = true;
    $("export").hidden = true;
  }
  if (!rows.length) say("There are no runs yet: python -m manual_backprop.run makes one, and it appears here.");
  drawChips();
  await show();
  if (LIVE) setTimeout(tick, TICK);
}
start().catch(fail);
