(() => {
  const all = JSON.parse(document.getElementById("images").textContent);
  const world = document.querySelector(".world"), pointed = world.querySelector(".pointed");
  const [thumb, name, path] = [...pointed.children], here = world.querySelector(".here");
  const groups = [...world.querySelectorAll("g")];
  const legends = [...document.querySelectorAll(".legend")];
  let current = -1;

  function point(k) {
    current = k;
    const at = k % all.perSheet, box = world.getBoundingClientRect();
    thumb.className = "thumb s" + Math.floor(k / all.perSheet);
    thumb.style.setProperty("--x", at % all.perRow);
    thumb.style.setProperty("--y", Math.floor(at / all.perRow));
    name.textContent = (all.label && all.label[k] ? all.label[k] + ", " : "")
      + "cluster " + all.cluster[k];
    path.textContent = all.path[k];
    pointed.hidden = false;
    // Beside the point, on the side that has room.
    const x = all.x[k] / 1000 * box.width, y = all.y[k] / 1000 * box.height;
    const width = pointed.offsetWidth, height = pointed.offsetHeight;
    pointed.style.left = Math.max(0, Math.min(box.width - width,
      x > box.width / 2 ? x - width - 14 : x + 14)) + "px";
    pointed.style.top = Math.max(0, Math.min(box.height - height, y - height / 2)) + "px";
    here.setAttribute("d", `M${all.x[k]} ${all.y[k]}h0`);
  }

  function leave() {
    pointed.hidden = true;
    here.setAttribute("d", "");
  }

  function nearest(x, y, allowed = () => true) {
    let best = -1, least = Infinity;
    for (let k = 0; k < all.x.length; k++) {
      const far = (all.x[k] - x) ** 2 + (all.y[k] - y) ** 2;
      if (far < least && allowed(k)) { best = k; least = far; }
    }
    return best;
  }

  const follow = (event) => {
    const box = world.getBoundingClientRect();
    point(nearest((event.clientX - box.left) / box.width * 1000,
      (event.clientY - box.top) / box.height * 1000));
  };
  world.addEventListener("pointermove", follow);
  world.addEventListener("pointerdown", follow);
  // A finger that is lifted leaves its image behind.
  world.addEventListener("pointerleave", (event) => {
    if (event.pointerType === "mouse") leave();
  });
  world.addEventListener("blur", leave);
  const ways = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
  world.addEventListener("keydown", (event) => {
    if (event.key === "Escape") leave();
    const way = ways[event.key];
    if (!way) return;
    event.preventDefault();
    if (current < 0) { point(nearest(500, 500)); return; }
    const [x, y] = [all.x[current], all.y[current]];
    const next = nearest(x, y, (k) => {
      const [right, down] = [all.x[k] - x, all.y[k] - y];
      const along = right * way[0] + down * way[1];
      return along > 0 && along >= Math.abs(right * way[1]) + Math.abs(down * way[0]);
    });
    if (next >= 0) point(next);
  });

  const finders = [...document.querySelectorAll("button.find")];
  const colourings = [...document.querySelectorAll("button[data-by]")];

  function colour(by) {
    for (const part of [...groups, ...legends])
      part.toggleAttribute("hidden", part.dataset.by !== by);
    for (const button of colourings) button.setAttribute("aria-pressed", button.dataset.by === by);
  }

  function single(number) {
    for (const dot of groups[0].children)
      dot.classList.toggle("dim", number !== null && dot.dataset.number !== number);
    for (const button of finders)
      button.setAttribute("aria-pressed", button.dataset.number === number);
  }

  for (const button of colourings) button.addEventListener("click", () => {
    single(null);
    colour(button.dataset.by);
  });
  for (const button of finders) {
    button.hidden = false;
    button.addEventListener("click", () => {
      const off = button.getAttribute("aria-pressed") === "true";
      colour("cluster");
      single(off ? null : button.dataset.number);
      if (!off) world.scrollIntoView({ block: "nearest" });
    });
  }
})();
