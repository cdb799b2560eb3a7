const strips = [...document.querySelectorAll("section")].map(s => [...s.querySelectorAll("img")]);
const dialog = document.querySelector("dialog");
const [large, caption] = [dialog.querySelector("img"), dialog.querySelector("p")];
let row = 0, column = 0;
function enlarge(newRow, newColumn) {
  row = (newRow + strips.length) % strips.length;
  column = (newColumn + strips[row].length) % strips[row].length;
  const image = strips[row][column], ratio = image.naturalWidth / image.naturalHeight;
  large.src = image.src;
  large.alt = image.alt;
  large.style.setProperty("--ratio", ratio);
  caption.textContent = image.alt;
  if (!dialog.open) dialog.showModal();
}
const moves = {
  previous: () => enlarge(row, column - 1), next: () => enlarge(row, column + 1),
  above: () => enlarge(row - 1, column), below: () => enlarge(row + 1, column),
  close: () => dialog.close(),
};
const keys = {
  ArrowLeft: "previous", ArrowRight: "next", ArrowUp: "above", ArrowDown: "below",
};
strips.forEach((images, i) => images.forEach((image, j) => {
  image.tabIndex = 0;
  image.setAttribute("role", "button");
  image.addEventListener("click", () => enlarge(i, j));
  image.addEventListener("keydown", event => {
    if (event.key === "Enter" || event.key === " ") { event.preventDefault(); enlarge(i, j); }
  });
}));
dialog.addEventListener("keydown", event => {
  if (event.key in keys) { event.preventDefault(); moves[keys[event.key]](); }
});
dialog.addEventListener("close", () => strips[row][column].focus());
for (const button of dialog.querySelectorAll("button"))
  button.addEventListener("click", moves[button.name]);
// A swipe over the enlarged picture goes to the next one.
let from = null;
dialog.addEventListener("touchstart", ({touches: [{clientX, clientY}]}) => {
  from = [clientX, clientY];
}, {passive: true});
dialog.addEventListener("touchend", ({changedTouches: [{clientX, clientY}]}) => {
  const [x, y] = from === null ? [0, 0] : [clientX - from[0], clientY - from[1]];
  from = null;
  if (Math.max(Math.abs(x), Math.abs(y)) < 40) return;
  if (Math.abs(x) > Math.abs(y)) moves[x < 0 ? "next" : "previous"]();
  else moves[y < 0 ? "below" : "above"]();
});
const overlay = document.getElementById("overlay");
if (overlay) {
  overlay.hidden = false;
  overlay.addEventListener("click", () => {
    const on = document.body.classList.toggle("overlay");
    overlay.setAttribute("aria-pressed", String(on));
    for (const section of document.querySelectorAll("section"))
      section.style.setProperty("--photo", on ? `url(${section.querySelector("img").src})` : "");
  });
}
document.getElementById("hint").hidden = false;
