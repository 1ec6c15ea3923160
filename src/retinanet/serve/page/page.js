// The page: pictures come in, answers are filtered here, everything is told in words as well.

import { Camera } from "./camera.js";
import { cocoResults, detectionsJson, save, uniqueName, withoutSuffix, zip } from "./download.js";
import { PALETTE, css, drawnPicture } from "./drawing.js";
import { chosen, decode, dropped, isPicture, thumbnail } from "./pictures.js";
import { Queue, Refusal, Service, refusalWords } from "./service.js";
import { View } from "./view.js";

const DRAWN_SCORE = 0.3; // as `retinanet detect` draws: AP wants every box, a person's eye does not
const FEW = 12; // classes that need no search box
const STRIP_HEIGHT = 66; // CSS pixels of a thumbnail

const $ = (id) => document.getElementById(id);

const state = {
  models: [],
  limits: {},
  version: "",
  used: [], // the model, and the one beside it where there is one
  threshold: DRAWN_SCORE,
  off: new Set(), // names of classes that are not shown
  pictures: [],
  current: null,
};

const service = new Service();
const queue = new Queue(service, {
  changed: jobChanged,
  held: showHold,
  first: (job) => job.picture === state.current,
});
const view = new View($("panes"), {
  activate,
  zoomed: (scale) => {
    $("zoom").textContent = `${Math.round(100 * scale)}%`;
  },
});
const camera = new Camera($("camera-dialog"), (file) => addFiles([{ file, name: file.name }]));

// --- small things ---------------------------------------------------------------------------

function element(name, className = "", ...children) {
  const one = document.createElement(name);
  if (className) one.className = className;
  one.append(...children); // strings become text, never markup
  return one;
}

function count(number, one, many = `${one}s`) {
  return `${number.toLocaleString("en")} ${number === 1 ? one : many}`;
}

function bytesWords(bytes) {
  if (bytes < 1000) return `${bytes} bytes`;
  const power = Math.min(3, Math.floor(Math.log10(bytes) / 3));
  const value = bytes / 1000 ** power;
  return `${value.toFixed(value < 10 ? 1 : 0)} ${["", "kB", "MB", "GB"][power]}`;
}

function fileKind(picture) {
  const suffix = /\.([a-z0-9]{1,5})$/i.exec(picture.name)?.[1];
  return (suffix ?? (picture.file.type.split("/")[1] || "picture")).toUpperCase();
}

let sayTimer = 0;

/** Told to screen readers; what comes quickly one after another is told once. */
function announce(words, delay = 150) {
  clearTimeout(sayTimer);
  sayTimer = setTimeout(() => {
    $("said").textContent = words;
  }, delay);
}

// --- messages -------------------------------------------------------------------------------

let noticeTimer = 0;
let noticeOfHold = false;

function tell(words, { button = "", act = null, wait = false, until = null, hold = false } = {}) {
  clearInterval(noticeTimer);
  noticeOfHold = hold;
  const box = $("notice");
  box.hidden = false;
  box.classList.toggle("wait", wait);
  // The same words again would be read out again.
  if ($("notice-words").textContent !== words) $("notice-words").textContent = words;
  $("notice-act").hidden = !button;
  $("notice-act").textContent = button;
  $("notice-act").onclick = act;
  $("notice-close").hidden = hold;
  const countDown = () => {
    const left = until === null ? 0 : Math.ceil((until - Date.now()) / 1000);
    $("notice-wait").textContent = left > 0 ? `${left} s` : "";
  };
  countDown();
  if (until !== null) noticeTimer = setInterval(countDown, 250);
}

function hush() {
  clearInterval(noticeTimer);
  noticeOfHold = false;
  $("notice").hidden = true;
  $("notice-words").textContent = "";
}

function showHold(hold) {
  if (!hold) {
    if (noticeOfHold) hush();
    return;
  }
  const again = { button: "Try now", act: () => queue.retry(), wait: true, hold: true };
  if (hold.kind === "key") askForKey();
  else if (hold.kind === "busy") {
    tell("The server is busy. The pictures wait and are tried again in", { ...again, until: hold.until });
  } else {
    tell("The server does not answer. The pictures wait and are tried again in", {
      ...again,
      until: hold.until,
    });
  }
}

// --- the key --------------------------------------------------------------------------------

function askForKey() {
  const dialog = $("key-dialog");
  const tried = service.key !== "";
  $("key-words").classList.toggle("bad", tried);
  $("key-words").textContent = tried
    ? "The server did not take this key. Look for a letter too many or too few."
    : "Whoever runs the server can give it to you. It is kept until this tab is closed.";
  tell("This server asks for a key.", { button: "Enter the key", act: askForKey, wait: true, hold: true });
  if (!dialog.open) dialog.showModal();
  $("key").select();
}

$("key-form").addEventListener("submit", () => {
  service.keepKey($("key").value.trim());
  hush();
  if (state.models.length === 0) connect();
  else queue.release();
});
$("key-later").addEventListener("click", () => $("key-dialog").close());

// --- models ---------------------------------------------------------------------------------

let connectPatience = 1;
let connectTimer = 0;

async function connect() {
  clearTimeout(connectTimer);
  let said;
  try {
    said = await service.describe();
  } catch (error) {
    const status = error instanceof Refusal ? error.status : -1;
    if (status === 401) {
      askForKey();
      return;
    }
    const seconds = error.retryAfter ?? connectPatience;
    connectPatience = Math.min(15, 2 * connectPatience);
    const words = {
      0: "The server does not answer. Trying again in",
      503: "The server is not ready yet. Trying again in",
    }[status];
    tell(words ?? `The server does not say what it can do: ${refusalWords(error)} Trying again in`, {
      wait: true,
      hold: true,
      until: Date.now() + 1000 * seconds,
      button: "Try now",
      act: connect,
    });
    connectTimer = setTimeout(connect, 1000 * seconds);
    return;
  }
  connectPatience = 1;
  hush();
  takeModels(said);
  const first = state.models.find((model) => model.default) ?? state.models[0];
  $("models").hidden = state.models.length < 1;
  $("second-label").hidden = state.models.length < 2;
  $("first-model").replaceChildren(...state.models.map((model) => new Option(model.name)));
  $("first-model").value = first.name;
  useModels();
}

function takeModels({ models, limits, version }) {
  // A model in use stays the same object, whose answers are known by it.
  state.models = models.map((model) => {
    const known = state.models.find((one) => one.name === model.name);
    return known ? Object.assign(known, model) : model;
  });
  state.limits = limits ?? {};
  state.version = version ?? "";
  const { bytes, pixels } = state.limits;
  const most = [
    bytes ? bytesWords(bytes) : "",
    pixels ? `${(pixels / 1e6).toLocaleString("en", { maximumSignificantDigits: 3 })} million pixels` : "",
  ].filter(Boolean);
  $("limits").textContent = most.length > 0 ? `Up to ${most.join(" and ")} a picture.` : "";
}

/** Puts the chosen models to use: every picture is wanted from each of them. */
function useModels() {
  const first = state.models.find((model) => model.name === $("first-model").value);
  const others = state.models.filter((model) => model !== first);
  const before = $("second-model").value;
  $("second-model").replaceChildren(
    new Option("none", ""),
    ...others.map((model) => new Option(model.name, model.name)),
  );
  $("second-model").value = others.some((model) => model.name === before) ? before : "";
  const second = others.find((model) => model.name === $("second-model").value);
  state.used = second ? [first, second] : [first];
  document.body.classList.toggle("comparing", state.used.length > 1);
  document.title = `${state.used.map((model) => model.name).join(" and ")} · retinanet`;

  const least = Math.min(...state.used.map((model) => model.thresholds?.score_threshold ?? 0));
  $("score").min = $("score-number").min = Math.floor(100 * least) / 100;
  setThreshold(Math.max(state.threshold, Number($("score").min)));

  $("save-model-label").hidden = state.used.length < 2;
  $("save-model").replaceChildren(...state.used.map((model) => new Option(model.name)));

  view.layOut(state.used.map((model) => model.name));
  for (const job of [...queue.waiting, ...queue.running]) {
    if (!state.used.includes(job.model)) queue.cancel(job);
  }
  for (const picture of state.pictures) want(picture);
  drawModels();
  if (state.current) showPicture(state.current, true);
  else {
    drawClasses();
    applyFilter();
  }
  for (const picture of state.pictures) drawThumb(picture);
  drawProgress();
}

function drawModels() {
  $("model-title").textContent = state.used.length > 1 ? "Models" : "Model";
  $("model-facts").replaceChildren(
    ...state.used.map((model) => {
      const list = element("dl");
      const name = element("dt", "model-name", model.name);
      list.append(name);
      const row = (what, value) => list.append(element("dt", "", what), element("dd", "", value));
      const { metrics } = model;
      if (metrics) {
        const about = [metrics.data?.split(/[\\/]/).filter(Boolean).pop(), metrics.split];
        const on = about.filter(Boolean).join(", ");
        const ap = [metrics.AP, metrics.AP50].map((value) => value?.toFixed(3) ?? "unknown");
        row("AP", `${ap[0]}${on ? ` on ${on}` : ""}`);
        row("AP50", ap[1]);
      } else row("AP", "not measured");
      row("Speed", speedWords(model.milliseconds));
      const few = model.classes.length <= 6 ? `: ${model.classes.join(", ")}` : "";
      row("Classes", `${model.classes.length}${few}`);
      if (model.image_size) {
        const most = model.max_size ? `, longer at most ${model.max_size}` : "";
        row("Input", `shorter side ${model.image_size} px${most}`);
      }
      if (model.network) row("Runs as", model.network);
      return list;
    }),
    ...(state.version ? [element("p", "hint", `retinanet ${state.version}`)] : []),
  );
}

function speedWords(milliseconds) {
  if (milliseconds === null || milliseconds === undefined) return "not yet measured";
  return `${milliseconds.toFixed(milliseconds < 10 ? 1 : 0)} ms a picture`;
}

/** The median of the server's recent pictures moves while it works. */
async function refreshSpeed() {
  try {
    takeModels(await service.describe());
    drawModels();
  } catch {
    // It is an ornament; the next picture tells what is wrong.
  }
}

// --- pictures -------------------------------------------------------------------------------

let pictureNumber = 0;

function addFiles(found) {
  const pictures = found.filter(({ file }) => isPicture(file));
  const left = found.filter(({ file }) => !isPicture(file));
  if (left.length > 0) {
    const names = left.slice(0, 3).map(({ name }) => name);
    const more = left.length > 3 ? " and others" : "";
    tell(`${count(left.length, "file")} left out, for they are no pictures: ${names.join(", ")}${more}.`);
  } else if (found.length === 0) {
    tell("There is no picture in it.");
  } else if (!noticeOfHold) hush();
  const added = pictures.map(({ file, name }) => {
    const picture = {
      id: `picture-${++pictureNumber}`,
      file,
      name,
      jobs: new Map(), // by the model's name
      thumb: "",
      unseen: false, // whether this browser has no decoder for it
      tooLarge: "",
    };
    const most = state.limits.bytes;
    if (most && file.size > most) {
      picture.tooLarge =
        `The picture has ${bytesWords(file.size)}; this server takes ${bytesWords(most)} at most. ` +
        "It was not sent.";
    }
    return picture;
  });
  state.pictures.push(...added);
  for (const picture of added) {
    picture.element = makeThumb(picture);
    want(picture);
  }
  $("strip").append(...added.map((picture) => picture.element));
  for (const picture of added) {
    drawThumb(picture);
    seen.observe(picture.element);
  }
  drawFrame();
  if (added.length > 0) select(added[0]);
  drawProgress();
}

/** Asks the models in use for what they have not yet said of a picture. */
function want(picture) {
  if (picture.tooLarge) return;
  for (const model of state.used) {
    const job = picture.jobs.get(model.name);
    if (job && job.state !== "cancelled") continue;
    const fresh = { picture, model, state: "waiting", reason: "", answer: null };
    picture.jobs.set(model.name, fresh);
    queue.add(fresh);
  }
}

function again(picture) {
  for (const model of state.used) {
    const job = picture.jobs.get(model.name);
    if (job && (job.state === "refused" || job.state === "cancelled")) {
      picture.jobs.delete(model.name);
    }
  }
  picture.tooLarge = "";
  want(picture);
  drawThumb(picture);
  if (picture === state.current) showAnswers();
  drawProgress();
}

function jobsOf(picture) {
  return state.used.map((model) => picture.jobs.get(model.name)).filter(Boolean);
}

/** waiting, running, done, refused or cancelled, for all models in use together. */
function stateOf(picture) {
  if (picture.tooLarge) return "refused";
  const states = jobsOf(picture).map((job) => job.state);
  const order = ["running", "waiting", "refused", "cancelled", "done"];
  return order.find((one) => states.includes(one)) ?? "waiting";
}

function remove(picture) {
  const place = state.pictures.indexOf(picture);
  if (place < 0) return;
  for (const job of picture.jobs.values()) queue.cancel(job);
  const focused = picture.element.contains(document.activeElement);
  forget(picture);
  state.pictures.splice(place, 1);
  if (state.current === picture) {
    state.current = null;
    const next = state.pictures[Math.min(place, state.pictures.length - 1)];
    if (next) {
      select(next);
      if (focused) next.element.focus();
    }
  }
  drawFrame();
  drawProgress();
  if (!state.current) $("choose").focus();
}

function forget(picture) {
  seen.unobserve(picture.element);
  picture.element.remove();
  if (picture.thumb) URL.revokeObjectURL(picture.thumb);
  picture.thumb = "";
}

function clearAll() {
  queue.cancelAll();
  for (const picture of state.pictures) forget(picture);
  state.pictures = [];
  state.current = null;
  drawFrame();
  drawProgress();
  $("choose").focus();
  announce("All pictures removed.");
}

/** What is on the page with pictures and without. */
function drawFrame() {
  const any = state.pictures.length > 0;
  for (const id of ["bar", "panes", "strip-bar", "save-card"]) $(id).hidden = !any;
  $("empty").hidden = any;
  const ways = ["choose", "choose-folder", "paste", "camera"].map($);
  const home = any ? $("strip-ways") : $("ways");
  if (ways[0].parentElement !== home) home.append(...ways);
  if (!any) {
    showTurn++;
    view.setPicture(null, null);
    view.panes.forEach((pane) => pane.fill(null, colourOf));
    $("found-card").hidden = true;
    drawClasses();
    applyFilter();
  }
}

// --- the strip ------------------------------------------------------------------------------

function makeThumb(picture) {
  const one = element("li", "thumb", element("span", "kind"), element("span", "state"));
  one.id = picture.id;
  one.setAttribute("role", "option");
  one.setAttribute("aria-selected", "false");
  one.tabIndex = -1;
  one.title = picture.name;
  one.addEventListener("click", () => select(picture));
  return one;
}

function drawThumb(picture) {
  const now = stateOf(picture);
  const one = picture.element;
  one.dataset.state = now;
  const found = jobsOf(picture).filter((job) => job.answer);
  const counts = found.map((job) => shownOf(job.answer).length);
  const words = {
    waiting: "waiting",
    running: "searching",
    refused: "refused",
    cancelled: "not searched",
    done: counts.join(" | "),
  }[now];
  const label = one.querySelector(".state");
  if (label.textContent !== words) label.textContent = words;
  const told = now === "done" ? counts.map((number) => count(number, "object")).join(" and ") : words;
  one.setAttribute("aria-label", `${picture.name}, ${told}`);
}

// Thumbnails are made for what is in sight, two at a time: each is decoded once and kept small.
const wantedThumbs = new Set();
let makingThumbs = 0;
const seen = new IntersectionObserver(
  (entries) => {
    for (const { target, isIntersecting } of entries) {
      const picture = state.pictures.find((one) => one.element === target);
      if (!picture || picture.thumb || picture.noThumb) continue;
      if (isIntersecting) wantedThumbs.add(picture);
      else wantedThumbs.delete(picture);
    }
    makeThumbs();
  },
  { root: $("strip"), rootMargin: "0px 300px" },
);

async function makeThumbs() {
  if (makingThumbs >= 2) return;
  const [picture] = wantedThumbs;
  if (!picture) return;
  wantedThumbs.delete(picture);
  makingThumbs++;
  try {
    const blob = await thumbnail(picture.file, Math.ceil(STRIP_HEIGHT * Math.min(2, devicePixelRatio)));
    if (state.pictures.includes(picture) && !picture.thumb) {
      picture.thumb = URL.createObjectURL(blob);
      const image = element("img");
      image.alt = "";
      image.src = picture.thumb;
      picture.element.querySelector(".kind, img").replaceWith(image);
    }
  } catch {
    picture.noThumb = true;
    const kind = picture.element.querySelector(".kind");
    if (kind) kind.textContent = fileKind(picture);
  } finally {
    makingThumbs--;
    makeThumbs();
  }
  makeThumbs();
}

let unfinishedBefore = 0;

function drawProgress() {
  const { pictures } = state;
  const numbers = { waiting: 0, running: 0, done: 0, refused: 0, cancelled: 0 };
  for (const picture of pictures) numbers[stateOf(picture)]++;
  const unfinished = numbers.waiting + numbers.running;
  const parts = [count(pictures.length, "picture")];
  if (unfinished > 0) parts.push(`${pictures.length - unfinished} searched`);
  if (numbers.refused > 0) parts.push(`${numbers.refused} refused`);
  if (numbers.cancelled > 0) parts.push(`${numbers.cancelled} not searched`);
  $("progress-words").textContent = parts.join(" · ");
  $("progress").hidden = $("cancel").hidden = unfinished === 0;
  $("progress").max = Math.max(1, pictures.length);
  $("progress").value = pictures.length - unfinished;
  if (unfinished === 0 && unfinishedBefore > 0) {
    refreshSpeed();
    if (pictures.length > 1) {
      announce(`All searched. ${parts.join(", ")}. ${pictureWords(state.current)}`);
    }
  }
  unfinishedBefore = unfinished;
  drawSave();
}

function jobChanged(job) {
  const { picture } = job;
  if (!state.pictures.includes(picture) || !state.used.includes(job.model)) return;
  drawThumb(picture);
  if (picture === state.current) {
    showAnswers();
    if (job.state === "done" || job.state === "refused") announce(pictureWords(picture));
  }
  drawProgress();
}

// --- the picture in view --------------------------------------------------------------------

let showTurn = 0;

function select(picture) {
  if (!picture) return;
  const before = state.current;
  state.current = picture;
  if (before) {
    before.element.setAttribute("aria-selected", "false");
    before.element.tabIndex = -1;
  }
  picture.element.setAttribute("aria-selected", "true");
  picture.element.tabIndex = 0;
  picture.element.scrollIntoView({ block: "nearest", inline: "nearest" });
  if (before !== picture) showPicture(picture, false);
  announce(pictureWords(picture));
}

function step(by) {
  const place = state.pictures.indexOf(state.current) + by;
  if (place < 0 || place >= state.pictures.length) return;
  const inStrip = $("strip").contains(document.activeElement);
  select(state.pictures[place]);
  if (inStrip) state.current.element.focus();
}

async function showPicture(picture, keepView) {
  const turn = ++showTurn;
  $("view").setAttribute("aria-busy", "true");
  $("name").textContent = picture.name;
  $("name").title = picture.name;
  if (!keepView) view.setPicture(null, null);
  showAnswers();
  let bitmap = null;
  try {
    bitmap = await decode(picture.file);
  } catch {
    // No decoder for it here, or no pixels in it; the server says which.
  }
  if (turn !== showTurn) {
    bitmap?.close();
    return;
  }
  picture.unseen = bitmap === null;
  picture.size = bitmap ? { width: bitmap.width, height: bitmap.height } : null;
  view.setPicture(bitmap, picture.size, keepView);
  showAnswers();
  $("view").removeAttribute("aria-busy");
}

/** Fills the panes and the lists from the answers that are there. */
function showAnswers() {
  const picture = state.current;
  if (!picture) return;
  const jobs = state.used.map((model) => picture.jobs.get(model.name) ?? null);
  const answers = jobs.map((job) => job?.answer ?? null);
  if (picture.unseen && !view.size) {
    const known = answers.find(Boolean);
    if (known) view.setPicture(null, { width: known.width, height: known.height });
  }
  jobs.forEach((job, n) => {
    const pane = view.panes[n];
    const answer = answers[n];
    const turned = answer && picture.size && !sameSize(answer, picture.size);
    // The same answer stays as it is: the focus may be on one of its boxes.
    const drawn = turned ? null : answer;
    if (pane.answer !== drawn || drawn === null) pane.fill(drawn, colourOf);
    pane.job = job;
    pane.turned = turned;
  });
  drawLists(answers);
  drawClasses();
  applyFilter();
}

function sameSize(a, b) {
  return a.width === b.width && a.height === b.height;
}

function stageWords(picture, pane) {
  const { job } = pane;
  const retry = { button: "Try again", act: () => again(picture) };
  if (picture.tooLarge) return [picture.tooLarge, { bad: true }];
  if (!job || job.state === "waiting") return ["Waiting for its turn"];
  if (job.state === "running") return ["Searching…"];
  if (job.state === "refused") return [job.reason, { bad: true, ...retry }];
  if (job.state === "cancelled") return ["Not searched.", { ...retry, button: "Search it" }];
  const { answer } = job;
  if (pane.turned) {
    return [
      `This browser shows the picture as ${picture.size.width} × ${picture.size.height} pixels, the ` +
        `server searched ${answer.width} × ${answer.height}. The boxes would lie wrong and are not drawn; ` +
        "the list has them.",
    ];
  }
  const shown = shownOf(answer).length;
  const seenWords =
    picture.unseen && view.size
      ? `This browser cannot show ${fileKind(picture)} pictures. The server has read it: the boxes lie on an empty sheet of its size.`
      : "";
  if (shown > 0) return [seenWords];
  if (answer.length === 0) return [`${seenWords} Nothing was found in this picture.`.trim()];
  const hidden = [...answer.labels].some((label) => state.off.has(answer.model.classes[label]));
  const lower = `Nothing scores ${state.threshold.toFixed(2)} or more; ${count(answer.length, "object")} ${answer.length === 1 ? "scores" : "score"} less.`;
  const words = hidden && countsOf(answer).size > 0 ? "The classes found here are switched off." : lower;
  return [
    `${seenWords} ${words}`.trim(),
    {
      button: "Show all",
      act: () => {
        state.off.clear();
        if (countsOf(answer).size === 0) setThreshold(Number($("score").min));
        drawClasses(true);
        applyFilter();
      },
    },
  ];
}

function pictureWords(picture) {
  if (!picture) return "";
  if (picture.tooLarge) return `${picture.name}: ${picture.tooLarge}`;
  const several = state.used.length > 1;
  const parts = state.used.map((model) => {
    const job = picture.jobs.get(model.name);
    const who = several ? `${model.name}: ` : "";
    if (job?.answer) return `${who}${answerWords(job.answer)}`;
    return `${who}${job?.state === "refused" ? job.reason : stateOf(picture)}`;
  });
  return `${picture.name}: ${parts.join("; ")}`;
}

/** "12 objects: 9 RBC, 3 WBC" of what is shown. */
function answerWords(answer) {
  const shown = shownOf(answer);
  const counts = new Map();
  for (const i of shown) counts.set(answer.className(i), (counts.get(answer.className(i)) ?? 0) + 1);
  const list = [...counts].sort((a, b) => b[1] - a[1]).map(([name, number]) => `${number} ${name}`);
  const more = list.length > 6 ? [...list.slice(0, 6), `${list.length - 6} classes more`] : list;
  return `${count(shown.length, "object")}${more.length > 0 ? `: ${more.join(", ")}` : ""}`;
}

// --- filter: score and classes ----------------------------------------------------------------

/** The numbers of the detections that the slider and the classes let through, best first. */
function shownOf(answer) {
  const kept = [];
  for (let i = 0; i < answer.length; i++) {
    if (answer.scores[i] >= state.threshold && !state.off.has(answer.className(i))) kept.push(i);
  }
  return kept;
}

/** How many of each class the slider lets through, whether the class is switched on or not. */
function countsOf(answer) {
  const counts = new Map();
  for (let i = 0; i < answer.length; i++) {
    if (answer.scores[i] < state.threshold) continue;
    const name = answer.className(i);
    counts.set(name, (counts.get(name) ?? 0) + 1);
  }
  return counts;
}

function classNames() {
  return [...new Set(state.used.flatMap((model) => model.classes))];
}

let colours = { of: [], map: new Map() };

/** Colours by class as `retinanet detect` has them; a second model's own classes come after. */
function colourOf(name) {
  if (colours.of !== state.used) {
    const map = new Map(classNames().map((one, n) => [one, PALETTE[n % PALETTE.length]]));
    colours = { of: state.used, map };
  }
  return colours.map.get(name) ?? PALETTE[0];
}

function setThreshold(value) {
  const [low, high] = [Number($("score").min), 1];
  state.threshold = Math.round(100 * Math.max(low, Math.min(high, value))) / 100;
  $("score").value = state.threshold;
  $("score").setAttribute("aria-valuetext", state.threshold.toFixed(2));
  if (document.activeElement !== $("score-number") || Number($("score-number").value) !== state.threshold) {
    $("score-number").value = state.threshold.toFixed(2);
  }
}

function currentAnswers() {
  return state.used.map((model) => state.current?.jobs.get(model.name)?.answer ?? null);
}

let filterFrame = 0;

/** Everything that follows the slider and the toggles; the server is not asked. */
function applyFilter() {
  const answers = currentAnswers();
  const shown = answers.map((answer) => (answer ? shownOf(answer) : []));
  view.panes.forEach((pane, n) => {
    pane.filter(pane.answer ? shown[n] : []);
    if (state.current) {
      const [words, more] = stageWords(state.current, pane);
      pane.say(words, more);
    }
  });
  for (const [n, list] of lists.entries()) {
    const kept = new Set(shown[n]);
    list.items.forEach((item, i) => item.classList.toggle("off", !kept.has(i)));
    list.title.textContent = listTitle(n, kept.size);
    list.nothing.hidden = kept.size > 0;
    list.list.hidden = kept.size === 0;
  }
  drawCounts(answers);
  drawScores(answers, shown);
  drawDifference(answers);
  drawFacts(answers, shown);
  drawSave();
  if (filterFrame) return;
  // Of a thousand pictures the strip may follow a moment later.
  filterFrame = requestAnimationFrame(() => {
    filterFrame = 0;
    for (const picture of state.pictures) drawThumb(picture);
  });
}

function drawFacts(answers, shown) {
  const picture = state.current;
  if (!picture) return;
  const size = picture.size ?? answers.find(Boolean);
  const parts = [];
  if (size) parts.push(`${size.width} × ${size.height} px`);
  parts.push(bytesWords(picture.file.size));
  const several = state.used.length > 1;
  answers.forEach((answer, n) => {
    if (!answer) return;
    const time = answer.milliseconds.total;
    const took = typeof time === "number" ? ` in ${Math.round(time)} ms` : "";
    const who = several ? `${answer.model.name} ` : "";
    parts.push(`${who}${count(shown[n].length, "object")}${took}`);
    if (several) view.panes[n].title.textContent = `${answer.model.name} · ${count(shown[n].length, "object")}`;
  });
  $("facts").textContent = parts.join(" · ");
}

function drawScores(answers, shown) {
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
    for (const [key, value] of Object.entries({ x: 2 * n + 0.2, y: 24 - height, width: 1.6, height })) {
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

/** A toggle for each class; of many classes, those in this picture come first. */
function drawClasses(force = false) {
  const names = classNames();
  const many = names.length > FEW;
  const here = new Set(
    currentAnswers().flatMap((answer) => (answer ? [...answer.labels].map((label) => answer.model.classes[label]) : [])),
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
    const focused = document.activeElement?.closest?.(".classes") ? document.activeElement.value : null;
    $("classes").replaceChildren(...present.map(classToggle));
    $("absent-classes").replaceChildren(...absent.map(classToggle));
    if (focused !== null) {
      for (const box of document.querySelectorAll(".classes input")) {
        if (box.value === focused) box.focus();
      }
    }
  }
  $("absent").hidden = absent.length === 0;
  $("absent-words").textContent = `${count(absent.length, "class", "classes")} ${state.current ? "not in this picture" : "in all"}`;
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
    applyFilter();
    if (state.current) announce(pictureWords(state.current), 400);
  });
  const swatch = element("span", "swatch");
  swatch.style.background = css(colourOf(name));
  const label = element("label", "", box, swatch, element("span", "class-name", name), element("span", "count"));
  return element("li", "", label);
}

function drawCounts(answers) {
  const counts = answers.map((answer) => (answer ? countsOf(answer) : null));
  for (const box of document.querySelectorAll(".classes input")) {
    const numbers = counts.map((one) => (one ? (one.get(box.value) ?? 0) : "")).filter((one) => one !== "");
    const label = box.closest("label");
    label.querySelector(".count").textContent = numbers.join(" | ");
    label.classList.toggle("zero", state.current !== null && numbers.every((one) => one === 0));
  }
}

function drawDifference(answers) {
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
    line.append(element("td", "", String(a)), element("td", "", String(b)), element("td", "", sign));
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

// --- lists of detections ------------------------------------------------------------------------

let lists = [];

function listTitle(n, number) {
  const who = state.used.length > 1 ? `${state.used[n].name}: ` : "";
  return `${who}${count(number, "object")}`;
}

function drawLists(answers) {
  const known = lists.length === answers.length && lists.every((list, n) => list.answer === answers[n]);
  $("found-card").hidden = !answers.some(Boolean);
  if (known) return;
  lists = answers.map((answer, n) => makeList(answer, n));
  $("lists").replaceChildren(
    ...lists.filter((list) => list.answer).flatMap((list) => [
      element("div", "", list.title, list.nothing, list.list),
    ]),
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
      element("span", "score", answer.scores[i].toFixed(2)),
    );
    item.id = `found-${n}-${i}`;
    item.setAttribute("role", "option");
    item.setAttribute("aria-selected", "false");
    item.setAttribute("aria-label", `${answer.className(i)}, score ${answer.scores[i].toFixed(2)}, ${size} pixels`);
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

/** Lifts out a detection on the picture and in its list; i is -1 for none. */
function activate(pane, i, pressed = false) {
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

// --- saving -----------------------------------------------------------------------------------

function saveModel() {
  return state.used.find((model) => model.name === $("save-model").value) ?? state.used[0];
}

/** The pictures to save, with what of each; those without an answer are told apart. */
function toSave(onlyShown = $("save-shown").checked) {
  const model = saveModel();
  const all = $("save-which").value === "all";
  const pictures = all ? state.pictures : state.current ? [state.current] : [];
  const ready = [];
  const failures = [];
  let open = 0;
  for (const picture of pictures) {
    const job = picture.jobs.get(model?.name);
    if (job?.answer) {
      const { answer } = job;
      const shown = onlyShown ? shownOf(answer) : Array.from({ length: answer.length }, (_, i) => i);
      ready.push({ picture, name: picture.name, answer, shown });
    } else if (picture.tooLarge || job?.state === "refused") {
      failures.push({ file: picture.name, reason: picture.tooLarge || job.reason });
    } else open++;
  }
  return { ready, failures, open };
}

function drawSave() {
  if ($("save-card").hidden) return;
  $("save-which-label").hidden = state.pictures.length < 2;
  if (state.pictures.length < 2) $("save-which").value = "one";
  $("save-which").options[1].textContent = `all ${state.pictures.length}`;
  const { ready, failures, open } = toSave(true);
  const shown = ready.reduce((sum, one) => sum + one.shown.length, 0);
  const all = ready.reduce((sum, one) => sum + one.answer.length, 0);
  $("save-shown-words").textContent = `only what is shown: ${shown} of ${count(all, "object")}`;
  $("save-json").disabled = ready.length + failures.length === 0;
  $("save-coco").disabled = ready.length === 0;
  const drawable = ready.filter((one) => !one.picture.unseen);
  $("save-png").disabled = drawable.length === 0 || saving;
  if (saving) return;
  const hints = [];
  if (open > 0) hints.push(`${count(open, "picture")} not searched yet, and left out.`);
  if (drawable.length < ready.length) {
    hints.push(
      ready.length === 1
        ? "This browser cannot show the picture, and so not draw on it."
        : "Pictures that this browser cannot show are not drawn on.",
    );
  }
  $("save-hint").textContent = hints.join(" ");
}

let saving = false;

function saveText(text, name) {
  save(new Blob([text], { type: "application/json" }), name);
  announce(`${name} saved.`);
}

$("save-json").addEventListener("click", () => {
  const { ready, failures } = toSave();
  saveText(detectionsJson(ready, failures), "detections.json");
});
$("save-coco").addEventListener("click", () => saveText(cocoResults(toSave().ready), "coco_results.json"));
$("save-png").addEventListener("click", async () => {
  // What is drawn is what is seen; the low scores of a detector would cover the picture.
  const { ready } = toSave(true);
  saving = true;
  drawSave();
  const files = [];
  const failed = [];
  const taken = new Set();
  try {
    for (const [n, { picture, name, answer, shown }] of ready.entries()) {
      if (ready.length > 1) $("save-hint").textContent = `Drawing ${n + 1} of ${ready.length}…`;
      let bitmap = null;
      try {
        bitmap = await decode(picture.file);
        if (!sameSize(bitmap, answer)) throw new Error("it is shown in another size than searched");
        const blob = await drawnPicture(bitmap, answer, shown, colourOf);
        const own = ready.length > 1 ? name : name.split("/").pop();
        files.push({ name: uniqueName(withoutSuffix(own) + "-detections.png", ".png", taken), blob });
      } catch {
        failed.push(name);
      } finally {
        bitmap?.close();
      }
    }
    if (files.length === 1) save(files[0].blob, files[0].name);
    else if (files.length > 1) save(await zip(files), "pictures.zip");
    if (files.length > 0) announce(files.length === 1 ? `${files[0].name} saved.` : `${files.length} pictures saved.`);
  } catch (error) {
    tell(`The pictures could not be saved: ${error.message}`);
  } finally {
    saving = false;
    drawSave();
  }
  if (failed.length > 0) {
    tell(`This browser could not draw on ${count(failed.length, "picture")}: ${failed.slice(0, 3).join(", ")}.`);
  }
});
for (const id of ["save-which", "save-model", "save-shown"]) $(id).addEventListener("change", drawSave);

// --- ways in ----------------------------------------------------------------------------------

$("choose").addEventListener("click", () => $("files").click());
$("choose-folder").addEventListener("click", () => $("folder").click());
$("camera").addEventListener("click", () => camera.open());
for (const id of ["files", "folder"]) {
  $(id).addEventListener("change", () => {
    const found = chosen($(id));
    $(id).value = ""; // the same file may be chosen again
    addFiles(found);
  });
}

let pasted = 0;

function namedPaste(file) {
  // A browser calls every picture from the clipboard image.png.
  const own = file.name && !/^image\.\w+$/.test(file.name);
  const suffix = (file.type.split("/")[1] || "png").replace("jpeg", "jpg").replace("+xml", "");
  return { file, name: own ? file.name : `pasted-${++pasted}.${suffix}` };
}

document.addEventListener("paste", (event) => {
  if (event.target.closest?.("input, textarea, dialog")) return;
  const files = [...(event.clipboardData?.files ?? [])];
  event.preventDefault();
  if (files.length > 0) addFiles(files.map(namedPaste));
  else tell("There is no picture in the clipboard.");
});
$("paste").addEventListener("click", async () => {
  if (!navigator.clipboard?.read) {
    tell("This browser gives the clipboard only to the keys: press Ctrl V.");
    return;
  }
  try {
    const found = [];
    for (const item of await navigator.clipboard.read()) {
      const type = item.types.find((one) => one.startsWith("image/"));
      if (type) found.push(namedPaste(new File([await item.getType(type)], "", { type })));
    }
    if (found.length > 0) addFiles(found);
    else tell("There is no picture in the clipboard.");
  } catch (error) {
    const words = error.name === "NotAllowedError" ? "The browser was not allowed to read it" : error.message;
    tell(`The clipboard cannot be read: ${words}. Ctrl V works as well.`);
  }
});

const carriesFiles = (event) => [...(event.dataTransfer?.types ?? [])].includes("Files");
let dragDepth = 0;
window.addEventListener("dragenter", (event) => {
  if (!carriesFiles(event)) return;
  dragDepth++;
  $("drop-sheet").hidden = false;
});
window.addEventListener("dragleave", (event) => {
  if (!carriesFiles(event)) return;
  dragDepth = Math.max(0, dragDepth - 1);
  $("drop-sheet").hidden = dragDepth === 0;
});
window.addEventListener("dragover", (event) => {
  if (carriesFiles(event)) event.preventDefault();
});
window.addEventListener("drop", async (event) => {
  dragDepth = 0;
  $("drop-sheet").hidden = true;
  if (!carriesFiles(event)) return;
  event.preventDefault();
  try {
    addFiles(await dropped(event.dataTransfer));
  } catch (error) {
    tell(`What was dropped cannot be read: ${error.message}`);
  }
});

// --- controls ---------------------------------------------------------------------------------

$("score").addEventListener("input", () => {
  setThreshold(Number($("score").value));
  applyFilter();
  announce(state.current ? pictureWords(state.current) : `Least score ${state.threshold.toFixed(2)}`, 500);
});
$("score-number").addEventListener("input", () => {
  const value = Number.parseFloat($("score-number").value);
  if (!Number.isFinite(value) || value < Number($("score").min) || value > 1) return;
  setThreshold(value);
  applyFilter();
  if (state.current) announce(pictureWords(state.current), 500);
});
$("score-number").addEventListener("change", () => {
  const value = Number.parseFloat($("score-number").value);
  setThreshold(Number.isFinite(value) ? value : state.threshold);
  $("score-number").value = state.threshold.toFixed(2);
  applyFilter();
});
function switchClasses(on) {
  // With something in the search box, those that it finds.
  const search = $("class-search").value.trim().toLowerCase();
  for (const name of classNames()) {
    if (!name.toLowerCase().includes(search)) continue;
    if (on) state.off.delete(name);
    else state.off.add(name);
  }
  drawClasses(true);
  applyFilter();
  if (state.current) announce(pictureWords(state.current), 400);
}
$("all").addEventListener("click", () => switchClasses(true));
$("none").addEventListener("click", () => switchClasses(false));
$("class-search").addEventListener("input", () => drawClasses());
$("first-model").addEventListener("change", useModels);
$("second-model").addEventListener("change", useModels);
$("zoom-in").addEventListener("click", () => view.zoom(1.4));
$("zoom-out").addEventListener("click", () => view.zoom(1 / 1.4));
$("fit").addEventListener("click", () => view.fit());
$("full").addEventListener("click", () => view.zoomTo(1));
$("remove").addEventListener("click", () => remove(state.current));
$("clear").addEventListener("click", clearAll);
$("cancel").addEventListener("click", () => {
  queue.cancelAll();
  drawProgress();
  announce("Cancelled.");
});
$("notice-close").addEventListener("click", hush);
$("help").addEventListener("click", () => $("help-dialog").showModal());

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.defaultPrevented) return;
  if (document.querySelector("dialog[open]")) return;
  if (event.target.closest?.("input:not([type=checkbox]), select, textarea")) return;
  if (event.key === "?") $("help-dialog").showModal();
  else if (!state.current) return;
  else if (event.shiftKey && event.key.startsWith("Arrow")) {
    const [dx, dy] = { ArrowLeft: [1, 0], ArrowRight: [-1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] }[event.key];
    view.pan(60 * dx, 60 * dy);
  } else if (event.key === "ArrowLeft") step(-1);
  else if (event.key === "ArrowRight") step(1);
  else if (event.key === "Home" && $("strip").contains(event.target)) step(-state.pictures.indexOf(state.current));
  else if (event.key === "End" && $("strip").contains(event.target)) {
    step(state.pictures.length - 1 - state.pictures.indexOf(state.current));
  } else if (event.key === "+" || event.key === "=") view.zoom(1.4);
  else if (event.key === "-" || event.key === "−") view.zoom(1 / 1.4);
  else if (event.key === "0") view.fit();
  else if (event.key === "1") view.zoomTo(1);
  else if (event.key === "Delete") remove(state.current);
  else return;
  event.preventDefault();
});

// --- theme ------------------------------------------------------------------------------------

const THEMES = ["auto", "light", "dark"];

function drawTheme() {
  const { theme } = document.documentElement.dataset;
  const name = theme[0].toUpperCase() + theme.slice(1);
  $("theme-name").textContent = name;
  const next = THEMES[(THEMES.indexOf(theme) + 1) % THEMES.length];
  $("theme").title = `Colours: ${theme === "auto" ? "as the system" : theme}; press for ${next}`;
  $("theme").setAttribute("aria-label", `Colours: ${name}`);
  view.draw();
}

$("theme").addEventListener("click", () => {
  const root = document.documentElement;
  root.dataset.theme = THEMES[(THEMES.indexOf(root.dataset.theme) + 1) % THEMES.length];
  try {
    localStorage.setItem("retinanet.theme", root.dataset.theme);
  } catch {
    // Storage is switched off: until the page is left.
  }
  drawTheme();
  announce(`Colours: ${root.dataset.theme}`);
});

drawTheme();
setThreshold(state.threshold);
drawFrame();
connect();
