// Placement of captions, and images with boxes drawn on them.

import { colourOf } from "./state.js";

/**
 * Place captions so that none covers another, or more than a quarter of an object.
 *
 * @param items [{box: [x1, y1, x2, y2], width}] by decreasing priority, in pixels of the area.
 * @param height of a caption.
 * @param area {width, height}.
 * @returns for each item [x, y] of its top left corner, or null if there is no space.
 */
export function placeCaptions(items, height, area) {
  const placed = [];
  return items.map(({ box: [x1, y1, x2, y2], width }) => {
    if (x2 < 0 || y2 < 0 || x1 > area.width || y1 > area.height) return null;
    const left = Math.max(0, Math.min(x1, area.width - width));
    for (const top of [y1 - height, y2, Math.max(y1, 0)]) {
      const caption = [left, top, left + width, top + height];
      if (top < 0 || top + height > area.height) continue;
      if (placed.some((other) => overlap(caption, other) > 0)) continue;
      if (items.some(({ box }) => overlap(caption, box) > overlap(box, box) / 4)) continue;
      placed.push(caption);
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

/** Draw the detections `indices` on the image at its full size; returns a PNG. */
export async function drawDetections(bitmap, detections, indices) {
  const canvas = new OffscreenCanvas(bitmap.width, bitmap.height);
  const context = canvas.getContext("2d");
  if (!context) throw new Error("the image is larger than this browser can draw");
  context.fillStyle = "#fff"; // the model sees transparent pixels as white
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.drawImage(bitmap, 0, 0);
  const longerSide = Math.max(canvas.width, canvas.height);
  const lineWidth = Math.max(2, Math.round(longerSide / 320));
  context.lineJoin = "round";
  for (const i of indices.toReversed()) {
    const [x1, y1, x2, y2] = detections.box(i);
    for (const [style, width] of [
      ["rgb(0 0 0 / 45%)", 2 * lineWidth],
      [colourOf(detections.className(i)).fill, lineWidth],
    ]) {
      Object.assign(context, { strokeStyle: style, lineWidth: width });
      context.strokeRect(x1, y1, x2 - x1, y2 - y1);
    }
  }
  const fontSize = Math.max(11, Math.round(longerSide / 56));
  const [height, padding] = [Math.round(1.4 * fontSize), Math.round(fontSize / 3)];
  context.font = `600 ${fontSize}px system-ui, sans-serif`;
  context.textBaseline = "middle";
  const items = indices.map((i) => ({
    box: [...detections.box(i)],
    width: Math.ceil(context.measureText(detections.caption(i)).width) + 2 * padding,
  }));
  placeCaptions(items, height, canvas).forEach((corner, n) => {
    if (!corner) return;
    const [x, y] = corner;
    const { fill, text } = colourOf(detections.className(indices[n]));
    context.fillStyle = fill;
    context.fillRect(x, y, items[n].width, height);
    context.fillStyle = text;
    context.fillText(detections.caption(indices[n]), x + padding, y + height / 2);
  });
  return canvas.convertToBlob({ type: "image/png" });
}
