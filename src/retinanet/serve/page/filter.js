// The slider, the classes, and what they count. The server is not asked again.

import { css } from "./drawing.js";
import { announce } from "./notice.js";
import {
  $,
  classNames,
  colourOf,
  count,
  countsOf,
  currentAnswers,
  element,
  imageWords,
  state,
} from "./state.js";

const FEW = 12; // classes that need no search box

let filtered = () => {};

/** What is to be done when the slider or a class was moved. */
export function whenFiltered(act) {
  filtered = act;
}

export function setThreshold(value) {
  const [low, high] = [Number($("score").min), 1];
  state.threshold = Math.round(100 * Math.max(low, Math.min(high, value))) / 100;
  $("score").value = state.threshold;
  $("score").setAttribute("aria-valuetext", state.threshold.toFixed(2));
  if (
    document.activeElement !== $("score-number") ||
    Number($("score-number").value) !== state.threshold
  ) {
    $("score-number").value = state.threshold.toFixed(2);
  }
}

export function drawScores(answers, shown) {
  const low = Number($("score").min);
  const bins = new Array(50).fill(0);
  for (const answer of answers) {
    for (const score of answer?.scores ?? []) {
      const place = Math.floor(((score - low) / (1 - low)) * bins.length);
      bins[Math.max(0, Math.min(bins.length - 1, place))]++;
    }
  }
  const most = Math.max(1, ...bins);
  const bars = [];
  bins.forEach((number, n) => {
    if (number === 0) return;
    const bar = document.createElementNS("http://www.w3.org/2000/svg", "rect");
    const height = Math.max(2, 24 * Math.sqrt(number / most));
    const start = low + ((n + 0.5) / bins.length) * (1 - low);
    for (const [key, value] of Object.entries({
      x: 2 * n + 0.2,
      y: 24 - height,
      width: 1.6,
      height,
    })) {
      bar.setAttribute(key, value);
    }
    if (start >= state.threshold) bar.setAttribute("class", "in");
    bars.push(bar);
  });
  $("scores").replaceChildren(...bars);
  const all = answers.reduce((sum, answer) => sum + (answer?.length ?? 0), 0);
  const kept = shown.reduce((sum, some) => sum + some.length, 0);
  $("score-hint").textContent = answers.some(Boolean)
    ? `Shown: ${kept} of ${count(all, "object")}`
    : "Boxes with a lower score are not shown.";
}

let drawnClasses = "";

/** A toggle for each class; of many classes, those in this image come first. */
export function drawClasses(force = false) {
  const names = classNames();
  const many = names.length > FEW;
  const here = new Set(
    currentAnswers().flatMap((answer) =>
      answer ? [...answer.labels].map((label) => answer.model.classes[label]) : [],
    ),
  );
  const search = $("class-search").value.trim().toLowerCase();
  $("class-search").hidden = !many;
  const wanted = names.filter((name) => !many || name.toLowerCase().includes(search));
  const present = wanted.filter((name) => !many || here.has(name));
  const absent = wanted.filter((name) => !present.includes(name));
  const key = JSON.stringify([present, absent, state.used.map((model) => model.name)]);
  if (key !== drawnClasses || force) {
    drawnClasses = key;
    // A toggle that has the focus keeps it.
    const focused = document.activeElement?.closest?.(".classes")
      ? document.activeElement.value
      : null;
    $("classes").replaceChildren(...present.map(classToggle));
    $("absent-classes").replaceChildren(...absent.map(classToggle));
    if (focused !== null) {
      for (const box of document.querySelectorAll(".classes input")) {
        if (box.value === focused) box.focus();
      }
    }
  }
  $("absent").hidden = absent.length === 0;
  $("absent-words").textContent =
    `${count(absent.length, "class", "classes")} ${state.current ? "not in this image" : "in all"}`;
  if (search && present.length === 0 && absent.length > 0) $("absent").open = true;
  drawCounts(currentAnswers());
}

function classToggle(name) {
  const box = element("input");
  box.type = "checkbox";
  box.value = name;
  box.checked = !state.off.has(name);
  box.addEventListener("change", () => {
    if (box.checked) state.off.delete(name);
    else state.off.add(name);
    filtered();
    if (state.current) announce(imageWords(state.current), 400);
  });
  const swatch = element("span", "swatch");
  swatch.style.background = css(colourOf(name));
  const label = element(
    "label",
    "",
    box,
    swatch,
    element("span", "class-name", name),
    element("span", "count"),
  );
  return element("li", "", label);
}

export function drawCounts(answers) {
  const counts = answers.map((answer) => (answer ? countsOf(answer) : null));
  for (const box of document.querySelectorAll(".classes input")) {
    const numbers = counts
      .map((one) => (one ? (one.get(box.value) ?? 0) : ""))
      .filter((one) => one !== "");
    const label = box.closest("label");
    label.querySelector(".count").textContent = numbers.join(" | ");
    label.classList.toggle("zero", numbers.length > 0 && numbers.every((one) => one === 0));
  }
}

export function drawDifference(answers) {
  const [first, second] = answers;
  $("difference-card").hidden = !(state.used.length > 1 && first && second);
  if ($("difference-card").hidden) return;
  const counts = answers.map((answer) => {
    const found = countsOf(answer);
    for (const name of state.off) found.delete(name);
    return found;
  });
  const names = classNames().filter((name) => counts.some((one) => one.has(name)));
  const head = (text, scope) => {
    const cell = element("th", "", text);
    cell.scope = scope;
    cell.title = text;
    return cell;
  };
  const row = (name, a, b, className = "") => {
    const by = b - a;
    const sign = by > 0 ? `+${by}` : by < 0 ? `−${-by}` : "0";
    const line = element("tr", className, head(name, "row"));
    line.append(
      element("td", "", String(a)),
      element("td", "", String(b)),
      element("td", "", sign),
    );
    return line;
  };
  const rows = names.map((name) => row(name, counts[0].get(name) ?? 0, counts[1].get(name) ?? 0));
  const sums = counts.map((one) => [...one.values()].reduce((sum, number) => sum + number, 0));
  rows.push(row("all", sums[0], sums[1], "sum"));
  const titles = ["class", ...state.used.map((model) => model.name), "difference"];
  $("difference").replaceChildren(
    element("thead", "", element("tr", "", ...titles.map((title) => head(title, "col")))),
    element("tbody", "", ...rows),
  );
}

function switchClasses(on) {
  // With something in the search box, those that it finds.
  const search = $("class-search").value.trim().toLowerCase();
  for (const name of classNames()) {
    if (!name.toLowerCase().includes(search)) continue;
    if (on) state.off.delete(name);
    else state.off.add(name);
  }
  drawClasses(true);
  filtered();
  if (state.current) announce(imageWords(state.current), 400);
}

$("score").addEventListener("input", () => {
  setThreshold(Number($("score").value));
  filtered();
  announce(
    state.current ? imageWords(state.current) : `Least score ${state.threshold.toFixed(2)}`,
    500,
  );
});
$("score-number").addEventListener("input", () => {
  const value = Number.parseFloat($("score-number").value);
  if (!Number.isFinite(value) || value < Number($("score").min) || value > 1) return;
  setThreshold(value);
  filtered();
  if (state.current) announce(imageWords(state.current), 500);
});
$("score-number").addEventListener("change", () => {
  const value = Number.parseFloat($("score-number").value);
  setThreshold(Number.isFinite(value) ? value : state.threshold);
  $("score-number").value = state.threshold.toFixed(2);
  filtered();
});
$("all").addEventListener("click", () => switchClasses(true));
$("none").addEventListener("click", () => switchClasses(false));
$("class-search").addEventListener("input", () => drawClasses());
