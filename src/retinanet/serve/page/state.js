// The state of the page, and helpers that every module uses.

export const state = {
  models: [], // as listed by the server
  limits: {},
  version: "",
  selected: [], // one model, or two to compare
  threshold: 0.3, // the default of `retinanet detect` for drawing
  hiddenClasses: new Set(),
  images: [],
  current: null, // the image in view
  active: null, // the highlighted detection
  notice: "", // a message that the user can close
  pause: null, // {text, button, isTimed, promise, resume}: no request is sent meanwhile
};

/** A function that runs `callback` in the next frame, once for any number of calls. */
export function scheduled(callback) {
  let frame = 0;
  return () => {
    frame ||= requestAnimationFrame(() => {
      frame = 0;
      callback();
    });
  };
}

const listeners = [];

/** Call `listener` after changes of the state. */
export const onChange = (listener) => listeners.push(listener);

/** Report a change of the state. */
export const changed = scheduled(() => listeners.forEach((listener) => listener()));

export const $ = (id) => document.getElementById(id);

/** Create an element; strings among the children become text, never markup. */
export function element(name, properties = {}, ...children) {
  const node = document.createElement(name);
  Object.assign(node, properties);
  node.append(...children);
  return node;
}

/** Set a text only if it differs: screen readers announce every change. */
export function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

/** Read, or write, a value that outlives a reload; null if the browser's storage is disabled. */
export function stored(storage, key, value) {
  try {
    if (value !== undefined) window[storage].setItem(key, value);
    return window[storage].getItem(key);
  } catch {
    return null;
  }
}

export function notify(text) {
  state.notice = text;
  changed();
}

let announceTimer = 0;

/** Announce to screen readers; of several announcements in quick succession, only the last. */
export function announce(text, delay = 150) {
  clearTimeout(announceTimer);
  announceTimer = setTimeout(() => ($("status").textContent = text), delay);
}

// --- detections -----------------------------------------------------------------------------------

/** The job of an image for each selected model; undefined where there is none. */
export const jobsOf = (image) => state.selected.map(({ name }) => image?.jobs.get(name));

/** Detections of a result that reach the score threshold, hidden classes included. */
export const scored = (result) => result.detections.filter(({ score }) => score >= state.threshold);

/** Detections of a result that pass the filter, by decreasing score. */
export const visible = (result) => scored(result).filter((item) => !state.hiddenClasses.has(item.class));

/** Number of detections per class. */
export function countClasses(detections) {
  const counts = new Map();
  for (const item of detections) counts.set(item.class, (counts.get(item.class) ?? 0) + 1);
  return counts;
}

/** waiting, running, done, failed or cancelled, over all selected models. */
export function statusOf(image) {
  if (image.tooLarge) return "failed";
  const statuses = jobsOf(image).map((job) => job?.status);
  const status = ["running", "waiting", "failed", "cancelled", "done"].find((name) => statuses.includes(name));
  return status === "running" && state.pause ? "waiting" : (status ?? "waiting");
}

/** One line of text about an image: "a.png: 12 objects: 9 RBC, 3 WBC". */
export function describe(image) {
  const parts = jobsOf(image).map((job, n) => {
    const text = job?.result ? summary(visible(job.result)) : job?.error || statusOf(image);
    return state.selected.length > 1 ? `${state.selected[n].name}: ${text}` : text;
  });
  return `${image.name}: ${image.tooLarge || parts.join("; ")}`;
}

function summary(detections) {
  const counts = [...countClasses(detections)].sort((a, b) => b[1] - a[1]);
  const names = counts.slice(0, 6).map(([name, number]) => `${number} ${name}`);
  if (counts.length > 6) names.push(`${counts.length - 6} more classes`);
  return [plural(detections.length, "object"), names.join(", ")].filter(Boolean).join(": ");
}

export const caption = (detection) => `${detection.class} ${detection.score.toFixed(2)}`;

// --- classes --------------------------------------------------------------------------------------

export const classNames = () => [...new Set(state.selected.flatMap(({ classes }) => classes))];

/** The palette of `retinanet detect`; the first seven colours are Okabe and Ito's. */
const PALETTE = [
  ...["#d55e00", "#009e73", "#56b4e9", "#f0e442", "#cc79a7", "#0072b2"],
  ...["#e69f00", "#96e650", "#8c50dc", "#00dcdc", "#a03c3c", "#ffffff"],
];
const DARK = ["#0072b2", "#8c50dc", "#a03c3c"];

/** Colour of a class; the classes of a second model follow the first's. */
export const colourOf = (name) => PALETTE[Math.max(0, classNames().indexOf(name)) % PALETTE.length];

/** Black or white, whichever has the higher contrast on the colour of a class. */
export const textColourOf = (name) => (DARK.includes(colourOf(name)) ? "#fff" : "#000");

// --- texts ----------------------------------------------------------------------------------------

export const plural = (number, noun) => `${number.toLocaleString("en")} ${noun}${number === 1 ? "" : "s"}`;

export function formatBytes(bytes) {
  const [value, unit] = bytes < 1e6 ? [bytes / 1e3, "kB"] : [bytes / 1e6, "MB"];
  return `${value.toFixed(value < 10 ? 1 : 0)} ${unit}`;
}

export function fileKind({ name, file }) {
  const suffix = /\.([a-z0-9]{1,5})$/i.exec(name)?.[1];
  return (suffix ?? (file.type.split("/")[1] || "image")).toUpperCase();
}

export const isSameSize = (a, b) => a.width === b.width && a.height === b.height;
