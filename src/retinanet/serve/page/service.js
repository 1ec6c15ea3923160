// Requests to the service, and the queue of images that wait for them.

import { changed, Detections } from "./state.js";

const KEY = "retinanet.key";
const MAX_UPLOADS = 3;

let apiKey = "";
try {
  apiKey = sessionStorage.getItem(KEY) ?? "";
} catch {
  // Storage is disabled: the key is kept until the page is closed.
}

export const hasKey = () => apiKey !== "";

export function setKey(key) {
  apiKey = key;
  try {
    sessionStorage.setItem(KEY, key);
  } catch {
    // As above.
  }
}

/** An error response; `status` is 0 if the server did not respond. */
export class RequestError extends Error {
  constructor(status, message, retryAfter = null) {
    super(message);
    this.status = status;
    this.retryAfter = retryAfter;
  }
}

async function request(path, options = {}) {
  const headers = { Accept: "application/json", ...(apiKey && { "X-API-Key": apiKey }) };
  let response;
  try {
    response = await fetch(new URL(path, document.baseURI), { cache: "no-store", headers, ...options });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new RequestError(0, "The server does not respond.");
  }
  const content = await response.json().catch((error) => {
    if (error.name === "AbortError") throw error;
    return null;
  });
  if (!response.ok) {
    const retryAfter = Number.parseFloat(response.headers.get("Retry-After"));
    const detail = typeof content?.detail === "string" ? content.detail : "";
    throw new RequestError(response.status, detail, Number.isFinite(retryAfter) ? retryAfter : null);
  }
  if (content === null) throw new RequestError(500, "The response is not JSON.");
  return content;
}

/** {models, limits, version} */
export const getModels = () => request("v1/model");

const isAlive = () =>
  fetch(new URL("healthz", document.baseURI), { cache: "no-store" }).then(({ ok }) => ok, () => false);

/** Detect with the model's own thresholds; the page filters further. */
async function detect({ file, name }, model, signal) {
  const body = new FormData();
  body.append("images", file, name);
  const query = new URLSearchParams({ model: model.name });
  const content = await request(`v1/detect?${query}`, { method: "POST", body, signal });
  if (content?.failures?.length) throw new RequestError(422, content.failures[0].reason);
  if (!content?.images?.length) throw new RequestError(500, "The response contains no image.");
  return new Detections(model, content.images[0], content.milliseconds ?? {});
}

/** Explain an error response to the user; `name` of the image is removed from its detail. */
export function explain(error, name = "") {
  const detail = error.message.startsWith(`${name}: `)
    ? error.message.slice(name.length + 2)
    : error.message;
  const text = {
    400: "The server rejected the request",
    404: "The server does not know this model",
    408: "The upload took too long",
    413: "The image is too large for this server",
    415: "The server does not accept this type of file",
    422: "The image cannot be read",
    500: "The server failed on this image",
    504: "The server took too long for this image",
  }[error.status];
  if (!text) return detail || `The server responded with status ${error.status}.`;
  const reason = detail.replace(/^cannot be read(: |; |$)/, "").replace(/\.$/, "");
  return `${text}${reason ? `: ${reason}` : ""}.`;
}

/**
 * Queue of jobs {image, model, status, error, detections}, a few uploads at a time.
 *
 * @param onDone called with every job that is done or failed.
 * @param onPause called with {kind: "key" | "busy" | "offline", until} when sending pauses, and with
 *   null when it resumes.
 * @param isUrgent whether a job goes before the others.
 */
export class Queue {
  constructor({ onDone, onPause, isUrgent }) {
    Object.assign(this, { onDone, onPause, isUrgent });
    this.waiting = new Set();
    this.running = new Set();
    this.pause = null;
    this.backoff = 1;
    this.timer = 0;
  }

  add(image, model) {
    const job = { image, model, status: "waiting", error: "", detections: null, hangUps: 0 };
    image.jobs.set(model.name, job);
    this.waiting.add(job);
    queueMicrotask(() => this.#send()); // after all images of the task are queued
  }

  cancel(job) {
    this.waiting.delete(job);
    job.abort?.abort();
    if (job.status === "waiting" || job.status === "running") job.status = "cancelled";
    changed();
  }

  cancelAll() {
    for (const job of [...this.waiting, ...this.running]) this.cancel(job);
    if (this.pause && this.pause.kind !== "key") this.resume();
  }

  resume() {
    clearTimeout(this.timer);
    this.pause = null;
    this.onPause(null);
    this.#send();
  }

  /** End a pause; if the server is still offline, wait longer. */
  async retry() {
    clearTimeout(this.timer);
    const { pause } = this;
    const offline = pause?.kind === "offline" && !(await isAlive());
    if (this.pause !== pause) return;
    if (offline) {
      this.backoff = Math.min(15, 2 * this.backoff);
      this.#pauseFor("offline", this.backoff);
    } else this.resume();
  }

  #send() {
    while (!this.pause && this.running.size < MAX_UPLOADS && this.waiting.size > 0) {
      const jobs = [...this.waiting];
      const next = jobs.find(this.isUrgent) ?? jobs[0];
      this.waiting.delete(next);
      this.#run(next);
    }
  }

  async #run(job) {
    job.abort = new AbortController();
    const { signal } = job.abort;
    job.status = "running";
    this.running.add(job);
    changed();
    try {
      const detections = await detect(job.image, job.model, signal);
      if (signal.aborted) return;
      Object.assign(job, { status: "done", detections });
      this.backoff = 1;
    } catch (error) {
      if (!signal.aborted) await this.#handleError(job, error);
    } finally {
      this.running.delete(job);
      changed();
      if (job.status === "done" || job.status === "failed") this.onDone(job);
      this.#send();
    }
  }

  async #handleError(job, error) {
    const fail = (text) => Object.assign(job, { status: "failed", error: text });
    if (!(error instanceof RequestError)) return fail(`Invalid response: ${error.message}.`);
    if (error.status === 401) this.#waitAgain(job, "key");
    else if (error.status === 503) {
      this.#waitAgain(job, "busy", Math.min(60, Math.max(0.2, error.retryAfter ?? 2)));
    } else if (error.status === 0) await this.#handleNoResponse(job, fail);
    else fail(explain(error, job.image.name));
  }

  /** Find out if the file is gone, the server is offline, or only this upload was dropped. */
  async #handleNoResponse(job, fail) {
    try {
      await job.image.file.slice(0, 1).arrayBuffer();
    } catch {
      return fail("The file can no longer be read: it was moved, changed or deleted.");
    }
    const alive = await isAlive();
    if (alive && ++job.hangUps >= 2) {
      return fail("The server closed the connection during the upload; the image may be too large.");
    }
    this.#waitAgain(job, alive ? "" : "offline", this.backoff);
  }

  #waitAgain(job, pause, seconds) {
    if (job.status === "cancelled") return;
    job.status = "waiting";
    this.waiting = new Set([job, ...this.waiting]);
    if (pause && !this.pause) this.#pauseFor(pause, seconds);
  }

  #pauseFor(kind, seconds) {
    this.pause = { kind, until: 0 };
    if (seconds) {
      this.pause.until = Date.now() + 1000 * seconds;
      this.timer = setTimeout(() => this.retry(), 1000 * seconds);
    }
    this.onPause(this.pause);
  }
}
