// The page: models, images and their strip, messages, and keyboard control.

import { renderSaveCard } from "./download.js";
import { decode, isImage, makeThumbnail } from "./images.js";
import { listenToInputs } from "./inputs.js";
import { renderModels, renderPanel, setThreshold, showClasses, view } from "./panel.js";
import { explain, getModels, hasKey, Queue, RequestError, setKey } from "./service.js";
import {
  $, announce, changed, describe, element, fileKind, formatBytes, hideMessage, isSameSize, jobsOf,
  messageIsPersistent, onChange, plural, setText, showMessage, state, statusOf,
} from "./state.js";

const THUMBNAIL_HEIGHT = 66; // CSS pixels

const queue = new Queue({
  onDone: ({ image }) => image === state.current && announce(describe(image)),
  onPause: showPause,
  isUrgent: ({ image }) => image === state.current,
});

// --- messages and the API key -------------------------------------------------------------------

let keyIsNeeded = false;

function showPause(pause) {
  if (pause?.kind === "key") askForKey();
  else if (pause) {
    const text = pause.kind === "busy" ? "The server is busy." : "The server does not respond.";
    const action = () => queue.retry();
    const options = { button: "Try now", action, persistent: true, until: pause.until };
    showMessage(`${text} Trying again in`, options);
  } else if (messageIsPersistent()) hideMessage();
}

function closeMessage() {
  hideMessage();
  if (keyIsNeeded) showKeyMessage();
  else if (queue.pause) showPause(queue.pause);
}

function showKeyMessage() {
  const options = { button: "Enter the key", action: askForKey, persistent: true };
  showMessage("This server requires an API key.", options);
}

function askForKey() {
  keyIsNeeded = true;
  $("key-message").classList.toggle("bad", hasKey());
  $("key-message").textContent = hasKey()
    ? "The server did not accept this key. Check it for missing or extra characters."
    : "Ask the server's administrator for the key. It is kept until this tab is closed.";
  showKeyMessage();
  if (!$("key-dialog").open) $("key-dialog").showModal();
  $("key").select();
}

$("key-form").onsubmit = () => {
  keyIsNeeded = false;
  setKey($("key").value.trim());
  hideMessage();
  if (state.models.length === 0) connect();
  else queue.resume();
};
$("key-later").onclick = () => $("key-dialog").close();
$("message-close").onclick = closeMessage;

// --- models -------------------------------------------------------------------------------------

let backoff = 1;
let connectTimer = 0;

async function connect() {
  clearTimeout(connectTimer);
  try {
    setModels(await getModels());
  } catch (error) {
    const status = error instanceof RequestError ? error.status : -1;
    if (status === 401) {
      askForKey();
      return;
    }
    const seconds = error.retryAfter ?? backoff;
    backoff = Math.min(15, 2 * backoff);
    const text =
      { 0: "The server does not respond.", 503: "The server is not ready yet." }[status] ??
      `The server does not list its models: ${explain(error)}`;
    const until = Date.now() + 1000 * seconds;
    const options = { button: "Try now", action: connect, persistent: true, until };
    showMessage(`${text} Trying again in`, options);
    connectTimer = setTimeout(connect, 1000 * seconds);
    return;
  }
  hideMessage();
  $("models").hidden = false;
  $("second-label").hidden = state.models.length < 2;
  $("first-model").replaceChildren(...state.models.map(({ name }) => new Option(name)));
  $("first-model").value = (state.models.find((model) => model.default) ?? state.models[0]).name;
  selectModels();
}

function setModels({ models, limits, version }) {
  // Keep the objects of known models: detections refer to them.
  state.models = models.map((model) =>
    Object.assign(state.models.find(({ name }) => name === model.name) ?? {}, model),
  );
  Object.assign(state, { limits: limits ?? {}, version: version ?? "" });
  const { bytes, pixels } = state.limits;
  const millions = (pixels / 1e6).toLocaleString("en", { maximumSignificantDigits: 3 });
  const parts = [bytes && formatBytes(bytes), pixels && `${millions} million pixels`].filter(Boolean);
  $("limits").textContent = parts.length > 0 ? `Up to ${parts.join(" and ")} per image.` : "";
}

/** Use the selected models: request their detections of all images. */
function selectModels() {
  const first = state.models.find(({ name }) => name === $("first-model").value);
  const others = state.models.filter((model) => model !== first);
  const second = others.find(({ name }) => name === $("second-model").value);
  state.selected = second ? [first, second] : [first];
  const options = others.map(({ name }) => new Option(name, name));
  $("second-model").replaceChildren(new Option("none", ""), ...options);
  $("second-model").value = second?.name ?? "";
  document.body.classList.toggle("comparing", Boolean(second));
  const names = state.selected.map(({ name }) => name);
  document.title = `${names.join(" and ")} · retinanet`;
  $("save-model-label").hidden = !second;
  $("save-model").replaceChildren(...names.map((name) => new Option(name)));
  const scores = state.selected.map((model) => model.thresholds?.score_threshold ?? 0);
  $("score").min = $("score-number").min = Math.floor(100 * Math.min(...scores)) / 100;
  setThreshold(state.threshold);
  view.setPanes(names);
  for (const job of [...queue.waiting, ...queue.running]) {
    if (!state.selected.includes(job.model)) queue.cancel(job);
  }
  state.images.forEach(requestDetections);
  renderModels();
  if (state.current) showImage(state.current, true);
}

$("first-model").onchange = $("second-model").onchange = selectModels;

/** The median speed changes while the server works. */
const refreshSpeed = () => getModels().then((content) => (setModels(content), renderModels()), () => {});

// --- images -------------------------------------------------------------------------------------

let numAdded = 0;

function addFiles(files) {
  const skipped = files.filter(({ file }) => !isImage(file)).map(({ name }) => name);
  if (skipped.length > 0) {
    const names = skipped.slice(0, 3).join(", ") + (skipped.length > 3 ? " and others" : "");
    showMessage(`${plural(skipped.length, "file")} skipped (not an image): ${names}.`);
  } else if (files.length === 0) showMessage("No images found.");
  else if (!messageIsPersistent()) closeMessage();
  const images = files.filter(({ file }) => isImage(file)).map(createImage);
  state.images.push(...images);
  images.forEach(requestDetections);
  $("strip").append(...images.map((image) => image.element));
  for (const image of images) inSight.observe(image.element);
  if (images.length > 0) select(images[0]);
  changed();
}

function createImage({ file, name }) {
  const image = { file, name, id: `image-${++numAdded}`, jobs: new Map(), size: null };
  Object.assign(image, { thumbnail: "", undecodable: false, tooLarge: "" });
  image.element = element(
    "li",
    { className: "thumb", id: image.id, role: "option", ariaSelected: "false", tabIndex: -1, title: name },
    element("span", { className: "kind" }),
    element("span", { className: "label" }),
  );
  image.element.onclick = () => select(image);
  return image;
}

/** Queue an image for the selected models that have not processed it. */
function requestDetections(image) {
  const maximum = state.limits.bytes;
  if (image.file.size > maximum) {
    image.tooLarge =
      `The image is ${formatBytes(image.file.size)}; this server accepts at most ` +
      `${formatBytes(maximum)}. It was not sent.`;
    return;
  }
  for (const model of state.selected) {
    const status = image.jobs.get(model.name)?.status ?? "cancelled";
    if (status === "cancelled") queue.add(image, model);
  }
}

function retry(image) {
  for (const job of jobsOf(image)) if (job?.status === "failed") job.status = "cancelled";
  requestDetections(image);
  changed();
}

function remove(image) {
  const index = state.images.indexOf(image);
  const isFocused = image.element.contains(document.activeElement);
  for (const job of image.jobs.values()) queue.cancel(job);
  release(image);
  state.images.splice(index, 1);
  select(state.images[Math.min(index, state.images.length - 1)] ?? null);
  if (!state.current) focusInputs();
  else if (isFocused) state.current.element.focus();
}

function release(image) {
  inSight.unobserve(image.element);
  image.element.remove();
  URL.revokeObjectURL(image.thumbnail);
}

function clear() {
  queue.cancelAll();
  state.images.forEach(release);
  state.images = [];
  select(null);
  focusInputs();
  announce("All images removed.");
}

/** Focus the inputs after they were moved, as moving them loses the focus. */
const focusInputs = () => queueMicrotask(() => $("choose").focus());

function select(image) {
  const previous = state.current;
  state.current = image;
  if (previous) Object.assign(previous.element, { ariaSelected: "false", tabIndex: -1 });
  if (image) {
    Object.assign(image.element, { ariaSelected: "true", tabIndex: 0 });
    image.element.scrollIntoView({ block: "nearest", inline: "nearest" });
    announce(describe(image));
  }
  if (image !== previous) showImage(image);
}

function step(offset) {
  const image = state.images[state.images.indexOf(state.current) + offset];
  if (!image) return;
  const inStrip = $("strip").contains(document.activeElement);
  select(image);
  if (inStrip) image.element.focus();
}

let showTurn = 0;

async function showImage(image, keepZoom = false) {
  const turn = ++showTurn;
  changed();
  if (!image || !keepZoom) view.setImage(null, null);
  if (!image) return;
  $("view").setAttribute("aria-busy", "true");
  // The browser may have no decoder; if the file is broken, the server says so.
  const bitmap = await decode(image.file).catch(() => null);
  if (turn !== showTurn) {
    bitmap?.close();
    return;
  }
  image.undecodable = bitmap === null;
  image.size = bitmap && { width: bitmap.width, height: bitmap.height };
  view.setImage(bitmap, image.size, keepZoom);
  $("view").removeAttribute("aria-busy");
  changed();
}

// --- strip --------------------------------------------------------------------------------------

function renderThumb(image) {
  const status = statusOf(image);
  const numbers = jobsOf(image).flatMap((job) => job?.detections?.visible().length ?? []);
  const label =
    { running: "detecting", done: numbers.join(" | ") }[status] ?? status;
  image.element.dataset.status = status;
  setText(image.element.querySelector(".label"), label);
  const kind = image.element.querySelector(".kind")?.textContent ?? "";
  const count = numbers.length === 1 ? plural(numbers[0], "object") : `${label} objects`;
  image.element.ariaLabel = `${image.name}, ${kind && `${kind} `}${status === "done" ? count : label}`;
}

// Thumbnails are made for visible images, two at a time.
const thumbnailQueue = new Set();
let numThumbnailTasks = 0;

const inSight = new IntersectionObserver(
  (entries) => {
    for (const { target, isIntersecting } of entries) {
      const image = state.images.find(({ id }) => id === target.id);
      if (isIntersecting && image && !image.thumbnail) thumbnailQueue.add(image);
      else thumbnailQueue.delete(image);
    }
    for (let n = numThumbnailTasks; n < 2; n++) makeThumbnails();
  },
  { root: $("strip"), rootMargin: "0px 300px" },
);

async function makeThumbnails() {
  numThumbnailTasks++;
  for (const image of thumbnailQueue) {
    thumbnailQueue.delete(image);
    const height = Math.ceil(THUMBNAIL_HEIGHT * Math.min(2, devicePixelRatio));
    const blob = await makeThumbnail(image.file, height).catch(() => null);
    const kind = image.element.querySelector(".kind");
    if (!state.images.includes(image)) continue;
    if (blob) {
      image.thumbnail = URL.createObjectURL(blob);
      kind?.replaceWith(element("img", { alt: "", src: image.thumbnail }));
    } else {
      kind.textContent = fileKind(image);
      inSight.unobserve(image.element);
      changed();
    }
  }
  numThumbnailTasks--;
}

// --- rendering ----------------------------------------------------------------------------------

let numUnfinished = 0;
let stripFrame = 0;

onChange(() => {
  const { current, images } = state;
  const jobs = jobsOf(current);
  const detections = jobs.map((job) => job?.detections ?? null);
  renderLayout(images.length > 0);
  if (current) renderImage(current, jobs, detections);
  renderPanel(detections);
  renderSaveCard();
  renderProgress(images);
  // The strip of a thousand images may follow a moment later.
  stripFrame ||= requestAnimationFrame(() => {
    stripFrame = 0;
    state.images.forEach(renderThumb);
  });
});

function renderLayout(hasImages) {
  for (const id of ["bar", "panes", "strip-bar"]) $(id).hidden = !hasImages;
  $("empty").hidden = hasImages;
  const parent = hasImages ? $("strip-inputs") : $("inputs");
  if ($("choose").parentElement !== parent) {
    parent.append(...["choose", "choose-folder", "paste", "camera"].map($));
  }
}

function renderImage(image, jobs, detections) {
  setText($("name"), image.name);
  $("name").title = image.name;
  const known = detections.find(Boolean);
  if (image.undecodable && !view.size && known) view.setImage(null, known);
  const size = image.size ?? known;
  const facts = [size && `${size.width} × ${size.height} px`, formatBytes(image.file.size)];
  view.panes.forEach((pane, n) => {
    const { name } = state.selected[n];
    const item = detections[n];
    const misplaced = item && image.size && !isSameSize(item, image.size);
    const drawn = misplaced ? null : item;
    // Unchanged boxes are kept, as one may have the focus; another model may change the colours.
    if (pane.detections !== drawn || pane.models !== state.selected) pane.setDetections(drawn);
    pane.models = state.selected;
    pane.setVisible(drawn?.visible() ?? []);
    pane.setMessage(...stageMessage(image, jobs[n], misplaced));
    if (!item) return;
    const objects = plural(item.visible().length, "object");
    const { total } = item.milliseconds;
    setText(pane.title, `${name} · ${objects}`);
    const model = jobs.length > 1 ? `${name} ` : "";
    facts.push(`${model}${objects}${total ? ` in ${Math.round(total)} ms` : ""}`);
  });
  setText($("facts"), facts.filter(Boolean).join(" · "));
}

/** The text over the image, and its options as of `setMessage`. */
function stageMessage(image, job, misplaced) {
  const tryAgain = { isError: true, button: "Try again", action: () => retry(image) };
  if (image.tooLarge) return [image.tooLarge, { isError: true }];
  if (!job || job.status === "waiting") return ["Waiting"];
  if (job.status === "running") return ["Detecting…"];
  if (job.status === "failed") return [job.error, tryAgain];
  if (job.status === "cancelled") return ["Cancelled.", { ...tryAgain, isError: false }];
  const { detections } = job;
  if (misplaced) {
    const [here, there] = [image.size, detections].map(({ width, height }) => `${width} × ${height}`);
    return [
      `The browser decodes this image to ${here} pixels, the server to ${there}. Its boxes would be ` +
        "misplaced and are not drawn; see the list.",
    ];
  }
  const undecodable =
    image.undecodable && view.size
      ? `This browser cannot display ${fileKind(image)} images; the boxes are drawn on an empty canvas. `
      : "";
  if (detections.visible().length > 0) return [undecodable.trim()];
  if (detections.length === 0) return [`${undecodable}No objects were detected.`];
  const isUnderThreshold = detections.counts().size === 0;
  const text = isUnderThreshold
    ? `No score of ${state.threshold.toFixed(2)} or more; ${plural(detections.length, "object")} below.`
    : "All detected classes are hidden.";
  const action = () => {
    showClasses(detections.model.classes, true);
    if (isUnderThreshold) setThreshold(0);
  };
  return [undecodable + text, { button: "Show all", action }];
}

function renderProgress(images) {
  const counts = { waiting: 0, running: 0, done: 0, failed: 0, cancelled: 0 };
  for (const image of images) counts[statusOf(image)]++;
  const unfinished = counts.waiting + counts.running;
  const parts = [plural(images.length, "image")];
  if (unfinished > 0) parts.push(`${images.length - unfinished} processed`);
  if (counts.failed > 0) parts.push(`${counts.failed} failed`);
  if (counts.cancelled > 0) parts.push(`${counts.cancelled} cancelled`);
  setText($("progress-text"), parts.join(" · "));
  $("progress").hidden = $("cancel").hidden = unfinished === 0;
  $("progress").max = Math.max(1, images.length);
  $("progress").value = images.length - unfinished;
  if (unfinished === 0 && numUnfinished > 0) {
    refreshSpeed();
    if (images.length > 1) announce(`Finished. ${parts.join(", ")}. ${describe(state.current)}`);
  }
  numUnfinished = unfinished;
}

// --- controls -----------------------------------------------------------------------------------

$("zoom-in").onclick = () => view.zoom(1.4);
$("zoom-out").onclick = () => view.zoom(1 / 1.4);
$("fit").onclick = () => view.fit();
$("full").onclick = () => view.zoomTo(1);
$("remove").onclick = () => remove(state.current);
$("clear").onclick = clear;
$("cancel").onclick = () => (queue.cancelAll(), announce("Cancelled."));
$("help").onclick = () => $("help-dialog").showModal();

const KEYS = {
  ArrowLeft: () => step(-1),
  ArrowRight: () => step(1),
  "+": () => view.zoom(1.4),
  "=": () => view.zoom(1.4),
  "-": () => view.zoom(1 / 1.4),
  "−": () => view.zoom(1 / 1.4),
  0: () => view.fit(),
  1: () => view.zoomTo(1),
  Delete: () => remove(state.current),
};
const PAN_KEYS = {
  ArrowLeft: () => view.pan(60, 0),
  ArrowRight: () => view.pan(-60, 0),
  ArrowUp: () => view.pan(0, 60),
  ArrowDown: () => view.pan(0, -60),
};
const STRIP_KEYS = {
  Home: () => step(-state.images.indexOf(state.current)),
  End: () => step(state.images.length - 1 - state.images.indexOf(state.current)),
};

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.defaultPrevented) return;
  if (document.querySelector("dialog[open]")) return;
  if (event.target.closest?.("input:not([type=checkbox]), select, textarea")) return;
  let action = (event.shiftKey && PAN_KEYS[event.key]) || KEYS[event.key];
  if ($("strip").contains(event.target)) action ??= STRIP_KEYS[event.key];
  if (!state.current) action = null;
  if (event.key === "?") action = () => $("help-dialog").showModal();
  if (!action) return;
  action();
  event.preventDefault();
});

const THEMES = ["auto", "light", "dark"];

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  const name = theme[0].toUpperCase() + theme.slice(1);
  $("theme-name").textContent = name;
  $("theme").ariaLabel = $("theme").title = `Colours: ${name}`;
  view.draw();
}

$("theme").onclick = () => {
  const theme = THEMES[(THEMES.indexOf(document.documentElement.dataset.theme) + 1) % 3];
  setTheme(theme);
  announce(`Colours: ${theme}`);
  try {
    localStorage.setItem("retinanet.theme", theme);
  } catch {
    // Storage is disabled: the theme is kept until the page is closed.
  }
};

listenToInputs(addFiles);
setTheme(document.documentElement.dataset.theme);
setThreshold(state.threshold);
connect();
