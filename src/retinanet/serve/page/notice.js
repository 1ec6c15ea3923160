// Words for a person: a bar at the top, and what screen readers say.

import { $ } from "./state.js";

let sayTimer = 0;

/** Told to screen readers; what comes quickly one after another is told once. */
export function announce(words, delay = 150) {
  clearTimeout(sayTimer);
  sayTimer = setTimeout(() => {
    $("said").textContent = words;
  }, delay);
}

let noticeTimer = 0;
export let noticeOfHold = false;

export function tell(
  words,
  { button = "", act = null, wait = false, until = null, hold = false } = {},
) {
  clearInterval(noticeTimer);
  noticeOfHold = hold;
  const box = $("notice");
  box.hidden = false;
  box.classList.toggle("wait", wait);
  // The same words again would be read out again.
  if ($("notice-words").textContent !== words) $("notice-words").textContent = words;
  $("notice-act").hidden = !button;
  $("notice-act").textContent = button;
  $("notice-act").onclick = act;
  $("notice-close").hidden = hold;
  const countDown = () => {
    const left = until === null ? 0 : Math.ceil((until - Date.now()) / 1000);
    $("notice-wait").textContent = left > 0 ? `${left} s` : "";
  };
  countDown();
  if (until !== null) noticeTimer = setInterval(countDown, 250);
}

export function hush() {
  clearInterval(noticeTimer);
  noticeOfHold = false;
  $("notice").hidden = true;
  $("notice-words").textContent = "";
}
