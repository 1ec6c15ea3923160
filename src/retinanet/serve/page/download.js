// Files to keep: the layouts that `retinanet detect` writes.

/** detections.json: {"images": [...], "failures": [...]}, a line an object. */
export function detectionsJson(images, failures) {
  const lines = images.map(({ name, answer, shown }) => {
    const head = JSON.stringify({ file: name, height: answer.height, width: answer.width });
    const objects = [...shown].map((i) =>
      JSON.stringify({
        class: answer.className(i),
        category_id: answer.categoryId(i),
        score: answer.scores[i],
        box: [...answer.box(i)],
      }),
    );
    const list = objects.length > 0 ? `\n  ${objects.join(",\n  ")}` : "";
    return `\n${head.slice(0, -1)}, "detections": [${list}]}`;
  });
  const refused = failures.map((one) => `\n${JSON.stringify(one)}`);
  return `{"images": [${lines.join(",")}\n],\n"failures": [${refused.join(",")}${refused.length > 0 ? "\n" : ""}]}\n`;
}

/** COCO's results: a list of image_id, category_id, bbox (x, y, w, h) and score. */
export function cocoResults(images) {
  const taken = new Set();
  const lines = [];
  for (const { name, answer, shown } of images) {
    const id = imageId(name, taken);
    for (const i of shown) {
      const [x1, y1, x2, y2] = answer.box(i);
      const box = [x1, y1, x2 - x1, y2 - y1].map((value) => Number(value.toFixed(3)));
      lines.push(
        `{"image_id": ${id}, "category_id": ${answer.categoryId(i)}, ` +
          `"bbox": ${JSON.stringify(box)}, "score": ${answer.scores[i]}}`,
      );
    }
  }
  return `[${lines.map((line) => `\n${line}`).join(",")}\n]\n`;
}

/** The name without its suffix, a number where it is one; the whole name where that is taken. */
function imageId(name, taken) {
  const stem = withoutSuffix(name);
  // As text, for a number may have more digits than JavaScript counts.
  const own = /^[0-9]+$/.test(stem) ? stem.replace(/^0+(?=.)/, "") : JSON.stringify(stem);
  for (let number = 0; ; number++) {
    const id = number === 0 ? own : JSON.stringify(number === 1 ? name : `${name}-${number}`);
    if (taken.has(id)) continue;
    taken.add(id);
    return id;
  }
}

export function withoutSuffix(name) {
  return name.replace(/(?<=[^/])\.[^./]+$/, "");
}

/** A name that no earlier one has, without regard to case. */
export function uniqueName(name, suffix, taken) {
  const stem = withoutSuffix(name);
  for (let number = 1; ; number++) {
    const own = `${stem}${number > 1 ? `-${number}` : ""}${suffix}`;
    if (taken.has(own.toLowerCase())) continue;
    taken.add(own.toLowerCase());
    return own;
  }
}

/** Gives a Blob to the browser to keep as `name`. */
export function save(blob, name) {
  const address = URL.createObjectURL(blob);
  const link = document.createElement("a");
  link.href = address;
  link.download = name;
  document.body.append(link);
  link.click();
  link.remove();
  // The browser has taken it over by then; what is not revoked stays in memory.
  setTimeout(() => URL.revokeObjectURL(address), 60_000);
}

const CRC = Uint32Array.from({ length: 256 }, (_, n) => {
  let value = n;
  for (let bit = 0; bit < 8; bit++) value = value & 1 ? (value >>> 1) ^ 0xedb88320 : value >>> 1;
  return value >>> 0;
});

async function crc32(blob) {
  let crc = 0xffffffff;
  for (const byte of new Uint8Array(await blob.arrayBuffer())) {
    crc = (crc >>> 8) ^ CRC[(crc ^ byte) & 255];
  }
  return (crc ^ 0xffffffff) >>> 0;
}

/** A ZIP archive of [{name, blob}], stored as they are: PNG is packed already. Up to 4 GiB. */
export async function zip(files) {
  const parts = [];
  const directory = [];
  let place = 0;
  for (const { name, blob } of files) {
    const path = new TextEncoder().encode(name);
    const fields = new DataView(new ArrayBuffer(26)); // from "version needed" to "extra length"
    fields.setUint16(0, 20, true);
    fields.setUint16(2, 0x0800, true); // names are UTF-8
    fields.setUint16(8, 0x21, true); // 1980-01-01: an archive of the same files is the same
    fields.setUint32(10, await crc32(blob), true);
    fields.setUint32(14, blob.size, true);
    fields.setUint32(18, blob.size, true);
    fields.setUint16(22, path.length, true);
    parts.push(new Uint8Array([0x50, 0x4b, 3, 4]), fields.buffer, path, blob);
    const tail = new DataView(new ArrayBuffer(14)); // comment, disk and attributes are 0
    tail.setUint32(10, place, true);
    directory.push(new Uint8Array([0x50, 0x4b, 1, 2, 20, 0]), fields.buffer, tail.buffer, path);
    place += 30 + path.length + blob.size;
    if (place > 0xffffffff) throw new Error("more than 4 GiB of images; save fewer at a time");
  }
  const length = new Blob(directory).size;
  const end = new DataView(new ArrayBuffer(22));
  end.setUint32(0, 0x504b0506);
  end.setUint16(8, files.length, true);
  end.setUint16(10, files.length, true);
  end.setUint32(12, length, true);
  end.setUint32(16, place, true);
  return new Blob([...parts, ...directory, end.buffer], { type: "application/zip" });
}
