// The panel beside the image: score and class filter, counts, detections, and the models.

import {
  $, announce, changed, classNames, colourOf, countClasses, describe, element, jobsOf, onChange, plural, scored,
  setText, state, visible,
} from "./state.js";
import { centre, draw, fit, view, zoomToDetection } from "./view.js";

const MAX_UNSORTED_CLASSES = 12;
const NUM_BINS = 50;

/** The filter of score and classes has changed. */
function filterChanged(delay = 400) {
  changed();
  if (state.current) announce(describe(state.current), delay);
}

// --- score ----------------------------------------------------------------------------------------

export function setThreshold(value) {
  state.threshold = Math.round(100 * Math.max(Number($("score").min), Math.min(1, value))) / 100;
  $("score").value = state.threshold;
  $("score").ariaValueText = state.threshold.toFixed(2);
  setText($("score-number"), state.threshold.toFixed(2));
  filterChanged(500);
}

$("score").oninput = () => setThreshold($("score").valueAsNumber);
function renderScores(results) {
  const minimum = Number($("score").min);
  const bins = new Array(NUM_BINS).fill(0);
  for (const { score } of results.flatMap(({ detections }) => detections)) {
    const bin = Math.floor(((score - minimum) / (1 - minimum)) * NUM_BINS);
    bins[Math.max(0, Math.min(NUM_BINS - 1, bin))]++;
  }
  const highest = Math.max(1, ...bins);
  const bars = bins.map((number, n) => {
    const score = minimum + ((n + 0.5) / NUM_BINS) * (1 - minimum);
    const bar = element("span", { className: score >= state.threshold ? "in" : "" });
    bar.style.height = `${number && Math.max(8, 100 * Math.sqrt(number / highest))}%`;
    return bar;
  });
  $("histogram").replaceChildren(...bars);
  const sum = (count) => results.reduce((total, result) => total + count(result).length, 0);
  $("score-hint").textContent = results.length
    ? `Shown: ${sum(visible)} of ${plural(sum(({ detections }) => detections), "object")}`
    : "Boxes with a lower score are not shown.";
}

// --- classes --------------------------------------------------------------------------------------

let classRows = new Map(); // {item, checkbox, count} by class name
let renderedClasses = null;

/** One checkbox per class with the counts of the models; of many classes, those in the image first. */
function renderClasses(results) {
  if (renderedClasses !== state.selected) {
    renderedClasses = state.selected;
    classRows = new Map(classNames().map((name) => [name, createClassRow(name)]));
  }
  const counts = results.map((result) => countClasses(scored(result)));
  const isLong = classRows.size > MAX_UNSORTED_CLASSES;
  $("difference-head").hidden = counts.length < 2;
  const listed = [];
  for (const [name, { item, checkbox, count }] of classRows) {
    const numbers = counts.map((number) => number.get(name) ?? 0);
    const difference = numbers.length > 1 ? ` ${signed(numbers[1] - numbers[0])}` : "";
    setText(count, numbers.join(" | ") + difference);
    checkbox.checked = !state.hiddenClasses.has(name);
    item.classList.toggle("zero", counts.length > 0 && !numbers.some(Boolean));
    listed.push(item);
  }
  if (isLong) listed.sort((a, b) => a.classList.contains("zero") - b.classList.contains("zero"));
  // Moving an item loses the focus within it.
  if (listed.some((item, n) => $("classes").children[n] !== item)) $("classes").replaceChildren(...listed);
}

const signed = (number) => `${number > 0 ? "+" : number < 0 ? "−" : "±"}${Math.abs(number)}`;

function createClassRow(name) {
  const checkbox = element("input", { type: "checkbox", value: name });
  checkbox.onchange = () => showClasses([name], checkbox.checked);
  const count = element("span", { className: "count" });
  const text = element("span", { className: "class-name", title: name }, name);
  return { item: element("li", {}, element("label", {}, checkbox, swatch(name), text, count)), checkbox, count };
}

function swatch(name) {
  const node = element("span", { className: "swatch" });
  node.style.background = colourOf(name);
  return node;
}

export function showClasses(names, isShown) {
  for (const name of names) {
    if (isShown) state.hiddenClasses.delete(name);
    else state.hiddenClasses.add(name);
  }
  filterChanged();
}

$("all").onclick = () => showClasses(classNames(), true);
$("none").onclick = () => showClasses(classNames(), false);

// --- lists of detections --------------------------------------------------------------------------

let rows = new Map(); // {row, input} by detection
let renderedResults = [];

function renderLists(results) {
  $("detections-card").hidden = results.length === 0;
  if (results.length !== renderedResults.length || results.some((result, n) => result !== renderedResults[n])) {
    renderedResults = results;
    rows = new Map();
    state.active = null;
    $("lists").replaceChildren(...results.map(createList));
  }
  results.forEach((result, n) => {
    const shown = new Set(visible(result));
    for (const detection of result.detections) rows.get(detection).row.hidden = !shown.has(detection);
    const model = results.length > 1 ? `${result.model}: ` : "";
    setText($("lists").children[n].querySelector("h3"), `${model}${plural(shown.size, "object")}`);
  });
}

/** A group of radio buttons: Tab reaches the group, and arrows go from row to row. */
function createList({ model, detections }, n) {
  const list = element("div", { className: "detections", role: "radiogroup", ariaLabel: `Detections of ${model}` });
  for (const detection of detections) {
    const [x1, y1, x2, y2] = detection.box.map(Math.round);
    const input = element("input", { type: "radio", name: `detection-${n}`, className: "visually-hidden" });
    input.onfocus = () => (activate(detection), view.fitted || centre(detection));
    input.onblur = () => activate(null);
    input.onkeydown = (event) => {
      if (event.key === "Enter") zoomToDetection(detection);
      if (event.key === "Escape") fit();
    };
    const size = element("span", { className: "size", title: `at ${x1}, ${y1}` }, `${x2 - x1} × ${y2 - y1}`);
    const name = element("span", { className: "class-name" }, detection.class);
    const score = element("span", { className: "score" }, detection.score.toFixed(2));
    const row = element("label", {}, input, swatch(detection.class), name, " ", size, " ", score);
    row.onpointerenter = () => activate(detection);
    row.onpointerleave = () => activate(null);
    row.ondblclick = () => zoomToDetection(detection);
    rows.set(detection, { row, input });
    list.append(row);
  }
  return element("div", {}, element("h3"), list);
}

/** Highlight a detection on the image and in its list; null: that which has the focus, if any. */
export function activate(detection, isClicked = false) {
  if (isClicked && detection) {
    const { input } = rows.get(detection);
    input.checked = true;
    input.focus({ preventScroll: true });
  }
  const focused = [...rows].find(([, { input }]) => input === document.activeElement);
  const active = detection ?? focused?.[0] ?? null;
  if (active === state.active) return;
  rows.get(state.active)?.row.classList.remove("active");
  state.active = active;
  const row = rows.get(active)?.row;
  if (row) {
    row.classList.add("active");
    // Scroll the list only; scrollIntoView would scroll the page too.
    const top = row.offsetTop - row.parentElement.offsetTop;
    const bottom = top + row.offsetHeight - row.parentElement.clientHeight;
    row.parentElement.scrollTop = Math.max(bottom, Math.min(top, row.parentElement.scrollTop));
  }
  draw();
}

// --- models ---------------------------------------------------------------------------------------

export function renderModels() {
  $("model-title").textContent = state.selected.length > 1 ? "Models" : "Model";
  const version = element("p", { className: "hint" }, `retinanet ${state.version}`);
  $("model-facts").replaceChildren(...state.selected.map(modelFacts), version);
}

function modelFacts({ name, metrics, milliseconds, classes, image_size, max_size, network }) {
  const list = element("dl", {}, element("dt", { className: "model-name" }, name));
  const row = (title, value) => list.append(element("dt", {}, title), element("dd", {}, value));
  const on = [metrics?.data, metrics?.split].filter(Boolean).join(", ");
  row("AP", `${metrics?.AP?.toFixed(3) ?? "not measured"}${on && ` on ${on}`}`);
  if (metrics) row("AP50", metrics.AP50?.toFixed(3) ?? "not measured");
  row("Speed", milliseconds ? `${milliseconds.toPrecision(3)} ms per image` : "not yet measured");
  row("Classes", `${classes.length}${classes.length <= 6 ? `: ${classes.join(", ")}` : ""}`);
  row("Input", `shorter side ${image_size} px, longer side at most ${max_size} px`);
  row("Runtime", network);
  return list;
}

onChange(() => {
  const results = jobsOf(state.current).map((job) => job?.result).filter(Boolean);
  renderScores(results);
  renderClasses(results);
  renderLists(results);
});
