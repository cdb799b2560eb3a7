(() => {
  const all = JSON.parse(document.getElementById("curves").textContent);
  const charts = [...document.querySelectorAll(".chart")].map((card, place) => ({
    ...all[place], plot: card.querySelector(".plot"), cursor: card.querySelector(".cursor"),
    at: card.querySelector(".at"), numbers: [...card.querySelectorAll(".key b")],
    dots: [...card.querySelectorAll(".dot")],
  }));
  const number = (v) => {
    const size = Math.abs(v), near = size >= 0.99 && size < 1;
    const digits = near ? Math.min(9, 1 - Math.floor(Math.log10(1 - size))) : 3;
    if (size >= 999.5) return Math.round(v).toLocaleString("en");
    if (size < 1e-12) return "0";
    return size >= 1e-4 ? v.toPrecision(digits) : v.toExponential(digits - 1);
  };

  function nearest(steps, step) {
    let low = 0, high = steps.length - 1;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (steps[middle] <= step) low = middle; else high = middle;
    }
    return step - steps[low] <= steps[high] - step ? low : high;
  }

  function write(chart, step) {
    let shown = 0;
    chart.curves.forEach((curve, i) => {
      const k = nearest(curve.steps, step);
      chart.numbers[i].textContent = number(curve.values[k]);
      chart.dots[i].style.left = 100 * curve.steps[k] / chart.right + "%";
      chart.dots[i].style.top =
        100 * (chart.high - curve.values[k]) / (chart.high - chart.low) + "%";
      if (i === 0 || Math.abs(curve.steps[k] - step) < Math.abs(shown - step)) {
        shown = curve.steps[k];
      }
    });
    chart.at.textContent = "step " + shown.toLocaleString("en");
    chart.shown = shown;
    const x = 1000 * shown / chart.right;
    chart.cursor.setAttribute("d", `M${x} 0V1000`);
  }

  function point(step) {
    for (const chart of charts) {
      write(chart, step);
      chart.dots.forEach((dot) => { dot.hidden = false; });
    }
  }

  function leave() {
    for (const chart of charts) {
      write(chart, chart.step);
      chart.cursor.setAttribute("d", "");
      chart.dots.forEach((dot) => { dot.hidden = true; });
    }
  }

  for (const chart of charts) {
    chart.shown = chart.step;
    const follow = (event) => {
      const box = chart.plot.getBoundingClientRect();
      point((event.clientX - box.left) / box.width * chart.right);
    };
    chart.plot.addEventListener("pointerdown", follow);
    chart.plot.addEventListener("pointermove", follow);
    // A finger that is lifted leaves its reading behind.
    chart.plot.addEventListener("pointerleave", (event) => {
      if (event.pointerType === "mouse") leave();
    });
    chart.plot.addEventListener("blur", leave);
    chart.plot.addEventListener("keydown", (event) => {
      const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (!move) return;
      event.preventDefault();
      const steps = chart.curves[0].steps;
      const k = nearest(steps, chart.shown) + move;
      point(steps[Math.min(Math.max(k, 0), steps.length - 1)]);
    });
  }
})();
