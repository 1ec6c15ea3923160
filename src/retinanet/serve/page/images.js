// Decoding of image files, upright, in the browser.

const SUFFIX = /\.(jpe?g|jpe|jfif|mpo|png|bmp|tiff?|webp|gif|p[pgb]m|jp2|avif|hei[cf])$/i;

/** Whether a file may be an image; the server decides. */
export const isImage = (file) => SUFFIX.test(file.name) || /^image\/(?!svg)/.test(file.type);

/**
 * Decode a file to an upright bitmap, as the server does; of an animation, the first frame.
 *
 * Rejects if the browser cannot decode the format, and rotated WebP files, which Chromium decodes
 * without their rotation: boxes would be misplaced.
 */
export async function decode(file) {
  if (await isRotatedWebp(file)) throw new Error("rotated WebP");
  return createImageBitmap(file, { imageOrientation: "from-image" });
}

/** Whether a WebP file has an EXIF orientation of 2 to 8 (tag 0x112, little- or big-endian). */
async function isRotatedWebp(file) {
  if (!/^RIFF[^]{4}WEBP$/.test(await file.slice(0, 12).text())) return false;
  const text = new TextDecoder("latin1").decode(await file.arrayBuffer());
  const exif = text.slice(text.lastIndexOf("EXIF"));
  return /\x12\x01\x03\0\x01\0\0\0[\x02-\x08]|\x01\x12\0\x03\0\0\0\x01\0[\x02-\x08]/.test(exif);
}
