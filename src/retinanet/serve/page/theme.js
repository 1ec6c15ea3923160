// Runs before the page is drawn, so that a kept theme never flashes in the other colours.
(() => {
  let kept = null;
  try {
    kept = localStorage.getItem("retinanet.theme");
  } catch {
    // Storage is switched off: the system's theme.
  }
  document.documentElement.dataset.theme = kept === "light" || kept === "dark" ? kept : "auto";
})();
