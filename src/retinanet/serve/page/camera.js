// One image from the camera.

const WORDS = {
  NotAllowedError:
    "The browser was not allowed to use the camera. Allow it in the address bar and try again.",
  NotFoundError: "No camera was found on this device.",
  OverconstrainedError: "No camera was found on this device.",
  NotReadableError: "The camera is there, but another program uses it.",
};

/** Why the camera cannot be had. */
export function cameraWords(error) {
  if (!error) {
    return "Browsers give the camera only to pages at https:// or on this very machine (localhost).";
  }
  return WORDS[error.name] ?? `The camera cannot be used: ${error.message}`;
}

/** The dialog with the camera's image; `taken` gets a File. */
export class Camera {
  constructor(dialog, taken) {
    this.dialog = dialog;
    this.video = dialog.querySelector("video");
    this.words = dialog.querySelector(".camera-words");
    this.shutter = dialog.querySelector(".shutter");
    this.choice = dialog.querySelector("select");
    this.stream = null;
    this.shots = 0;
    this.turn = 0;
    this.shutter.addEventListener("click", () => this.#shoot(taken));
    this.choice.addEventListener("change", () => this.#start(this.choice.value));
    dialog.addEventListener("close", () => this.#stop());
  }

  open() {
    this.dialog.showModal();
    this.#start(null);
  }

  async #start(device) {
    this.#stop();
    const turn = ++this.turn;
    this.shutter.disabled = true;
    this.video.hidden = true;
    this.words.textContent = "Waiting for the camera. The browser may ask you.";
    if (!navigator.mediaDevices?.getUserMedia) {
      this.words.textContent = cameraWords(null);
      return;
    }
    try {
      const which = device ? { deviceId: { exact: device } } : { facingMode: "environment" };
      const stream = await navigator.mediaDevices.getUserMedia({
        video: { ...which, width: { ideal: 1920 }, height: { ideal: 1080 } },
      });
      if (turn !== this.turn || !this.dialog.open) {
        for (const track of stream.getTracks()) track.stop();
        return;
      }
      this.stream = stream;
      this.video.srcObject = stream;
      await this.video.play();
      this.video.hidden = false;
      this.words.textContent = "";
      this.shutter.disabled = false;
      this.shutter.focus();
      await this.#list();
    } catch (error) {
      if (turn !== this.turn || error.name === "AbortError") return;
      this.#stop();
      this.words.textContent = cameraWords(error);
    }
  }

  async #list() {
    const devices = await navigator.mediaDevices.enumerateDevices();
    const cameras = devices.filter((device) => device.kind === "videoinput");
    this.choice.closest("label").hidden = cameras.length < 2;
    const used = this.stream?.getVideoTracks()[0]?.getSettings().deviceId;
    this.choice.replaceChildren(
      ...cameras.map((camera, n) => new Option(camera.label || `Camera ${n + 1}`, camera.deviceId)),
    );
    if (used) this.choice.value = used;
  }

  async #shoot(taken) {
    const canvas = document.createElement("canvas");
    canvas.width = this.video.videoWidth;
    canvas.height = this.video.videoHeight;
    canvas.getContext("2d").drawImage(this.video, 0, 0);
    const blob = await new Promise((resolve) => canvas.toBlob(resolve, "image/jpeg", 0.92));
    this.dialog.close();
    taken(new File([blob], `camera-${++this.shots}.jpg`, { type: "image/jpeg" }));
  }

  #stop() {
    this.turn++;
    for (const track of this.stream?.getTracks() ?? []) track.stop();
    this.stream = null;
    this.video.srcObject = null;
  }
}
