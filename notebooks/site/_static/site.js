// Outputs that only claim are sentences: they wrap on a phone, where tables of numbers scroll.
addEventListener("DOMContentLoaded", () => {
  for (const output of document.querySelectorAll(".cell_output pre")) {
    const lines = output.textContent.split("\n").filter(Boolean);
    if (lines.length && lines.every(line => line.startsWith("✓"))) output.classList.add("claims");
  }
});
