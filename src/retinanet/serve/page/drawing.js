// Boxes and captions on a canvas: on the screen and in saved images.

import { caption, colourOf, textColourOf } from "./state.js";

/**
 * Draw boxes and captions of detections by decreasing score; a caption covers no other, nor more
 * than a quarter of an object. The highlighted detection, `active`, has a caption in any case.
 */
export function drawDetections(
  context, detections, { area, scale = 1, x = 0, y = 0, lineWidth, fontSize, active = null },
) {
  context.save();
  context.lineJoin = "round";
  context.textBaseline = "middle";
  context.font = `600 ${fontSize}px system-ui, sans-serif`;
  const padding = fontSize / 3;
  const items = detections.map((detection) => {
    const [x1, y1, x2, y2] = detection.box;
    const box = [x + scale * x1, y + scale * y1, x + scale * x2, y + scale * y2];
    const width = Math.ceil(context.measureText(caption(detection)).width + 2 * padding);
    return { detection, box, width };
  });
  const first = items.find(({ detection }) => detection === active);
  for (const item of items.toReversed()) if (item !== first) drawBox(context, item, lineWidth, first && 0.6);
  if (first) drawBox(context, first, 1.4 * lineWidth, 1, "#fff");
  const height = Math.round(1.5 * fontSize);
  const corners = placeCaptions(items, height, area);
  if (first) {
    const n = items.indexOf(first);
    const top = first.box[1] >= height ? first.box[1] - height : first.box[3];
    corners[n] ??= [
      Math.max(0, Math.min(first.box[0], area.width - first.width)),
      Math.max(0, Math.min(top, area.height - height)),
    ];
  }
  const order = [...items.keys()].filter((n) => corners[n]);
  order.sort((a, b) => (items[a] === first) - (items[b] === first)); // the highlighted on top
  for (const n of order) {
    const { detection, width } = items[n];
    const [left, top] = corners[n].map(Math.round);
    context.fillStyle = colourOf(detection.class);
    context.fillRect(left, top, width, height);
    context.fillStyle = textColourOf(detection.class);
    context.fillText(caption(detection), left + padding, top + height / 2);
  }
  context.restore();
}

function drawBox(context, { detection, box: [x1, y1, x2, y2] }, lineWidth, alpha = 1, halo = "rgb(0 0 0 / 45%)") {
  context.globalAlpha = alpha;
  for (const [style, width] of [[halo, 2 * lineWidth], [colourOf(detection.class), lineWidth]]) {
    Object.assign(context, { strokeStyle: style, lineWidth: width });
    context.strokeRect(x1, y1, x2 - x1, y2 - y1);
  }
  context.globalAlpha = 1;
}

/** [x, y] of the top left corner of each caption, by decreasing priority; null without a space. */
function placeCaptions(items, height, area) {
  const placed = [];
  return items.map(({ box: [x1, y1, x2, y2], width }) => {
    if (x2 < 0 || y2 < 0 || x1 > area.width || y1 > area.height) return null;
    const left = Math.max(0, Math.min(x1, area.width - width));
    for (const top of [y1 - height, y2, Math.max(y1, 0)]) {
      const rectangle = [left, top, left + width, top + height];
      if (top < 0 || top + height > area.height) continue;
      if (placed.some((other) => overlap(rectangle, other) > 0)) continue;
      if (items.some(({ box }) => overlap(rectangle, box) > overlap(box, box) / 4)) continue;
      placed.push(rectangle);
      return [left, top];
    }
    return null;
  });
}

function overlap(a, b) {
  const width = Math.min(a[2], b[2]) - Math.max(a[0], b[0]);
  const height = Math.min(a[3], b[3]) - Math.max(a[1], b[1]);
  return width > 0 && height > 0 ? width * height : 0;
}
