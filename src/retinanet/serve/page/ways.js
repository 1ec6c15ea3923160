// Ways in: files, a folder, the clipboard, the camera, and what is dropped on the page.

import { Camera } from "./camera.js";
import { tell } from "./notice.js";
import { chosen, dropped } from "./images.js";
import { $ } from "./state.js";

let addFiles = () => {};

/** Opens the ways; `add` gets [{file, name}]. */
export function openWays(add) {
  addFiles = add;
}

const camera = new Camera($("camera-dialog"), (file) => addFiles([{ file, name: file.name }]));

$("choose").addEventListener("click", () => $("files").click());
$("choose-folder").addEventListener("click", () => $("folder").click());
$("camera").addEventListener("click", () => camera.open());
for (const id of ["files", "folder"]) {
  $(id).addEventListener("change", () => {
    const found = chosen($(id));
    $(id).value = ""; // the same file may be chosen again
    addFiles(found);
  });
}

let pasted = 0;

function namedPaste(file) {
  // A browser calls every image from the clipboard image.png.
  const own = file.name && !/^image\.\w+$/.test(file.name);
  const suffix = (file.type.split("/")[1] || "png").replace("jpeg", "jpg").replace("+xml", "");
  return { file, name: own ? file.name : `pasted-${++pasted}.${suffix}` };
}

document.addEventListener("paste", (event) => {
  if (event.target.closest?.("input, textarea, dialog")) return;
  const files = [...(event.clipboardData?.files ?? [])];
  event.preventDefault();
  if (files.length > 0) addFiles(files.map(namedPaste));
  else tell("There is no image in the clipboard.");
});
$("paste").addEventListener("click", async () => {
  if (!navigator.clipboard?.read) {
    tell("This browser gives the clipboard only to the keys: press Ctrl V.");
    return;
  }
  try {
    const found = [];
    for (const item of await navigator.clipboard.read()) {
      const type = item.types.find((one) => one.startsWith("image/"));
      if (type) found.push(namedPaste(new File([await item.getType(type)], "", { type })));
    }
    if (found.length > 0) addFiles(found);
    else tell("There is no image in the clipboard.");
  } catch (error) {
    const words =
      error.name === "NotAllowedError" ? "The browser was not allowed to read it" : error.message;
    tell(`The clipboard cannot be read: ${words}. Ctrl V works as well.`);
  }
});

const carriesFiles = (event) => [...(event.dataTransfer?.types ?? [])].includes("Files");
let dragDepth = 0;
window.addEventListener("dragenter", (event) => {
  if (!carriesFiles(event)) return;
  dragDepth++;
  $("drop-sheet").hidden = false;
});
window.addEventListener("dragleave", (event) => {
  if (!carriesFiles(event)) return;
  dragDepth = Math.max(0, dragDepth - 1);
  $("drop-sheet").hidden = dragDepth === 0;
});
window.addEventListener("dragover", (event) => {
  if (carriesFiles(event)) event.preventDefault();
});
window.addEventListener("drop", async (event) => {
  dragDepth = 0;
  $("drop-sheet").hidden = true;
  if (!carriesFiles(event)) return;
  event.preventDefault();
  try {
    addFiles(await dropped(event.dataTransfer));
  } catch (error) {
    tell(`What was dropped cannot be read: ${error.message}`);
  }
});
