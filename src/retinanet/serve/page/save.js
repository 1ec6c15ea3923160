// The save card: detections and drawn images as files, in the layouts of `retinanet detect`.

import { drawDetections } from "./drawing.js";
import { decode } from "./images.js";
import { $, announce, changed, isSameSize, notify, onChange, plural, state, visible } from "./state.js";

let isSaving = false;

/** The images to save as {image, name, result, detections}, failures, and the unprocessed. */
function selection(onlyVisible) {
  const model = state.selected.find(({ name }) => name === $("save-model").value) ?? state.selected[0];
  const images = $("save-which").value === "all" ? state.images : [state.current].filter(Boolean);
  const selected = { ready: [], failures: [], unprocessed: 0 };
  for (const image of images) {
    const { result, status, error } = image.jobs.get(model?.name) ?? {};
    if (result) {
      const detections = onlyVisible ? visible(result) : result.detections;
      selected.ready.push({ image, name: image.name, result, detections });
    } else if (image.tooLarge || status === "failed") {
      selected.failures.push({ file: image.name, reason: image.tooLarge || error });
    } else selected.unprocessed++;
  }
  return selected;
}

onChange(() => {
  const several = state.images.length > 1;
  $("save-card").hidden = state.images.length === 0;
  $("save-which-label").hidden = !several;
  if (!several) $("save-which").value = "one";
  $("save-which").options[1].textContent = `all ${state.images.length}`;
  const { ready, failures, unprocessed } = selection(true);
  const sum = (count) => ready.reduce((total, item) => total + count(item), 0);
  const total = plural(sum(({ result }) => result.detections.length), "object");
  $("save-visible-text").textContent = `visible only: ${sum(({ detections }) => detections.length)} of ${total}`;
  const numDrawable = ready.filter(({ image }) => !image.undecodable).length;
  $("save-json").disabled = ready.length + failures.length === 0;
  $("save-coco").disabled = ready.length === 0;
  $("save-png").disabled = numDrawable === 0 || isSaving;
  const hints = [];
  if (isSaving) hints.push("Drawing…");
  if (unprocessed > 0) hints.push(`${plural(unprocessed, "image")} not yet processed and left out.`);
  if (numDrawable < ready.length) hints.push("This browser cannot display some images and cannot draw on them.");
  $("save-hint").textContent = hints.join(" ");
});

function saveJson({ ready, failures }) {
  const images = ready.map(({ name, result: { height, width }, detections }) => ({ file: name, height, width, detections }));
  saveText(JSON.stringify({ images, failures }, null, 1), "detections.json");
}

/** COCO results: a list of image_id, category_id, bbox (x, y, width, height) and score. */
function saveCoco({ ready }) {
  const used = new Set();
  const lines = ready.flatMap(({ name, detections }) => {
    const id = imageId(name, used);
    return detections.map(({ category_id, score, box: [x1, y1, x2, y2] }) => {
      const bbox = [x1, y1, x2 - x1, y2 - y1].map((value) => Number(value.toFixed(3)));
      return `\n{"image_id": ${id}, ${JSON.stringify({ category_id, bbox, score }).slice(1)}`;
    });
  });
  saveText(`[${lines}\n]\n`, "coco_results.json");
}

/** The name without suffix, as a number if it is one; the whole name if that is used already. */
function imageId(name, used) {
  const stem = withoutSuffix(name);
  // As text: the number may have more digits than JavaScript's numbers.
  let id = /^[0-9]+$/.test(stem) ? stem.replace(/^0+(?=.)/, "") : JSON.stringify(stem);
  for (let n = 1; used.has(id); n++) id = JSON.stringify(n === 1 ? name : `${name}-${n}`);
  used.add(id);
  return id;
}

const withoutSuffix = (name) => name.replace(/(?<=[^/])\.[^./]+$/, "");

async function savePng({ ready }) {
  const [files, failed] = [new Map(), []];
  isSaving = true;
  changed();
  for (const item of ready) {
    const stem = `${withoutSuffix(ready.length > 1 ? item.name : item.name.split("/").pop())}-detections`;
    let name = `${stem}.png`;
    const used = new Set([...files.keys()].map((other) => other.toLowerCase()));
    for (let n = 2; used.has(name.toLowerCase()); n++) name = `${stem}-${n}.png`;
    await drawImage(item).then((blob) => files.set(name, blob), () => failed.push(item.name));
  }
  if (failed.length > 0) {
    notify(`This browser could not draw on ${plural(failed.length, "image")}: ${failed.slice(0, 3).join(", ")}.`);
  }
  try {
    if (files.size > 1) save(await zip(files), "images.zip");
    else for (const [name, blob] of files) save(blob, name);
  } catch (error) {
    notify(`The images could not be saved: ${error.message}`);
  }
  isSaving = false;
  changed();
}

/** A PNG of an image with its boxes, at full size. */
async function drawImage({ image, result, detections }) {
  const bitmap = await decode(image.file);
  if (!isSameSize(bitmap, result)) throw new Error("decoded with another size");
  const canvas = new OffscreenCanvas(bitmap.width, bitmap.height);
  const context = canvas.getContext("2d");
  context.fillStyle = "#fff"; // the model sees transparent pixels as white
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.drawImage(bitmap, 0, 0);
  bitmap.close();
  const side = Math.max(canvas.width, canvas.height);
  const lineWidth = Math.max(2, Math.round(side / 320));
  drawDetections(context, detections, { area: canvas, lineWidth, fontSize: Math.max(11, Math.round(side / 56)) });
  return canvas.convertToBlob({ type: "image/png" });
}

/** Little-endian bytes of [number of bytes, value] fields. */
function bytes(...fields) {
  const digits = ([size, value]) => Array.from({ length: size }, (_, n) => Math.floor(value / 256 ** n) % 256);
  return Uint8Array.from(fields.flatMap(digits));
}

/** A ZIP archive of a map of blobs by name, up to 4 GiB. */
async function zip(files) {
  const [parts, directory] = [[], []];
  let offset = 0;
  for (const [name, blob] of files) {
    const path = new TextEncoder().encode(name);
    // gzip: a header of 10 bytes, the data, their checksum in 4 bytes, and their size in 4 bytes.
    const packed = await new Response(blob.stream().pipeThrough(new CompressionStream("gzip"))).blob();
    const data = packed.slice(10, -8);
    // Version 2.0, UTF-8 names, deflated, 1980-01-01, checksum, sizes, no extra field.
    const head = [bytes([2, 20], [2, 0x800], [2, 8], [2, 0], [2, 0x21]), packed.slice(-8, -4),
      bytes([4, data.size], [4, blob.size], [2, path.length], [2, 0])];
    parts.push(bytes([4, 0x04034b50]), ...head, path, data);
    directory.push(bytes([4, 0x02014b50], [2, 20]), ...head, bytes([10, 0], [4, offset]), path);
    offset += 30 + path.length + data.size;
    if (offset > 0xffffffff) throw new Error("more than 4 GiB of images; save fewer at a time");
  }
  const end = bytes([4, 0x06054b50], [4, 0], [2, files.size], [2, files.size],
    [4, new Blob(directory).size], [4, offset], [2, 0]);
  return new Blob([...parts, ...directory, end], { type: "application/zip" });
}

function save(blob, name) {
  const link = document.createElement("a");
  Object.assign(link, { href: URL.createObjectURL(blob), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000); // the browser has read it by then
  announce(`${name} saved.`);
}

const saveText = (text, name) => save(new Blob([text], { type: "application/json" }), name);
$("save-json").onclick = () => saveJson(selection($("save-visible").checked));
$("save-coco").onclick = () => saveCoco(selection($("save-visible").checked));
$("save-png").onclick = () => savePng(selection(true));
for (const id of ["save-which", "save-model", "save-visible"]) $(id).onchange = changed;
