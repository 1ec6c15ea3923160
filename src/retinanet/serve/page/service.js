// The service: its models, its answers, and the queue of images that wait for them.

const KEY = "retinanet.key";

/** What the service answered instead of detections; `status` 0: it did not answer. */
export class Refusal extends Error {
  constructor(status, message, retryAfter = null) {
    super(message);
    this.status = status;
    this.retryAfter = retryAfter;
  }
}

/** What one model found in one image, in flat arrays: many images fit into memory. */
export class Answer {
  constructor(model, image, milliseconds) {
    const found = image.detections;
    const places = new Map(model.category_ids.map((id, label) => [id, label]));
    this.model = model;
    this.width = image.width;
    this.height = image.height;
    this.milliseconds = milliseconds;
    this.length = found.length;
    this.boxes = new Float64Array(4 * found.length);
    this.scores = new Float64Array(found.length);
    this.labels = new Uint16Array(found.length);
    found.forEach((one, i) => {
      const label = places.get(one.category_id);
      if (label === undefined) {
        throw new Error(`category ${one.category_id} is none of the model's`);
      }
      this.boxes.set(one.box, 4 * i);
      this.scores[i] = one.score;
      this.labels[i] = label;
    });
  }

  box(i) {
    return this.boxes.subarray(4 * i, 4 * i + 4);
  }

  className(i) {
    return this.model.classes[this.labels[i]];
  }

  categoryId(i) {
    return this.model.category_ids[this.labels[i]];
  }
}

export class Service {
  constructor() {
    this.key = "";
    try {
      this.key = sessionStorage.getItem(KEY) ?? "";
    } catch {
      // Storage is switched off: the key lasts as long as the page.
    }
  }

  keepKey(key) {
    this.key = key;
    try {
      sessionStorage.setItem(KEY, key);
    } catch {
      // As above.
    }
  }

  /** {models, limits, version} */
  async describe(signal) {
    return this.#ask("v1/model", { signal });
  }

  /** Answers for one image; the service's own thresholds hold, the page filters further. */
  async detect(file, name, model, signal) {
    const form = new FormData();
    form.append("images", file, name);
    const query = new URLSearchParams({ model: model.name });
    const said = await this.#ask(`v1/detect?${query}`, { method: "POST", body: form, signal });
    const failure = said?.failures?.[0];
    if (failure) throw new Refusal(422, failure.reason);
    const image = said?.images?.[0];
    if (!image) throw new Refusal(500, "The server's answer holds no image.");
    return new Answer(model, image, said.milliseconds ?? {});
  }

  /** Whether anybody is there. */
  async alive() {
    try {
      return (await fetch(new URL("healthz", document.baseURI), { cache: "no-store" })).ok;
    } catch {
      return false;
    }
  }

  async #ask(path, options) {
    const headers = { Accept: "application/json" };
    if (this.key) headers["X-API-Key"] = this.key;
    let response;
    try {
      response = await fetch(new URL(path, document.baseURI), {
        ...options,
        headers,
        cache: "no-store",
      });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Refusal(0, "The server does not answer.");
    }
    let said;
    try {
      said = await response.json();
    } catch (error) {
      if (error.name === "AbortError") throw error;
      said = null;
    }
    if (!response.ok) {
      const detail = typeof said?.detail === "string" ? said.detail : "";
      const wait = Number.parseFloat(response.headers.get("Retry-After") ?? "");
      throw new Refusal(response.status, detail, Number.isFinite(wait) ? wait : null);
    }
    if (said === null) throw new Refusal(500, "The server's answer is no JSON.");
    return said;
  }
}

/** Clear words for a person about an image that was refused. */
export function refusalWords(refusal, name = "") {
  // The server puts the image's name first, which the page has said.
  const named = name !== "" && refusal.message.startsWith(`${name}: `);
  const said = named ? refusal.message.slice(name.length + 2) : refusal.message;
  const words = {
    400: "The server did not take the request",
    404: "The server does not know this model",
    408: "The upload took too long",
    413: "The image is too large for this server",
    415: "The server takes no such files",
    422: "The image cannot be read",
    500: "The server failed on this image",
    504: "The server took too long over this image",
  }[refusal.status];
  if (!words) return said || `The server answered with status ${refusal.status}.`;
  const reason = said.replace(/^cannot be read(: |; |$)/, "").replace(/\.$/, "");
  return `${words}${reason ? `: ${reason}` : ""}.`;
}

const AT_A_TIME = 3;

/**
 * Images wait here for models, a few uploads at a time, those of the image in view first.
 *
 * A job is {image, model, state, reason, answer}; its state is waiting, running, done, refused or
 * cancelled. `hold` says why nothing is sent just now: {kind: "key" | "busy" | "away", until}.
 */
export class Queue {
  constructor(service, { changed, held, first }) {
    this.service = service;
    this.changed = changed;
    this.held = held;
    this.first = first;
    this.waiting = new Set();
    this.running = new Set();
    this.hold = null;
    this.patience = 1;
    this.timer = 0;
  }

  /** Wakes the queue a tick later, so that a thousand images are all listed before any is sent. */
  add(job) {
    job.state = "waiting";
    job.reason = "";
    this.waiting.add(job);
    queueMicrotask(() => this.pump());
  }

  cancel(job) {
    this.waiting.delete(job);
    job.abort?.abort();
    if (job.state === "waiting" || job.state === "running") {
      job.state = "cancelled";
      this.changed(job);
    }
  }

  cancelAll() {
    for (const job of [...this.waiting, ...this.running]) this.cancel(job);
    if (this.hold && this.hold.kind !== "key") this.release();
  }

  /** Goes on: the key was given, or it is time to try again. */
  release() {
    clearTimeout(this.timer);
    this.hold = null;
    this.held(null);
    this.pump();
  }

  pump() {
    while (!this.hold && this.running.size < AT_A_TIME && this.waiting.size > 0) {
      let next = null;
      for (const job of this.waiting) {
        if (this.first(job)) {
          next = job;
          break;
        }
        next ??= job;
      }
      this.waiting.delete(next);
      this.#run(next);
    }
  }

  async #run(job) {
    const abort = new AbortController();
    job.abort = abort;
    job.state = "running";
    this.running.add(job);
    this.changed(job);
    try {
      const answer = await this.service.detect(
        job.image.file,
        job.image.name,
        job.model,
        abort.signal,
      );
      if (abort.signal.aborted) return;
      job.answer = answer;
      job.state = "done";
      this.patience = 1;
    } catch (error) {
      if (abort.signal.aborted || error.name === "AbortError") return;
      await this.#refused(job, error);
    } finally {
      this.running.delete(job);
      if (!abort.signal.aborted) this.changed(job);
      this.pump();
    }
  }

  async #refused(job, error) {
    const status = error instanceof Refusal ? error.status : -1;
    if (status === 401) {
      this.#again(job);
      this.#hold("key", null);
    } else if (status === 503) {
      this.#again(job);
      this.#hold("busy", Math.min(60, Math.max(0.2, error.retryAfter ?? 2)));
    } else if (status === 0) {
      await this.#unanswered(job);
    } else {
      job.state = "refused";
      job.reason =
        status > 0
          ? refusalWords(error, job.image.name)
          : `The answer is not understood: ${error.message}`;
    }
  }

  /** The file is gone, the server is away, or it hung up on this one image. */
  async #unanswered(job) {
    try {
      await job.image.file.slice(0, 1).arrayBuffer();
    } catch {
      job.state = "refused";
      job.reason = "The file can no longer be read; it was moved, changed or deleted.";
      return;
    }
    const alive = await this.service.alive();
    if (job.state === "cancelled") return;
    job.hangUps = alive ? (job.hangUps ?? 0) + 1 : (job.hangUps ?? 0);
    if (job.hangUps >= 2) {
      job.state = "refused";
      job.reason = "The server hung up while this image was sent; it may be too large for it.";
      return;
    }
    this.#again(job);
    if (!alive) this.away();
  }

  #again(job) {
    if (job.state === "cancelled") return;
    job.state = "waiting";
    this.waiting = new Set([job, ...this.waiting]);
  }

  away() {
    this.#hold("away", this.patience);
  }

  /** Ends a hold when there is reason to; a server that is still away is asked again later. */
  async retry() {
    clearTimeout(this.timer);
    const { hold } = this;
    if (hold?.kind === "away" && !(await this.service.alive())) {
      if (this.hold !== hold) return;
      this.patience = Math.min(15, this.patience * 2);
      this.#wait(hold, this.patience);
    } else if (this.hold === hold) {
      this.release();
    }
  }

  #hold(kind, seconds) {
    if (this.hold) return; // the other uploads that ran beside the first one refused
    this.hold = { kind, until: null };
    this.#wait(this.hold, seconds);
  }

  #wait(hold, seconds) {
    if (seconds !== null) {
      hold.until = Date.now() + 1000 * seconds;
      this.timer = setTimeout(() => this.retry(), 1000 * seconds);
    }
    this.held(hold);
  }
}
