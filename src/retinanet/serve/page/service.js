// Requests to the service, and the queue of images that wait for them.

import { changed, state, stored } from "./state.js";

const MAX_UPLOADS = 3;

let apiKey = stored("sessionStorage", "retinanet.key") ?? "";

export const hasKey = () => apiKey !== "";

export function setKey(key) {
  apiKey = key;
  stored("sessionStorage", "retinanet.key", key);
  state.pause?.resume();
}

/** An error that is explained to the user as it is. */
class ExplainedError extends Error {}

/** Wait, as all requests do, until `seconds` (0: any time) have passed or the user continues. */
export function pause(text, seconds, button = "Try now") {
  if (!state.pause) {
    const { promise, resolve } = Promise.withResolvers();
    const resume = () => {
      clearTimeout(timer);
      state.pause = null;
      changed();
      resolve();
    };
    const timer = seconds && setTimeout(resume, 1000 * seconds);
    const retry = seconds ? ` Trying again in ${seconds} s.` : "";
    state.pause = { text: text + retry, button, isTimed: seconds > 0, promise, resume };
    changed();
  }
  return state.pause.promise;
}

const url = (path) => new URL(path, document.baseURI);
const isAlive = () => fetch(url("healthz"), { cache: "no-store" }).then(({ ok }) => ok, () => false);

/** Fetch JSON; waits while the server is busy, does not respond, or needs another key. */
async function request(path, { signal, ...options } = {}) {
  for (let closed = 0; ; ) {
    while (state.pause) await state.pause.promise;
    signal?.throwIfAborted();
    const key = apiKey;
    const headers = { Accept: "application/json", ...(key && { "X-API-Key": key }) };
    let response;
    try {
      response = await fetch(url(path), { cache: "no-store", headers, signal, ...options });
    } catch (error) {
      if (signal?.aborted) throw error;
      if ((await isAlive()) && ++closed === 2) {
        throw new ExplainedError("The server closed the connection during the upload; the image may be too large.");
      }
      while (!(await isAlive())) await pause("The server does not respond.", 5);
      continue;
    }
    if (response.status === 401) {
      // Another request may have asked for the key meanwhile.
      if (key === apiKey) await pause("This server requires an API key.", 0, "Enter the key");
    } else if (response.status === 503) {
      const seconds = Number.parseFloat(response.headers.get("Retry-After") ?? "2") || 1;
      await pause("The server is busy.", Math.min(60, seconds));
    } else return readResponse(response);
  }
}

const EXPLANATIONS = {
  400: "The server rejected the request",
  404: "The server does not know this model",
  408: "The upload took too long",
  413: "The image is too large for this server",
  415: "The server does not accept this type of file",
  422: "The image cannot be read",
  500: "The server failed on this image",
  504: "The server took too long for this image",
};

async function readResponse(response) {
  const content = await response.json().catch(() => null);
  if (response.ok && content === null) throw new ExplainedError("The response is not JSON.");
  if (response.ok) return content;
  const text = EXPLANATIONS[response.status] ?? `The server responded with status ${response.status}`;
  const reason = String(content?.detail ?? "").replace(/^(image: )?(cannot be read(: |; |$))?/, "").replace(/\.$/, "");
  throw new ExplainedError(`${text}${reason && `: ${reason}`}.`);
}

export const getModels = () => request("v1/model");

/** Detect with the model's own thresholds; the page filters further. */
async function detect({ image, model, abort }) {
  const data = await image.file.arrayBuffer().catch(() => {
    throw new ExplainedError("The file can no longer be read: it was moved, changed or deleted.");
  });
  const body = new FormData();
  body.append("images", new Blob([data]), "image");
  const query = new URLSearchParams({ model: model.name });
  const content = await request(`v1/detect?${query}`, { method: "POST", body, signal: abort.signal });
  const [result] = content.images ?? [];
  if (!Array.isArray(result?.detections)) throw new ExplainedError("The response contains no image.");
  return { ...result, model: model.name, milliseconds: content.milliseconds };
}

// --- queue ----------------------------------------------------------------------------------------

const waiting = new Set();
const running = new Set();

/** Queue an image for a model; `onDone` is called when the job is done or failed. */
export function enqueue(image, model, onDone) {
  const job = { image, model, onDone, status: "waiting", error: "", result: null, abort: new AbortController() };
  image.jobs.set(model.name, job);
  waiting.add(job);
  queueMicrotask(send); // after all images of the task are queued
}

export function cancel(job) {
  if (job.status !== "waiting" && job.status !== "running") return;
  waiting.delete(job);
  job.status = "cancelled";
  job.abort.abort();
  changed();
}

function send() {
  while (running.size < MAX_UPLOADS && waiting.size > 0) {
    const jobs = [...waiting];
    run(jobs.find(({ image }) => image === state.current) ?? jobs[0]);
  }
}

async function run(job) {
  waiting.delete(job);
  running.add(job);
  job.status = "running";
  changed();
  try {
    job.result = await detect(job);
    job.status = "done";
  } catch (error) {
    if (job.status !== "cancelled") {
      job.status = "failed";
      job.error = error instanceof ExplainedError ? error.message : `Invalid response: ${error.message}.`;
    }
  }
  running.delete(job);
  changed();
  if (job.status !== "cancelled") job.onDone(job);
  send();
}
