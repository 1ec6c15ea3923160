// Decoding of image files, upright, in the browser.

const SUFFIX = /\.(jpe?g|jpe|jfif|mpo|png|bmp|tiff?|webp|gif|p[pgb]m|jp2|avif|hei[cf])$/i;

/** Whether a file may be an image; the server decides. */
export const isImage = (file) => SUFFIX.test(file.name) || /^image\/(?!svg)/.test(file.type);

/**
 * Decode a file to an upright bitmap, as the server does; of an animation, the first frame.
 *
 * Rejects if the browser cannot decode the format.
 */
export async function decode(file, options = {}) {
  const bitmap = await createImageBitmap(file, { imageOrientation: "from-image", ...options });
  const orientation = await ignoredOrientation(file);
  return orientation > 1 ? applyOrientation(bitmap, orientation) : bitmap;
}

// Chromium ignores the EXIF orientation of WebP files; the server applies it. To check this browser,
// decode a WebP of 2 x 1 pixels with an orientation of 90 degrees.
const ROTATED_WEBP =
  "UklGRlAAAABXRUJQVlA4WAoAAAAIAAAAAQAAAAAAVlA4TA8AAAAvAQAAAAcQ/Y/+ByKi/wEARVhJRhoAAABNTQAqAAAACAABARIAAwAAAAEABgAAAAAAAA==";
const ignoresWebpOrientation = (async () => {
  const bytes = Uint8Array.from(atob(ROTATED_WEBP), (char) => char.charCodeAt(0));
  return (await createImageBitmap(new Blob([bytes], { type: "image/webp" }))).width === 2;
})().catch(() => false);

/** EXIF orientation (1 to 8) of a WebP file, if the browser ignores it; else 1. */
async function ignoredOrientation(file) {
  const head = await file.slice(0, 12).text();
  if (!/^RIFF[^]{4}WEBP$/.test(head) || !(await ignoresWebpOrientation)) return 1;
  const view = new DataView(await file.arrayBuffer());
  const text = (start) => String.fromCharCode(...new Uint8Array(view.buffer, start, 4));
  try {
    let start = 12;
    while (text(start) !== "EXIF") {
      const length = view.getUint32(start + 4, true);
      start += 8 + length + (length % 2);
    }
    const base = start + (text(start + 8) === "Exif" ? 14 : 8);
    const little = view.getUint16(base) === 0x4949;
    const directory = base + view.getUint32(base + 4, little);
    for (let i = 0; i < view.getUint16(directory, little); i++) {
      const entry = directory + 2 + 12 * i;
      if (view.getUint16(entry, little) === 0x112) return view.getUint16(entry + 8, little);
    }
  } catch {
    // The file has no EXIF data, or they are truncated: no orientation.
  }
  return 1;
}

// (a, b, c, d) of the canvas transform by orientation.
const TRANSFORMS = {
  ...{ 2: [-1, 0, 0, 1], 3: [-1, 0, 0, -1], 4: [1, 0, 0, -1], 5: [0, 1, 1, 0] },
  ...{ 6: [0, 1, -1, 0], 7: [0, -1, -1, 0], 8: [0, -1, 1, 0] },
};

function applyOrientation(bitmap, orientation) {
  if (!TRANSFORMS[orientation]) return bitmap;
  const [a, b, c, d] = TRANSFORMS[orientation];
  const { width, height } = bitmap;
  const canvas = new OffscreenCanvas(...(orientation > 4 ? [height, width] : [width, height]));
  const context = canvas.getContext("2d");
  const shift = (m, n) => Math.max(0, -(m * width), -(n * height)); // back to the origin
  context.setTransform(a, b, c, d, shift(a, c), shift(b, d));
  context.drawImage(bitmap, 0, 0);
  bitmap.close();
  return canvas.transferToImageBitmap();
}
