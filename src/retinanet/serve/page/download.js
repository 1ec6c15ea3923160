// The save card: detections and drawn images as files, in the layouts of `retinanet detect`.

import { drawDetections } from "./captions.js";
import { decode } from "./images.js";
import { $, announce, changed, isSameSize, plural, showMessage, state } from "./state.js";

let isSaving = false;

/** The images to save as {image, name, detections, indices}, failures, and the unprocessed. */
function selection(onlyVisible) {
  const model = state.selected.find(({ name }) => name === $("save-model").value) ?? state.selected[0];
  const images = $("save-which").value === "all" ? state.images : [state.current].filter(Boolean);
  const result = { ready: [], failures: [], unprocessed: 0 };
  for (const image of images) {
    const { name } = image;
    const { detections, status, error } = image.jobs.get(model?.name) ?? {};
    if (detections) {
      const indices = onlyVisible ? detections.visible() : [...detections.scores.keys()];
      result.ready.push({ image, name, detections, indices });
    } else if (image.tooLarge || status === "failed") {
      result.failures.push({ file: name, reason: image.tooLarge || error });
    } else result.unprocessed++;
  }
  return result;
}

export function renderSaveCard() {
  const several = state.images.length > 1;
  $("save-card").hidden = state.images.length === 0;
  $("save-which-label").hidden = !several;
  if (!several) $("save-which").value = "one";
  $("save-which").options[1].textContent = `all ${state.images.length}`;
  const { ready, failures, unprocessed } = selection(true);
  const sum = (count) => ready.reduce((total, item) => total + count(item), 0);
  const visible = sum(({ indices }) => indices.length);
  const total = plural(sum(({ detections }) => detections.length), "object");
  $("save-visible-text").textContent = `visible only: ${visible} of ${total}`;
  const numDrawable = ready.filter(({ image }) => !image.undecodable).length;
  $("save-json").disabled = ready.length + failures.length === 0;
  $("save-coco").disabled = ready.length === 0;
  $("save-png").disabled = numDrawable === 0 || isSaving;
  if (isSaving) return;
  const hints = [];
  if (unprocessed > 0) hints.push(`${plural(unprocessed, "image")} not yet processed and left out.`);
  if (numDrawable < ready.length) {
    const number = ready.length > 1 ? plural(ready.length - numDrawable, "image") : "the image";
    hints.push(`This browser cannot display ${number} and cannot draw on it.`);
  }
  $("save-hint").textContent = hints.join(" ");
}

/** detections.json: {"images": [...], "failures": [...]}, one line per object. */
function detectionsJson({ ready, failures }) {
  const images = ready.map(({ name, detections, indices }) => {
    const { height, width } = detections;
    const head = JSON.stringify({ file: name, height, width });
    const objects = indices.map((i) => {
      const names = { class: detections.className(i), category_id: detections.categoryId(i) };
      return JSON.stringify({ ...names, score: detections.scores[i], box: [...detections.box(i)] });
    });
    const list = objects.length > 0 ? `\n  ${objects.join(",\n  ")}` : "";
    return `\n${head.slice(0, -1)}, "detections": [${list}]}`;
  });
  const failed = failures.map((failure) => `\n${JSON.stringify(failure)}`);
  return `{"images": [${images}\n],\n"failures": [${failed}\n]}\n`;
}

/** COCO results: a list of image_id, category_id, bbox (x, y, width, height) and score. */
function cocoResults({ ready }) {
  const used = new Set();
  const lines = ready.flatMap(({ name, detections, indices }) => {
    const id = imageId(name, used);
    return indices.map((i) => {
      const [x1, y1, x2, y2] = detections.box(i);
      const box = [x1, y1, x2 - x1, y2 - y1].map((value) => Number(value.toFixed(3)));
      const category = `"category_id": ${detections.categoryId(i)}`;
      return `\n{"image_id": ${id}, ${category}, "bbox": [${box}], "score": ${detections.scores[i]}}`;
    });
  });
  return `[${lines}\n]\n`;
}

/** The name without suffix, as a number if it is one; the whole name if that is used already. */
function imageId(name, used) {
  const stem = withoutSuffix(name);
  // As text: the number may have more digits than JavaScript's numbers.
  const first = /^[0-9]+$/.test(stem) ? stem.replace(/^0+(?=.)/, "") : JSON.stringify(stem);
  let id = first;
  for (let n = 1; used.has(id); n++) id = JSON.stringify(n === 1 ? name : `${name}-${n}`);
  used.add(id);
  return id;
}

const withoutSuffix = (name) => name.replace(/(?<=[^/])\.[^./]+$/, "");

/** A file name that is not used yet, regardless of case. */
function pngName(name, used) {
  const stem = `${withoutSuffix(name)}-detections`;
  let unique = `${stem}.png`;
  for (let n = 2; used.has(unique.toLowerCase()); n++) unique = `${stem}-${n}.png`;
  used.add(unique.toLowerCase());
  return unique;
}

async function savePng() {
  const { ready } = selection(true);
  const [files, failed, used] = [[], [], new Set()];
  isSaving = true;
  changed();
  try {
    for (const [n, { image, name, detections, indices }] of ready.entries()) {
      if (ready.length > 1) $("save-hint").textContent = `Drawing ${n + 1} of ${ready.length}…`;
      try {
        const bitmap = await decode(image.file);
        if (!isSameSize(bitmap, detections)) throw new Error("decoded with another size");
        const blob = await drawDetections(bitmap, detections, indices);
        bitmap.close();
        files.push({ name: pngName(ready.length > 1 ? name : name.split("/").pop(), used), blob });
      } catch {
        failed.push(name);
      }
    }
    if (files.length === 1) save(files[0].blob, files[0].name);
    else if (files.length > 1) save(await zip(files), "images.zip");
  } catch (error) {
    showMessage(`The images could not be saved: ${error.message}`);
  }
  isSaving = false;
  changed();
  if (failed.length > 0) {
    const names = failed.slice(0, 3).join(", ");
    showMessage(`This browser could not draw on ${plural(failed.length, "image")}: ${names}.`);
  }
}

function save(blob, name) {
  const link = document.createElement("a");
  Object.assign(link, { href: URL.createObjectURL(blob), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000); // the browser has read it by then
  announce(`${name} saved.`);
}

const CRC_TABLE = Uint32Array.from({ length: 256 }, (_, value) => {
  for (let bit = 0; bit < 8; bit++) value = value & 1 ? (value >>> 1) ^ 0xedb88320 : value >>> 1;
  return value;
});

async function crc32(blob) {
  let crc = 0xffffffff;
  for (const byte of new Uint8Array(await blob.arrayBuffer())) {
    crc = (crc >>> 8) ^ CRC_TABLE[(crc ^ byte) & 255];
  }
  return (crc ^ 0xffffffff) >>> 0;
}

/** Little-endian bytes of [number of bytes, value] fields. */
function bytes(...fields) {
  return Uint8Array.from(fields.flatMap(([size, value]) => {
    return Array.from({ length: size }, (_, n) => Math.floor(value / 256 ** n) % 256);
  }));
}

/** An uncompressed ZIP archive of [{name, blob}], up to 4 GiB: PNG is compressed already. */
async function zip(files) {
  const [parts, directory] = [[], []];
  let offset = 0;
  for (const { name, blob } of files) {
    const path = new TextEncoder().encode(name);
    // Version 2.0, UTF-8 names, no compression, 1980-01-01, checksum, sizes, no extra field.
    const fields = bytes([2, 20], [2, 0x800], [2, 0], [2, 0], [2, 0x21], [4, await crc32(blob)],
      [4, blob.size], [4, blob.size], [2, path.length], [2, 0]);
    parts.push(bytes([4, 0x04034b50]), fields, path, blob);
    directory.push(bytes([4, 0x02014b50], [2, 20]), fields, bytes([10, 0], [4, offset]), path);
    offset += 30 + path.length + blob.size;
    if (offset > 0xffffffff) throw new Error("more than 4 GiB of images; save fewer at a time");
  }
  const end = bytes([4, 0x06054b50], [4, 0], [2, files.length], [2, files.length],
    [4, new Blob(directory).size], [4, offset], [2, 0]);
  return new Blob([...parts, ...directory, end], { type: "application/zip" });
}

const saveText = (text, name) => save(new Blob([text], { type: "application/json" }), name);
const onlyVisible = () => $("save-visible").checked;
$("save-json").onclick = () => saveText(detectionsJson(selection(onlyVisible())), "detections.json");
$("save-coco").onclick = () => saveText(cocoResults(selection(onlyVisible())), "coco_results.json");
$("save-png").onclick = savePng;
for (const id of ["save-which", "save-model", "save-visible"]) $(id).onchange = changed;
