// Image inputs: files, folders, the clipboard, drag and drop, and the camera.

import { $, notify } from "./state.js";

const byName = new Intl.Collator(undefined, { numeric: true, sensitivity: "base" }).compare;

/** Listen to all inputs; `addFiles` receives [{file, name}], folders included in the names. */
export function listenToInputs(addFiles) {
  for (const [button, input] of [["choose", "files"], ["choose-folder", "folder"]]) {
    $(button).onclick = () => $(input).click();
    $(input).onchange = () => {
      const files = [...$(input).files].map((file) => ({ file, name: file.webkitRelativePath || file.name }));
      $(input).value = ""; // the same file can be chosen again
      const shown = files.filter(({ name }) => !/(^|\/)\./.test(name));
      addFiles(shown.sort((a, b) => byName(a.name, b.name)));
    };
  }
  listenToClipboard(addFiles);
  listenToDrops(addFiles);
  listenToCamera(addFiles);
}

function listenToClipboard(addFiles) {
  let numPasted = 0;
  const nameFile = (file) => {
    // Browsers name every image from the clipboard image.png.
    if (file.name && !/^image\.\w+$/.test(file.name)) return { file, name: file.name };
    const suffix = (file.type.split("/")[1] || "png").replace("jpeg", "jpg");
    return { file, name: `pasted-${++numPasted}.${suffix}` };
  };
  document.addEventListener("paste", (event) => {
    if (event.target.closest?.("input, dialog")) return;
    event.preventDefault();
    const files = [...(event.clipboardData?.files ?? [])];
    if (files.length === 0) notify("There is no image in the clipboard.");
    else addFiles(files.map(nameFile));
  });
}

function listenToDrops(addFiles) {
  let depth = 0; // dragenter and dragleave come for every element
  const show = (value) => {
    depth = Math.max(0, value);
    $("drop-sheet").hidden = depth === 0;
  };
  const on = (type, listener) =>
    window.addEventListener(type, (event) => {
      if (event.dataTransfer?.types.includes("Files")) listener(event);
    });
  on("dragenter", () => show(depth + 1));
  on("dragleave", () => show(depth - 1));
  on("dragover", (event) => event.preventDefault());
  on("drop", async (event) => {
    event.preventDefault();
    show(0);
    try {
      // Collect all entries first: the browser clears the list after the event.
      const items = [...event.dataTransfer.items].filter(({ kind }) => kind === "file");
      const entries = items.map((item) => item.webkitGetAsEntry?.() ?? item.getAsFile());
      addFiles((await Promise.all(entries.map(readEntry))).flat());
    } catch (error) {
      notify(`The dropped files cannot be read: ${error.message}`);
    }
  });
}

/** Read a dropped File, or an entry of a file or folder, to [{file, name}]. */
async function readEntry(entry) {
  if (entry instanceof File) return [{ file: entry, name: entry.name }];
  if (!entry.isDirectory) {
    const file = await new Promise((resolve, reject) => entry.file(resolve, reject));
    return [{ file, name: entry.fullPath.replace(/^\//, "") }];
  }
  const reader = entry.createReader();
  const entries = [];
  for (let size = -1; size < entries.length; ) {
    // Browsers return a hundred entries at a time.
    size = entries.length;
    entries.push(...(await new Promise((resolve, reject) => reader.readEntries(resolve, reject))));
  }
  const shown = entries.filter(({ name }) => !name.startsWith("."));
  shown.sort((a, b) => byName(a.name, b.name));
  return (await Promise.all(shown.map(readEntry))).flat();
}

const CAMERA_ERRORS = {
  NotAllowedError: "The browser denied access to the camera. Allow it in the address bar and try again.",
  NotFoundError: "No camera was found on this device.",
  NotReadableError: "The camera cannot be used: another program uses it.",
};

function listenToCamera(addFiles) {
  const [dialog, video, shutter, message] = ["camera-dialog", "video", "shutter", "camera-message"].map($);
  let numImages = 0;
  const stop = () => {
    for (const track of video.srcObject?.getTracks() ?? []) track.stop();
    video.srcObject = null;
    video.hidden = shutter.disabled = true;
  };
  dialog.onclose = stop;
  $("camera").onclick = async () => {
    dialog.showModal();
    message.textContent = "Waiting for the camera; the browser may ask for permission.";
    if (!navigator.mediaDevices) {
      message.textContent =
        "Browsers allow access to the camera only to pages at https:// or on this machine (localhost).";
      return;
    }
    try {
      const camera = { facingMode: "environment", width: { ideal: 1920 }, height: { ideal: 1080 } };
      video.srcObject = await navigator.mediaDevices.getUserMedia({ video: camera });
      if (!dialog.open) return stop(); // closed meanwhile
      await video.play();
      video.hidden = shutter.disabled = false;
      message.textContent = "";
      shutter.focus();
    } catch (error) {
      stop();
      message.textContent = CAMERA_ERRORS[error.name] ?? `The camera cannot be used: ${error.message}`;
    }
  };
  shutter.onclick = async () => {
    const canvas = new OffscreenCanvas(video.videoWidth, video.videoHeight);
    canvas.getContext("2d").drawImage(video, 0, 0);
    const blob = await canvas.convertToBlob({ type: "image/jpeg", quality: 0.92 });
    dialog.close();
    const file = new File([blob], `camera-${++numImages}.jpg`, { type: "image/jpeg" });
    addFiles([{ file, name: file.name }]);
  };
}
