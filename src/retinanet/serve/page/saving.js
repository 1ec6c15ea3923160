// The card that saves: what of which images, in which layout.

import { cocoResults, detectionsJson, save, uniqueName, withoutSuffix, zip } from "./download.js";
import { drawnImage } from "./drawing.js";
import { announce, tell } from "./notice.js";
import { decode } from "./images.js";
import { $, colourOf, count, sameSize, shownOf, state } from "./state.js";

function saveModel() {
  return state.used.find((model) => model.name === $("save-model").value) ?? state.used[0];
}

/** The images to save, with what of each; those without an answer are told apart. */
function toSave(onlyShown = $("save-shown").checked) {
  const model = saveModel();
  const all = $("save-which").value === "all";
  const images = all ? state.images : state.current ? [state.current] : [];
  const ready = [];
  const failures = [];
  let open = 0;
  for (const image of images) {
    const job = image.jobs.get(model?.name);
    if (job?.answer) {
      const { answer } = job;
      const shown = onlyShown
        ? shownOf(answer)
        : Array.from({ length: answer.length }, (_, i) => i);
      ready.push({ image, name: image.name, answer, shown });
    } else if (image.tooLarge || job?.state === "refused") {
      failures.push({ file: image.name, reason: image.tooLarge || job.reason });
    } else open++;
  }
  return { ready, failures, open };
}

export function drawSave() {
  if ($("save-card").hidden) return;
  $("save-which-label").hidden = state.images.length < 2;
  if (state.images.length < 2) $("save-which").value = "one";
  $("save-which").options[1].textContent = `all ${state.images.length}`;
  const { ready, failures, open } = toSave(true);
  const shown = ready.reduce((sum, one) => sum + one.shown.length, 0);
  const all = ready.reduce((sum, one) => sum + one.answer.length, 0);
  $("save-shown-words").textContent = `only what is shown: ${shown} of ${count(all, "object")}`;
  $("save-json").disabled = ready.length + failures.length === 0;
  $("save-coco").disabled = ready.length === 0;
  const drawable = ready.filter((one) => !one.image.unseen);
  $("save-png").disabled = drawable.length === 0 || saving;
  if (saving) return;
  const hints = [];
  if (open > 0 && ready.length === 0) hints.push("Nothing is searched yet.");
  else if (open > 0) hints.push(`${count(open, "image")} not searched yet, and left out.`);
  if (drawable.length < ready.length) {
    hints.push(
      ready.length === 1
        ? "This browser cannot show the image, and so not draw on it."
        : "Images that this browser cannot show are not drawn on.",
    );
  }
  $("save-hint").textContent = hints.join(" ");
}

let saving = false;

function saveText(text, name) {
  save(new Blob([text], { type: "application/json" }), name);
  announce(`${name} saved.`);
}

$("save-json").addEventListener("click", () => {
  const { ready, failures } = toSave();
  saveText(detectionsJson(ready, failures), "detections.json");
});
$("save-coco").addEventListener("click", () =>
  saveText(cocoResults(toSave().ready), "coco_results.json"),
);
$("save-png").addEventListener("click", async () => {
  // What is drawn is what is seen; the low scores of a detector would cover the image.
  const { ready } = toSave(true);
  saving = true;
  drawSave();
  const files = [];
  const failed = [];
  const taken = new Set();
  try {
    for (const [n, { image, name, answer, shown }] of ready.entries()) {
      if (ready.length > 1) $("save-hint").textContent = `Drawing ${n + 1} of ${ready.length}…`;
      let bitmap = null;
      try {
        bitmap = await decode(image.file);
        if (!sameSize(bitmap, answer)) throw new Error("it is shown in another size than searched");
        const blob = await drawnImage(bitmap, answer, shown, colourOf);
        const own = ready.length > 1 ? name : name.split("/").pop();
        files.push({
          name: uniqueName(withoutSuffix(own) + "-detections.png", ".png", taken),
          blob,
        });
      } catch {
        failed.push(name);
      } finally {
        bitmap?.close();
      }
    }
    if (files.length === 1) save(files[0].blob, files[0].name);
    else if (files.length > 1) save(await zip(files), "images.zip");
    if (files.length > 0)
      announce(files.length === 1 ? `${files[0].name} saved.` : `${files.length} images saved.`);
  } catch (error) {
    tell(`The images could not be saved: ${error.message}`);
  } finally {
    saving = false;
    drawSave();
  }
  if (failed.length > 0) {
    tell(
      `This browser could not draw on ${count(failed.length, "image")}: ${failed.slice(0, 3).join(", ")}.`,
    );
  }
});
for (const id of ["save-which", "save-model", "save-shown"])
  $(id).addEventListener("change", drawSave);
