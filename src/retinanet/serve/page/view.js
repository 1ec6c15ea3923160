// The image in view: one pane a model, all with the same zoom.

import { captionOf, css, inkOn, placeCaptions } from "./drawing.js";

const SVG = "http://www.w3.org/2000/svg";
const CLOSEST = 40; // CSS pixels that one pixel of an image may fill
const NEAR = 4; // CSS pixels by which a pointer may miss a box
const CAPTION = 18; // CSS pixels of height

function make(name, className, parent) {
  const element = document.createElementNS(SVG, name);
  if (className) element.setAttribute("class", className);
  parent?.append(element);
  return element;
}

/**
 * Zoom and place of the image, and the boxes on it.
 *
 * @param root where the panes go.
 * @param actions {activate(pane, i), zoomed(scale)}: a box was pointed at or focused (i is -1 where
 *   none is); the zoom has changed.
 */
export class View {
  constructor(root, actions) {
    this.root = root;
    this.actions = actions;
    this.panes = [];
    this.bitmap = null;
    this.size = null;
    this.scale = 1;
    this.x = 0;
    this.y = 0;
    this.fitted = true;
    this.frame = 0;
    this.pointers = new Map();
    this.watcher = new ResizeObserver(() => this.#resized());
    this.ruler = document.createElement("canvas").getContext("2d");
    this.widths = new Map();
    this.#watchDensity();
  }

  /** A window that is moved to another screen keeps its size, and may change its pixels. */
  #watchDensity() {
    const now = matchMedia(`(resolution: ${window.devicePixelRatio}dppx)`);
    now.addEventListener(
      "change",
      () => {
        this.draw();
        this.#watchDensity();
      },
      { once: true },
    );
  }

  /** A pane for each title; what it holds comes by `fill`. */
  layOut(titles) {
    if (this.panes.length !== titles.length) {
      this.watcher.disconnect();
      this.panes = titles.map((_, n) => new Pane(this, n));
      this.root.replaceChildren(...this.panes.map((pane) => pane.element));
      for (const pane of this.panes) this.watcher.observe(pane.stage);
      this.#resized();
    }
    titles.forEach((title, n) => this.panes[n].name(title, titles.length > 1));
  }

  /** What is shown: a bitmap (null where the browser has none) and its size, once it is known. */
  setImage(bitmap, size, keepView = false) {
    this.bitmap?.close();
    this.bitmap = bitmap;
    const same =
      this.size && size && this.size.width === size.width && this.size.height === size.height;
    this.size = size;
    if (!(keepView && same)) this.fit();
    this.draw();
  }

  /** Pixels of a stage; all are of one size. */
  get area() {
    const stage = this.panes[0]?.stage;
    return { width: stage?.clientWidth ?? 0, height: stage?.clientHeight ?? 0 };
  }

  get fitScale() {
    const { width, height } = this.area;
    if (!this.size || width === 0) return 1;
    const margin = Math.min(16, width / 20);
    return Math.min(
      (width - 2 * margin) / this.size.width,
      (height - 2 * margin) / this.size.height,
      4, // a small image is enlarged, but stays an image
    );
  }

  fit() {
    this.fitted = true;
    this.scale = this.fitScale;
    this.#place();
  }

  /** Zooms by a factor about a point of the stage, in CSS pixels; null: its middle. */
  zoom(factor, point = null) {
    if (!this.size) return;
    const { width, height } = this.area;
    const [px, py] = point ?? [width / 2, height / 2];
    const least = Math.min(this.fitScale, 1);
    const scale = Math.max(least, Math.min(CLOSEST, this.scale * factor));
    this.x = px - ((px - this.x) * scale) / this.scale;
    this.y = py - ((py - this.y) * scale) / this.scale;
    this.scale = scale;
    this.fitted = scale === this.fitScale;
    this.#place();
  }

  /** Zooms to so many CSS pixels a pixel. */
  zoomTo(scale) {
    this.zoom(scale / this.scale);
  }

  pan(dx, dy) {
    this.x += dx;
    this.y += dy;
    this.#place();
  }

  /** Brings a box to the middle, with as much about it as it is large. */
  zoomToBox([x1, y1, x2, y2]) {
    const { width, height } = this.area;
    const room = Math.min(width / (x2 - x1), height / (y2 - y1)) / 2.5;
    this.scale = Math.max(Math.min(this.fitScale, 1), Math.min(CLOSEST / 2, room));
    this.x = width / 2 - (this.scale * (x1 + x2)) / 2;
    this.y = height / 2 - (this.scale * (y1 + y2)) / 2;
    this.fitted = false;
    this.#place();
  }

  /** Moves as little as is needed for a box to be seen. */
  reveal([x1, y1, x2, y2]) {
    const { width, height } = this.area;
    const move = (low, high, room) =>
      low < 0 && high > room ? 0 : low < 8 ? 8 - low : high > room - 8 ? room - 8 - high : 0;
    if (this.fitted) return;
    const dx = move(this.x + this.scale * x1, this.x + this.scale * x2, width);
    const dy = move(this.y + this.scale * y1, this.y + this.scale * y2, height);
    if (dx || dy) this.pan(dx, dy);
  }

  /** Keeps the image in view: in the middle where it is smaller than the stage. */
  #place() {
    if (!this.size) return;
    const { width, height } = this.area;
    const hold = (place, length, room) => {
      const slack = room - length;
      if (slack >= 0) return slack / 2;
      // A part of the stage may stay empty, so that an object at the edge can come to the middle.
      return Math.max(slack - room / 3, Math.min(room / 3, place));
    };
    if (this.fitted) {
      this.x = (width - this.scale * this.size.width) / 2;
      this.y = (height - this.scale * this.size.height) / 2;
    }
    this.x = hold(this.x, this.scale * this.size.width, width);
    this.y = hold(this.y, this.scale * this.size.height, height);
    this.actions.zoomed(this.scale);
    this.draw();
  }

  #resized() {
    if (this.fitted) this.fit();
    else this.#place();
    this.draw();
  }

  draw() {
    if (this.frame) return;
    this.frame = requestAnimationFrame(() => {
      this.frame = 0;
      for (const pane of this.panes) pane.draw();
    });
  }

  /** Width of a caption in CSS pixels. */
  widthOf(text) {
    let width = this.widths.get(text);
    if (width === undefined) {
      this.ruler.font = getComputedStyle(this.root).getPropertyValue("--caption-font");
      width = Math.ceil(this.ruler.measureText(text).width) + 10;
      if (this.widths.size > 5000) this.widths.clear();
      this.widths.set(text, width);
    }
    return width;
  }
}

class Pane {
  constructor(view, number) {
    this.view = view;
    this.number = number;
    this.answer = null;
    this.shown = new Set();
    this.active = -1;
    this.boxes = [];
    this.captions = new Map();

    this.element = document.createElement("section");
    this.element.className = "pane";
    this.title = document.createElement("h3");
    this.title.className = "pane-title";
    this.stage = document.createElement("div");
    this.stage.className = "stage";
    this.canvas = document.createElement("canvas");
    this.canvas.setAttribute("aria-hidden", "true");
    this.svg = make("svg", "overlay");
    this.moved = make("g", "boxes", this.svg);
    this.moved.setAttribute("role", "group");
    this.still = make("g", "captions", this.svg);
    this.still.setAttribute("aria-hidden", "true");
    this.words = document.createElement("p");
    this.words.className = "stage-words";
    this.words.hidden = true;
    this.stage.append(this.canvas, this.svg, this.words);
    this.element.append(this.title, this.stage);
    this.#listen();
  }

  name(title, several) {
    this.element.setAttribute("aria-label", title);
    this.moved.setAttribute("aria-label", `Boxes of ${title}`);
    this.title.textContent = title;
    this.title.hidden = !several;
  }

  /** A detection each becomes an element; `colour` gives (r, g, b) by class name. */
  fill(answer, colour) {
    this.answer = answer;
    this.active = -1;
    this.captions = new Map();
    this.still.replaceChildren();
    this.boxes = [];
    const fresh = [];
    for (let i = 0; i < (answer?.length ?? 0); i++) {
      const [x1, y1, x2, y2] = answer.box(i);
      const box = make("g", "box");
      box.dataset.i = i;
      box.setAttribute("role", "img");
      box.setAttribute("tabindex", "-1");
      box.setAttribute(
        "aria-label",
        `${answer.className(i)}, score ${answer.scores[i].toFixed(2)}, ` +
          `${Math.round(x2 - x1)} by ${Math.round(y2 - y1)} pixels at ` +
          `${Math.round(x1)}, ${Math.round(y1)}`,
      );
      for (const part of ["halo", "line"]) {
        const rect = make("rect", part, box);
        rect.setAttribute("x", x1);
        rect.setAttribute("y", y1);
        rect.setAttribute("width", Math.max(0, x2 - x1));
        rect.setAttribute("height", Math.max(0, y2 - y1));
        if (part === "line") rect.style.stroke = css(colour(answer.className(i)));
      }
      this.boxes.push(box);
      fresh.push(box);
    }
    this.colour = colour;
    // Best last, so that it lies on top.
    this.moved.replaceChildren(...fresh.reverse());
  }

  /** Shows these detections alone. */
  filter(shown) {
    this.shown = new Set(shown);
    this.boxes.forEach((box, i) => box.classList.toggle("off", !this.shown.has(i)));
    if (!this.shown.has(this.active)) this.highlight(-1);
    else this.#rove();
    this.view.draw();
  }

  /** Lifts a box out, -1 none; it is the one that Tab leads to. */
  highlight(i) {
    this.boxes[this.active]?.classList.remove("active");
    this.active = i;
    this.boxes[i]?.classList.add("active");
    this.stage.classList.toggle("has-active", i >= 0);
    this.#rove();
    this.view.draw();
  }

  #rove() {
    const reached = this.shown.has(this.active) ? this.active : Math.min(...this.shown);
    this.boxes.forEach((box, i) => box.setAttribute("tabindex", i === reached ? "0" : "-1"));
  }

  /** Words over the image, and a button where something can be done; "" takes them away. */
  say(words, { bad = false, button = "", act = null } = {}) {
    this.act = act;
    const now = JSON.stringify([words, bad, button]);
    if (this.told === now) return; // a button that is being pressed stays the same button
    this.told = now;
    this.words.replaceChildren(words);
    this.words.hidden = !words;
    this.words.classList.toggle("bad", bad);
    if (!button) return;
    const press = document.createElement("button");
    press.type = "button";
    press.className = "small";
    press.textContent = button;
    press.addEventListener("click", () => this.act());
    this.words.append(" ", press);
  }

  draw() {
    const { view } = this;
    const { width, height } = view.area;
    const ratio = window.devicePixelRatio || 1;
    if (this.canvas.width !== Math.round(width * ratio))
      this.canvas.width = Math.round(width * ratio);
    if (this.canvas.height !== Math.round(height * ratio)) {
      this.canvas.height = Math.round(height * ratio);
    }
    const context = this.canvas.getContext("2d");
    context.setTransform(1, 0, 0, 1, 0, 0);
    context.clearRect(0, 0, this.canvas.width, this.canvas.height);
    this.svg.classList.toggle("off", !view.size);
    this.stage.classList.toggle("sized", view.size !== null);
    if (!view.size) return;
    const scale = view.scale * ratio;
    context.setTransform(scale, 0, 0, scale, view.x * ratio, view.y * ratio);
    context.imageSmoothingEnabled = scale < 3; // from there on one sees the pixels as they are
    context.imageSmoothingQuality = "high";
    if (view.bitmap) {
      context.fillStyle = "#fff";
      context.fillRect(0, 0, view.size.width, view.size.height);
      context.drawImage(view.bitmap, 0, 0, view.size.width, view.size.height);
    } else {
      context.fillStyle = getComputedStyle(this.canvas).color;
      context.fillRect(0, 0, view.size.width, view.size.height);
    }
    this.stage.classList.toggle("zoomed", !view.fitted);
    this.moved.setAttribute("transform", `translate(${view.x} ${view.y}) scale(${view.scale})`);
    this.#drawCaptions(width, height);
  }

  /** Captions keep their size on the screen, so nearer there is room for more of them. */
  #drawCaptions(width, height) {
    const { view, answer } = this;
    const items = [...this.shown].map((i) => {
      const [x1, y1, x2, y2] = answer.box(i);
      return {
        i,
        box: [
          view.x + view.scale * x1,
          view.y + view.scale * y1,
          view.x + view.scale * x2,
          view.y + view.scale * y2,
        ],
        width: view.widthOf(captionOf(answer, i)),
      };
    });
    const places = placeCaptions(items, CAPTION, { width, height });
    const pointed = items.findIndex(({ i }) => i === this.active);
    if (pointed >= 0 && !places[pointed]) {
      // It has its caption whatever that hides; the others stay where they are.
      const { box, width: length } = items[pointed];
      const left = Math.max(0, Math.min(box[0], width - length));
      const top = box[1] >= CAPTION ? box[1] - CAPTION : box[3];
      places[pointed] = [left, Math.max(0, Math.min(top, height - CAPTION))];
    }
    const used = new Set();
    items.forEach(({ i, width: length }, n) => {
      if (!places[n]) return;
      used.add(i);
      const caption = this.#caption(i, length);
      const [left, top] = places[n].map(Math.round);
      caption.setAttribute("transform", `translate(${left} ${top})`);
      caption.classList.remove("off");
      caption.classList.toggle("active", i === this.active);
    });
    for (const [i, caption] of this.captions) if (!used.has(i)) caption.classList.add("off");
    if (used.has(this.active)) this.still.append(this.captions.get(this.active));
  }

  #caption(i, width) {
    let caption = this.captions.get(i);
    if (!caption) {
      const rgb = this.colour(this.answer.className(i));
      caption = make("g", "caption", this.still);
      const rect = make("rect", "", caption);
      rect.setAttribute("width", width);
      rect.setAttribute("height", CAPTION);
      rect.setAttribute("rx", 2);
      rect.style.fill = css(rgb);
      const text = make("text", "", caption);
      text.setAttribute("x", 5);
      text.setAttribute("y", CAPTION - 5);
      text.style.fill = inkOn(rgb);
      text.textContent = captionOf(this.answer, i);
      this.captions.set(i, caption);
    }
    return caption;
  }

  /** The smallest shown box about a point, in CSS pixels of the stage; -1: none. */
  #hit(px, py) {
    const { view, answer } = this;
    const x = (px - view.x) / view.scale;
    const y = (py - view.y) / view.scale;
    const near = NEAR / view.scale;
    let best = -1;
    let least = Infinity;
    for (const i of this.shown) {
      const [x1, y1, x2, y2] = answer.box(i);
      if (x < x1 - near || y < y1 - near || x > x2 + near || y > y2 + near) continue;
      const size = (x2 - x1) * (y2 - y1);
      if (size < least) [best, least] = [i, size];
    }
    return best;
  }

  #point(event) {
    const corner = this.stage.getBoundingClientRect();
    return [event.clientX - corner.left, event.clientY - corner.top];
  }

  #listen() {
    const { view, stage } = this;
    stage.addEventListener(
      "wheel",
      (event) => {
        if (!view.size) return;
        event.preventDefault();
        const lines = event.deltaMode === 1 ? 16 : 1;
        // Two fingers that spread on a touchpad come as a wheel with Ctrl, in small steps.
        const speed = event.ctrlKey ? 0.01 : 0.0015;
        view.zoom(Math.exp(-event.deltaY * lines * speed), this.#point(event));
      },
      { passive: false },
    );
    stage.addEventListener("pointerdown", (event) => {
      if (event.button !== 0 || !view.size || this.words.contains(event.target)) return;
      view.pointers.set(event.pointerId, this.#point(event));
      stage.setPointerCapture(event.pointerId);
      this.dragged = false;
    });
    stage.addEventListener("pointermove", (event) => {
      const point = this.#point(event);
      if (!view.pointers.has(event.pointerId)) {
        if (event.pointerType !== "touch" && view.size) {
          view.actions.activate(this.number, this.#hit(...point));
        }
        return;
      }
      const before = [...view.pointers.values()];
      const old = view.pointers.get(event.pointerId);
      if (!this.dragged && Math.hypot(point[0] - old[0], point[1] - old[1]) < 3) return;
      this.dragged = true;
      stage.classList.add("dragging");
      view.pointers.set(event.pointerId, point);
      const after = [...view.pointers.values()];
      if (after.length === 1) {
        if (!view.fitted) view.pan(point[0] - old[0], point[1] - old[1]);
      } else if (after.length === 2) {
        const spread = ([a, b]) => Math.hypot(a[0] - b[0], a[1] - b[1]) || 1;
        const middle = ([a, b]) => [(a[0] + b[0]) / 2, (a[1] + b[1]) / 2];
        const [from, to] = [middle(before), middle(after)];
        view.zoom(spread(after) / spread(before), from);
        if (!view.fitted) view.pan(to[0] - from[0], to[1] - from[1]);
      }
    });
    const lift = (event) => {
      if (view.pointers.delete(event.pointerId)) stage.classList.remove("dragging");
    };
    stage.addEventListener("pointerup", lift);
    stage.addEventListener("pointercancel", lift);
    // Not at "pointerup": after a tap the browser would take the focus away again.
    stage.addEventListener("click", (event) => {
      if (this.dragged || !view.size || this.words.contains(event.target)) return;
      view.actions.activate(this.number, this.#hit(...this.#point(event)), true);
    });
    stage.addEventListener("pointerleave", (event) => {
      if (!view.pointers.size && event.pointerType !== "touch") {
        if (!this.moved.contains(document.activeElement)) view.actions.activate(this.number, -1);
      }
    });
    stage.addEventListener("dblclick", (event) => {
      if (view.fitted) view.zoom(2.5, this.#point(event));
      else view.fit();
    });
    // On the stage, for an SVG element that listens for the focus can be focused itself.
    stage.addEventListener("focusin", (event) => {
      const box = event.target.closest(".box");
      if (box) view.actions.activate(this.number, Number(box.dataset.i));
    });
    stage.addEventListener("focusout", (event) => {
      const left = this.moved.contains(event.target) && !this.moved.contains(event.relatedTarget);
      if (left) view.actions.activate(this.number, -1);
    });
    stage.addEventListener("keydown", (event) => {
      if (event.target.closest(".box")) this.#key(event);
    });
  }

  /** Arrows up and down lead from box to box by score; Enter goes near, Escape back. */
  #key(event) {
    if (event.ctrlKey || event.altKey || event.metaKey || event.shiftKey) return;
    const order = [...this.shown];
    const at = order.indexOf(this.active);
    const to = {
      ArrowDown: Math.min(order.length - 1, at + 1),
      ArrowUp: Math.max(0, at - 1),
      Home: 0,
      End: order.length - 1,
    }[event.key];
    if (to !== undefined) {
      this.boxes[order[to]]?.focus();
      this.view.reveal(this.answer.box(order[to]));
    } else if (event.key === "Enter" && at >= 0) {
      this.view.zoomToBox(this.answer.box(this.active));
    } else if (event.key === "Escape") {
      this.view.fit();
    } else return;
    event.preventDefault();
    event.stopPropagation();
  }
}
