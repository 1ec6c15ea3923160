// The current image with its boxes: one pane per model, all with the same zoom.

import { placeCaptions } from "./captions.js";
import { colourOf, element, isSameSize, svg } from "./state.js";

const MAX_SCALE = 40; // CSS pixels per image pixel
const HIT_TOLERANCE = 4; // CSS pixels
const CAPTION_HEIGHT = 18; // CSS pixels

const clamp = (value, low, high) => Math.max(low, Math.min(high, value));

/**
 * Zoom and position of the image, and its panes.
 *
 * @param root parent of the panes.
 * @param actions {activate(pane, i, focus), zoomed(scale)}: a box was pointed at or focused (i is -1
 *   for none); the zoom has changed.
 */
export class View {
  constructor(root, actions) {
    Object.assign(this, { root, actions, panes: [], bitmap: null, size: null, frame: 0 });
    Object.assign(this, { scale: 1, x: 0, y: 0, fitted: true });
    this.pointers = new Map();
    this.observer = new ResizeObserver(() => (this.fitted ? this.fit() : this.#move()));
    this.ruler = document.createElement("canvas").getContext("2d");
    this.#watchDensity();
  }

  /** Redraw when the window moves to a screen with another pixel density. */
  #watchDensity() {
    const query = matchMedia(`(resolution: ${devicePixelRatio}dppx)`);
    const onChange = () => (this.draw(), this.#watchDensity());
    query.addEventListener("change", onChange, { once: true });
  }

  /** Create one pane per title. */
  setPanes(titles) {
    if (this.panes.length !== titles.length) {
      this.observer.disconnect();
      this.panes = titles.map((_, n) => new Pane(this, n));
      this.root.replaceChildren(...this.panes.map((pane) => pane.element));
      for (const { stage } of this.panes) this.observer.observe(stage);
    }
    titles.forEach((title, n) => this.panes[n].setTitle(title, titles.length > 1));
  }

  /** Show a bitmap (null: an empty canvas) of a size (null: not yet known). */
  setImage(bitmap, size, keepZoom = false) {
    this.bitmap?.close();
    this.bitmap = bitmap;
    const same = this.size && size && isSameSize(this.size, size);
    this.size = size;
    if (!(keepZoom && same)) this.fit();
    this.draw();
  }

  /** Size of a stage in CSS pixels. */
  get area() {
    const stage = this.panes[0]?.stage;
    return { width: stage?.clientWidth ?? 0, height: stage?.clientHeight ?? 0 };
  }

  get fitScale() {
    const { width, height } = this.area;
    if (!this.size || width === 0) return 1;
    const margin = 2 * Math.min(16, width / 20);
    return Math.min((width - margin) / this.size.width, (height - margin) / this.size.height, 4);
  }

  fit() {
    this.fitted = true;
    this.scale = this.fitScale;
    this.#move();
  }

  /** Zoom by a factor about a point of the stage in CSS pixels; by default its centre. */
  zoom(factor, point = null) {
    if (!this.size) return;
    const { width, height } = this.area;
    const [px, py] = point ?? [width / 2, height / 2];
    const scale = clamp(this.scale * factor, Math.min(this.fitScale, 1), MAX_SCALE);
    this.x = px - ((px - this.x) * scale) / this.scale;
    this.y = py - ((py - this.y) * scale) / this.scale;
    this.scale = scale;
    this.fitted = scale === this.fitScale;
    this.#move();
  }

  zoomTo(scale) {
    this.zoom(scale / this.scale);
  }

  pan(dx, dy) {
    this.x += dx;
    this.y += dy;
    this.#move();
  }

  /** Centre a box, with some context around it. */
  zoomToBox([x1, y1, x2, y2]) {
    const { width, height } = this.area;
    const scale = Math.min(width / (x2 - x1), height / (y2 - y1)) / 2.5;
    this.scale = clamp(scale, Math.min(this.fitScale, 1), MAX_SCALE / 2);
    this.x = width / 2 - (this.scale * (x1 + x2)) / 2;
    this.y = height / 2 - (this.scale * (y1 + y2)) / 2;
    this.fitted = false;
    this.#move();
  }

  /** Pan as little as needed to show a box. */
  reveal([x1, y1, x2, y2]) {
    if (this.fitted) return;
    const shift = (low, high, length) => {
      if (low < 0 && high > length) return 0;
      return low < 8 ? 8 - low : Math.min(0, length - 8 - high);
    };
    const { width, height } = this.area;
    this.pan(
      shift(this.x + this.scale * x1, this.x + this.scale * x2, width),
      shift(this.y + this.scale * y1, this.y + this.scale * y2, height),
    );
  }

  /** Keep the image in sight: centred if it is smaller than the stage. */
  #move() {
    if (!this.size) return;
    const { width, height } = this.area;
    const limit = (start, length, available) => {
      const slack = available - length;
      if (slack >= 0 || this.fitted) return slack / 2;
      // A third of the stage may stay empty, so that objects at the edge can be centred.
      return clamp(start, slack - available / 3, available / 3);
    };
    this.x = limit(this.x, this.scale * this.size.width, width);
    this.y = limit(this.y, this.scale * this.size.height, height);
    this.actions.zoomed(this.scale);
    this.draw();
  }

  draw() {
    this.frame ||= requestAnimationFrame(() => {
      this.frame = 0;
      for (const pane of this.panes) pane.draw();
    });
  }

  captionWidth(text) {
    this.ruler.font = getComputedStyle(this.root).getPropertyValue("--caption-font");
    return Math.ceil(this.ruler.measureText(text).width) + 10;
  }
}

class Pane {
  constructor(view, number) {
    Object.assign(this, { view, number, detections: null, visible: new Set(), active: -1 });
    Object.assign(this, { boxes: [], captions: new Map(), message: "" });
    this.title = element("h3", { className: "pane-title" });
    this.canvas = element("canvas", { ariaHidden: "true" });
    this.boxGroup = svg("g", { class: "boxes", role: "group" });
    this.captionGroup = svg("g", { class: "captions", "aria-hidden": "true" });
    this.overlay = svg("svg", { class: "overlay" }, this.boxGroup, this.captionGroup);
    this.text = element("p", { className: "stage-message", hidden: true });
    this.stage = element("div", { className: "stage" }, this.canvas, this.overlay, this.text);
    this.element = element("section", { className: "pane" }, this.title, this.stage);
    this.#listen();
  }

  setTitle(title, isShown) {
    this.element.ariaLabel = title;
    this.boxGroup.setAttribute("aria-label", `Boxes of ${title}`);
    this.title.textContent = title;
    this.title.hidden = !isShown;
  }

  /** Create one element per detection. */
  setDetections(detections) {
    this.detections = detections;
    this.active = -1;
    this.captions.clear();
    this.captionGroup.replaceChildren();
    this.boxes = Array.from({ length: detections?.length ?? 0 }, (_, i) => {
      const [x1, y1, x2, y2] = detections.box(i);
      const shape = { x: x1, y: y1, width: Math.max(0, x2 - x1), height: Math.max(0, y2 - y1) };
      const line = svg("rect", { ...shape, class: "line" });
      line.style.stroke = colourOf(detections.className(i)).fill;
      const score = detections.scores[i].toFixed(2);
      const where = `${detections.size(i).join(" by ")} pixels at ${Math.round(x1)}, ${Math.round(y1)}`;
      const label = `${detections.className(i)}, score ${score}, ${where}`;
      const attributes = { class: "box", role: "img", tabindex: -1, "data-i": i, "aria-label": label };
      return svg("g", attributes, svg("rect", { ...shape, class: "halo" }), line);
    });
    this.boxGroup.replaceChildren(...this.boxes.toReversed()); // the best on top
  }

  setVisible(indices) {
    this.visible = new Set(indices);
    this.boxes.forEach((box, i) => box.classList.toggle("off", !this.visible.has(i)));
    this.highlight(this.visible.has(this.active) ? this.active : -1);
  }

  /** Highlight a box (-1: none); Tab focuses it, or else the best. */
  highlight(i) {
    this.boxes[this.active]?.classList.remove("active");
    this.active = i;
    this.boxes[i]?.classList.add("active");
    this.stage.classList.toggle("has-active", i >= 0);
    const focusable = i >= 0 ? i : Math.min(...this.visible);
    this.boxes.forEach((box, n) => box.setAttribute("tabindex", n === focusable ? 0 : -1));
    this.view.draw();
  }

  /** Show a text over the image, with a button if there is something to do. */
  setMessage(text, { isError = false, button = "", action = null } = {}) {
    this.action = action;
    const message = JSON.stringify([text, isError, button]);
    if (this.message === message) return; // keeps the focus on its button
    this.message = message;
    this.text.replaceChildren(text);
    this.text.hidden = !text;
    this.text.classList.toggle("bad", isError);
    const onclick = () => this.action();
    const properties = { type: "button", className: "small", textContent: button, onclick };
    if (button) this.text.append(" ", element("button", properties));
  }

  draw() {
    const { view, canvas } = this;
    const { width, height } = view.area;
    const ratio = devicePixelRatio || 1;
    const [pixelWidth, pixelHeight] = [Math.round(width * ratio), Math.round(height * ratio)];
    if (canvas.width !== pixelWidth) canvas.width = pixelWidth;
    if (canvas.height !== pixelHeight) canvas.height = pixelHeight;
    const context = canvas.getContext("2d");
    context.setTransform(1, 0, 0, 1, 0, 0);
    context.clearRect(0, 0, pixelWidth, pixelHeight);
    this.overlay.classList.toggle("off", !view.size);
    this.stage.classList.toggle("sized", view.size !== null);
    if (!view.size) return;
    const scale = view.scale * ratio;
    context.setTransform(scale, 0, 0, scale, view.x * ratio, view.y * ratio);
    context.imageSmoothingEnabled = scale < 3; // show single pixels when zoomed in
    context.imageSmoothingQuality = "high";
    context.fillStyle = view.bitmap ? "#fff" : getComputedStyle(canvas).color;
    context.fillRect(0, 0, view.size.width, view.size.height);
    if (view.bitmap) context.drawImage(view.bitmap, 0, 0, view.size.width, view.size.height);
    this.stage.classList.toggle("zoomed", !view.fitted);
    this.boxGroup.setAttribute("transform", `translate(${view.x} ${view.y}) scale(${view.scale})`);
    this.#drawCaptions({ width, height });
  }

  /** Captions have a constant size on the screen, so zooming in makes space for more. */
  #drawCaptions(area) {
    const { view, detections, active } = this;
    const items = [...this.visible].map((i) => {
      const offsets = [view.x, view.y, view.x, view.y];
      const box = [...detections.box(i)].map((side, n) => offsets[n] + view.scale * side);
      return { i, box, width: view.captionWidth(detections.caption(i)) };
    });
    const corners = placeCaptions(items, CAPTION_HEIGHT, area);
    const n = items.findIndex(({ i }) => i === active);
    if (n >= 0 && !corners[n]) {
      // The highlighted box has a caption in any case.
      const { box, width } = items[n];
      const top = box[1] >= CAPTION_HEIGHT ? box[1] - CAPTION_HEIGHT : box[3];
      const left = clamp(box[0], 0, area.width - width);
      corners[n] = [left, clamp(top, 0, area.height - CAPTION_HEIGHT)];
    }
    for (const caption of this.captions.values()) caption.classList.add("off");
    items.forEach(({ i, width }, k) => {
      if (!corners[k]) return;
      const caption = this.#caption(i, width);
      caption.setAttribute("transform", `translate(${corners[k].map(Math.round).join(" ")})`);
      caption.classList.remove("off");
      caption.classList.toggle("active", i === active);
      if (i === active) this.captionGroup.append(caption); // on top
    });
  }

  #caption(i, width) {
    if (!this.captions.has(i)) {
      const { fill, text } = colourOf(this.detections.className(i));
      const rect = svg("rect", { width, height: CAPTION_HEIGHT, rx: 2 });
      const label = svg("text", { x: 5, y: CAPTION_HEIGHT - 5 }, this.detections.caption(i));
      rect.style.fill = fill;
      label.style.fill = text;
      this.captions.set(i, svg("g", { class: "caption" }, rect, label));
      this.captionGroup.append(this.captions.get(i));
    }
    return this.captions.get(i);
  }

  /** Index of the smallest visible box at a point of the stage in CSS pixels, or -1. */
  #hit([px, py]) {
    const { view, detections } = this;
    const [x, y] = [(px - view.x) / view.scale, (py - view.y) / view.scale];
    const margin = HIT_TOLERANCE / view.scale;
    let [best, minArea] = [-1, Infinity];
    for (const i of this.visible) {
      const [x1, y1, x2, y2] = detections.box(i);
      if (x < x1 - margin || y < y1 - margin || x > x2 + margin || y > y2 + margin) continue;
      const area = (x2 - x1) * (y2 - y1);
      if (area < minArea) [best, minArea] = [i, area];
    }
    return best;
  }

  #point(event) {
    const corner = this.stage.getBoundingClientRect();
    return [event.clientX - corner.left, event.clientY - corner.top];
  }

  #listen() {
    const { view, stage, boxGroup } = this;
    const on = (type, listener, options) => stage.addEventListener(type, listener, options);
    const activate = (i, focus) => view.actions.activate(this.number, i, focus);
    const isOnImage = (event) => view.size && !this.text.contains(event.target);
    const onWheel = (event) => {
      if (!view.size) return;
      event.preventDefault();
      // Pinching a touchpad sends wheel events with Ctrl, in small steps.
      const speed = (event.ctrlKey ? 0.01 : 0.0015) * (event.deltaMode === 1 ? 16 : 1);
      view.zoom(Math.exp(-event.deltaY * speed), this.#point(event));
    };
    on("wheel", onWheel, { passive: false });
    on("pointerdown", (event) => {
      if (event.button !== 0 || !isOnImage(event)) return;
      view.pointers.set(event.pointerId, this.#point(event));
      stage.setPointerCapture(event.pointerId);
      this.dragged = false;
    });
    on("pointermove", (event) => {
      if (view.pointers.has(event.pointerId)) this.#drag(event);
      else if (event.pointerType !== "touch" && view.size) activate(this.#hit(this.#point(event)));
    });
    for (const type of ["pointerup", "pointercancel"]) {
      on(type, (event) => {
        if (view.pointers.delete(event.pointerId)) stage.classList.remove("dragging");
      });
    }
    // Not at "pointerup": browsers move the focus after a tap.
    on("click", (event) => {
      if (!this.dragged && isOnImage(event)) activate(this.#hit(this.#point(event)), true);
    });
    on("pointerleave", (event) => {
      const isFocused = boxGroup.contains(document.activeElement);
      if (!view.pointers.size && event.pointerType !== "touch" && !isFocused) activate(-1);
    });
    on("dblclick", (event) => (view.fitted ? view.zoom(2.5, this.#point(event)) : view.fit()));
    // On the stage: an SVG element with a focus listener becomes focusable itself.
    on("focusin", (event) => {
      const box = event.target.closest(".box");
      if (box) activate(Number(box.dataset.i));
    });
    on("focusout", (event) => {
      if (boxGroup.contains(event.target) && !boxGroup.contains(event.relatedTarget)) activate(-1);
    });
    on("keydown", (event) => {
      if (!event.target.closest(".box")) return;
      const focus = (i) => this.boxes[i]?.focus();
      navigate(event, { view, detections: this.detections, indices: [...this.visible], active: this.active, focus });
    });
  }

  /** Pan with one pointer, zoom and pan with two. */
  #drag(event) {
    const { pointers } = this.view;
    const [point, last] = [this.#point(event), pointers.get(event.pointerId)];
    if (!this.dragged && Math.hypot(point[0] - last[0], point[1] - last[1]) < 3) return;
    this.dragged = true;
    this.stage.classList.add("dragging");
    const middle = (points) => [0, 1].map((n) => points.reduce((sum, p) => sum + p[n], 0) / points.length);
    const spread = ([a, b]) => Math.hypot(a[0] - b[0], a[1] - b[1]) || 1;
    const before = [...pointers.values()];
    pointers.set(event.pointerId, point);
    const after = [...pointers.values()];
    if (after.length > 2) return;
    const [from, to] = [middle(before), middle(after)];
    if (after.length === 2) this.view.zoom(spread(after) / spread(before), from);
    if (!this.view.fitted) this.view.pan(to[0] - from[0], to[1] - from[1]);
  }
}

/** Keys for boxes and lists: arrows move by score, Enter zooms to the active one, Escape back. */
export function navigate(event, { view, detections, indices, active, focus }) {
  if (event.ctrlKey || event.altKey || event.metaKey || event.shiftKey) return;
  const last = indices.length - 1;
  const at = indices.indexOf(active);
  const target = {
    ArrowDown: Math.min(last, at + 1),
    ArrowUp: Math.max(0, at - 1),
    PageDown: Math.min(last, at + 8),
    PageUp: Math.max(0, at - 8),
    Home: 0,
    End: last,
  }[event.key];
  if (target !== undefined) {
    if (indices.length > 0) {
      focus(indices[target]);
      view.reveal(detections.box(indices[target]));
    }
  } else if (event.key === "Enter" && at >= 0) view.zoomToBox(detections.box(active));
  else if (event.key === "Escape") view.fit();
  else return;
  event.preventDefault();
  event.stopPropagation();
}
