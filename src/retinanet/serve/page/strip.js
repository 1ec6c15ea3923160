// The strip of thumbnails.

import { thumbnail } from "./pictures.js";
import { $, count, element, fileKind, jobsOf, shownOf, state, stateOf } from "./state.js";

const STRIP_HEIGHT = 66; // CSS pixels of a thumbnail

/** The place of a picture in the strip; `select` is called when it is pressed. */
export function makeThumb(picture, select) {
  const one = element("li", "thumb", element("span", "kind"), element("span", "state"));
  one.id = picture.id;
  one.setAttribute("role", "option");
  one.setAttribute("aria-selected", "false");
  one.tabIndex = -1;
  one.title = picture.name;
  one.addEventListener("click", () => select(picture));
  return one;
}

export function drawThumb(picture) {
  const now = stateOf(picture);
  const one = picture.element;
  one.dataset.state = now;
  const found = jobsOf(picture).filter((job) => job.answer);
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
  const kind = picture.noThumb ? `${fileKind(picture)} ` : "";
  const told =
    now !== "done" ? words : counts.length === 1 ? count(counts[0], "object") : `${words} objects`;
  one.setAttribute("aria-label", `${picture.name}, ${kind}${told}`);
}

// Thumbnails are made for what is in sight, two at a time: each is decoded once and kept small.
const wantedThumbs = new Set();

let makingThumbs = 0;

export const seen = new IntersectionObserver(
  (entries) => {
    for (const { target, isIntersecting } of entries) {
      const picture = state.pictures.find((one) => one.element === target);
      if (!picture || picture.thumb || picture.noThumb) continue;
      if (isIntersecting) wantedThumbs.add(picture);
      else wantedThumbs.delete(picture);
    }
    makeThumbs();
  },
  { root: $("strip"), rootMargin: "0px 300px" },
);

async function makeThumbs() {
  if (makingThumbs >= 2) return;
  const [picture] = wantedThumbs;
  if (!picture) return;
  wantedThumbs.delete(picture);
  makingThumbs++;
  try {
    const blob = await thumbnail(
      picture.file,
      Math.ceil(STRIP_HEIGHT * Math.min(2, devicePixelRatio)),
    );
    if (state.pictures.includes(picture) && !picture.thumb) {
      picture.thumb = URL.createObjectURL(blob);
      const image = element("img");
      image.alt = "";
      image.src = picture.thumb;
      picture.element.querySelector(".kind, img").replaceWith(image);
    }
  } catch {
    picture.noThumb = true;
    const kind = picture.element.querySelector(".kind");
    if (kind) kind.textContent = fileKind(picture);
    drawThumb(picture);
  } finally {
    makingThumbs--;
    makeThumbs();
  }
  makeThumbs();
}
