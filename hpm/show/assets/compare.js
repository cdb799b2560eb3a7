(() => {
  const keys = JSON.parse(document.getElementById("keys").textContent);
  const select = document.getElementById("sort"), turn = document.getElementById("turn");
  const parts = [...document.querySelectorAll("[data-run]")];
  const holders = [...new Set(parts.map((part) => part.parentElement))];
  const sorters = [...document.querySelectorAll(".sorter")];
  document.querySelector(".toolbar").hidden = false;

  function order() {
    const values = keys[select.value], down = turn.getAttribute("aria-pressed") === "true";
    const before = (a, b) => {
      const [x, y] = [values[a], values[b]];
      if (x === null || y === null) return (x === null) - (y === null);
      const found = typeof x === "number" && typeof y === "number" ? x - y
        : String(x).localeCompare(String(y), "en", { numeric: true });
      return down ? -found : found;
    };
    for (const holder of holders) {
      const own = [...holder.children].filter((part) => part.dataset.run !== undefined);
      own.sort((a, b) => before(Number(a.dataset.run), Number(b.dataset.run)));
      holder.append(...own);
    }
    for (const sorter of sorters) {
      const sorted = sorter.dataset.key === select.value;
      const way = down ? "descending" : "ascending";
      sorter.parentElement.setAttribute("aria-sort", sorted ? way : "none");
    }
  }

  select.addEventListener("change", order);
  turn.addEventListener("click", () => {
    turn.setAttribute("aria-pressed", turn.getAttribute("aria-pressed") !== "true");
    order();
  });
  for (const sorter of sorters) sorter.addEventListener("click", () => {
    const again = select.value === sorter.dataset.key;
    const down = again && turn.getAttribute("aria-pressed") !== "true";
    select.value = sorter.dataset.key;
    turn.setAttribute("aria-pressed", down);
    order();
  });
  for (const chip of document.querySelectorAll(".chip")) chip.addEventListener("click", () => {
    const run = chip.dataset.number, off = chip.getAttribute("aria-pressed") === "true";
    chip.setAttribute("aria-pressed", !off);
    for (const part of document.querySelectorAll(`[data-run="${run}"], .chart .c${run}`))
      part.classList.toggle("off", off);
  });
})();
