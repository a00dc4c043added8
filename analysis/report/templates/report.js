"use strict";
// Draws DATA. Everything that comes from a table is text: textContent in the document, esc() where Plotly reads markup.
(() => {
const COLOURS = ["#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#6A3D9A", "#8C564B"];
const SYMBOLS = ["circle", "square", "diamond", "triangle-up", "triangle-down", "star", "cross", "pentagon"];
const MAX_LINES = 400, PAGE = 100;
const $ = id => document.getElementById(id);
const esc = text => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
const there = v => v !== null && v !== undefined;
const short = (v, digits = 3) => !there(v) ? "-" : Math.abs(v) >= 1e5 || (v !== 0 && Math.abs(v) < 1e-3) ? v.toExponential(digits - 1) : String(Number(v.toPrecision(digits)));
const rate = v => there(v) ? v.toExponential(2).replace("e-", "e\u2212") : "-";
const interval = (c, show = short) => there(c.value) ? (there(c.low) ? `${show(c.value)} [${show(c.low)}, ${show(c.high)}]` : `${show(c.value)} (no interval)`) :
  there(c.low) && there(c.high) ? `between ${show(c.low)} and ${show(c.high)}` : there(c.low) ? `> ${show(c.low)}` : there(c.high) ? `< ${show(c.high)}` : "-";
const node = (tag, text, className) => { const n = document.createElement(tag); if (there(text)) n.textContent = text; if (className) n.className = className; return n; };
const layout = extra => ({ margin: { l: 64, r: 16, t: 10, b: 48 }, paper_bgcolor: "#fff", plot_bgcolor: "#fff", font: { family: "system-ui, sans-serif", size: 13 }, hovermode: "closest", legend: { orientation: "h", y: -0.2 }, ...extra });
const axis = (title, extra) => ({ title: { text: title }, gridcolor: "#e6eaee", zeroline: false, ...extra });
const config = { responsive: true, displaylogo: false, modeBarButtonsToRemove: ["lasso2d", "select2d"] };

DATA.runs.forEach((r, k) => { r.index = k; });
const FILTERS = [["model", "model"], ["rank", "rank"], ["batch_size", "batch"]];
const chosen = {};
const label = (key, v) => key === "rank" ? (there(v) ? `rank ${v}` : "full fine-tuning") : there(v) ? String(v) : "not given";
const keep = c => FILTERS.every(([key]) => chosen[key] === undefined || String(c[key]) === chosen[key]);
const groups = new Set(DATA.curves.map(c => c.group));
const name = c => groups.size > 1 ? `${c.name}, ${c.group}` : c.name;

function filters() {
  for (const [key, title] of FILTERS) {
    const values = [...new Set(DATA.curves.map(c => c[key]))].sort((a, b) => !there(a) ? -1 : !there(b) ? 1 : a < b ? -1 : a > b ? 1 : 0);
    const box = node("label", title + " "), select = node("select");
    select.id = "filter-" + key;
    const all = node("option", "all"); all.value = ""; select.append(all);
    for (const v of values) { const o = node("option", label(key, v)); o.value = String(v) === "" ? " " : String(v); select.append(o); }
    select.addEventListener("change", () => { if (select.value === "") delete chosen[key]; else chosen[key] = select.value; draw(); });
    box.append(select); $("filters").append(box);
  }
  const count = node("span", "", "note"); count.id = "count"; $("filters").append(count);
}

function shown() {
  const at = DATA.curves.map((c, k) => keep(c) ? k : -1).filter(k => k >= 0), set = new Set(at);
  return { at, runs: DATA.runs.filter(r => set.has(r.curve)) };
}
const metric = at => esc([...new Set(at.map(k => DATA.curves[k].metric))].join(" or "));
const look = k => ({ color: COLOURS[k % COLOURS.length], symbol: SYMBOLS[k % SYMBOLS.length] });

function lrPlot(at, runs) {
  const byCurve = new Map(at.map(k => [k, []]));
  runs.forEach(r => byCurve.get(r.curve).push(r));
  const good = runs.filter(r => r.fitted && there(r.nll)).map(r => r.nll);
  const low = good.reduce((a, b) => Math.min(a, b), Infinity), high = good.reduce((a, b) => Math.max(a, b), -Infinity);
  const sign = at.length && DATA.curves[at[0]].sign, span = Math.max(high - low, 1e-9), worst = sign < 0 ? low - 0.07 * span : high + 0.07 * span;
  const traces = [];
  let nBad = 0;
  for (const k of at) {
    const c = DATA.curves[k], { color, symbol } = look(k), mine = byCurve.get(k), legend = esc(name(c));
    const ok = mine.filter(r => r.fitted && there(r.nll)), bad = mine.filter(r => !(r.fitted && there(r.nll)));
    const hover = r => `${legend}<br>lr ${rate(r.lr)}, seed ${esc(r.seed)}<br>${there(r.nll) ? short(r.nll, 5) : esc(r.status)}`;
    traces.push({ type: "scatter", mode: "markers", name: legend, legendgroup: String(k), x: ok.map(r => r.lr), y: ok.map(r => r.nll), customdata: ok.map(r => r.index), text: ok.map(hover), hoverinfo: "text", marker: { color, symbol, size: 7, opacity: 0.8 } });
    if (bad.length) { nBad += bad.length; traces.push({ type: "scatter", mode: "markers", showlegend: false, legendgroup: String(k), x: bad.map(r => r.lr), y: bad.map(() => worst), customdata: bad.map(r => r.index), text: bad.map(hover), hoverinfo: "text", marker: { color, symbol: "x", size: 8 } }); }
    if (c.fit) traces.push({ type: "scatter", mode: "lines", showlegend: false, legendgroup: String(k), x: c.fit.lr, y: c.fit.nll.map(v => sign * v > sign * worst ? null : v), hoverinfo: "skip", line: { color, width: 1.6 } });
    if (there(c.best_lr) && there(c.best_nll)) traces.push({ type: "scatter", mode: "markers", showlegend: false, legendgroup: String(k), x: [c.best_lr], y: [c.best_nll], hoverinfo: "text", text: [`${legend}<br>best lr ${rate(c.best_lr)} [${rate(c.low)}, ${rate(c.high)}]`], marker: { color, symbol: "line-ns-open", size: 16, line: { width: 2.5, color } }, error_x: there(c.low) ? { type: "data", symmetric: false, array: [c.high - c.best_lr], arrayminus: [c.best_lr - c.low], color, thickness: 1.6, width: 5 } : undefined });
    if (c.band && there(c.best_nll)) traces.push({ type: "scatter", mode: "lines", showlegend: false, legendgroup: String(k), x: c.band, y: [c.best_nll, c.best_nll], hoverinfo: "text", text: `${legend}: within ${DATA.within} of the best from ${rate(c.band[0])} to ${rate(c.band[1])}`, line: { color, width: 9 }, opacity: 0.22 });
  }
  $("lr-note").textContent = `Lines: fits. Bars: 95% intervals of the optimum. Pale strips: learning rates within ${DATA.within} of the best. ` + (nBad ? `Crosses on the ${sign < 0 ? "lowest" : "top"} line: ${nBad} runs that diverged or were not fitted. ` : "") + "Click a point for its run.";
  return Plotly.react("lr-plot", traces, layout({ height: 520, xaxis: axis("learning rate", { type: "log", exponentformat: "e" }), yaxis: axis(metric(at)) }), config).then(pickable);
}

function forestPlot(at) {
  const visible = new Set(at.map(k => DATA.curves[k].group));
  const rows = DATA.ratios.filter(r => visible.has(r.group) && (there(r.value) || there(r.low) || there(r.high)));
  $("forest-section").hidden = !rows.length;
  if (!rows.length) return Promise.resolve();
  const names = rows.map(r => esc(groups.size > 1 ? `${r.name}, ${r.group}` : r.name)), traces = [];
  const full = rows.map((r, k) => [r, k]).filter(([r]) => there(r.value));
  traces.push({ type: "scatter", mode: "markers", x: full.map(([r]) => r.value), y: full.map(([, k]) => k), text: full.map(([r, k]) => `${names[k]}<br>${interval(r)}`), hoverinfo: "text", showlegend: false, marker: { color: "#0072B2", size: 9 }, error_x: { type: "data", symmetric: false, array: full.map(([r]) => there(r.high) ? r.high - r.value : 0), arrayminus: full.map(([r]) => there(r.low) ? r.value - r.low : 0), color: "#0072B2", thickness: 1.8, width: 5 } });
  const bounds = rows.map((r, k) => [r, k]).filter(([r]) => !there(r.value));
  traces.push({ type: "scatter", mode: "markers", name: "bound only", x: bounds.map(([r]) => r.low ?? r.high), y: bounds.map(([, k]) => k), text: bounds.map(([r, k]) => `${names[k]}<br>${interval(r)}`), hoverinfo: "text", showlegend: bounds.length > 0, marker: { color: "#5c6670", size: 10, symbol: bounds.map(([r]) => there(r.low) ? "triangle-right" : "triangle-left") } });
  const ratio = DATA.verdicts.find(v => v.estimand === "lr_ratio"), shapes = [{ type: "line", x0: 1, x1: 1, yref: "paper", y0: 0, y1: 1, line: { color: "#5c6670", width: 1, dash: "dot" } }];
  if (ratio) shapes.push({ type: "rect", x0: ratio.margin[0], x1: ratio.margin[1], yref: "paper", y0: 0, y1: 1, fillcolor: "#009E73", opacity: 0.12, line: { width: 0 } });
  return Plotly.react("forest-plot", traces, layout({ height: 120 + 30 * rows.length, shapes, xaxis: axis(`ratio (${ratio ? "shaded: the claim's margin; " : ""}dotted: 1)`, { type: "log" }), yaxis: axis("", { tickvals: rows.map((_, k) => k), ticktext: names, autorange: "reversed", automargin: true }) }), config);
}

function learningPlot(at, runs) {
  const curved = runs.filter(r => r.learned.length);
  $("learning-section").hidden = !curved.length;
  if (!curved.length) return Promise.resolve();
  const best = new Map();
  curved.forEach(r => { const b = best.get(r.curve); if (there(r.nll) && r.fitted && (!b || DATA.curves[r.curve].sign * (r.nll - b.nll) < 0)) best.set(r.curve, r); });
  const thin = curved.length > MAX_LINES ? curved.filter((_, k) => k % Math.ceil(curved.length / MAX_LINES) === 0) : curved;
  const traces = [];
  for (const k of at) {
    const { color } = look(k), x = [], y = [], id = [];
    for (const r of thin) if (r.curve === k) { r.learned.forEach(([s, v]) => { x.push(s); y.push(v); id.push(r.index); }); x.push(null); y.push(null); id.push(null); }
    if (x.length) traces.push({ type: "scatter", mode: "lines", showlegend: false, legendgroup: String(k), x, y, customdata: id, hoverinfo: "skip", line: { color, width: 0.8 }, opacity: 0.35 });
    const b = best.get(k);
    if (b) traces.push({ type: "scatter", mode: "lines+markers", name: esc(`${name(DATA.curves[k])}, lr ${rate(b.lr)}`), legendgroup: String(k), x: b.learned.map(p => p[0]), y: b.learned.map(p => p[1]), customdata: b.learned.map(() => b.index), hovertemplate: "step %{x}: %{y:.4f}<extra></extra>", line: { color, width: 2.4 }, marker: { color, size: 4 } });
  }
  $("learning-note").textContent = `Thick: the best run of each curve. Thin: ${thin.length} of ${curved.length} runs.`;
  return Plotly.react("learning-plot", traces, layout({ height: 460, xaxis: axis("step", { type: "log" }), yaxis: axis(metric(at)) }), config).then(pickable);
}

function pickable(plot) {
  plot.removeAllListeners("plotly_click");
  plot.on("plotly_click", e => { const k = e.points[0].customdata; if (there(k)) details(DATA.runs[k]); });
}

function details(run) {
  const box = $("details"), close = node("button", "close"), list = node("dl");
  close.addEventListener("click", () => { box.hidden = true; });
  for (const [key, value] of Object.entries(run.details)) list.append(node("dt", key), node("dd", typeof value === "number" && !Number.isInteger(value) ? short(value, 5) : value));
  if (run.details.run_id) list.append(node("dt", "folder"), node("dd", `RUNS_DIR/${run.details.run_id}/`));
  box.replaceChildren(close, node("h3", run.curve === null ? "run" : `${DATA.curves[run.curve].name}, lr ${rate(run.lr)}, seed ${run.seed ?? "-"}`), list);
  box.hidden = false;
}

// A sortable table of which PAGE rows are built at a time.
function table(host, columns, rows, pick) {
  const state = { by: null, up: true, count: PAGE };
  const box = $(host);
  const render = () => {
    const sorted = state.by === null ? rows : [...rows].sort((a, b) => {
      const x = columns[state.by].value(a), y = columns[state.by].value(b);
      if (!there(x) || !there(y)) return there(x) ? -1 : there(y) ? 1 : 0;
      return (x < y ? -1 : x > y ? 1 : 0) * (state.up ? 1 : -1);
    });
    const t = node("table"), head = node("tr"), body = node("tbody");
    columns.forEach((c, k) => {
      const th = node("th", c.title, rows.length && typeof c.value(rows[0]) === "number" && !c.left ? "number" : ""); th.dataset.sortable = ""; th.tabIndex = 0; th.setAttribute("role", "button");
      if (state.by === k) th.setAttribute("aria-sort", state.up ? "ascending" : "descending");
      const sort = () => { state.up = state.by === k ? !state.up : true; state.by = k; render(); };
      th.addEventListener("click", sort); th.addEventListener("keydown", e => { if (e.key === "Enter") sort(); });
      head.append(th);
    });
    for (const r of sorted.slice(0, state.count)) {
      const tr = node("tr");
      columns.forEach(c => tr.append(node("td", c.text ? c.text(r) : there(c.value(r)) ? c.value(r) : "-", typeof c.value(r) === "number" && !c.left ? "number" : "")));
      if (pick) { tr.className = "pick"; tr.tabIndex = 0; tr.addEventListener("click", () => pick(r)); tr.addEventListener("keydown", e => { if (e.key === "Enter") pick(r); }); }
      body.append(tr);
    }
    const thead = node("thead"); thead.append(head); t.append(thead, body);
    box.replaceChildren(t);
    if (rows.length > state.count) { const more = node("button", `${state.count} of ${rows.length} shown: more`); more.addEventListener("click", () => { state.count += 5 * PAGE; render(); }); box.append(more); }
  };
  render();
}

function verdicts() {
  $("answers").hidden = !DATA.verdicts.length;
  const groups = new Set(DATA.verdicts.map(v => v.group));
  if (groups.size === 1) document.querySelector("#answers h2").textContent = `Verdicts: ${[...groups][0]}`;
  if (DATA.verdicts.length) table("verdicts", [
    { title: "claim", value: v => v.text ? `${v.text} (${v.claim})` : v.claim }, ...(groups.size > 1 ? [{ title: "model and data", value: v => v.group }] : []), { title: "verdict", value: v => v.outcome },
    { title: "measured", left: true, value: v => v.value, text: v => interval(v) }, { title: "margin", left: true, value: v => v.margin[0], text: v => `${short(v.margin[0])} to ${short(v.margin[1])}` },
    { title: "why", value: v => v.why }, { title: "needed", value: v => v.needed || null }], DATA.verdicts);
  document.querySelectorAll("#verdicts td").forEach(td => { if (["SUPPORTED", "REFUTED", "UNDECIDED"].includes(td.textContent)) td.className = td.textContent; });
}

function draw() {
  const { at, runs } = shown();
  $("count").textContent = `${at.length} curves, ${runs.length} runs`;
  table("curve-table", [
    { title: "model and data", value: c => c.group }, { title: "curve", value: c => c.name },
    { title: "best LR [95%]", left: true, value: c => c.best_lr ?? c.low ?? c.high, text: c => interval({ value: c.best_lr, low: c.low, high: c.high }, rate) },
    { title: `within ${DATA.within}`, left: true, value: c => c.band ? c.band[0] : null, text: c => c.band ? `${rate(c.band[0])} to ${rate(c.band[1])}` : "-" },
    { title: "best", value: c => c.best_nll, text: c => short(c.best_nll, 5) }, { title: "flags", value: c => c.flags.join(", ") || null }], at.map(k => DATA.curves[k]));
  const of = r => DATA.curves[r.curve];
  table("run-table", [
    { title: "run", value: r => r.details.run_id ?? r.index + 1 }, { title: "model and data", value: r => of(r).group }, { title: "curve", value: r => of(r).name },
    { title: "lr", value: r => r.lr, text: r => rate(r.lr) }, { title: "seed", value: r => r.seed }, { title: "status", value: r => r.status },
    { title: "result", value: r => r.nll, text: r => short(r.nll, 5) }, { title: "in the fit", value: r => r.fitted ? "yes" : "no" }], runs, details);
  return Promise.all([lrPlot(at, runs), forestPlot(at), learningPlot(at, runs)]).then(() => { document.body.dataset.drawn = String(Number(document.body.dataset.drawn || 0) + 1); });
}

document.title = DATA.title; $("title").textContent = DATA.title;
document.addEventListener("keydown", e => { if (e.key === "Escape") $("details").hidden = true; });
filters(); verdicts(); draw();
})();
