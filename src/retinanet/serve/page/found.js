// Detections: on the image and in lists beside it, of which one may be lifted out.

import { css } from "./drawing.js";
import { $, colourOf, count, element, shownOf, state } from "./state.js";
import { View } from "./view.js";

export const view = new View($("panes"), {
  activate,
  zoomed: (scale) => {
    $("zoom").textContent = `${Math.round(100 * scale)}%`;
  },
});

let lists = [];
let listedFor = null;

function listTitle(n, number) {
  const who = state.used.length > 1 ? `${state.used[n].name}: ` : "";
  return `${who}${count(number, "object")}`;
}

export function drawLists(answers) {
  const known =
    lists.length === answers.length && lists.every((list, n) => list.answer === answers[n]);
  $("found-card").hidden = !answers.some(Boolean);
  if (known && listedFor === state.used) return;
  listedFor = state.used;
  lists = answers.map((answer, n) => makeList(answer, n));
  $("lists").replaceChildren(
    ...lists
      .filter((list) => list.answer)
      .flatMap((list) => [element("div", "", list.title, list.nothing, list.list)]),
  );
}

function makeList(answer, n) {
  const title = element("h3", "");
  title.id = `list-title-${n}`;
  const nothing = element("p", "nothing", "Nothing is shown.");
  const list = element("ul", "found");
  list.setAttribute("role", "listbox");
  list.setAttribute("aria-labelledby", `found-title ${title.id}`);
  list.tabIndex = 0;
  const items = [];
  for (let i = 0; i < (answer?.length ?? 0); i++) {
    const [x1, y1, x2, y2] = answer.box(i);
    const swatch = element("span", "swatch");
    swatch.style.background = css(colourOf(answer.className(i)));
    const size = `${Math.round(x2 - x1)} × ${Math.round(y2 - y1)}`;
    const item = element(
      "li",
      "",
      swatch,
      element("span", "class-name", answer.className(i)),
      element("span", "size", size),
      element("span", "unseen", " pixels, score "),
      element("span", "score", answer.scores[i].toFixed(2)),
    );
    item.id = `found-${n}-${i}`;
    item.setAttribute("role", "option");
    item.setAttribute("aria-selected", "false");
    item.addEventListener("pointerenter", () => activate(n, i));
    item.addEventListener("click", () => {
      activate(n, i);
      view.reveal(answer.box(i));
    });
    item.addEventListener("dblclick", () => view.zoomToBox(answer.box(i)));
    items.push(item);
  }
  list.append(...items);
  list.addEventListener("pointerleave", () => {
    if (document.activeElement !== list) activate(n, -1);
  });
  list.addEventListener("focus", () => {
    if (active.pane !== n) activate(n, shownOf(answer)[0] ?? -1);
  });
  list.addEventListener("blur", () => activate(n, -1));
  list.addEventListener("keydown", (event) => listKey(event, n, answer));
  return { answer, title, nothing, list, items };
}

function listKey(event, n, answer) {
  if (event.ctrlKey || event.altKey || event.metaKey || event.shiftKey) return;
  const order = shownOf(answer);
  const at = active.pane === n ? order.indexOf(active.i) : -1;
  const to = {
    ArrowDown: Math.min(order.length - 1, at + 1),
    ArrowUp: Math.max(0, at - 1),
    PageDown: Math.min(order.length - 1, at + 8),
    PageUp: Math.max(0, at - 8),
    Home: 0,
    End: order.length - 1,
  }[event.key];
  if (to !== undefined) {
    activate(n, order[to] ?? -1);
    if (order[to] !== undefined) view.reveal(answer.box(order[to]));
  } else if (event.key === "Enter" && at >= 0) view.zoomToBox(answer.box(order[at]));
  else if (event.key === "Escape") view.fit();
  else return;
  event.preventDefault();
  event.stopPropagation();
}

const active = { pane: -1, i: -1 };

/** Lifts out a detection on the image and in its list; i is -1 for none. */
export function activate(pane, i, pressed = false) {
  if (active.pane !== pane || active.i !== i) {
    const old = lists[active.pane];
    old?.items[active.i]?.setAttribute("aria-selected", "false");
    old?.list.removeAttribute("aria-activedescendant");
    if (active.pane !== pane) view.panes[active.pane]?.highlight(-1);
    active.pane = i < 0 ? -1 : pane;
    active.i = i;
    view.panes[pane]?.highlight(i);
    const item = lists[pane]?.items[i];
    if (item) {
      item.setAttribute("aria-selected", "true");
      lists[pane].list.setAttribute("aria-activedescendant", item.id);
      scrollWithin(lists[pane].list, item);
    }
  }
  // Pressed with the mouse or a finger: the arrows go on from there.
  if (pressed && i >= 0) view.panes[pane].boxes[i]?.focus({ preventScroll: true });
}

/** Scrolls a list, and never the page, as scrollIntoView would. */
function scrollWithin(list, item) {
  const top = item.offsetTop - list.offsetTop;
  if (top < list.scrollTop) list.scrollTop = top;
  else if (top + item.offsetHeight > list.scrollTop + list.clientHeight) {
    list.scrollTop = top + item.offsetHeight - list.clientHeight;
  }
}

/** Shows in the lists what is shown on the image. */
export function filterLists(shown) {
  for (const [n, list] of lists.entries()) {
    const kept = new Set(shown[n]);
    list.items.forEach((item, i) => item.classList.toggle("off", !kept.has(i)));
    list.title.textContent = listTitle(n, kept.size);
    list.nothing.hidden = kept.size > 0;
    list.list.hidden = kept.size === 0;
  }
}
