// The page: models, images and their strip, messages, and keyboard control.

import { decode, isImage } from "./images.js";
import { listenToInputs } from "./inputs.js";
import { activate, renderModels, setThreshold, showClasses } from "./panel.js";
import "./save.js";
import { cancel, enqueue, getModels, hasKey, pause, setKey } from "./service.js";
import {
  $, announce, caption, changed, describe, element, fileKind, formatBytes, isSameSize, jobsOf, notify, onChange,
  plural, scored, setText, state, statusOf, stored, visible,
} from "./state.js";
import { draw, fit, pan, panes, setImage, setPanes, view, zoom, zoomTo } from "./view.js";

// --- messages and the API key ---------------------------------------------------------------------

let renderedPause = null;

function renderMessages() {
  $("notice").hidden = !state.notice;
  setText($("notice-text"), state.notice);
  $("pause").hidden = !state.pause;
  if (!state.pause || state.pause === renderedPause) return;
  renderedPause = state.pause;
  const { text, button, isTimed } = state.pause;
  setText($("pause-text"), text);
  $("resume").textContent = button;
  $("resume").onclick = isTimed ? state.pause.resume : askForKey;
  if (!isTimed) askForKey();
}

function askForKey() {
  $("key-message").classList.toggle("bad", hasKey());
  $("key-message").textContent = hasKey()
    ? "The server did not accept this key. Check it for missing or extra characters."
    : "Ask the server's administrator for the key. It is kept until this tab is closed.";
  $("key-dialog").showModal();
  $("key").select();
}

$("key-form").onsubmit = () => setKey($("key").value.trim());
$("key-later").onclick = () => $("key-dialog").close();
$("notice-close").onclick = () => notify("");

// --- models ---------------------------------------------------------------------------------------

async function connect() {
  for (;;) {
    try {
      setModels(await getModels());
      break;
    } catch (error) {
      await pause(`The server does not list its models: ${error.message}`, 5);
    }
  }
  $("models").hidden = false;
  $("second-label").hidden = state.models.length < 2;
  $("first-model").replaceChildren(...state.models.map(({ name }) => new Option(name)));
  selectModels();
}

function setModels({ models, limits, version }) {
  Object.assign(state, { models, limits, version });
  const byName = (name) => models.find((model) => model.name === name);
  state.selected.forEach((model) => Object.assign(model, byName(model.name)));
  const megapixels = (limits.pixels / 1e6).toLocaleString("en", { maximumSignificantDigits: 3 });
  $("limits").textContent = `Up to ${formatBytes(limits.bytes)} and ${megapixels} million pixels per image.`;
}

/** Use the selected models: request their detections of all images. */
function selectModels() {
  const first = state.models.find(({ name }) => name === $("first-model").value);
  const others = state.models.filter((model) => model !== first);
  const second = others.find(({ name }) => name === $("second-model").value);
  state.selected = second ? [first, second] : [first];
  const names = state.selected.map(({ name }) => name);
  $("second-model").replaceChildren(new Option("none", ""), ...others.map(({ name }) => new Option(name)));
  $("second-model").value = second?.name ?? "";
  document.title = `${names.join(" and ")} · retinanet`;
  $("save-model-label").hidden = !second;
  $("save-model").replaceChildren(...names.map((name) => new Option(name)));
  const scores = state.selected.map(({ thresholds }) => thresholds.score_threshold ?? 0);
  const ofClasses = state.selected.flatMap(({ thresholds }) => Object.values(thresholds.score_thresholds ?? {}));
  $("score").min = Math.floor(100 * Math.min(...scores, ...ofClasses)) / 100;
  setThreshold(Math.min(state.threshold, ...ofClasses));
  setPanes(state.selected, activate);
  for (const image of state.images) {
    for (const job of image.jobs.values()) if (!names.includes(job.model.name)) cancel(job);
    requestDetections(image);
  }
  renderModels();
  changed();
}

$("first-model").onchange = $("second-model").onchange = selectModels;

// --- images ---------------------------------------------------------------------------------------

function addFiles(files) {
  const skipped = files.filter(({ file }) => !isImage(file)).map(({ name }) => name);
  const names = skipped.slice(0, 3).join(", ") + (skipped.length > 3 ? " and others" : "");
  notify(skipped.length > 0 ? `${plural(skipped.length, "file")} skipped (not an image): ${names}.` : "");
  if (files.length === 0) notify("No images found.");
  const images = files.filter(({ file }) => isImage(file)).map(createImage);
  state.images.push(...images);
  images.forEach(requestDetections);
  $("strip").append(...images.map((image) => image.element));
  if (images.length > 0) select(images[0]);
}

function createImage({ file, name }) {
  const image = { file, name, jobs: new Map(), size: null, undecodable: false, tooLarge: "" };
  image.input = element("input", { type: "radio", name: "image", className: "visually-hidden" });
  image.input.onchange = () => select(image);
  image.label = element("span", { className: "label" });
  image.url = URL.createObjectURL(file);
  const preview = element("img", { alt: "", loading: "lazy", decoding: "async", src: image.url });
  preview.onerror = () => preview.replaceWith(element("span", { className: "kind" }, fileKind(image)));
  image.element = element("label", { className: "thumb", title: name }, image.input, preview, image.label);
  return image;
}

/** Queue an image for the selected models that have not processed it. */
function requestDetections(image) {
  if (image.file.size > state.limits.bytes) {
    image.tooLarge =
      `The image is ${formatBytes(image.file.size)}; this server accepts at most ` +
      `${formatBytes(state.limits.bytes)}. It was not sent.`;
    return;
  }
  for (const model of state.selected) {
    if ((image.jobs.get(model.name)?.status ?? "cancelled") === "cancelled") enqueue(image, model, onDone);
  }
}

function onDone({ image }) {
  const isFinished = state.images.every((item) => ["done", "failed", "cancelled"].includes(statusOf(item)));
  if (isFinished) getModels().then(setModels).then(renderModels).catch(() => {}); // the speed has changed
  if (isFinished && state.images.length > 1) announce(`Finished. ${progress()}. ${describe(state.current)}`);
  else if (image === state.current) announce(describe(image));
}

function retry(image) {
  for (const job of jobsOf(image)) if (job?.status === "failed") job.status = "cancelled";
  requestDetections(image);
  changed();
}

function remove(images) {
  const index = state.images.indexOf(state.current);
  for (const image of images) {
    image.jobs.forEach(cancel);
    image.element.remove();
    URL.revokeObjectURL(image.url);
  }
  state.images = state.images.filter((image) => !images.includes(image));
  select(state.images[Math.min(index, state.images.length - 1)] ?? null);
  (state.current?.input ?? $("choose")).focus();
}

let shown = null; // the image whose pixels are in view

async function select(image) {
  state.current = image;
  changed();
  if (image === shown) return;
  shown = image;
  setImage(null, null);
  if (!image) return;
  image.input.checked = true;
  image.element.scrollIntoView({ block: "nearest", inline: "nearest" });
  announce(describe(image));
  $("work").ariaBusy = "true";
  // The browser may have no decoder; if the file is broken, the server says so.
  const bitmap = await decode(image.file).catch(() => null);
  if (shown !== image) return bitmap?.close();
  image.undecodable = bitmap === null;
  image.size = bitmap && { width: bitmap.width, height: bitmap.height };
  setImage(bitmap, image.size);
  $("work").ariaBusy = "false";
  changed();
}

function step(offset) {
  const image = state.images[state.images.indexOf(state.current) + offset];
  if (image) select(image);
}

// --- rendering ------------------------------------------------------------------------------------

onChange(() => {
  const { current, images } = state;
  $("work").classList.toggle("empty", images.length === 0);
  renderMessages();
  renderProgress();
  images.forEach(renderThumb);
  if (current) renderImage(current);
});

function progress() {
  const statuses = state.images.map(statusOf);
  const number = (...names) => statuses.filter((status) => names.includes(status)).length;
  const parts = [plural(statuses.length, "image")];
  if (number("waiting", "running") > 0) parts.push(`${number("done", "failed", "cancelled")} processed`);
  for (const name of ["failed", "cancelled"]) if (number(name) > 0) parts.push(`${number(name)} ${name}`);
  $("progress").max = Math.max(1, statuses.length);
  $("progress").value = number("done", "failed", "cancelled");
  return parts.join(" · ");
}

function renderProgress() {
  setText($("progress-text"), progress());
  $("progress").hidden = $("cancel").hidden = $("progress").value === state.images.length;
}

function renderThumb(image) {
  const status = statusOf(image);
  const numbers = jobsOf(image).flatMap((job) => (job?.result ? [visible(job.result).length] : []));
  const counts = numbers.length === 1 ? plural(numbers[0], "object") : `${numbers.join(" | ")} objects`;
  const label = { running: "detecting", done: numbers.join(" | ") }[status] ?? status;
  image.element.dataset.status = status;
  setText(image.label, label);
  image.input.ariaLabel = `${image.name}, ${status === "done" ? counts : label}`;
}

function renderImage(image) {
  const jobs = jobsOf(image);
  const known = jobs.find((job) => job?.result)?.result;
  if (image.undecodable && !view.size && known) setImage(null, known);
  const size = image.size ?? known;
  const facts = [size && `${size.width} × ${size.height} px`, formatBytes(image.file.size)];
  panes.forEach((pane, n) => {
    const result = jobs[n]?.result;
    const isMisplaced = result && image.size && !isSameSize(result, image.size);
    pane.detections = result && !isMisplaced ? visible(result) : [];
    pane.canvas.ariaLabel = [image.name, ...pane.detections.slice(0, 20).map(caption)].join(", ");
    showStageMessage(pane, ...stageMessage(image, jobs[n], isMisplaced));
    if (!result) return;
    const objects = plural(visible(result).length, "object");
    setText(pane.title, `${result.model} · ${objects}`);
    const model = jobs.length > 1 ? `${result.model} ` : "";
    facts.push(`${model}${objects}${result.milliseconds ? ` in ${Math.round(result.milliseconds)} ms` : ""}`);
  });
  setText($("name"), image.name);
  $("name").title = image.name;
  setText($("facts"), facts.filter(Boolean).join(" · "));
  draw();
}

/** The text over the image, and the label and action of its button if there is something to do. */
function stageMessage(image, job, isMisplaced) {
  const tryAgain = ["Try again", () => retry(image)];
  if (image.tooLarge) return [image.tooLarge];
  if (!job || job.status === "waiting" || (job.status === "running" && state.pause)) return ["Waiting"];
  if (job.status === "running") return ["Detecting…"];
  if (job.status === "failed") return [job.error, ...tryAgain];
  if (job.status === "cancelled") return ["Cancelled.", ...tryAgain];
  const { result } = job;
  if (isMisplaced) {
    const [here, there] = [image.size, result].map(({ width, height }) => `${width} × ${height}`);
    return [`The browser decodes this image to ${here} pixels, the server to ${there}. Its boxes would be misplaced and are not drawn; see the list.`];
  }
  const undecodable = image.undecodable
    ? `This browser cannot display ${fileKind(image)} images; the boxes are drawn on an empty canvas. `
    : "";
  if (visible(result).length > 0) return [undecodable.trim()];
  if (result.detections.length === 0) return [`${undecodable}No objects were detected.`];
  const isUnderThreshold = scored(result).length === 0;
  const text = isUnderThreshold
    ? `No score of ${state.threshold.toFixed(2)} or more; ${plural(result.detections.length, "object")} below.`
    : "All detected classes are hidden.";
  const showAll = () => {
    showClasses(job.model.classes, true);
    if (isUnderThreshold) setThreshold(0);
  };
  return [undecodable + text, "Show all", showAll];
}

function showStageMessage({ message }, text, button = "", action = null) {
  message.hidden = !text;
  message.classList.toggle("bad", statusOf(state.current) === "failed");
  if (message.dataset.text !== text + button) {
    message.dataset.text = text + button; // a message that stays keeps the focus on its button
    const buttons = button ? [" ", element("button", { type: "button", className: "small" }, button)] : [];
    message.replaceChildren(text, ...buttons);
  }
  if (button) message.lastChild.onclick = action;
}

// --- controls -------------------------------------------------------------------------------------

$("zoom-in").onclick = () => zoom(1.4);
$("zoom-out").onclick = () => zoom(1 / 1.4);
$("fit").onclick = fit;
$("full").onclick = () => zoomTo(1);
$("remove").onclick = () => remove([state.current]);
$("clear").onclick = () => remove(state.images);
$("cancel").onclick = () => state.images.forEach((image) => image.jobs.forEach(cancel));
$("help").onclick = () => $("help-dialog").showModal();
$("theme").onchange = () => setTheme($("theme").value);

const KEYS = {
  ArrowLeft: () => step(-1),
  ArrowRight: () => step(1),
  "+": () => zoom(1.4),
  "-": () => zoom(1 / 1.4),
  0: fit,
  1: () => zoomTo(1),
  Delete: () => remove([state.current]),
};
const PAN_KEYS = {
  ArrowLeft: () => pan(60, 0),
  ArrowRight: () => pan(-60, 0),
  ArrowUp: () => pan(0, 60),
  ArrowDown: () => pan(0, -60),
};

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || document.querySelector("dialog[open]")) return;
  if (event.target.closest?.("input:not([type=checkbox], [type=radio]), select")) return;
  let action = state.current && ((event.shiftKey && PAN_KEYS[event.key]) || KEYS[event.key]);
  // Arrows go from radio button to radio button: in the strip to an image, in a list to a detection.
  if (event.target.type === "radio" && action === KEYS[event.key] && event.key.startsWith("Arrow")) return;
  if (event.key === "?") action = $("help").onclick;
  if (!action) return;
  action();
  event.preventDefault();
});

function setTheme(theme) {
  $("theme").value = document.documentElement.dataset.theme = theme;
  stored("localStorage", "retinanet.theme", theme);
  draw();
}

listenToInputs(addFiles);
$("theme").value = document.documentElement.dataset.theme;
setThreshold(state.threshold);
connect();
