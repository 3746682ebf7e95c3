"use strict";
// The whole page: the table of all runs, the chosen runs, the controls, and polling for updates.

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

// Showing, and polling for updates

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
    say("the server does not answer: perhaps it was stopped");
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
  colours = table.colours;
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
