"use strict";
// The page of `flyrun serve`. What comes from machines is text: it goes to textContent and attributes, never to markup.

const WORDS = { resumed: "resumed", base: "from base", cold_boot: "cold boot", suspended: "suspended", stopped: "stopped", failed: "failed", destroyed: "destroyed" };
const STARTS = new Set(["resumed", "base", "cold_boot"]);
const KNOWN = new Set([...Object.keys(WORDS), "created", "starting", "started", "stopping", "suspending", "destroying", "paused"]);
const MOST_LANES = 40;
const MOST_ROWS = 50;
const SVG = "http://www.w3.org/2000/svg";

let state = { apps: [], events: [] };
let isKnown = false;
let minutes = 5;
const byId = (id) => document.getElementById(id);

/** An element with attributes and children; texts stay texts. */
function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  fill(element, attributes, children);
  return element;
}
function draw(tag, attributes = {}, ...children) {
  const element = document.createElementNS(SVG, tag);
  fill(element, attributes, children);
  return element;
}
function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
}
/** A class that the style sheet knows, or none: states come from elsewhere. */
const classOf = (word) => (KNOWN.has(word) ? word : "");

function time(ms) {
  if (ms === null || ms === undefined) return "–";
  if (ms < 10) return `${Number(ms.toFixed(1))} ms`;
  if (ms < 1000) return `${Math.round(ms)} ms`;
  return ms < 60000 ? `${(ms / 1000).toFixed(1)} s` : `${Math.round(ms / 60000)} min`;
}
function ago(at) {
  const seconds = Math.max(0, Math.round((Date.now() - at) / 1000));
  if (seconds < 2) return "now";
  if (seconds < 60) return `${seconds} s ago`;
  if (seconds < 3600) return `${Math.floor(seconds / 60)} min ago`;
  if (seconds < 86400) return `${Math.floor(seconds / 3600)} h ago`;
  return `${Math.floor(seconds / 86400)} d ago`;
}
const clock = (at) => new Date(at).toLocaleTimeString([], { hour12: false });

function matches(...words) {
  const wanted = byId("filter").value.trim().toLowerCase();
  return wanted === "" || words.some((word) => word.toLowerCase().includes(wanted));
}
function shownApps() {
  return state.apps.flatMap((app) => {
    if (matches(app.name, app.group)) return [app];
    const machines = app.machines.filter((machine) => matches(machine.id, machine.name));
    return machines.length ? [{ ...app, machines }] : [];
  });
}
function names() {
  return new Map(state.apps.flatMap((app) => app.machines.map((machine) => [machine.id, machine.name || machine.id])));
}

function showSums() {
  const machines = state.apps.flatMap((app) => app.machines);
  const count = (...states) => machines.filter((machine) => states.includes(machine.state)).length;
  const starts = state.events.filter((event) => STARTS.has(event.what) && event.ms !== null && event.at > Date.now() - 3600000);
  const resumed = starts.filter((event) => event.what === "resumed").map((event) => event.ms).sort((a, b) => a - b);
  const sums = [
    ["Apps", new Set(state.apps.map((app) => app.name)).size, ""],
    ["Running", count("started"), `of ${machines.length}`],
    ["Suspended", count("suspended"), ""],
    ["Requests now", machines.reduce((sum, machine) => sum + machine.load, 0), ""],
    ["Waiting", state.apps.reduce((sum, app) => sum + app.queue, 0), ""],
    ["Resume, median", resumed.length ? time(resumed[Math.floor((resumed.length - 1) / 2)]) : "–", resumed.length ? `of ${resumed.length}` : ""],
  ];
  byId("sums").replaceChildren(...sums.map(([name, value, beside]) =>
    make("div", {}, make("dt", {}, name), make("dd", {}, String(value), ...(beside ? [make("small", {}, beside)] : [])))));
}

/** When a machine ran, and what began and ended it, as far as the events tell. */
function lanes() {
  const from = Date.now() - minutes * 60000;
  const all = new Map();
  for (const app of shownApps()) {
    for (const machine of app.machines) all.set(machine.id, { app: app.name, name: machine.name || machine.id, machine, runs: [], marks: [] });
  }
  for (const event of state.events) {
    const lane = all.get(event.machine);
    if (!lane) continue;
    const open = lane.runs.at(-1);
    if (STARTS.has(event.what)) {
      lane.runs.push({ what: event.what, from: event.at - (event.ms || 0), to: null });
    } else if (open && open.to === null) {
      open.to = event.at;
    } else if (!open && event.what !== "failed") {
      const start = lane.machine.last_start;
      lane.runs.push({ what: start ? start.kind : "resumed", from: 0, to: event.at });
    }
    lane.marks.push(event);
  }
  for (const lane of all.values()) {
    const start = lane.machine.last_start;
    if (!lane.runs.length && lane.machine.state === "started") lane.runs.push({ what: start ? start.kind : "resumed", from: start ? start.at - start.ms : 0, to: null });
    const last = lane.runs.at(-1);
    if (last && last.to === null && ["suspended", "stopped", "failed"].includes(lane.machine.state)) last.to = last.from;
    lane.runs = lane.runs.filter((run) => run.to === null || run.to >= from);
    lane.marks = lane.marks.filter((event) => event.at >= from);
    lane.last = Math.max(0, ...lane.marks.map((event) => event.at), lane.machine.state === "started" ? from : 0);
  }
  return [...all.values()];
}

function showTimeline() {
  const box = byId("timeline");
  const width = Math.max(240, box.clientWidth - 26);
  let all = lanes();
  const hidden = Math.max(0, all.length - MOST_LANES);
  if (hidden) {
    // Those in which something has happened come before the others, each in its own order.
    const kept = new Set([...all].sort((a, b) => b.last - a.last).slice(0, MOST_LANES));
    all = all.filter((lane) => kept.has(lane));
  }
  if (!all.length) {
    box.replaceChildren(make("p", { class: "empty" }, state.apps.length ? "No machine matches." : "No machines yet."));
    return;
  }
  const narrow = width < 520;
  const left = narrow ? 6 : 170;
  const laneHeight = narrow ? 38 : 24;
  const height = all.length * laneHeight + 26;
  const now = Date.now();
  const span = minutes * 60000;
  const x = (at) => left + Math.max(0, Math.min(1, 1 - (now - at) / span)) * (width - left - 8);
  const svg = draw("svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `Starts and suspends of ${all.length} machines in the last ${minutes} minutes; the events below tell the same` });
  // Whole minutes or quarters of one, and room for the words.
  const parts = narrow ? (minutes === 5 ? 1 : 2) : minutes === 5 ? 5 : 4;
  for (let part = 0; part <= parts; part++) {
    const at = now - span + (span * part) / parts;
    const seconds = Math.round((now - at) / 1000);
    const label = seconds === 0 ? "now" : seconds < 60 ? `−${seconds} s` : `−${Math.round(seconds / 60)} min`;
    svg.append(draw("line", { class: "grid", x1: x(at), x2: x(at), y1: 4, y2: height - 20 }));
    const anchor = part === parts ? "end" : part === 0 ? "start" : "middle";
    svg.append(draw("text", { x: x(at), y: height - 5, "text-anchor": anchor }, label));
  }
  all.forEach((lane, index) => {
    const y = index * laneHeight + (narrow ? 27 : 14);
    const name = `${lane.app} / ${lane.name}`;
    const most = narrow ? Math.floor(width / 7) : 24;
    const label = draw("text", { class: "lane-name", x: narrow ? left : left - 12, y: narrow ? y - 11 : y + 4, "text-anchor": narrow ? "start" : "end" }, name.length > most ? `${name.slice(0, most - 1)}…` : name);
    label.append(draw("title", {}, name));
    svg.append(label, draw("line", { class: "rail", x1: left + 5, x2: width - 13, y1: y, y2: y }));
    for (const run of lane.runs) {
      const end = run.to === null ? width - 8 : x(run.to);
      svg.append(draw("line", { class: `run ${classOf(run.what)}`, x1: x(run.from), x2: Math.max(end, x(run.from) + 2), y1: y, y2: y }));
    }
    for (const event of lane.marks) {
      const starts = STARTS.has(event.what) || event.what === "failed";
      const mark = draw("circle", { class: starts ? `mark ${classOf(event.what)}` : "end", cx: x(event.at), cy: y, r: starts ? 5.5 : 4 });
      mark.append(draw("title", {}, `${lane.name}: ${WORDS[event.what] || event.what}${event.ms === null ? "" : ` in ${time(event.ms)}`}, ${clock(event.at)}`));
      svg.append(mark);
    }
  });
  const rest = hidden ? [make("p", { class: "empty" }, `${hidden} more machines in which less has happened`)] : [];
  box.replaceChildren(svg, ...rest);
}

function showMachine(machine) {
  const start = machine.last_start;
  const told = start ? `${WORDS[start.kind] || start.kind} in ${time(start.ms)}, ${ago(start.at)}` : "not started yet";
  const load = make("span", { class: "load" });
  if (machine.state === "started") {
    if (machine.limit) load.append(make("meter", { min: 0, max: machine.limit, high: machine.limit * 0.8, value: Math.min(machine.load, machine.limit), "aria-label": "load" }));
    load.append(machine.limit ? `${machine.load} of ${machine.limit}` : `${machine.load} now`);
  }
  return make("li", { class: "machine" },
    make("span", { class: "name", title: machine.id }, machine.name || machine.id),
    make("span", { class: `state ${classOf(machine.state)}` }, machine.state),
    make("span", { class: "start" }, told), load);
}

function showApps() {
  const cards = shownApps().map((app) => {
    const latencies = [["p50", app.latencies.p50], ["p99", app.latencies.p99], ["p99.9", app.latencies["p99.9"]], ["requests", null]];
    return make("article", { class: "app" },
      make("header", {}, make("h3", {}, app.name), make("span", { class: "group" }, app.group),
        make("span", { class: app.queue ? "queue waits" : "queue" }, app.queue ? `${app.queue} waiting` : "")),
      make("dl", { class: "latencies" }, ...latencies.map(([name, ms]) =>
        make("div", {}, make("dt", {}, name), make("dd", {}, name === "requests" ? app.latencies.count.toLocaleString() : time(ms))))),
      make("ul", { class: "machines" }, ...(app.machines.length ? app.machines.map(showMachine) : [make("li", { class: "empty" }, "no machines")])));
  });
  byId("apps").replaceChildren(...(cards.length ? cards : [make("p", { class: "empty" }, state.apps.length ? "No app matches." : "No apps yet.")]));
}

let newest = null;
function showEvents() {
  const known = names();
  const rows = state.events.filter((event) => matches(event.app, event.machine, known.get(event.machine) || "")).slice(-MOST_ROWS).reverse();
  const before = newest;
  newest = isKnown ? Math.max(0, ...state.events.map((event) => event.at)) : null;
  byId("events").replaceChildren(...rows.map((event) =>
    make("tr", before !== null && event.at > before ? { class: "fresh" } : {},
      make("td", {}, make("time", { datetime: new Date(event.at).toISOString() }, clock(event.at))),
      make("td", { title: event.app }, event.app), make("td", { title: event.machine }, known.get(event.machine) || event.machine),
      make("td", {}, make("span", { class: `what ${classOf(event.what)}` }, WORDS[event.what] || event.what)),
      make("td", { class: "number" }, time(event.ms)))));
  if (!rows.length) byId("events").append(make("tr", {}, make("td", { colspan: 5, class: "empty" }, "Nothing has happened yet.")));
}

function show() {
  showSums();
  showTimeline();
  showApps();
  showEvents();
}

function listen() {
  const link = byId("link");
  const stream = new EventSource("events");
  stream.addEventListener("state", (message) => {
    state = JSON.parse(message.data);
    isKnown = true;
    link.textContent = "Live";
    link.classList.add("live");
    show();
  });
  stream.addEventListener("error", () => {
    link.textContent = "Connection lost, trying again";
    link.classList.remove("live");
    // The browser comes back to a server that was gone, but not to one that refused.
    if (stream.readyState === EventSource.CLOSED) setTimeout(listen, 1000);
  });
}

for (const button of document.querySelectorAll(".windows button")) {
  button.addEventListener("click", () => {
    minutes = Number(button.dataset.minutes);
    for (const other of document.querySelectorAll(".windows button")) other.setAttribute("aria-pressed", String(other === button));
    showTimeline();
  });
}
byId("filter").addEventListener("input", show);
window.addEventListener("resize", showTimeline);
// Times go on also when nothing happens.
setInterval(() => { if (!document.hidden) { showTimeline(); showApps(); } }, 1000);
show();
listen();
