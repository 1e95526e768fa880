/* Draws explain.json: bytes read from the file, errors layer by layer, what flipped, what matters, how sure each claim is. */
const groupNames = { embedding: "Embeddings", tied_head: "Embedding and head, tied", attention: "Attention", feed_forward: "Feed-forward", conv: "Convolutions", head: "Head and pooler", other: "Norms, biases, other", file: "The file itself" };
const partNames = { codes: "Codes", floats: "Floats", scales: "Scales", zero_points: "Zero points", palettes: "Palettes", masks: "Masks", graph: "Graph", metadata: "Metadata", alignment: "Alignment" };

function drawExplanation(x) {
  drawBytes(x.bytes);
  drawFlips(x);
  drawLayerErrors(x);
  drawSensitivity(x);
  drawClaims(x.claims);
  if (x.changes) drawChanges(x.changes);
}

/* The waterfall, from the file's own bytes; it takes the place of the one that follows from the manifest. */
function drawBytes(b) {
  const box = place("bytes");
  const levels = [b.original];
  for (const step of b.steps) levels.push(levels[levels.length - 1] + step.change);
  const whole = Math.max(...levels, 1);
  const step = (label, style, low, high, value) =>
    el("div", { class: "step" }, el("span", { class: "step-label" }, label),
      el("svg", { class: "step-bar", width: "100%", height: 18, "aria-hidden": "true" },
        el("rect", { class: "track", width: "100%", height: 18, rx: 3 }),
        el("rect", { class: style, x: at(low / whole), width: at((high - low) / whole), height: 18, rx: 3 })),
      el("span", { class: "step-value" }, value));
  const steps = [step("Weights in float32", "original", 0, b.original, bytes(b.original))];
  b.steps.forEach((s, i) => {
    if (s.change)
      steps.push(step(s.label, s.change > 0 ? "added" : "saved", Math.min(levels[i], levels[i + 1]), Math.max(levels[i], levels[i + 1]), (s.change > 0 ? "+" : "") + bytes(s.change)));
  });
  steps.push(step("The file", "total", 0, b.file, bytes(b.file)));
  const parts = Object.keys(partNames).filter((part) => b.cells.some((c) => c.part === part && c.bytes));
  const groups = Object.keys(groupNames).filter((group) => b.cells.some((c) => c.group === group && c.bytes));
  const sum = (test) => b.cells.filter(test).reduce((total, c) => total + c.bytes, 0);
  box.replaceChildren(
    el("p", { class: "lead" }, `From ${bytes(b.original)} of float32 weights to ${bytes(b.file)} on disk: ${count(b.file)} bytes, read from the file itself, of which the parts below are the exact sum.`),
    el("div", { class: "steps", role: "img", "aria-label": `Size waterfall from ${bytes(b.original)} to ${bytes(b.file)}` }, steps),
    table("What the file's bytes are", [
      { name: "Part of the file", show: (g) => groupNames[g] },
      { name: "In float32", number: true, show: (g) => maybe(b.before[g], bytes), value: (g) => b.before[g] },
      ...parts.map((part) => ({ name: partNames[part], number: true, show: (g) => { const n = sum((c) => c.group === g && c.part === part); return n ? bytes(n) : ABSENT; }, value: (g) => sum((c) => c.group === g && c.part === part) })),
      { name: "Of the file", number: true, show: (g) => percent(sum((c) => c.group === g) / b.file), value: (g) => sum((c) => c.group === g) },
    ], groups),
    el("details", {}, el("summary", {}, `Every stored tensor (${count(b.tensors.length)})`),
      table("Stored tensors, largest first", [
        { name: "In the file", name_: true, show: (t) => t.name },
        { name: "Of", name_: true, optional: true, show: (t) => t.parameter },
        { name: "Group", choose: true, show: (t) => groupNames[t.group] },
        { name: "Part", choose: true, show: (t) => partNames[t.part] },
        { name: "Bytes", number: true, show: (t) => count(t.bytes), value: (t) => t.bytes },
      ], b.tensors.slice(0, 1000))),
    ...b.notes.map((text) => caption(text)));
  if (b.beside.length) box.append(caption("Beside it in the bundle, not counted: " + b.beside.map((f) => `${f.path} (${bytes(f.bytes)})`).join(", ") + "."));
}

/* Flips */
function drawFlips(x) {
  if (!x.flips.length) {
    if (x.flips_absent) reveal("flips", notice(x.flips_absent, "plain"));
    return;
  }
  reveal("flips", x.flips.map((f) => suiteFlips(f)));
}
function suiteFlips(f) {
  const shown = (flip) => flip.shown === null ? ABSENT : [flip.shown, flip.cut ? el("span", { class: "muted" }, " … (cut)") : null];
  const parts = [
    el("h3", {}, `${f.suite}: ${f.metric}`),
    el("p", {}, `Against ${f.other}: of ${plural(f.n, "sample")} ${f.worse} ${f.worse === 1 ? "is" : "are"} worse and ${f.better} better.`),
  ];
  if (f.slices.length) parts.push(sliceChart(f));
  if (f.flips.length)
    parts.push(table(`Inputs whose score changed${f.left_out ? `; ${f.left_out} more are left out` : ""}`, [
      { name: "Row", number: true, show: (p) => count(p.row), value: (p) => p.row },
      { name: "Change", choose: true, show: (p) => (p.worse ? "worse" : "better") },
      { name: "Input", wide: true, show: shown },
      { name: "Right answer", choose: true, optional: true, show: (p) => p.label },
      { name: "Answer of " + f.other.replace(/^the /, ""), optional: true, show: (p) => p.other_answer },
      { name: "Answer of this file", optional: true, show: (p) => p.answer },
      { name: "Score before", number: true, show: (p) => maybe(p.other_score, (v) => score(v, f.unit)), value: (p) => p.other_score },
      { name: "Score now", number: true, show: (p) => maybe(p.score, (v) => score(v, f.unit)), value: (p) => p.score },
      { name: "Tokens", number: true, optional: true, show: (p) => maybe(p.length, count), value: (p) => p.length },
      { name: "Sure of it", number: true, optional: true, show: (p) => maybe(p.confidence, percent), value: (p) => p.confidence },
    ], f.flips, { cards: true, label: (p) => (p.worse ? "worse" : "better") }));
  for (const text of f.notes) parts.push(caption(text));
  return parts;
}
function sliceChart(f) {
  const slices = f.slices.filter((s) => s.difference && present(s.low));
  const parts = [];
  if (slices.length) {
    const [low, high] = around([0, ...slices.flatMap((s) => [s.low, s.high])]);
    const scale = (v) => (v - low) / (high - low);
    const ticks = ticksOf(low, high, changeTick(f.unit));
    parts.push(figure("Difference by slice",
      slices.map((s) => {
        const drawing = dotDrawing(scale, ticks, { mean: s.difference.mean, low: s.low, high: s.high, n: s.n });
        drawing.prepend(el("line", { class: "zero", x1: at(scale(0)), x2: at(scale(0)), y1: 0, y2: 26 }));
        return row(`${s.by}: ${s.value}`, drawing, change(s.difference.mean, f.unit), `n = ${s.n}` + (s.stands_out ? ", stands out" : ""));
      }),
      axisRow(ticks),
      keys(meanKey("difference"), rangeKey(`interval that holds for all slices together (a false alarm in at most ${percent(f.chance_of_a_false_alarm)})`))));
  }
  parts.push(table("Slices of the suite", [
    { name: "By", choose: true, show: (s) => s.by },
    { name: "Slice", show: (s) => s.value },
    { name: "n", number: true, show: (s) => count(s.n), value: (s) => s.n },
    { name: "Before", number: true, show: (s) => score(s.other_score, f.unit), value: (s) => s.other_score },
    { name: "Now", number: true, show: (s) => score(s.score, f.unit), value: (s) => s.score },
    { name: "Difference", number: true, show: (s) => maybe(s.difference, (i) => two(change(i.mean, f.unit), present(s.low) ? `${change(s.low, f.unit)} – ${change(s.high, f.unit)}` : "")), value: (s) => s.difference && s.difference.mean },
    { name: "Worse", number: true, show: (s) => count(s.worse), value: (s) => s.worse },
    { name: "Better", number: true, show: (s) => count(s.better), value: (s) => s.better },
    { name: "Stands out", show: (s) => (s.stands_out ? "yes" : "no") },
  ], f.slices));
  return parts;
}

/* Layers */
function drawLayerErrors(x) {
  const l = x.layers;
  if (!l) {
    reveal("layer-errors", notice(x.layers_absent || "Not compared.", "plain"));
    return;
  }
  const most = Math.max(...l.rows.map((r) => r.relative_error), 1e-12);
  const name = (r) => `${r.layer}: relative error ${small(r.relative_error)}, grows by ${small(r.growth)}, ${r.format}`;
  const draw = (px, py) => [
    line("line-this", l.rows.map((r, i) => [px(i + 1), py(r.relative_error)])),
    l.rows.map((r, i) => el("circle", tip(name(r), { class: r.layer === l.grows_most ? "dot-worst" : "dot-this", cx: px(i + 1), cy: py(r.relative_error), r: l.rows.length > 120 ? 3 : 4.5 }))),
  ];
  reveal("layer-errors",
    el("p", { class: "lead" }, `${l.statement} ${plural(l.samples, "golden input")}.` +
      (present(l.output_change) ? ` Watching changed the file's own outputs by ${small(l.output_change)} at most.` : "")),
    l.grows_most ? el("p", {}, "The error grows most in ", el("code", {}, l.grows_most), ".") : null,
    figure("Relative error of each layer's output, in the order of the graph",
      plot("Relative error by layer", { low: 0, high: l.rows.length + 1, label: "layer", form: (v) => (Number.isInteger(v) ? String(v) : "") }, { low: 0, high: most * 1.08, label: "relative error", form: short }, draw),
      keys(l.grows_most ? key(el("circle", { class: "dot-worst", cx: 9, cy: 6, r: 5 }), "grows most here") : null)),
    table("Layers in the order of the graph", [
      { name: "#", number: true, show: (r) => String(l.rows.indexOf(r) + 1), value: (r) => l.rows.indexOf(r) },
      { name: "Layer", name_: true, show: (r) => r.layer },
      { name: "Group", choose: true, show: (r) => groupNames[r.group] },
      { name: "Format", choose: true, show: (r) => r.format },
      { name: "Relative error", number: true, show: (r) => small(r.relative_error), value: (r) => r.relative_error },
      { name: "Grows by", number: true, show: (r) => small(r.growth), value: (r) => r.growth },
      { name: "Worst sample", number: true, show: (r) => small(r.worst), value: (r) => r.worst },
      { name: "SNR, dB", number: true, show: (r) => maybe(r.snr_db, (v) => minus(v.toFixed(1))), value: (r) => r.snr_db ?? 999 },
      { name: "Cosine", number: true, show: (r) => cosine(r.cosine), value: (r) => r.cosine },
    ], l.rows),
    l.missing.length ? caption("Not compared: " + l.missing.map((m) => `${m.layer} (${m.why})`).join("; ") + ".") : null);
}

function drawSensitivity(x) {
  const s = x.sensitivity;
  if (!s) {
    if (x.sensitivity_absent) reveal("sensitivity", notice(x.sensitivity_absent, "plain"));
    return;
  }
  const [label, value] = { recorded: ["cost, nats a sample", (r) => r.cost], measured: ["relative error of the outputs", (r) => r.effect], "weights alone": ["relative error of the weight", (r) => r.weight_error] }[s.source];
  const rows = s.rows.filter((r) => present(value(r)) && value(r) > 0 && r.bytes_saved > 0);
  const parts = [el("p", { class: "lead" }, s.statement)];
  if (rows.length > 1) {
    const range = (values) => [Math.min(...values) / 1.6, Math.max(...values) * 1.6];
    const [left, right] = range(rows.map((r) => r.bytes_saved)), [low, high] = range(rows.map(value));
    parts.push(figure("What each layer's compression saves, and what it costs",
      plot("Bytes saved against cost", { low: left, high: right, log: true, label: "bytes saved", form: shortBytes }, { low, high, log: true, label, form: short },
        (px, py) => rows.map((r) => el("circle", tip(`${r.layer} (${r.format}): saves ${bytes(r.bytes_saved)}, ${label} ${small(value(r))}`, { class: "dot-this soft", cx: px(r.bytes_saved), cy: py(value(r)), r: 5 })))),
      keys(el("span", { class: "key" }, "top left: costs most, saves least; keep those in more bits first"))));
  }
  const other = (a) => (a ? two(a.format, `${bytes(a.bytes)}, cost ${small(a.cost)}`) : ABSENT);
  parts.push(table("Layers, the most sensitive first", [
    { name: "Layer", name_: true, show: (r) => r.layer },
    { name: "Group", choose: true, show: (r) => groupNames[r.group] },
    { name: "Format", choose: true, show: (r) => r.format },
    { name: "Bits a weight", number: true, show: (r) => digits(r.bits), value: (r) => r.bits },
    { name: "Saved", number: true, show: (r) => bytes(r.bytes_saved), value: (r) => r.bytes_saved },
    { name: "Outputs, this layer alone", number: true, optional: true, show: (r) => maybe(r.effect, small), value: (r) => r.effect },
    { name: "KL, nats", number: true, optional: true, show: (r) => maybe(r.kl, small), value: (r) => r.kl },
    { name: "Cost, nats", number: true, optional: true, show: (r) => maybe(r.cost, small), value: (r) => r.cost },
    { name: "Error of the weight", number: true, show: (r) => small(r.weight_error), value: (r) => r.weight_error },
    { name: "One cheaper", optional: true, show: (r) => other(r.cheaper) },
    { name: "One dearer", optional: true, show: (r) => other(r.dearer) },
  ], s.rows));
  reveal("sensitivity", parts);
}

/* Claims */
function drawClaims(claims) {
  if (!claims.length) return;
  const form = (c, v) => (c.state === "exact" && isFlag(c) ? (v ? "yes" : "no") : c.metric.startsWith("cosine") ? cosine(v) : amount(c, v) + (["ms", "MB", "nats", "s"].includes(c.unit) ? " " + c.unit : ""));
  reveal("claims", table("Each number, and whether the data decides it", [
    { name: "Claim", show: (c) => title(c.metric) + (c.output ? ` · ${c.output}` : "") },
    { name: "Measured", number: true, show: (c) => (present(c.value) ? form(c, c.value) : "not measured"), value: (c) => c.value },
    { name: "Interval", number: true, show: (c) => (present(c.low) && present(c.high) ? `${form(c, c.low)} – ${form(c, c.high)}` : ABSENT) },
    { name: "n", number: true, show: (c) => maybe(c.n, count), value: (c) => c.n },
    { name: "Allowed", number: true, optional: true, show: (c) => maybe(c.allowed, (v) => form(c, v)), value: (c) => c.allowed },
    { name: "State", choose: true, show: (c) => c.state },
    { name: "Distance / half width", number: true, optional: true, show: (c) => maybe(c.decided_by, small), value: (c) => c.decided_by },
    { name: "Samples needed", number: true, optional: true, show: (c) => maybe(c.needed, count), value: (c) => c.needed },
    { name: "In words", wide: true, show: (c) => c.words },
  ], claims));
}

function drawChanges(c) {
  const parts = [el("p", { class: "lead" }, `What differs from ${c.other} (${bytes(c.other_file)}).`)];
  parts.push(table("Bytes in both", [
    { name: "Group", show: (r) => groupNames[r.group] },
    { name: "Part", show: (r) => partNames[r.part] },
    { name: "The other", number: true, show: (r) => bytes(r.other), value: (r) => r.other },
    { name: "This", number: true, show: (r) => bytes(r.this), value: (r) => r.this },
    { name: "Change", number: true, show: (r) => (r.this > r.other ? "+" : "") + bytes(r.this - r.other), value: (r) => r.this - r.other },
  ], c.cells));
  if (c.layers.length)
    parts.push(table("Layers in both", [
      { name: "Layer", name_: true, show: (r) => r.layer },
      { name: "Format there", choose: true, show: (r) => r.other_format },
      { name: "Format here", choose: true, show: (r) => r.format },
      { name: "Error there", number: true, show: (r) => maybe(r.other_error, small), value: (r) => r.other_error },
      { name: "Error here", number: true, show: (r) => maybe(r.error, small), value: (r) => r.error },
    ], c.layers));
  reveal("changes", parts, c.flips.map((f) => suiteFlips(f)), c.notes.map((text) => caption(text)));
}
