// The state of the page, detections, and helpers that every module uses.

export const state = {
  models: [],
  limits: {},
  version: "",
  selected: [], // one model, or two to compare
  threshold: 0.3, // the default of `retinanet detect` for drawing
  hiddenClasses: new Set(),
  images: [],
  current: null,
};

let render = () => {};
let renderQueued = false;

export function onChange(callback) {
  render = callback;
}

/** Call after every change of the state: the page is updated once, at the end of the task. */
export function changed() {
  if (renderQueued) return;
  renderQueued = true;
  queueMicrotask(() => {
    renderQueued = false;
    render();
  });
}

export const $ = (id) => document.getElementById(id);

/** Create an HTML element; strings among the children become text, never markup. */
export function element(name, properties = {}, ...children) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(properties)) {
    if (key in node) node[key] = value;
    else node.setAttribute(key, value);
  }
  node.append(...children);
  return node;
}

/** Create an SVG element. */
export function svg(name, attributes = {}, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children);
  return node;
}

/** Set a text only if it differs: screen readers announce every change. */
export function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

/** Detections of one model in one image, in flat arrays, so that many images fit into memory. */
export class Detections {
  constructor(model, { width, height, detections }, milliseconds) {
    const labels = new Map(model.category_ids.map((id, label) => [id, label]));
    Object.assign(this, { model, width, height, milliseconds, length: detections.length });
    this.boxes = new Float64Array(4 * this.length);
    this.scores = new Float64Array(this.length);
    this.labels = new Uint16Array(this.length);
    detections.forEach(({ category_id: id, box, score }, i) => {
      if (!labels.has(id)) throw new Error(`unknown category id ${id}`);
      this.boxes.set(box, 4 * i);
      this.scores[i] = score;
      this.labels[i] = labels.get(id);
    });
  }

  /** x1, y1, x2, y2 in pixels of the image. */
  box(i) {
    return this.boxes.subarray(4 * i, 4 * i + 4);
  }

  /** Rounded width and height of a box in pixels. */
  size(i) {
    const [x1, y1, x2, y2] = this.box(i);
    return [Math.round(x2 - x1), Math.round(y2 - y1)];
  }

  className(i) {
    return this.model.classes[this.labels[i]];
  }

  categoryId(i) {
    return this.model.category_ids[this.labels[i]];
  }

  caption(i) {
    return `${this.className(i)} ${this.scores[i].toFixed(2)}`;
  }

  /** Indices of the detections that pass the filter, by decreasing score. */
  visible() {
    const hidden = this.model.classes.map((name) => state.hiddenClasses.has(name));
    const indices = [];
    for (let i = 0; i < this.length; i++) {
      if (this.scores[i] >= state.threshold && !hidden[this.labels[i]]) indices.push(i);
    }
    return indices;
  }

  /** Number of detections per class name that reach the score threshold. */
  counts() {
    const counts = new Map();
    for (let i = 0; i < this.length; i++) {
      if (this.scores[i] < state.threshold) continue;
      counts.set(this.className(i), (counts.get(this.className(i)) ?? 0) + 1);
    }
    return counts;
  }

  /** "12 objects: 9 RBC, 3 WBC", of the visible detections. */
  summary() {
    const counts = [...this.counts()].filter(([name]) => !state.hiddenClasses.has(name));
    counts.sort((a, b) => b[1] - a[1]);
    const names = counts.slice(0, 6).map(([name, number]) => `${number} ${name}`);
    if (counts.length > 6) names.push(`${counts.length - 6} more classes`);
    const total = counts.reduce((sum, [, number]) => sum + number, 0);
    return `${plural(total, "object")}${names.length > 0 ? `: ${names.join(", ")}` : ""}`;
  }
}

/** The jobs of an image for the selected models; null where there is none. */
export function jobsOf(image) {
  return state.selected.map((model) => image?.jobs.get(model.name) ?? null);
}

/** waiting, running, done, failed or cancelled, over all selected models. */
export function statusOf(image) {
  if (image.tooLarge) return "failed";
  const statuses = jobsOf(image).map((job) => job?.status);
  const order = ["running", "waiting", "failed", "cancelled", "done"];
  return order.find((status) => statuses.includes(status)) ?? "waiting";
}

/** One line of text about an image, for screen readers. */
export function describe(image) {
  if (!image) return "";
  if (image.tooLarge) return `${image.name}: ${image.tooLarge}`;
  const parts = jobsOf(image).map((job, n) => {
    const text = job?.detections?.summary() ?? (job?.error || statusOf(image));
    return state.selected.length > 1 ? `${state.selected[n].name}: ${text}` : text;
  });
  return `${image.name}: ${parts.join("; ")}`;
}

export function classNames() {
  return [...new Set(state.selected.flatMap((model) => model.classes))];
}

/** The palette of `retinanet detect`; the first seven colours are Okabe and Ito's. */
const PALETTE = [
  ...[[213, 94, 0], [0, 158, 115], [86, 180, 233], [240, 228, 66], [204, 121, 167]],
  ...[[0, 114, 178], [230, 159, 0], [150, 230, 80], [140, 80, 220], [0, 220, 220]],
  ...[[160, 60, 60], [255, 255, 255]],
];

let colourCache = { models: null, colours: new Map() };

/** CSS colours of a class: {fill, text}; the classes of a second model follow the first's. */
export function colourOf(name) {
  if (colourCache.models !== state.selected) {
    const colours = classNames().map((key, n) => [key, PALETTE[n % PALETTE.length]]);
    colourCache = {
      models: state.selected,
      colours: new Map(colours.map(([key, rgb]) => [key, { fill: `rgb(${rgb.join(" ")})`, text: textColour(rgb) }])),
    };
  }
  return colourCache.colours.get(name);
}

/** Black or white, whichever has the higher contrast (WCAG relative luminance). */
function textColour(rgb) {
  const [r, g, b] = rgb.map((value) => {
    const part = value / 255;
    return part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4;
  });
  return 0.2126 * r + 0.7152 * g + 0.0722 * b > 0.179 ? "#000" : "#fff";
}

export function plural(number, noun, nouns = `${noun}s`) {
  return `${number.toLocaleString("en")} ${number === 1 ? noun : nouns}`;
}

export function formatBytes(bytes) {
  if (bytes < 1000) return `${bytes} bytes`;
  const power = Math.min(3, Math.floor(Math.log10(bytes) / 3));
  const value = bytes / 1000 ** power;
  return `${value.toFixed(value < 10 ? 1 : 0)} ${["", "kB", "MB", "GB"][power]}`;
}

export function fileKind({ name, file }) {
  const suffix = /\.([a-z0-9]{1,5})$/i.exec(name)?.[1];
  return (suffix ?? (file.type.split("/")[1] || "image")).toUpperCase();
}

export const isSameSize = (a, b) => a.width === b.width && a.height === b.height;

let announceTimer = 0;

/** Announce to screen readers; of several announcements in quick succession, only the last. */
export function announce(text, delay = 150) {
  clearTimeout(announceTimer);
  announceTimer = setTimeout(() => ($("status").textContent = text), delay);
}

let countdownTimer = 0;

/**
 * Show a message at the top of the page.
 *
 * `persistent` messages stay until `hideMessage`; `until` is a time in ms to count down to.
 */
export function showMessage(text, { button = "", action = null, persistent = false, until = 0 } = {}) {
  hideMessage();
  const box = $("message");
  box.hidden = false;
  box.classList.toggle("waiting", persistent);
  setText($("message-text"), text);
  Object.assign($("message-action"), { hidden: !button, textContent: button, onclick: action });
  $("message-close").hidden = persistent;
  const countDown = () => {
    const seconds = Math.ceil((until - Date.now()) / 1000);
    $("message-countdown").textContent = seconds > 0 ? `${seconds} s` : "";
  };
  countDown();
  if (until) countdownTimer = setInterval(countDown, 250);
}

export function hideMessage() {
  clearInterval(countdownTimer);
  $("message").hidden = true;
}

export const messageIsPersistent = () => !$("message").hidden && $("message-close").hidden;
