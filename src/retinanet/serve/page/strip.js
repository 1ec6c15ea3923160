// The strip of thumbnails.

import { thumbnail } from "./images.js";
import { $, count, element, fileKind, jobsOf, shownOf, state, stateOf } from "./state.js";

const STRIP_HEIGHT = 66; // CSS pixels of a thumbnail

/** The place of an image in the strip; `select` is called when it is pressed. */
export function makeThumb(image, select) {
  const one = element("li", "thumb", element("span", "kind"), element("span", "state"));
  one.id = image.id;
  one.setAttribute("role", "option");
  one.setAttribute("aria-selected", "false");
  one.tabIndex = -1;
  one.title = image.name;
  one.addEventListener("click", () => select(image));
  return one;
}

export function drawThumb(image) {
  const now = stateOf(image);
  const one = image.element;
  one.dataset.state = now;
  const found = jobsOf(image).filter((job) => job.answer);
  const counts = found.map((job) => shownOf(job.answer).length);
  const words = {
    waiting: "waiting",
    running: "searching",
    refused: "refused",
    cancelled: "not searched",
    done: counts.join(" | "),
  }[now];
  const label = one.querySelector(".state");
  if (label.textContent !== words) label.textContent = words;
  // Names hold what is to be read on the thing itself.
  const kind = image.noThumb ? `${fileKind(image)} ` : "";
  const told =
    now !== "done" ? words : counts.length === 1 ? count(counts[0], "object") : `${words} objects`;
  one.setAttribute("aria-label", `${image.name}, ${kind}${told}`);
}

// Thumbnails are made for what is in sight, two at a time: each is decoded once and kept small.
const wantedThumbs = new Set();

let makingThumbs = 0;

export const seen = new IntersectionObserver(
  (entries) => {
    for (const { target, isIntersecting } of entries) {
      const image = state.images.find((one) => one.element === target);
      if (!image || image.thumb || image.noThumb) continue;
      if (isIntersecting) wantedThumbs.add(image);
      else wantedThumbs.delete(image);
    }
    makeThumbs();
  },
  { root: $("strip"), rootMargin: "0px 300px" },
);

async function makeThumbs() {
  if (makingThumbs >= 2) return;
  const [image] = wantedThumbs;
  if (!image) return;
  wantedThumbs.delete(image);
  makingThumbs++;
  try {
    const blob = await thumbnail(
      image.file,
      Math.ceil(STRIP_HEIGHT * Math.min(2, devicePixelRatio)),
    );
    if (state.images.includes(image) && !image.thumb) {
      image.thumb = URL.createObjectURL(blob);
      const shown = element("img");
      shown.alt = "";
      shown.src = image.thumb;
      image.element.querySelector(".kind, img").replaceWith(shown);
    }
  } catch {
    image.noThumb = true;
    const kind = image.element.querySelector(".kind");
    if (kind) kind.textContent = fileKind(image);
    drawThumb(image);
  } finally {
    makingThumbs--;
    makeThumbs();
  }
  makeThumbs();
}
