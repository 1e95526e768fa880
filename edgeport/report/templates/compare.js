/* Draws edgeport.report.compare.Comparison. */
function drawComparison(c) {
  const fit = c.rows.filter((r) => present(r.quality) && !present(r.why_quality));
  drawSummary(c, fit);
  if (c.notes.length) reveal("notes", el("ul", { class: "plain-list" }, c.notes.map((text) => el("li", {}, text))));
  if (c.axes.length && fit.length) drawFront(c, fit);
  drawBundles(c);
  drawScores(c);
  if (c.pairs.length) drawPairs(c);
  drawOrigins(c);
}
const quality = (c) => (x) => (["cosine"].includes(c.measure.name) ? cosine(x) : score(x, c.measure.unit));
const verdictOf = (r) => (r.passed ? "passed" : `failed (${r.exit_code})`);

function drawSummary(c, fit) {
  const needed = fit.filter((r) => !r.dominated_by);
  const best = needed.filter((r) => r.passed).sort((a, b) => a.bytes - b.bytes)[0];
  place("summary").append(el("div", { class: "verdict " + (best ? "pass" : c.axes.length ? "fail" : "partly") },
    el("div", { class: "words" },
      el("strong", {}, c.axes.length ? (best ? `${best.label}: the smallest on the front that passed its gate` : "None on the front passed its gate") : "Side by side, without a front"),
      el("span", {}, c.axes.length ? `${needed.length} of ${plural(fit.length, "bundle")} are on the front of ${c.axes.join(", ")}` + (needed.length < fit.length ? "; each of the others is dominated by one of them." : ".") : "What differs in more than its compression can't be ranked."))));
}

/* The front: hollow where another bundle is at least as good in everything. */
function drawFront(c, fit) {
  const form = quality(c);
  const worse = c.measure.higher_is_better ? "higher is better" : "lower is better";
  const label = `${c.measure.title} (${worse})`;
  const values = fit.flatMap((r) => [r.quality.low, r.quality.high]).concat(present(c.measure.baseline) ? [c.measure.baseline] : []);
  const [low, high] = around(values, 0.1);
  const y = { low, high, label, form: (v) => (c.measure.unit === "share" ? short(100 * v) + " %" : String(Number(v.toPrecision(4)))) };
  const place_ = (r, kind) => (kind === "size" ? r.bytes : r.p50_ms);
  const draw = (title, kind, rows, x) => figure(title,
    plot(title, x, { ...y }, (px, py, area) => [
      present(c.measure.baseline) ? [
        el("line", { class: "zero dashed", x1: area.left, x2: area.right, y1: py(c.measure.baseline), y2: py(c.measure.baseline) }),
        el("text", { x: area.left + 4, y: py(c.measure.baseline) - 5 }, "the original")] : null,
      staircase(c, rows.filter((r) => !r.dominated_by), (r) => px(place_(r, kind)), (r) => py(r.quality.mean), area),
      rows.map((r) => point(r, px(place_(r, kind)), py, form)),
      labels(rows.map((r) => [px(place_(r, kind)), py(r.quality.mean), r.label]), area,
        present(c.measure.baseline) ? [[area.left, py(c.measure.baseline) - 16, area.left + 84, py(c.measure.baseline) + 2]] : []),
    ], { height: 320, left: 60 }),
    keys(key(el("circle", { class: "dot-this", cx: 9, cy: 6, r: 5 }), "on the front"), key(el("circle", { class: "dot-base", cx: 9, cy: 6, r: 5 }), "dominated"), key(el("circle", { class: "dot-worst", cx: 9, cy: 6, r: 5 }), "failed its gate"), rangeKey()));
  const sizes = fit.map((r) => r.bytes);
  const parts = [el("p", { class: "lead" }, "Further left is smaller or faster. A bundle is dominated when another one is at least as good in " + c.axes.join(", ") + ", and better in one of them; by the means, whose intervals are drawn.")];
  parts.push(draw("Size and quality", "size", fit, { low: Math.min(...sizes) / 1.25, high: Math.max(...sizes) * 1.25, log: true, label: "bytes of the file", form: shortBytes }));
  const timed = fit.filter((r) => !present(r.why_times));
  if (timed.length > 1) {
    const ends = around(timed.map((r) => r.p50_ms), 0.14);
    parts.push(draw("Latency and quality", "latency", timed, { low: Math.max(0, ends[0]), high: ends[1], label: "ms, p50 of a valid run on one machine", form: short }));
  } else parts.push(notice("Latency is not drawn: fewer than two valid runs on the same machine.", "plain"));
  reveal("front", parts);
}
/* Steps through the points that no other beats in these two: what can be had for so much. */
function staircase(c, rows, x, y, area) {
  const points = rows.map((r) => [x(r), y(r), r]).sort((a, b) => a[0] - b[0] || a[1] - b[1]);
  const best = [];
  let level = Infinity;
  for (const [a, b] of points) {
    const good = c.measure.higher_is_better ? b : area.top + area.bottom - b;
    if (good < level) {
      best.push([a, b]);
      level = good;
    }
  }
  if (best.length < 2) return null;
  const steps = [best[0]];
  for (let i = 1; i < best.length; i++) steps.push([best[i][0], best[i - 1][1]], best[i]);
  return line("front", steps);
}
function point(r, x, py, form) {
  const style = !r.passed ? "dot-worst" : r.dominated_by ? "dot-base" : "dot-this";
  const text = `${r.label}: ${bytes(r.bytes)}, ${form(r.quality.mean)} [${interval(r.quality, form)}]` + (present(r.p50_ms) ? `, ${ms(r.p50_ms)}${present(r.why_times) ? " (not comparable)" : ""}` : "") +
    (r.dominated_by ? `; dominated by ${r.dominated_by}` : "") + (r.passed ? "" : `; failed: ${r.failed.join(", ")}`);
  return [
    r.quality.n > 1 ? el("line", { class: "range thin", x1: x, x2: x, y1: py(r.quality.low), y2: py(r.quality.high) }) : null,
    el("circle", tip(text, { class: style, cx: x, cy: py(r.quality.mean), r: 6.5 })),
  ];
}

function drawBundles(c) {
  const form = c.measure && quality(c);
  const why = (text) => el("small", { class: "warn" }, text);
  reveal("bundles", table("One row a bundle", [
    { name: "Bundle", name_: true, show: (r) => r.label },
    { name: "Model", optional: true, choose: true, show: (r) => (new Set(c.rows.map((o) => o.model)).size > 1 ? r.model : null) },
    { name: "Target", choose: true, show: (r) => r.target },
    { name: "Recipe", choose: true, show: (r) => r.recipe },
    { name: "Gate", choose: true, show: (r) => el("span", { class: "word " + (r.passed ? "better" : "worse") }, verdictOf(r)) },
    { name: "Size", number: true, show: (r) => two(bytes(r.bytes), present(r.size_ratio) ? times(r.size_ratio) + " of fp32" : ""), value: (r) => r.bytes },
    ...(c.measure ? [{ name: c.measure.title, number: true, show: (r) => (r.quality ? [form(r.quality.mean), present(r.why_quality) ? why(r.why_quality) : el("small", {}, interval(r.quality, form))] : ABSENT), value: (r) => r.quality && r.quality.mean }] : []),
    { name: "Latency, p50", number: true, show: (r) => (present(r.p50_ms) ? [...two(ms(r.p50_ms), "p90 " + ms(r.p90_ms)), present(r.why_times) ? why("not comparable") : null] : ABSENT), value: (r) => r.p50_ms },
    { name: "Of fp32's p50", number: true, show: (r) => maybe(r.latency_ratio, (i) => two(times(i.mean), r.valid ? interval(i, times) : "not valid")), value: (r) => r.latency_ratio && r.latency_ratio.mean },
    { name: "Peak memory", number: true, show: (r) => (present(r.peak_rss_mb) ? [digits(r.peak_rss_mb) + " MB", present(r.why_memory) ? why(r.why_memory) : null] : ABSENT), value: (r) => r.peak_rss_mb },
    { name: "Dominated by", optional: true, show: (r) => r.dominated_by },
  ], c.rows, { filter: c.rows.length > 5, cards: true }));
}

function drawScores(c) {
  if (!c.scores.length) {
    reveal("scores", notice("No bundle carries a suite: quality is closeness to the original.", "plain"));
    return;
  }
  const parts = [];
  for (const suite of new Set(c.scores.map((s) => s.suite))) {
    const rows = c.scores.filter((s) => s.suite === suite && s.artifact);
    if (!rows.length) continue;
    const unit = rows[0].unit;
    const baseline = rows.find((s) => s.original);
    const [low, high] = around(rows.flatMap((s) => [s.artifact.low, s.artifact.high]).concat(baseline ? [baseline.original.mean] : []));
    const scale = (x) => (x - low) / (high - low);
    const ticks = ticksOf(low, high, (x) => (unit === "share" ? short(100 * x) + " %" : short(x)));
    parts.push(figure(`${suite}: ${rows[0].metric}, ${rows[0].higher_is_better ? "higher" : "lower"} is better`,
      rows.map((s) => {
        const drawing = dotDrawing(scale, ticks, s.artifact);
        if (s.original) drawing.prepend(el("line", { class: "zero dashed", x1: at(scale(s.original.mean)), x2: at(scale(s.original.mean)), y1: 0, y2: 26 }));
        return row(s.label, drawing, score(s.artifact.mean, unit), `n = ${s.n}`);
      }),
      axisRow(ticks), keys(meanKey("this bundle"), rangeKey(), lineKey("zero dashed", "the original on the same samples"))));
    for (const problem of new Set(rows.map((s) => s.problem).filter(Boolean))) parts.push(notice(`${suite} says nothing: ${problem}.`));
  }
  reveal("scores", parts);
}

function drawPairs(c) {
  reveal("pairs", el("p", { class: "lead" }, `Second minus first on the same samples, ${plural(c.pairs.length, "comparison")}: the intervals are widened so that all of them together hold at 95 % (Bonferroni).`),
    table("Pairs of bundles", [
      { name: "Suite", choose: true, show: (p) => p.suite },
      { name: "First", name_: true, choose: true, show: (p) => p.first },
      { name: "Second", name_: true, choose: true, show: (p) => p.second },
      { name: "Difference", number: true, show: (p) => two(change(p.change, p.unit), `${change(p.low, p.unit)} – ${change(p.high, p.unit)}`), value: (p) => p.change },
      { name: "n", number: true, show: (p) => count(p.n), value: (p) => p.n },
      { name: "Better", number: true, show: (p) => count(p.better), value: (p) => p.better },
      { name: "Worse", number: true, show: (p) => count(p.worse), value: (p) => p.worse },
      { name: "McNemar p", number: true, optional: true, show: (p) => maybe(p.mcnemar_p, (v) => (v < 0.001 ? "< 0.001" : v.toFixed(3))), value: (p) => p.mcnemar_p },
      { name: "The second is", choose: true, show: (p) => el("span", { class: "word " + p.answer.replaceAll(" ", "-") }, p.answer) },
    ], c.pairs, { cards: true }));
}

function drawOrigins(c) {
  reveal("origins", table("Where and when each was measured", [
    { name: "Bundle", name_: true, show: (r) => r.label },
    { name: "Measured", show: (r) => r.measured_at },
    { name: "Machine", wide: true, show: (r) => r.machine },
    { name: "Runtime", show: (r) => `${r.runtime}${r.executed === "runtime" ? "" : r.executed === "reference" ? " (reference evaluator)" : " (not executed)"}` },
    { name: "sha256 of the manifest", show: (r) => el("span", { class: "hash" }, r.manifest_sha256 || ABSENT) },
  ], c.rows, { filter: false, cards: true }));
}

drawComparison(read("comparison"));
contents(place("contents"));
openForPrint();
