/* The page: what the shell shows, what was measured, what was explained, what changed. */
function drawAgainst(a) {
  const words = { better: "better", worse: "worse", "not shown": "no difference shown", same: "the same", unknown: "not compared" };
  reveal("older", el("p", { class: "lead" }, `Each number beside that of ${a.name}. Suites are paired: the same samples.`),
    table("This bundle and the older one", [
      { name: "What", show: (d) => d.what },
      { name: "Before", number: true, show: (d) => d.before },
      { name: "Now", number: true, show: (d) => d.after },
      { name: "Change", number: true, show: (d) => d.change },
      { name: "It is", choose: true, show: (d) => el("span", { class: "word " + d.direction.replace(" ", "-") }, words[d.direction]) },
      { name: "Note", wide: true, optional: true, show: (d) => d.note || null },
    ], a.deltas, { cards: true }));
}

/* Errors of the weights themselves, which the shell's table of layers has. */
function drawWeightErrors() {
  const rows = place("layers") ? [...place("layers").tBodies[0].rows] : [];
  const found = rows.map((tr) => ({ name: tr.children[0].firstChild.textContent.trim(), format: tr.children[2].textContent, error: Number(tr.children[6].dataset.value), saved: Number(tr.children[4].dataset.value) - Number(tr.children[5].dataset.value) }));
  if (found.length < 2 || !found.some((r) => r.error > 0)) return;
  const most = Math.max(...found.map((r) => r.error));
  place("layer-chart").append(figure("Relative error of each weight, in the order of the model",
    plot("Relative error by weight", { low: 0, high: found.length + 1, label: "weight", form: (v) => (Number.isInteger(v) ? String(v) : "") }, { low: 0, high: most * 1.08, label: "relative error", form: short },
      (px, py) => {
        const width = Math.max(1, Math.min(18, 0.7 * (px(2) - px(1))));
        return found.map((r, i) => el("rect", tip(`${r.name} (${r.format}): relative error ${small(r.error)}, ${bytes(r.saved)} saved`, { class: "bar-this", x: px(i + 1) - width / 2, y: py(r.error), width, height: Math.max(0, py(0) - py(r.error)) })));
      }, { height: 210 })));
}

const evidence = read("evidence"), explanation = read("explain"), against = read("against");
drawWeightErrors();
if (evidence === null) {
  place("verdict").className = "verdict";
  place("verdict").append(el("span", {}, "This page holds no measurements."));
} else {
  drawEvidence(evidence);
}
if (against !== null) drawAgainst(against);
if (explanation !== null) drawExplanation(explanation);
for (const node of document.querySelectorAll("table.shell")) {
  sortable(node);
  if (node.tBodies[0].rows.length > 7) node.closest(".scroll").before(filters(node, node.id === "layers" ? [1, 2, 3] : []));
}
contents(place("contents"));
openForPrint();
