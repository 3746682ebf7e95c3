"use strict";
// The tabs: each one requests its data and shows the answer. Python computes what is drawn.

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
        await draw(one, chart.figure, true);
        zoomed(one, chart.key);
      } else await draw(one, chart.figure, true);
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
    if (state.budget === "" || !(Number(state.budget) > 0)) $("budget").value = common >= 0 ? common : last; // the largest budget at which all runs can be compared
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
    body.replaceChildren(element("tr", {}, element("td", { class: "faint" }, "No run has logged FLOPs together with a validation metric.")));
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
  $("next").replaceChildren(element("h2", {}, seen.title), element("table", {},
    element("tr", {}, element("th", {}, "place"), element("th", {}, "after"), ...seen.next[0].map((_, place) => element("th", {}, place + 1))),
    ...seen.tokens.map((token, place) => element("tr", {}, element("td", {}, place), element("td", {}, token),
      ...seen.next[place].map(([text, share]) => element("td", {}, text, share === null ? "" : element("span", {}, (100 * share).toFixed(share < 0.1 ? 1 : 0) + " %")))))));
  $("maps").replaceChildren();
  for (const map of seen.maps) {
    const place = element("div", { role: "figure", "aria-label": map.name, style: `height:${map.figure.layout.height}px;max-width:${320 * map.columns}px` });
    $("maps").append(element("h2", {}, map.name), place);
    draw(place, map.figure);
  }
}
