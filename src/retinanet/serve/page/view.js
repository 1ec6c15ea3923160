// The image in view with its boxes: one pane per model, all with the same zoom.

import { drawDetections } from "./drawing.js";
import { $, element, scheduled, setText, state } from "./state.js";

const MAX_SCALE = 40; // CSS pixels per image pixel
const HIT_TOLERANCE = 4; // CSS pixels

const clamp = (value, low, high) => Math.max(low, Math.min(high, value));

/** Zoom and position of the image in CSS pixels of a stage. */
export const view = { bitmap: null, size: null, scale: 1, x: 0, y: 0, fitted: true };

/** Panes {element, title, stage, canvas, message, detections}; `detections` are those to draw. */
export let panes = [];

const observer = new ResizeObserver(() => (view.fitted ? fit() : move()));
const pointers = new Map(); // the pressed pointers' [x, y]
let dragged = false;

/** Create one pane per model; `activate(detection, isClicked)` is called with null for none. */
export function setPanes(models, activate) {
  observer.disconnect();
  panes = models.map(({ name }) => {
    const title = element("h3", { className: "pane-title", hidden: models.length < 2 }, name);
    const canvas = element("canvas", { role: "img" });
    const message = element("p", { className: "stage-message", hidden: true });
    const stage = element("div", { className: "stage" }, canvas, message);
    const section = element("section", { className: "pane", ariaLabel: name }, title, stage);
    const pane = { element: section, title, stage, canvas, message, detections: [] };
    listen(pane, activate);
    observer.observe(stage);
    return pane;
  });
  $("panes").replaceChildren(...panes.map((pane) => pane.element));
}

/** Show a bitmap (null: an empty canvas) of a size (null: not yet known). */
export function setImage(bitmap, size) {
  view.bitmap?.close();
  Object.assign(view, { bitmap, size });
  fit();
  draw();
}

/** Size of a stage in CSS pixels. */
const area = () => ({ width: panes[0]?.stage.clientWidth ?? 0, height: panes[0]?.stage.clientHeight ?? 0 });

function fitScale() {
  const { width, height } = area();
  if (!view.size || width === 0) return 1;
  const margin = 2 * Math.min(16, width / 20);
  return Math.min((width - margin) / view.size.width, (height - margin) / view.size.height, 4);
}

export function fit() {
  view.fitted = true;
  view.scale = fitScale();
  move();
}

/** Zoom by a factor about a point of the stage in CSS pixels; by default its centre. */
export function zoom(factor, point = [area().width / 2, area().height / 2]) {
  if (!view.size) return;
  const smallest = fitScale();
  const scale = clamp(view.scale * factor, Math.min(smallest, 1), MAX_SCALE);
  view.x = point[0] - ((point[0] - view.x) * scale) / view.scale;
  view.y = point[1] - ((point[1] - view.y) * scale) / view.scale;
  view.scale = scale;
  view.fitted = scale === smallest;
  move();
}

export const zoomTo = (scale) => zoom(scale / view.scale);

export function pan(dx, dy) {
  view.x += dx;
  view.y += dy;
  move();
}

/** Centre a detection. */
export function centre({ box: [x1, y1, x2, y2] }) {
  const { width, height } = area();
  view.x = width / 2 - (view.scale * (x1 + x2)) / 2;
  view.y = height / 2 - (view.scale * (y1 + y2)) / 2;
  move();
}

/** Centre a detection, with some context around it. */
export function zoomToDetection(detection) {
  const { width, height } = area();
  const [x1, y1, x2, y2] = detection.box;
  const scale = Math.min(width / (x2 - x1), height / (y2 - y1)) / 2.5;
  view.scale = clamp(scale, Math.min(fitScale(), 1), MAX_SCALE / 2);
  view.fitted = false;
  centre(detection);
}

/** Keep the image in sight: centred if it is smaller than the stage. */
function move() {
  if (!view.size) return;
  const { width, height } = area();
  const limit = (start, length, available) => {
    const slack = available - length;
    if (slack >= 0 || view.fitted) return slack / 2;
    // A third of the stage may stay empty, so that objects at the edge can be centred.
    return clamp(start, slack - available / 3, available / 3);
  };
  view.x = limit(view.x, view.scale * view.size.width, width);
  view.y = limit(view.y, view.scale * view.size.height, height);
  setText($("zoom"), `${Math.round(100 * view.scale)}%`);
  draw();
}

export const draw = scheduled(() => panes.forEach(drawPane));

function drawPane({ stage, canvas, detections }) {
  const { width, height } = area();
  const ratio = devicePixelRatio;
  Object.assign(canvas, { width: Math.round(width * ratio), height: Math.round(height * ratio) });
  stage.classList.toggle("zoomed", !view.fitted);
  if (!view.size) return;
  const { bitmap, size, scale, x, y } = view;
  const context = canvas.getContext("2d");
  context.scale(ratio, ratio);
  context.imageSmoothingEnabled = scale * ratio < 3; // show single pixels when zoomed in
  context.imageSmoothingQuality = "high";
  context.fillStyle = bitmap ? "#fff" : getComputedStyle(canvas).color;
  context.fillRect(x, y, scale * size.width, scale * size.height);
  if (bitmap) context.drawImage(bitmap, x, y, scale * size.width, scale * size.height);
  const options = { area: { width, height }, scale, x, y, lineWidth: 2.5, fontSize: 12 };
  drawDetections(context, detections, { ...options, active: state.active });
}

/** The smallest detection at a point of the stage in CSS pixels, or null. */
function hit({ detections }, [px, py]) {
  const [x, y, margin] = [(px - view.x) / view.scale, (py - view.y) / view.scale, HIT_TOLERANCE / view.scale];
  const isAt = ({ box: [x1, y1, x2, y2] }) =>
    x >= x1 - margin && y >= y1 - margin && x <= x2 + margin && y <= y2 + margin;
  const size = ({ box: [x1, y1, x2, y2] }) => (x2 - x1) * (y2 - y1);
  return detections.filter(isAt).sort((a, b) => size(a) - size(b))[0] ?? null;
}

function listen(pane, activate) {
  const { stage, message } = pane;
  const point = ({ clientX, clientY }) => {
    const corner = stage.getBoundingClientRect();
    return [clientX - corner.left, clientY - corner.top];
  };
  const isOnImage = (event) => view.size && !message.contains(event.target);
  const onWheel = (event) => {
    event.preventDefault();
    // Pinching a touchpad sends wheel events with Ctrl, in small steps.
    const speed = (event.ctrlKey ? 0.01 : 0.0015) * (event.deltaMode === 1 ? 16 : 1);
    zoom(Math.exp(-event.deltaY * speed), point(event));
  };
  stage.addEventListener("wheel", onWheel, { passive: false });
  stage.onpointerdown = (event) => {
    if (event.button !== 0 || !isOnImage(event)) return;
    pointers.set(event.pointerId, point(event));
    stage.setPointerCapture(event.pointerId);
    dragged = false;
  };
  stage.onpointermove = (event) => {
    if (pointers.has(event.pointerId)) drag(event.pointerId, point(event));
    else if (event.pointerType !== "touch") activate(hit(pane, point(event)), false);
  };
  stage.onpointerup = stage.onpointercancel = (event) => pointers.delete(event.pointerId);
  stage.onclick = (event) => !dragged && isOnImage(event) && activate(hit(pane, point(event)), true);
  stage.onpointerleave = (event) => event.pointerType !== "touch" && activate(null, false);
  stage.ondblclick = (event) => (view.fitted ? zoom(2.5, point(event)) : fit());
}

/** Pan with one pointer, zoom and pan with two. */
function drag(id, point) {
  const last = pointers.get(id);
  if (!dragged && Math.hypot(point[0] - last[0], point[1] - last[1]) < 3) return;
  dragged = true;
  const middle = (points) => [0, 1].map((n) => points.reduce((sum, p) => sum + p[n], 0) / points.length);
  const spread = ([a, b]) => Math.hypot(a[0] - b[0], a[1] - b[1]) || 1;
  const before = [...pointers.values()];
  pointers.set(id, point);
  const after = [...pointers.values()];
  if (after.length > 2) return;
  const [from, to] = [middle(before), middle(after)];
  if (after.length === 2) zoom(spread(after) / spread(before), from);
  if (!view.fitted) pan(to[0] - from[0], to[1] - from[1]);
}
