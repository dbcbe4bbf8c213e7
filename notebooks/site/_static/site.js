addEventListener("DOMContentLoaded", () => {
  // Outputs that only claim are sentences: they wrap on a phone, where tables of numbers scroll.
  for (const output of document.querySelectorAll(".cell_output pre")) {
    const lines = output.textContent.split("\n").filter(Boolean);
    if (lines.length && lines.every(line => line.startsWith("✓"))) output.classList.add("claims");
  }
  // A cell that holds a sentence keeps room for some words in a line.
  for (const cell of document.querySelectorAll(".table-wrapper td"))
    if (cell.textContent.length > 45) cell.classList.add("long");
});

// A figure shrinks to a phone's width as far as its small print can be read, and no further.
addEventListener("load", () => {
  for (const image of document.querySelectorAll(".cell_output > img"))
    image.style.setProperty("--least", `${Math.round(0.55 * image.naturalWidth)}px`);
});
