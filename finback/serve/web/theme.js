// Applies the last chosen theme before anything is painted, so that a dark page never flashes white.
try {
  const chosen = localStorage.getItem("finback.theme");
  if (chosen === "light" || chosen === "dark") document.documentElement.dataset.theme = chosen;
} catch {
  // storage is off: the system decides
}
