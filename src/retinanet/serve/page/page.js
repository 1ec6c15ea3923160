// The page: images come in, answers are filtered here, everything is told in words as well.

import {
  drawClasses,
  drawCounts,
  drawDifference,
  drawScores,
  setThreshold,
  whenFiltered,
} from "./filter.js";
import { drawLists, filterLists, view } from "./found.js";
import { announce, hush, noticeOfHold, tell } from "./notice.js";
import { decode, isImage } from "./images.js";
import { drawSave } from "./saving.js";
import { Queue, Refusal, Service, refusalWords } from "./service.js";
import {
  $,
  bytesWords,
  colourOf,
  count,
  countsOf,
  currentAnswers,
  element,
  fileKind,
  imageWords,
  sameSize,
  shownOf,
  state,
  stateOf,
} from "./state.js";
import { drawThumb, makeThumb, seen } from "./strip.js";
import { openWays } from "./ways.js";

const service = new Service();
const queue = new Queue(service, {
  changed: jobChanged,
  held: showHold,
  first: (job) => job.image === state.current,
});

function showHold(hold) {
  if (!hold) {
    if (noticeOfHold) hush();
    return;
  }
  if (hold.kind === "key") {
    askForKey();
    return;
  }
  const what = hold.kind === "busy" ? "The server is busy." : "The server does not answer.";
  tell(`${what} The images wait and are tried again in`, {
    button: "Try now",
    act: () => queue.retry(),
    wait: true,
    until: hold.until,
    hold: true,
  });
}

/** Takes a message away; what the page still waits for is told again. */
function closeNotice() {
  hush();
  if (keyWanted) tellOfKey();
  else if (queue.hold) showHold(queue.hold);
}

// --- the key --------------------------------------------------------------------------------

let keyWanted = false;

function tellOfKey() {
  const more = { button: "Enter the key", act: askForKey, wait: true, hold: true };
  tell("This server asks for a key.", more);
}

function askForKey() {
  keyWanted = true;
  const dialog = $("key-dialog");
  const tried = service.key !== "";
  $("key-words").classList.toggle("bad", tried);
  $("key-words").textContent = tried
    ? "The server did not take this key. Look for a letter too many or too few."
    : "Whoever runs the server can give it to you. It is kept until this tab is closed.";
  tellOfKey();
  if (!dialog.open) dialog.showModal();
  $("key").select();
}

$("key-form").addEventListener("submit", () => {
  keyWanted = false;
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
    tell(
      words ?? `The server does not say what it can do: ${refusalWords(error)} Trying again in`,
      {
        wait: true,
        hold: true,
        until: Date.now() + 1000 * seconds,
        button: "Try now",
        act: connect,
      },
    );
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
    pixels
      ? `${(pixels / 1e6).toLocaleString("en", { maximumSignificantDigits: 3 })} million pixels`
      : "",
  ].filter(Boolean);
  $("limits").textContent = most.length > 0 ? `Up to ${most.join(" and ")} an image.` : "";
}

/** Puts the chosen models to use: every image is wanted from each of them. */
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
  for (const image of state.images) want(image);
  drawModels();
  if (state.current) showImage(state.current, true);
  else {
    drawClasses();
    applyFilter();
  }
  for (const image of state.images) drawThumb(image);
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
  return `${milliseconds.toFixed(milliseconds < 10 ? 1 : 0)} ms an image`;
}

/** The median of the server's recent images moves while it works. */
async function refreshSpeed() {
  try {
    takeModels(await service.describe());
    drawModels();
  } catch {
    // It is an ornament; the next image tells what is wrong.
  }
}

// --- images -------------------------------------------------------------------------------

let imageNumber = 0;

function addFiles(found) {
  const images = found.filter(({ file }) => isImage(file));
  const left = found.filter(({ file }) => !isImage(file));
  if (left.length > 0) {
    const names = left.slice(0, 3).map(({ name }) => name);
    const more = left.length > 3 ? " and others" : "";
    const list = `${names.join(", ")}${more}`;
    tell(`${count(left.length, "file")} left out, for they are no images: ${list}.`);
  } else if (found.length === 0) {
    tell("There is no image in it.");
  } else if (!noticeOfHold) closeNotice();
  const added = images.map(({ file, name }) => {
    return {
      id: `image-${++imageNumber}`,
      file,
      name,
      jobs: new Map(), // by the model's name
      thumb: "",
      unseen: false, // whether this browser has no decoder for it
      tooLarge: "",
    };
  });
  state.images.push(...added);
  for (const image of added) {
    image.element = makeThumb(image, select);
    want(image);
  }
  $("strip").append(...added.map((image) => image.element));
  for (const image of added) {
    drawThumb(image);
    seen.observe(image.element);
  }
  drawFrame();
  if (added.length > 0) select(added[0]);
  drawProgress();
}

/** Asks the models in use for what they have not yet said of an image. */
function want(image) {
  const [size, most] = [image.file.size, state.limits.bytes];
  if (most && size > most) {
    image.tooLarge =
      `The image has ${bytesWords(size)}; this server takes ${bytesWords(most)} at most. ` +
      "It was not sent.";
    return;
  }
  for (const model of state.used) {
    const job = image.jobs.get(model.name);
    if (job && job.state !== "cancelled") continue;
    const fresh = { image, model, state: "waiting", reason: "", answer: null };
    image.jobs.set(model.name, fresh);
    queue.add(fresh);
  }
}

function again(image) {
  for (const model of state.used) {
    const job = image.jobs.get(model.name);
    if (job && (job.state === "refused" || job.state === "cancelled")) {
      image.jobs.delete(model.name);
    }
  }
  want(image);
  drawThumb(image);
  if (image === state.current) showAnswers();
  drawProgress();
}

function remove(image) {
  const place = state.images.indexOf(image);
  if (place < 0) return;
  for (const job of image.jobs.values()) queue.cancel(job);
  const focused = image.element.contains(document.activeElement);
  forget(image);
  state.images.splice(place, 1);
  if (state.current === image) {
    state.current = null;
    const next = state.images[Math.min(place, state.images.length - 1)];
    if (next) {
      select(next);
      if (focused) next.element.focus();
    }
  }
  drawFrame();
  drawProgress();
  if (!state.current) $("choose").focus();
}

function forget(image) {
  seen.unobserve(image.element);
  image.element.remove();
  if (image.thumb) URL.revokeObjectURL(image.thumb);
  image.thumb = "";
}

function clearAll() {
  queue.cancelAll();
  for (const image of state.images) forget(image);
  state.images = [];
  state.current = null;
  drawFrame();
  drawProgress();
  $("choose").focus();
  announce("All images removed.");
}

/** What is on the page with images and without. */
function drawFrame() {
  const any = state.images.length > 0;
  for (const id of ["bar", "panes", "strip-bar", "save-card"]) $(id).hidden = !any;
  $("empty").hidden = any;
  const ways = ["choose", "choose-folder", "paste", "camera"].map($);
  const home = any ? $("strip-ways") : $("ways");
  if (ways[0].parentElement !== home) home.append(...ways);
  if (!any) {
    showTurn++;
    view.setImage(null, null);
    view.panes.forEach((pane) => pane.fill(null, colourOf));
    $("found-card").hidden = true;
    drawClasses();
    applyFilter();
  }
}

let unfinishedBefore = 0;

function drawProgress() {
  const { images } = state;
  const numbers = { waiting: 0, running: 0, done: 0, refused: 0, cancelled: 0 };
  for (const image of images) numbers[stateOf(image)]++;
  const unfinished = numbers.waiting + numbers.running;
  const parts = [count(images.length, "image")];
  if (unfinished > 0) parts.push(`${images.length - unfinished} searched`);
  if (numbers.refused > 0) parts.push(`${numbers.refused} refused`);
  if (numbers.cancelled > 0) parts.push(`${numbers.cancelled} not searched`);
  $("progress-words").textContent = parts.join(" · ");
  $("progress").hidden = $("cancel").hidden = unfinished === 0;
  $("progress").max = Math.max(1, images.length);
  $("progress").value = images.length - unfinished;
  if (unfinished === 0 && unfinishedBefore > 0) {
    refreshSpeed();
    if (images.length > 1) {
      announce(`All searched. ${parts.join(", ")}. ${imageWords(state.current)}`);
    }
  }
  unfinishedBefore = unfinished;
  drawSave();
}

function jobChanged(job) {
  const { image } = job;
  if (!state.images.includes(image) || !state.used.includes(job.model)) return;
  drawThumb(image);
  if (image === state.current) {
    showAnswers();
    if (job.state === "done" || job.state === "refused") announce(imageWords(image));
  }
  drawProgress();
}

// --- the image in view --------------------------------------------------------------------

let showTurn = 0;

function select(image) {
  if (!image) return;
  const before = state.current;
  state.current = image;
  if (before) {
    before.element.setAttribute("aria-selected", "false");
    before.element.tabIndex = -1;
  }
  image.element.setAttribute("aria-selected", "true");
  image.element.tabIndex = 0;
  image.element.scrollIntoView({ block: "nearest", inline: "nearest" });
  if (before !== image) showImage(image, false);
  announce(imageWords(image));
}

function step(by) {
  const place = state.images.indexOf(state.current) + by;
  if (place < 0 || place >= state.images.length) return;
  const inStrip = $("strip").contains(document.activeElement);
  select(state.images[place]);
  if (inStrip) state.current.element.focus();
}

async function showImage(image, keepView) {
  const turn = ++showTurn;
  $("view").setAttribute("aria-busy", "true");
  $("name").textContent = image.name;
  $("name").title = image.name;
  if (!keepView) view.setImage(null, null);
  showAnswers();
  let bitmap = null;
  try {
    bitmap = await decode(image.file);
  } catch {
    // No decoder for it here, or no pixels in it; the server says which.
  }
  if (turn !== showTurn) {
    bitmap?.close();
    return;
  }
  image.unseen = bitmap === null;
  image.size = bitmap ? { width: bitmap.width, height: bitmap.height } : null;
  view.setImage(bitmap, image.size, keepView);
  showAnswers();
  $("view").removeAttribute("aria-busy");
}

/** Fills the panes and the lists from the answers that are there. */
function showAnswers() {
  const image = state.current;
  if (!image) return;
  const jobs = state.used.map((model) => image.jobs.get(model.name) ?? null);
  const answers = jobs.map((job) => job?.answer ?? null);
  if (image.unseen && !view.size) {
    const known = answers.find(Boolean);
    if (known) view.setImage(null, { width: known.width, height: known.height });
  }
  jobs.forEach((job, n) => {
    const pane = view.panes[n];
    const answer = answers[n];
    const turned = answer && image.size && !sameSize(answer, image.size);
    // The same answer stays as it is: the focus may be on one of its boxes. Other models may have
    // brought other colours.
    const drawn = turned ? null : answer;
    if (pane.answer !== drawn || drawn === null || pane.used !== state.used) {
      pane.fill(drawn, colourOf);
    }
    pane.used = state.used;
    pane.job = job;
    pane.turned = turned;
  });
  drawLists(answers);
  drawClasses();
  applyFilter();
}

function stageWords(image, pane) {
  const { job } = pane;
  const retry = { button: "Try again", act: () => again(image) };
  if (image.tooLarge) return [image.tooLarge, { bad: true }];
  if (!job || job.state === "waiting") return ["Waiting for its turn"];
  if (job.state === "running") return ["Searching…"];
  if (job.state === "refused") return [job.reason, { bad: true, ...retry }];
  if (job.state === "cancelled") return ["Not searched.", { ...retry, button: "Search it" }];
  const { answer } = job;
  if (pane.turned) {
    const [here, there] = [image.size, answer].map(({ width, height }) => `${width} × ${height}`);
    return [
      `This browser shows the image as ${here} pixels, the server searched ${there}. The boxes ` +
        "would lie wrong and are not drawn; the list has them.",
    ];
  }
  const shown = shownOf(answer).length;
  const seenWords =
    image.unseen && view.size
      ? `This browser cannot show ${fileKind(image)} images; the boxes lie on an empty sheet.`
      : "";
  if (shown > 0) return [seenWords];
  if (answer.length === 0) return [`${seenWords} Nothing was found in this image.`.trim()];
  const hidden = [...answer.labels].some((label) => state.off.has(answer.model.classes[label]));
  const less = `${count(answer.length, "object")} ${answer.length === 1 ? "scores" : "score"} less`;
  const lower = `Nothing scores ${state.threshold.toFixed(2)} or more; ${less}.`;
  const words =
    hidden && countsOf(answer).size > 0 ? "The classes found here are switched off." : lower;
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
  filterLists(shown);
  drawCounts(answers);
  drawScores(answers, shown);
  drawDifference(answers);
  drawFacts(answers, shown);
  drawSave();
  if (filterFrame) return;
  // Of a thousand images the strip may follow a moment later.
  filterFrame = requestAnimationFrame(() => {
    filterFrame = 0;
    for (const image of state.images) drawThumb(image);
  });
}

function drawFacts(answers, shown) {
  const image = state.current;
  if (!image) return;
  const size = image.size ?? answers.find(Boolean);
  const parts = [];
  if (size) parts.push(`${size.width} × ${size.height} px`);
  parts.push(bytesWords(image.file.size));
  const several = state.used.length > 1;
  answers.forEach((answer, n) => {
    const title = answer
      ? `${answer.model.name} · ${count(shown[n].length, "object")}`
      : state.used[n].name;
    if (several) view.panes[n].title.textContent = title;
    if (!answer) return;
    const time = answer.milliseconds.total;
    const took = typeof time === "number" ? ` in ${Math.round(time)} ms` : "";
    const who = several ? `${answer.model.name} ` : "";
    parts.push(`${who}${count(shown[n].length, "object")}${took}`);
  });
  $("facts").textContent = parts.join(" · ");
}

// --- controls ---------------------------------------------------------------------------------

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
$("notice-close").addEventListener("click", closeNotice);
$("help").addEventListener("click", () => $("help-dialog").showModal());

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.defaultPrevented) return;
  if (document.querySelector("dialog[open]")) return;
  if (event.target.closest?.("input:not([type=checkbox]), select, textarea")) return;
  if (event.key === "?") $("help-dialog").showModal();
  else if (!state.current) return;
  else if (event.shiftKey && event.key.startsWith("Arrow")) {
    const [dx, dy] = {
      ArrowLeft: [1, 0],
      ArrowRight: [-1, 0],
      ArrowUp: [0, 1],
      ArrowDown: [0, -1],
    }[event.key];
    view.pan(60 * dx, 60 * dy);
  } else if (event.key === "ArrowLeft") step(-1);
  else if (event.key === "ArrowRight") step(1);
  else if (event.key === "Home" && $("strip").contains(event.target))
    step(-state.images.indexOf(state.current));
  else if (event.key === "End" && $("strip").contains(event.target)) {
    step(state.images.length - 1 - state.images.indexOf(state.current));
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

whenFiltered(applyFilter);
openWays(addFiles);
drawTheme();
setThreshold(state.threshold);
drawFrame();
connect();
