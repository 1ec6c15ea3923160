// Image inputs: files, folders, the clipboard, drag and drop, and the camera.

import { $, showMessage } from "./state.js";

const byName = new Intl.Collator(undefined, { numeric: true, sensitivity: "base" }).compare;

/** Listen to all inputs; `addFiles` receives [{file, name}], folders included in the names. */
export function listenToInputs(addFiles) {
  $("choose").onclick = () => $("files").click();
  $("choose-folder").onclick = () => $("folder").click();
  for (const id of ["files", "folder"]) {
    $(id).onchange = () => {
      const files = [...$(id).files].map((file) => ({ file, name: file.webkitRelativePath || file.name }));
      $(id).value = ""; // the same file can be chosen again
      const visible = files.filter(({ name }) => !/(^|\/)\./.test(name));
      addFiles(visible.sort((a, b) => byName(a.name, b.name)));
    };
  }
  listenToClipboard(addFiles);
  listenToDrops(addFiles);
  const camera = new Camera($("camera-dialog"), (file) => addFiles([{ file, name: file.name }]));
  $("camera").onclick = () => camera.open();
}

function listenToClipboard(addFiles) {
  let numPasted = 0;
  const paste = (files) => {
    if (files.length === 0) showMessage("There is no image in the clipboard.");
    else addFiles(files.map(nameFile));
  };
  const nameFile = (file) => {
    // Browsers name every image from the clipboard image.png.
    if (file.name && !/^image\.\w+$/.test(file.name)) return { file, name: file.name };
    const suffix = (file.type.split("/")[1] || "png").replace("jpeg", "jpg").replace("+xml", "");
    return { file, name: `pasted-${++numPasted}.${suffix}` };
  };
  document.addEventListener("paste", (event) => {
    if (event.target.closest?.("input, textarea, dialog")) return;
    event.preventDefault();
    paste([...(event.clipboardData?.files ?? [])]);
  });
  $("paste").onclick = async () => {
    if (!navigator.clipboard?.read) {
      showMessage("This browser allows access to the clipboard only by keyboard: press Ctrl V.");
      return;
    }
    try {
      const files = [];
      for (const item of await navigator.clipboard.read()) {
        const type = item.types.find((name) => name.startsWith("image/"));
        if (type) files.push(new File([await item.getType(type)], "", { type }));
      }
      paste(files);
    } catch ({ name, message }) {
      const reason = name === "NotAllowedError" ? "the browser denied access" : message;
      showMessage(`The clipboard cannot be read: ${reason}. Ctrl V works as well.`);
    }
  };
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
      addFiles(await droppedFiles(event.dataTransfer));
    } catch (error) {
      showMessage(`The dropped files cannot be read: ${error.message}`);
    }
  });
}

async function droppedFiles(transfer) {
  // Collect all entries first: the browser clears the list after the event.
  const items = [...transfer.items]
    .filter((item) => item.kind === "file")
    .map((item) => ({ entry: item.webkitGetAsEntry?.(), file: item.getAsFile() }));
  const files = [];
  for (const { entry, file } of items) {
    if (entry?.isDirectory) await readFolder(entry, files);
    else if (file) files.push({ file, name: file.name });
  }
  return files;
}

async function readFolder(folder, files) {
  const reader = folder.createReader();
  const entries = [];
  let batch;
  do {
    // Browsers return a hundred entries at a time.
    batch = await new Promise((resolve, reject) => reader.readEntries(resolve, reject));
    entries.push(...batch);
  } while (batch.length > 0);
  for (const entry of entries.sort((a, b) => byName(a.name, b.name))) {
    if (entry.name.startsWith(".")) continue;
    if (entry.isDirectory) {
      await readFolder(entry, files);
      continue;
    }
    const file = await new Promise((resolve, reject) => entry.file(resolve, reject));
    files.push({ file, name: entry.fullPath.replace(/^\//, "") });
  }
}

const CAMERA_ERRORS = {
  NotAllowedError: "The browser denied access to the camera. Allow it in the address bar and try again.",
  NotFoundError: "No camera was found on this device.",
  OverconstrainedError: "No camera was found on this device.",
  NotReadableError: "The camera cannot be used: another program uses it.",
};

/** The camera dialog; `onImage` receives a File. */
class Camera {
  constructor(dialog, onImage) {
    Object.assign(this, { dialog, onImage, stream: null, attempt: 0, numImages: 0 });
    this.video = dialog.querySelector("video");
    this.message = dialog.querySelector(".camera-message");
    this.shutter = dialog.querySelector(".shutter");
    this.devices = dialog.querySelector("select");
    this.shutter.onclick = () => this.#takeImage();
    this.devices.onchange = () => this.#start({ deviceId: { exact: this.devices.value } });
    dialog.onclose = () => this.#stop();
  }

  open() {
    this.dialog.showModal();
    this.#start({ facingMode: "environment" });
  }

  async #start(constraints) {
    this.#stop();
    const { attempt } = this;
    this.message.textContent = "Waiting for the camera; the browser may ask for permission.";
    if (!navigator.mediaDevices?.getUserMedia) {
      this.message.textContent =
        "Browsers allow access to the camera only to pages at https:// or on this machine (localhost).";
      return;
    }
    try {
      const video = { ...constraints, width: { ideal: 1920 }, height: { ideal: 1080 } };
      const stream = await navigator.mediaDevices.getUserMedia({ video });
      if (attempt !== this.attempt) {
        for (const track of stream.getTracks()) track.stop();
        return;
      }
      this.stream = stream;
      this.video.srcObject = stream;
      await this.video.play();
      this.video.hidden = this.shutter.disabled = false;
      this.message.textContent = "";
      this.shutter.focus();
      await this.#listDevices();
    } catch (error) {
      if (attempt !== this.attempt || error.name === "AbortError") return;
      this.#stop();
      this.message.textContent = CAMERA_ERRORS[error.name] ?? `The camera cannot be used: ${error.message}`;
    }
  }

  async #listDevices() {
    const devices = await navigator.mediaDevices.enumerateDevices();
    const cameras = devices.filter(({ kind }) => kind === "videoinput");
    this.devices.closest("label").hidden = cameras.length < 2;
    this.devices.replaceChildren(
      ...cameras.map(({ label, deviceId }, n) => new Option(label || `Camera ${n + 1}`, deviceId)),
    );
    const current = this.stream?.getVideoTracks()[0]?.getSettings().deviceId;
    if (current) this.devices.value = current;
  }

  async #takeImage() {
    const canvas = new OffscreenCanvas(this.video.videoWidth, this.video.videoHeight);
    canvas.getContext("2d").drawImage(this.video, 0, 0);
    const blob = await canvas.convertToBlob({ type: "image/jpeg", quality: 0.92 });
    this.dialog.close();
    this.onImage(new File([blob], `camera-${++this.numImages}.jpg`, { type: "image/jpeg" }));
  }

  #stop() {
    this.attempt++;
    for (const track of this.stream?.getTracks() ?? []) track.stop();
    this.stream = this.video.srcObject = null;
    this.video.hidden = this.shutter.disabled = true;
  }
}
