/* Charts, drawn as SVG in the page's own colours. A mark with `data-tip` says more below its chart when it is pointed at,
   touched or reached by the keyboard. */
const at = (share) => (100 * Math.min(1, Math.max(0, share))).toFixed(2) + "%";

function figure(title, ...children) {
  const node = el("figure", { class: "chart" }, title ? el("figcaption", { class: "title" }, title) : null, ...children);
  if (node.querySelector("[data-tip]") || node.querySelector(".plot")) {
    const readout = el("output", { class: "readout" });
    node.append(readout);
    const tell = (event) => {
      const mark = event.target.closest && event.target.closest("[data-tip]");
      if (mark) readout.textContent = mark.dataset.tip;
    };
    for (const kind of ["pointerover", "focusin", "click"]) node.addEventListener(kind, tell);
  }
  return node;
}
const tip = (text, attributes = {}) => ({ "data-tip": text, tabindex: "0", role: "img", "aria-label": text, ...attributes });

/* Rows of label, drawing, value. Positions are shares of the width, so they fit any screen. */
function row(label, drawing, value, note) {
  return el("div", { class: "row" },
    el("span", { class: "label" }, label), drawing,
    el("span", { class: "value" }, value, note ? el("small", {}, note) : null));
}
function axisRow(ticks) {
  const marks = ticks.map(([share, label]) =>
    el("text", { x: at(share), y: 12, "text-anchor": share < 0.04 ? "start" : share > 0.96 ? "end" : "middle" }, label));
  return el("div", { class: "row" }, el("span", { class: "label" }),
    el("svg", { class: "axis-row", width: "100%", height: 16, "aria-hidden": "true" }, marks), el("span", { class: "value" }));
}
function dotDrawing(scale, ticks, i, worst, budget, other) {
  const y = 13;
  const drawing = el("svg", { width: "100%", height: 26, "aria-hidden": "true" });
  for (const [share] of ticks) drawing.append(el("line", { class: "axis", x1: at(share), x2: at(share), y1: 0, y2: 26 }));
  if (present(budget)) drawing.append(el("line", { class: "budget", x1: at(scale(budget)), x2: at(scale(budget)), y1: 0, y2: 26 }));
  if (present(other)) {
    if (other.n > 1) drawing.append(el("line", { class: "range-base", x1: at(scale(other.low)), x2: at(scale(other.high)), y1: 19, y2: 19 }));
    drawing.append(el("circle", { class: "worst", cx: at(scale(other.mean)), cy: 19, r: 4 }));
  }
  const level = present(other) ? 8 : y;
  if (i) {
    if (i.n > 1) drawing.append(el("line", { class: "range", x1: at(scale(i.low)), x2: at(scale(i.high)), y1: level, y2: level }));
    if (present(worst)) drawing.append(el("circle", { class: "worst", cx: at(scale(worst)), cy: level, r: 4 }));
    drawing.append(el("circle", { class: "mean", cx: at(scale(i.mean)), cy: level, r: 5 }));
  }
  return drawing;
}
function bar(share, style, whisker) {
  const drawing = el("svg", { width: "100%", height: 22, "aria-hidden": "true" },
    el("rect", { class: "track", width: "100%", height: 18, y: 2, rx: 3 }),
    el("rect", { class: style, width: at(share), height: 18, y: 2, rx: 3 }));
  if (present(whisker))
    drawing.append(
      el("line", { class: "whisker", x1: at(share), x2: at(whisker), y1: 11, y2: 11 }),
      el("line", { class: "whisker", x1: at(whisker), x2: at(whisker), y1: 6, y2: 16 }));
  return drawing;
}
/* Even ticks of a range, as [share, label]. */
function ticksOf(low, high, form, wanted = 4) {
  return stepsOf(low, high, wanted).map((x) => [(x - low) / (high - low), form(x)]);
}
function stepsOf(low, high, wanted = 5) {
  const rough = (high - low) / wanted;
  const unit = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map((m) => m * unit).find((s) => s >= rough * 0.999);
  const found = [];
  for (let x = Math.ceil(low / step - 1e-9) * step; x <= high + step * 1e-9; x += step) found.push(Math.abs(x) < step * 1e-9 ? 0 : x);
  return found;
}
/* A range around values, a little wider than they are; never of no width. */
function around(values, margin = 0.06) {
  const low = Math.min(...values), high = Math.max(...values);
  const pad = (high - low || Math.abs(high) || 1) * margin;
  return [low - pad, high + pad];
}

/* Keys */
function key(shape, text) {
  return el("span", { class: "key" }, el("svg", { width: 18, height: 12, "aria-hidden": "true" }, shape), text);
}
const meanKey = (text = "mean") => key(el("circle", { class: "mean", cx: 9, cy: 6, r: 5 }), text);
const rangeKey = (text = "95 % interval") => key(el("line", { class: "range", x1: 2, x2: 16, y1: 6, y2: 6 }), text);
const worstKey = (text = "worst sample") => key(el("circle", { class: "worst", cx: 9, cy: 6, r: 4 }), text);
const budgetKey = (text = "the gate's limit") => key(el("line", { class: "budget", x1: 9, x2: 9, y1: 0, y2: 12 }), text);
const lineKey = (style, text) => key(el("line", { class: style, x1: 1, x2: 17, y1: 6, y2: 6 }), text);
const keys = (...entries) => el("div", { class: "keys" }, entries);

/* Two axes. x and y: {low, high, log, label, form, ticks}. `marks(px, py, area)` gives the nodes between them. Drawn
   again when the width changes, so that text keeps its size on a phone. */
function plot(title, x, y, marks, { height = 260, left = 52 } = {}) {
  const box = el("div", { class: "plot" });
  const scaleOf = (axis, from, to) => {
    const f = axis.log ? Math.log10 : (v) => v;
    const low = f(axis.low), high = f(axis.high);
    return (v) => from + ((f(v) - low) / (high - low)) * (to - from);
  };
  const ticksFor = (axis, wanted) => {
    if (axis.ticks) return axis.ticks;
    if (!axis.log) return stepsOf(axis.low, axis.high, wanted);
    const found = [];
    const decades = Math.log10(axis.high / axis.low);
    for (let e = Math.floor(Math.log10(axis.low)); e <= Math.log10(axis.high); e++)
      for (const m of decades > 2.5 ? [1] : [1, 2, 5]) found.push(m * 10 ** e);
    const fit = found.filter((v) => v >= axis.low * 0.999 && v <= axis.high * 1.001);
    if (fit.length >= 2) return fit.filter((v, i) => fit.length <= wanted + 2 || i % 2 === 0);
    return stepsOf(axis.low, axis.high, 4).filter((v) => v > 0);
  };
  function draw() {
    const width = Math.max(260, Math.round(box.clientWidth) || 640);
    if (box.dataset.width === String(width)) return;
    box.dataset.width = width;
    const area = { left, right: width - 14, top: 26, bottom: height - 42 };
    const px = scaleOf(x, area.left, area.right), py = scaleOf(y, area.bottom, area.top);
    const svg = el("svg", { viewBox: `0 0 ${width} ${height}`, width: "100%", role: "group", "aria-label": title });
    for (const v of ticksFor(y, 4))
      svg.append(el("line", { class: "axis", x1: area.left, x2: area.right, y1: py(v), y2: py(v) }),
        el("text", { x: area.left - 7, y: py(v) + 4, "text-anchor": "end" }, y.form(v)));
    const xs = ticksFor(x, width < 480 ? 3 : 6);
    for (const v of xs)
      svg.append(el("line", { class: "axis", x1: px(v), x2: px(v), y1: area.top, y2: area.bottom }),
        el("text", { x: px(v), y: area.bottom + 16, "text-anchor": "middle" }, x.form(v)));
    svg.append(el("text", { class: "axis-label", x: (area.left + area.right) / 2, y: height - 5, "text-anchor": "middle" }, x.label),
      el("text", { class: "axis-label", x: 2, y: 11, "text-anchor": "start" }, y.label));
    svg.append(...marks(px, py, area).flat(3).filter(present));
    box.replaceChildren(svg);
  }
  draw();
  new ResizeObserver(() => requestAnimationFrame(draw)).observe(box);
  return box;
}
/* Names beside points, each where it covers no other; a point that has no room keeps its tip. `points`: [x, y, text];
   `reserved`: boxes [left, top, right, bottom] of other text. */
function labels(points, area, reserved = []) {
  const taken = [...points.map(([x, y]) => [x - 7, y - 7, x + 7, y + 7]), ...reserved];
  const free = (box) => box[0] >= area.left && box[2] <= area.right + 8 && box[1] >= area.top - 10 && box[3] <= area.bottom &&
    taken.every((other) => box[2] < other[0] || box[0] > other[2] || box[3] < other[1] || box[1] > other[3]);
  return points.map(([x, y, text]) => {
    const width = 6.4 * text.length;
    for (const [dx, dy, anchor] of [[11, 4, "start"], [-11, 4, "end"], [8, -10, "start"], [8, 19, "start"], [-8, -10, "end"], [-8, 19, "end"], [0, -13, "middle"], [0, 23, "middle"]]) {
      const left = x + dx - (anchor === "end" ? width : anchor === "middle" ? width / 2 : 0);
      const box = [left, y + dy - 10, left + width, y + dy + 3];
      if (free(box)) {
        taken.push(box);
        return el("text", { class: "mark-label", x: x + dx, y: y + dy, "text-anchor": anchor }, text);
      }
    }
    return null;
  });
}
const line = (style, points) => el("polyline", { class: style, points: points.map(([a, b]) => `${a.toFixed(1)},${b.toFixed(1)}`).join(" ") });
