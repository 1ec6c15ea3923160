// Images as they come: from files, folders, the clipboard; decoded upright.

const SUFFIX = /\.(jpe?g|jpe|jfif|mpo|png|bmp|tiff?|webp|gif|p[pgb]m|jp2|avif|hei[cf])$/i;
const inOrder = new Intl.Collator(undefined, { numeric: true, sensitivity: "base" }).compare;

/** Whether a file may be an image; the server has the last word. */
export function isImage(file) {
  if (SUFFIX.test(file.name)) return true;
  return file.type.startsWith("image/") && !file.type.startsWith("image/svg");
}

/** Files and folders that were dropped, as [{file, name}], `name` with the folders in it. */
export async function dropped(transfer) {
  // Both must be asked for at once: after the event the browser takes them away.
  const things = [...transfer.items]
    .filter((item) => item.kind === "file")
    .map((item) => ({ entry: item.webkitGetAsEntry?.() ?? null, file: item.getAsFile() }));
  const found = [];
  for (const { entry, file } of things) {
    if (entry?.isDirectory) await walk(entry, found);
    else if (file) found.push({ file, name: file.name });
  }
  return found;
}

async function walk(folder, found) {
  const reader = folder.createReader();
  const entries = [];
  for (;;) {
    // A browser gives a hundred at a time, and an empty list at the end.
    const some = await new Promise((resolve, reject) => reader.readEntries(resolve, reject));
    if (some.length === 0) break;
    entries.push(...some);
  }
  entries.sort((a, b) => inOrder(a.name, b.name));
  for (const entry of entries) {
    if (entry.name.startsWith(".")) continue;
    if (entry.isDirectory) await walk(entry, found);
    else {
      const file = await new Promise((resolve, reject) => entry.file(resolve, reject));
      found.push({ file, name: entry.fullPath.replace(/^\//, "") });
    }
  }
}

/** Files of an <input>, in order of their names. */
export function chosen(input) {
  const found = [...input.files].map((file) => ({
    file,
    name: file.webkitRelativePath || file.name,
  }));
  const visible = found.filter(({ name }) => !name.split("/").some((part) => part.startsWith(".")));
  return visible.sort((a, b) => inOrder(a.name, b.name));
}

/**
 * A file's pixels, upright as the server sees them, and of an animation the first image.
 *
 * Rejects where the browser has no decoder for the format.
 */
export async function decode(file, options = {}) {
  const bitmap = await createImageBitmap(file, { imageOrientation: "from-image", ...options });
  const orientation = await forgottenOrientation(file);
  return orientation > 1 ? turned(bitmap, orientation) : bitmap;
}

/** A small image for the strip as a Blob. */
export async function thumbnail(file, height) {
  const bitmap = await decode(file, { resizeHeight: height, resizeQuality: "medium" });
  try {
    const canvas = document.createElement("canvas");
    canvas.width = Math.min(bitmap.width, 4 * height); // a panorama shows its beginning
    canvas.height = bitmap.height;
    const context = canvas.getContext("2d");
    context.fillStyle = "#fff";
    context.fillRect(0, 0, canvas.width, canvas.height);
    context.drawImage(bitmap, 0, 0);
    return await new Promise((resolve) => canvas.toBlob(resolve, "image/jpeg", 0.8));
  } finally {
    bitmap.close();
  }
}

// Chromium does not heed the EXIF orientation of WebP, the server does. So that this holds in
// browsers of any kind, a WebP of 2 x 1 pixels that says "turn me" is decoded once.
const SIDEWAYS_WEBP =
  "UklGRlAAAABXRUJQVlA4WAoAAAAIAAAAAQAAAAAAVlA4TA8AAAAvAQAAAAcQ/Y/+ByKi/wEARVhJRhoAAABNTQAqAAAACAABARIAAwAAAAEABgAAAAAAAA==";
let webpIsTurned = null;

async function heedsWebp() {
  webpIsTurned ??= (async () => {
    const bytes = Uint8Array.from(atob(SIDEWAYS_WEBP), (c) => c.charCodeAt(0));
    const bitmap = await createImageBitmap(new Blob([bytes], { type: "image/webp" }), {
      imageOrientation: "from-image",
    });
    return bitmap.height === 2;
  })().catch(() => true);
  return webpIsTurned;
}

async function forgottenOrientation(file) {
  const head = await view(file, 0, 12);
  const isWebp = head.byteLength === 12 && text(head, 0) === "RIFF" && text(head, 8) === "WEBP";
  if (!isWebp || (await heedsWebp())) return 1;
  for (let place = 12; place + 8 <= file.size;) {
    const chunk = await view(file, place, 8);
    const length = chunk.getUint32(4, true);
    if (text(chunk, 0) === "EXIF") return exifOrientation(await view(file, place + 8, length));
    place += 8 + length + (length % 2);
  }
  return 1;
}

async function view(file, start, length) {
  return new DataView(await file.slice(start, start + length).arrayBuffer());
}

function text(bytes, start) {
  return String.fromCharCode(...[0, 1, 2, 3].map((i) => bytes.getUint8(start + i)));
}

/** The value of tag 0x112 in the first directory of EXIF data; 1 where there is none. */
function exifOrientation(bytes) {
  try {
    const start = text(bytes, 0) === "Exif" ? 6 : 0;
    const little = bytes.getUint16(start) === 0x4949;
    const directory = start + bytes.getUint32(start + 4, little);
    const entries = bytes.getUint16(directory, little);
    for (let i = 0; i < entries; i++) {
      const entry = directory + 2 + 12 * i;
      if (bytes.getUint16(entry, little) !== 0x112) continue;
      const value = bytes.getUint16(entry + 8, little);
      return value >= 1 && value <= 8 ? value : 1;
    }
  } catch {
    // Cut short: as if it said nothing.
  }
  return 1;
}

// (a, b, c, d) of the canvas transform by orientation; e and f bring it back to the origin.
const TURNS = {
  2: [-1, 0, 0, 1],
  3: [-1, 0, 0, -1],
  4: [1, 0, 0, -1],
  5: [0, 1, 1, 0],
  6: [0, 1, -1, 0],
  7: [0, -1, -1, 0],
  8: [0, -1, 1, 0],
};

function turned(bitmap, orientation) {
  const [a, b, c, d] = TURNS[orientation];
  const { width, height } = bitmap;
  const canvas =
    orientation > 4 ? new OffscreenCanvas(height, width) : new OffscreenCanvas(width, height);
  const context = canvas.getContext("2d");
  const e = Math.max(0, -(a * width), -(c * height));
  const f = Math.max(0, -(b * width), -(d * height));
  context.setTransform(a, b, c, d, e, f);
  context.drawImage(bitmap, 0, 0);
  bitmap.close();
  return canvas.transferToImageBitmap();
}
