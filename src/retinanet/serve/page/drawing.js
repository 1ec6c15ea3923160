// Colours and captions, on the screen and on images to keep.

/** As `retinanet detect` draws them; the first seven are Okabe and Ito's. */
export const PALETTE = [
  [213, 94, 0],
  [0, 158, 115],
  [86, 180, 233],
  [240, 228, 66],
  [204, 121, 167],
  [0, 114, 178],
  [230, 159, 0],
  [150, 230, 80],
  [140, 80, 220],
  [0, 220, 220],
  [160, 60, 60],
  [255, 255, 255],
];

export function css(rgb) {
  return `rgb(${rgb.join(" ")})`;
}

/** Black or white, whichever is read more easily on a colour (WCAG's relative luminance). */
export function inkOn(rgb) {
  const [r, g, b] = rgb.map((value) => {
    const share = value / 255;
    return share <= 0.04045 ? share / 12.92 : ((share + 0.055) / 1.055) ** 2.4;
  });
  const light = 0.2126 * r + 0.7152 * g + 0.0722 * b;
  return (light + 0.05) / 0.05 >= 1.05 / (light + 0.05) ? "#000" : "#fff";
}

export function captionOf(answer, i) {
  return `${answer.className(i)} ${answer.scores[i].toFixed(2)}`;
}

/**
 * Places for captions: none hides another, nor more than a quarter of an object.
 *
 * @param items [{box: [x1, y1, x2, y2], width}] in the order in which they may choose, in pixels of
 *   what is drawn on.
 * @param height of a caption.
 * @param area {width, height} of what is drawn on.
 * @returns for each item [x, y] of its upper left corner, or null where it finds no place.
 */
export function placeCaptions(items, height, area) {
  const taken = [];
  return items.map(({ box, width }) => {
    const [x1, y1, x2, y2] = box;
    if (x2 < 0 || y2 < 0 || x1 > area.width || y1 > area.height) return null;
    const left = Math.max(0, Math.min(x1, area.width - width));
    for (const top of [y1 - height, y2, Math.max(y1, 0)]) {
      const place = [left, top, left + width, top + height];
      if (top < 0 || top + height > area.height) continue;
      if (taken.some((other) => overlap(place, other) > 0)) continue;
      if (items.some((other) => overlap(place, other.box) > quarter(other.box))) continue;
      taken.push(place);
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

function quarter(box) {
  return ((box[2] - box[0]) * (box[3] - box[1])) / 4;
}

/**
 * The image at full size with boxes and captions on it, as a PNG.
 *
 * @param bitmap the image's pixels.
 * @param answer what was found in it.
 * @param shown the numbers of the detections to draw, best first.
 * @param colour gives the (r, g, b) of a class name.
 */
export async function drawnImage(bitmap, answer, shown, colour) {
  const canvas = document.createElement("canvas");
  canvas.width = bitmap.width;
  canvas.height = bitmap.height;
  const context = canvas.getContext("2d");
  if (!context) throw new Error("the image is larger than this browser can draw");
  context.fillStyle = "#fff"; // transparent images lie on white, as the model sees them
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.drawImage(bitmap, 0, 0);

  const longer = Math.max(canvas.width, canvas.height);
  const line = Math.max(2, Math.round(longer / 320));
  const size = Math.max(11, Math.round(longer / 56));
  context.lineJoin = "round";
  for (const i of [...shown].reverse()) {
    const [x1, y1, x2, y2] = answer.box(i);
    context.strokeStyle = "rgb(0 0 0 / 45%)";
    context.lineWidth = line * 2;
    context.strokeRect(x1, y1, x2 - x1, y2 - y1);
    context.strokeStyle = css(colour(answer.className(i)));
    context.lineWidth = line;
    context.strokeRect(x1, y1, x2 - x1, y2 - y1);
  }
  context.font = `600 ${size}px system-ui, sans-serif`;
  context.textBaseline = "middle";
  const pad = Math.round(size / 3);
  const height = Math.round(size * 1.4);
  const items = shown.map((i) => ({
    box: [...answer.box(i)],
    width: Math.ceil(context.measureText(captionOf(answer, i)).width) + 2 * pad,
  }));
  placeCaptions(items, height, canvas).forEach((place, n) => {
    if (!place) return;
    const rgb = colour(answer.className(shown[n]));
    context.fillStyle = css(rgb);
    context.fillRect(place[0], place[1], items[n].width, height);
    context.fillStyle = inkOn(rgb);
    context.fillText(captionOf(answer, shown[n]), place[0] + pad, place[1] + height / 2);
  });
  const blob = await new Promise((resolve) => canvas.toBlob(resolve, "image/png"));
  if (!blob) throw new Error("the image is larger than this browser can draw");
  return blob;
}
