// What the page knows: models, images, and what the slider and the classes let through.

import { PALETTE } from "./drawing.js";

const DRAWN_SCORE = 0.3; // as `retinanet detect` draws: AP wants every box, a person's eye does not

export const $ = (id) => document.getElementById(id);

export const state = {
  models: [],
  limits: {},
  version: "",
  used: [], // the model, and the one beside it where there is one
  threshold: DRAWN_SCORE,
  off: new Set(), // names of classes that are not shown
  images: [],
  current: null,
};

export function element(name, className = "", ...children) {
  const one = document.createElement(name);
  if (className) one.className = className;
  one.append(...children); // strings become text, never markup
  return one;
}

export function count(number, one, many = `${one}s`) {
  return `${number.toLocaleString("en")} ${number === 1 ? one : many}`;
}

export function bytesWords(bytes) {
  if (bytes < 1000) return `${bytes} bytes`;
  const power = Math.min(3, Math.floor(Math.log10(bytes) / 3));
  const value = bytes / 1000 ** power;
  return `${value.toFixed(value < 10 ? 1 : 0)} ${["", "kB", "MB", "GB"][power]}`;
}

export function fileKind(image) {
  const suffix = /\.([a-z0-9]{1,5})$/i.exec(image.name)?.[1];
  return (suffix ?? (image.file.type.split("/")[1] || "image")).toUpperCase();
}

export function sameSize(a, b) {
  return a.width === b.width && a.height === b.height;
}

export function jobsOf(image) {
  return state.used.map((model) => image.jobs.get(model.name)).filter(Boolean);
}

/** waiting, running, done, refused or cancelled, for all models in use together. */
export function stateOf(image) {
  if (image.tooLarge) return "refused";
  const states = jobsOf(image).map((job) => job.state);
  const order = ["running", "waiting", "refused", "cancelled", "done"];
  return order.find((one) => states.includes(one)) ?? "waiting";
}

export function currentAnswers() {
  return state.used.map((model) => state.current?.jobs.get(model.name)?.answer ?? null);
}

/** The numbers of the detections that the slider and the classes let through, best first. */
export function shownOf(answer) {
  const kept = [];
  for (let i = 0; i < answer.length; i++) {
    if (answer.scores[i] >= state.threshold && !state.off.has(answer.className(i))) kept.push(i);
  }
  return kept;
}

/** How many of each class the slider lets through, whether the class is switched on or not. */
export function countsOf(answer) {
  const counts = new Map();
  for (let i = 0; i < answer.length; i++) {
    if (answer.scores[i] < state.threshold) continue;
    const name = answer.className(i);
    counts.set(name, (counts.get(name) ?? 0) + 1);
  }
  return counts;
}

export function classNames() {
  return [...new Set(state.used.flatMap((model) => model.classes))];
}

let colours = { of: [], map: new Map() };

/** Colours by class as `retinanet detect` has them; a second model's own classes come after. */
export function colourOf(name) {
  if (colours.of !== state.used) {
    const map = new Map(classNames().map((one, n) => [one, PALETTE[n % PALETTE.length]]));
    colours = { of: state.used, map };
  }
  return colours.map.get(name) ?? PALETTE[0];
}

export function imageWords(image) {
  if (!image) return "";
  if (image.tooLarge) return `${image.name}: ${image.tooLarge}`;
  const several = state.used.length > 1;
  const parts = state.used.map((model) => {
    const job = image.jobs.get(model.name);
    const who = several ? `${model.name}: ` : "";
    if (job?.answer) return `${who}${answerWords(job.answer)}`;
    return `${who}${job?.state === "refused" ? job.reason : stateOf(image)}`;
  });
  return `${image.name}: ${parts.join("; ")}`;
}

/** "12 objects: 9 RBC, 3 WBC" of what is shown. */
export function answerWords(answer) {
  const shown = shownOf(answer);
  const counts = new Map();
  for (const i of shown)
    counts.set(answer.className(i), (counts.get(answer.className(i)) ?? 0) + 1);
  const list = [...counts].sort((a, b) => b[1] - a[1]).map(([name, number]) => `${number} ${name}`);
  const more = list.length > 6 ? [...list.slice(0, 6), `${list.length - 6} classes more`] : list;
  return `${count(shown.length, "object")}${more.length > 0 ? `: ${more.join(", ")}` : ""}`;
}
