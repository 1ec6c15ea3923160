// Runs before the page is drawn, so that it never flashes in the colours of another theme.
try {
  const theme = localStorage.getItem("retinanet.theme");
  if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
} catch {
  // Storage is disabled: the theme of the system.
}
