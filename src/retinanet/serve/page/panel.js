// The panel beside the image: score and class filter, counts, detections, and the models.

import {
  $, announce, changed, classNames, colourOf, describe, element, jobsOf, plural, setText, state,
  svg,
} from "./state.js";
import { navigate, View } from "./view.js";

const MAX_UNSEARCHED_CLASSES = 12;
const NUM_BINS = 50;

export const view = new View($("panes"), {
  activate,
  zoomed: (scale) => setText($("zoom"), `${Math.round(100 * scale)}%`),
});

/** Update the panel; `detections` are those of the current image per model, null where none. */
export function renderPanel(detections) {
  renderScores(detections);
  renderClasses(detections);
  renderDifference(detections);
  renderLists(detections);
}

// --- score ------------------------------------------------------------------------------------

export function setThreshold(value) {
  const minimum = Number($("score").min);
  state.threshold = Math.round(100 * Math.max(minimum, Math.min(1, value))) / 100;
  $("score").value = state.threshold;
  $("score").ariaValueText = state.threshold.toFixed(2);
  const isTyped = document.activeElement === $("score-number");
  if (!isTyped || Number($("score-number").value) !== state.threshold) {
    $("score-number").value = state.threshold.toFixed(2);
  }
  changed();
}

function renderScores(detections) {
  const minimum = Number($("score").min);
  const bins = new Array(NUM_BINS).fill(0);
  for (const score of detections.flatMap((item) => [...(item?.scores ?? [])])) {
    const bin = Math.floor(((score - minimum) / (1 - minimum)) * NUM_BINS);
    bins[Math.max(0, Math.min(NUM_BINS - 1, bin))]++;
  }
  const highest = Math.max(1, ...bins);
  const bars = bins.map((number, n) => {
    const height = number && Math.max(2, 24 * Math.sqrt(number / highest));
    const score = minimum + ((n + 0.5) / NUM_BINS) * (1 - minimum);
    const className = score >= state.threshold ? "in" : "";
    return svg("rect", { x: 2 * n + 0.2, y: 24 - height, width: 1.6, height, class: className });
  });
  $("scores").replaceChildren(...bars);
  const sum = (count) => detections.reduce((total, item) => total + (item ? count(item) : 0), 0);
  const visible = sum((item) => item.visible().length);
  $("score-hint").textContent = detections.some(Boolean)
    ? `Shown: ${visible} of ${plural(sum((item) => item.length), "object")}`
    : "Boxes with a lower score are not shown.";
}

$("score").oninput = () => {
  setThreshold(Number($("score").value));
  announceFilter(500);
};
$("score-number").oninput = () => {
  const value = Number.parseFloat($("score-number").value);
  if (!(value >= Number($("score").min) && value <= 1)) return;
  setThreshold(value);
  announceFilter(500);
};
$("score-number").onchange = () => {
  const value = Number.parseFloat($("score-number").value);
  setThreshold(Number.isFinite(value) ? value : state.threshold);
  $("score-number").value = state.threshold.toFixed(2);
};

function announceFilter(delay = 400) {
  announce(describe(state.current) || `Minimum score ${state.threshold.toFixed(2)}`, delay);
}

// --- classes ----------------------------------------------------------------------------------

let renderedClasses = "";

const searchText = () => $("class-search").value.trim().toLowerCase();

/** One checkbox per class; of many classes, those of the current image come first. */
function renderClasses(detections) {
  const names = classNames();
  const isLong = names.length > MAX_UNSEARCHED_CLASSES;
  const labels = (item) => [...new Set(item?.labels)].map((label) => item.model.classes[label]);
  const detected = new Set(detections.flatMap(labels));
  const found = names.filter((name) => !isLong || name.toLowerCase().includes(searchText()));
  const present = found.filter((name) => !isLong || detected.has(name));
  const absent = found.filter((name) => !present.includes(name));
  $("class-search").hidden = !isLong;
  const key = JSON.stringify([present, absent, state.selected.map(({ name }) => name)]);
  if (key !== renderedClasses) {
    renderedClasses = key;
    const focused = document.activeElement?.closest?.(".classes") && document.activeElement.value;
    $("classes").replaceChildren(...present.map(classCheckbox));
    $("absent-classes").replaceChildren(...absent.map(classCheckbox));
    for (const box of checkboxes()) if (box.value === focused) box.focus();
  }
  $("absent").hidden = absent.length === 0;
  if (searchText() && present.length === 0) $("absent").open = true;
  $("absent-summary").textContent =
    `${plural(absent.length, "class", "classes")} ${state.current ? "not in this image" : "in total"}`;
  const counts = detections.filter(Boolean).map((item) => item.counts());
  for (const box of checkboxes()) {
    box.checked = !state.hiddenClasses.has(box.value);
    const numbers = counts.map((count) => count.get(box.value) ?? 0);
    const label = box.closest("label");
    setText(label.querySelector(".count"), numbers.join(" | "));
    label.classList.toggle("zero", numbers.length > 0 && !numbers.some(Boolean));
  }
}

const checkboxes = () => document.querySelectorAll(".classes input");

function classCheckbox(name) {
  const onchange = ({ target }) => showClasses([name], target.checked);
  const label = element(
    "label",
    {},
    element("input", { type: "checkbox", value: name, onchange }),
    swatch(name),
    element("span", { className: "class-name" }, name),
    element("span", { className: "count" }),
  );
  return element("li", {}, label);
}

function swatch(name) {
  const node = element("span", { className: "swatch" });
  node.style.background = colourOf(name).fill;
  return node;
}

export function showClasses(names, isShown) {
  for (const name of names) {
    if (isShown) state.hiddenClasses.delete(name);
    else state.hiddenClasses.add(name);
  }
  changed();
  announceFilter();
}

const foundClasses = () => classNames().filter((name) => name.toLowerCase().includes(searchText()));
$("all").onclick = () => showClasses(foundClasses(), true);
$("none").onclick = () => showClasses(foundClasses(), false);
$("class-search").oninput = changed;

// --- difference of two models -----------------------------------------------------------------

function renderDifference(detections) {
  $("difference-card").hidden = detections.length < 2 || !detections.every(Boolean);
  if ($("difference-card").hidden) return;
  const counts = detections.map((item) => item.counts());
  const isListed = (name) => !state.hiddenClasses.has(name) && counts.some((count) => count.has(name));
  const rows = classNames().filter(isListed).map((name) => [name, ...counts.map((count) => count.get(name) ?? 0)]);
  rows.push(["all", ...[1, 2].map((n) => rows.reduce((sum, row) => sum + row[n], 0))]);
  const head = (text, scope) => element("th", { scope, title: text }, text);
  const titles = ["class", ...state.selected.map(({ name }) => name), "difference"];
  $("difference").replaceChildren(
    element("thead", {}, element("tr", {}, ...titles.map((title) => head(title, "col")))),
    element("tbody", {}, ...rows.map(([name, a, b]) => {
      const difference = `${b > a ? "+" : b < a ? "−" : ""}${Math.abs(b - a)}`;
      const cells = [a, b, difference].map((value) => element("td", {}, String(value)));
      return element("tr", {}, head(name, "row"), ...cells);
    })),
  );
}

// --- lists of detections ----------------------------------------------------------------------

let lists = [];
const active = { pane: -1, i: -1 };

function renderLists(detections) {
  $("detections-card").hidden = !detections.some(Boolean);
  const isSame =
    lists.models === state.selected && detections.every((item, n) => lists[n].detections === item);
  if (!isSame) {
    lists = detections.map(createList);
    lists.models = state.selected;
    const shown = lists.filter((list) => list.detections);
    $("lists").replaceChildren(
      ...shown.map(({ title, empty, list }) => element("div", {}, title, empty, list)),
    );
  }
  lists.forEach(({ detections: item, title, empty, list, options }, n) => {
    const visible = new Set(item?.visible());
    options.forEach((option, i) => option.classList.toggle("off", !visible.has(i)));
    const model = state.selected.length > 1 ? `${state.selected[n].name}: ` : "";
    setText(title, `${model}${plural(visible.size, "object")}`);
    empty.hidden = visible.size > 0;
    list.hidden = visible.size === 0;
  });
}

function createList(detections, n) {
  const title = element("h3", { id: `list-title-${n}` });
  const empty = element("p", { className: "hint" }, "No visible detections.");
  const list = element("ul", { className: "detections", role: "listbox", tabIndex: 0 });
  list.setAttribute("aria-labelledby", `detections-title ${title.id}`);
  const options = Array.from({ length: detections?.length ?? 0 }, (_, i) => {
    const option = element(
      "li",
      { id: `detection-${n}-${i}`, role: "option", ariaSelected: "false" },
      swatch(detections.className(i)),
      element("span", { className: "class-name" }, detections.className(i)),
      element("span", { className: "size" }, detections.size(i).join(" × ")),
      element("span", { className: "visually-hidden" }, " pixels, score "),
      element("span", { className: "score" }, detections.scores[i].toFixed(2)),
    );
    option.onpointerenter = () => activate(n, i);
    option.onclick = () => (activate(n, i), view.reveal(detections.box(i)));
    option.ondblclick = () => view.zoomToBox(detections.box(i));
    return option;
  });
  list.append(...options);
  list.onpointerleave = () => document.activeElement !== list && activate(n, -1);
  list.onfocus = () => active.pane !== n && activate(n, detections.visible()[0] ?? -1);
  list.onblur = () => activate(n, -1);
  list.onkeydown = (event) => {
    const current = active.pane === n ? active.i : -1;
    const focus = (i) => activate(n, i);
    navigate(event, { view, detections, indices: detections.visible(), active: current, focus });
  };
  return { detections, title, empty, list, options };
}

/** Highlight a detection on the image and in its list; i is -1 for none. */
function activate(pane, i, focus = false) {
  if (active.pane !== pane || active.i !== i) {
    const previous = lists[active.pane];
    previous?.options[active.i]?.setAttribute("aria-selected", "false");
    previous?.list.removeAttribute("aria-activedescendant");
    if (active.pane !== pane) view.panes[active.pane]?.highlight(-1);
    Object.assign(active, { pane: i < 0 ? -1 : pane, i });
    view.panes[pane]?.highlight(i);
    const option = lists[pane]?.options[i];
    if (option) {
      const { list } = lists[pane];
      option.ariaSelected = "true";
      list.setAttribute("aria-activedescendant", option.id);
      // Scroll the list only; scrollIntoView would scroll the page too.
      const top = option.offsetTop - list.offsetTop;
      const bottom = top + option.offsetHeight - list.clientHeight;
      list.scrollTop = Math.max(bottom, Math.min(top, list.scrollTop));
    }
  }
  if (focus && i >= 0) view.panes[pane].boxes[i]?.focus({ preventScroll: true });
}

// --- models -----------------------------------------------------------------------------------

export function renderModels() {
  $("model-title").textContent = state.selected.length > 1 ? "Models" : "Model";
  $("model-facts").replaceChildren(
    ...state.selected.map(modelFacts),
    element("p", { className: "hint" }, state.version && `retinanet ${state.version}`),
  );
}

function modelFacts({ name, metrics, milliseconds, classes, image_size, max_size, network }) {
  const list = element("dl", {}, element("dt", { className: "model-name" }, name));
  const row = (title, value) => list.append(element("dt", {}, title), element("dd", {}, value));
  const ap = [metrics?.AP, metrics?.AP50].map((value) => value?.toFixed(3) ?? "not measured");
  const on = [metrics?.data?.split(/[\\/]/).filter(Boolean).pop(), metrics?.split].filter(Boolean);
  row("AP", `${ap[0]}${on.length > 0 ? ` on ${on.join(", ")}` : ""}`);
  if (metrics) row("AP50", ap[1]);
  const digits = milliseconds < 10 ? 1 : 0;
  row("Speed", milliseconds ? `${milliseconds.toFixed(digits)} ms per image` : "not yet measured");
  row("Classes", `${classes.length}${classes.length <= 6 ? `: ${classes.join(", ")}` : ""}`);
  if (image_size) {
    const longer = max_size ? `, longer side at most ${max_size} px` : "";
    row("Input", `shorter side ${image_size} px${longer}`);
  }
  if (network) row("Runtime", network);
  return list;
}
