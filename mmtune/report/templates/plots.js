"use strict";
// Values of a plot at the step under the pointer, or chosen with the arrow keys.
for (const chart of document.querySelectorAll(".chart")) {
  const SVG = "http://www.w3.org/2000/svg";
  const { range: [left, right, bottom, top], lines } = JSON.parse(chart.parentElement.querySelector("script").textContent);
  const steps = [...new Set(lines.flatMap(([, points]) => points.map(([step]) => step)))].sort((a, b) => a - b);
  const tip = chart.querySelector(".tip"), axes = chart.querySelector(".axes");
  const classes = [...chart.querySelectorAll("path:not(.points)")].map((path) => path.getAttribute("class").replace("line", "dot"));
  const marks = document.createElementNS(SVG, "g");
  axes.append(marks);
  let at = steps.length - 1;

  const number = (value) => {
    const rounded = Number(value.toPrecision(5)), size = Math.abs(value);
    return size && (size < 1e-3 || size >= 1e7) ? String(rounded) : rounded.toLocaleString("en-US", { maximumFractionDigits: 8 });
  };
  const percent = (share) => `${(100 * share).toFixed(3)}%`;

  function nearest(points, step) {
    let low = 0, high = points.length - 1;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (points[middle][0] < step) low = middle + 1; else high = middle;
    }
    const before = points[Math.max(low - 1, 0)];
    const best = Math.abs(before[0] - step) < Math.abs(points[low][0] - step) ? before : points[low];
    return Math.abs(best[0] - step) <= (right - left) / 100 ? best : null;
  }

  function add(kind, attributes) {
    const element = document.createElementNS(SVG, kind);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    marks.append(element);
  }

  function show(index) {
    at = Math.min(Math.max(index, 0), steps.length - 1);
    const step = steps[at], x = (step - left) / (right - left);
    marks.replaceChildren();
    add("line", { class: "cursor", x1: percent(x), x2: percent(x), y1: "0", y2: "100%" });
    const heading = document.createElement("b");
    heading.textContent = `step ${step.toLocaleString("en-US")}`;
    tip.replaceChildren(heading);
    const spoken = [];
    lines.forEach(([name, points], line) => {
      const point = nearest(points, step);
      if (!point) return;
      add("circle", { class: classes[line], r: 5, cx: percent((point[0] - left) / (right - left)), cy: percent((top - point[1]) / (top - bottom)) });
      const text = `${name} ${number(point[1])}`;
      const row = document.createElement("div");
      row.textContent = point[0] === step ? text : `${text} (step ${point[0].toLocaleString("en-US")})`;
      tip.append(row);
      spoken.push(row.textContent);
    });
    tip.hidden = false;
    const room = chart.clientWidth - tip.offsetWidth, place = x * chart.clientWidth;
    tip.style.left = `${Math.max(0, Math.min(room, place < chart.clientWidth / 2 ? place + 12 : place - tip.offsetWidth - 12))}px`;
    chart.setAttribute("aria-valuenow", step);
    chart.setAttribute("aria-valuetext", `${heading.textContent}: ${spoken.join(", ")}`);
  }

  function hide() {
    tip.hidden = true;
    marks.replaceChildren();
  }

  const moves = { ArrowRight: 1, ArrowUp: 1, ArrowLeft: -1, ArrowDown: -1, PageUp: 10, PageDown: -10, Home: -Infinity, End: Infinity };
  chart.tabIndex = 0;
  for (const [name, value] of Object.entries({
    role: "slider", "aria-valuemin": steps[0], "aria-valuemax": steps[steps.length - 1], "aria-valuenow": steps[at], "aria-orientation": "horizontal",
    "aria-valuetext": `step ${steps[at].toLocaleString("en-US")}`,
  })) chart.setAttribute(name, value);
  chart.addEventListener("keydown", (event) => {
    if (event.key === "Escape") hide();
    else if (event.key in moves) {
      event.preventDefault();
      show(tip.hidden && Number.isFinite(moves[event.key]) ? at : at + moves[event.key]);
    }
  });
  chart.addEventListener("focus", () => { if (chart.matches(":focus-visible")) show(at); });
  chart.addEventListener("blur", hide);
  const follow = (event) => {
    const box = chart.getBoundingClientRect(), step = left + ((event.clientX - box.left) / box.width) * (right - left);
    let best = 0;
    steps.forEach((each, index) => { if (Math.abs(each - step) < Math.abs(steps[best] - step)) best = index; });
    show(best);
  };
  chart.addEventListener("pointermove", follow);
  chart.addEventListener("pointerdown", follow);
  chart.addEventListener("pointerleave", () => { if (document.activeElement !== chart) hide(); });
}
