/* Draws the measurements of evidence.json. */
function drawEvidence(e) {
  drawVerdict(e);
  drawStates(e.states);
  drawTiles(e);
  drawChecks(e.verdict);
  drawSuites(e);
  drawParity(e);
  drawLatency(e);
  drawRoofline(e);
  drawGeneration(e.generation);
  drawMemory(e);
  drawMachine(e);
  drawCommands(e);
}

/* Verdict, states, tiles */
function drawVerdict(e) {
  const verdict = e.verdict;
  const failed = verdict.checks.filter((c) => !c.passed);
  const total = verdict.checks.length;
  const executed = e.states.executed_here;
  const how = { reference: ", run by a reference evaluator: not yet on the target's own kernels", none: ", which was not run here" }[executed] || "";
  const banner = place("verdict");
  const partly = verdict.passed && executed !== "runtime";
  banner.classList.add(!verdict.passed ? "fail" : partly ? "partly" : "pass");
  const undecided = failed.length > 0 && failed.every((c) => c.undecided || !present(c.measured));
  const lines = failed.slice(0, 5);
  banner.append(
    el("div", { class: "mark", "aria-hidden": "true" }, verdict.passed ? "✓" : undecided ? "?" : "✗"),
    el("div", { class: "words" },
      el("strong", {}, verdict.passed ? (partly ? "All checks passed, not on the target itself" : "All checks passed") : undecided ? "Not proven: do not ship yet" : "Not ready to ship"),
      el("span", {}, verdict.passed
        ? `${total} of ${total} checks of the gate, on the file in this bundle${how}.`
        : `${failed.length} of ${total} checks failed (exit code ${verdict.exit_code}): ` +
          [...new Set(failed.map((c) => title(c.metric)))].join(", ") + "."),
      lines.length ? el("ul", { class: "todo" }, lines.map((c, i) =>
        el("li", {}, el("b", {}, title(c.metric) + (c.output ? ` (${c.output})` : "") + ": "), measureOf(c) + ". ",
          i && c.advice === lines[i - 1].advice ? null : el("em", {}, "Try first: " + c.advice)))) : null,
      failed.length > lines.length ? el("span", {}, `${failed.length - lines.length} more are listed below.`) : null));
}

function drawStates(s) {
  const words = { yes: "Yes", no: "No", failed: "Failed" };
  const executed = {
    runtime: ["yes", "In the runtime itself", "The runtime that ships with the app, on the machine that made this bundle."],
    reference: ["partly", "By a reference evaluator", "edgeport computed the saved program itself; the vendor's kernels did not run."],
    none: ["no", "Not here", "The file was converted; nothing has run it."],
  }[s.executed_here] || ["no", s.executed_here, ""];
  const verified = {
    yes: "Outputs agree with the uncompressed model, within the gate's budgets.",
    failed: "Outputs differ from the uncompressed model by more than the gate allows.",
    no: "Outputs were not compared with the uncompressed model.",
  }[s.numerics_verified];
  const card = (name, style, value, text) =>
    el("li", {}, el("b", {}, name), el("span", { class: "value " + style }, value), el("small", {}, text));
  place("states").append(
    card("Lowered", s.lowered, words[s.lowered], "The file is written in the target's format."),
    card("Executed here", ...executed),
    card("Numerics verified", s.numerics_verified, words[s.numerics_verified], verified),
    el("li", { class: "statement" }, s.statement));
}

function mainParity(e) {
  const measured = e.parity.filter((p) => present(p.cosine));
  return measured.sort((a, b) => a.cosine.mean - b.cosine.mean)[0] || e.parity[0];
}
/* The first metric of each suite is its main one. */
function mainTasks(tasks) {
  const seen = new Map();
  for (const task of tasks || []) if (!seen.has(task.suite)) seen.set(task.suite, task);
  return [...seen.values()];
}

function drawTiles(e) {
  const tile = (label, figure, note) =>
    el("div", { class: "tile" },
      el("div", { class: "label" }, label),
      el("div", { class: present(figure) ? "figure" : "figure none" }, present(figure) ? figure : "not measured"),
      el("small", {}, note || ""));
  const p = mainParity(e);
  const tiles = [
    tile("Size", bytes(e.size.bytes), present(e.size.ratio) ? `${times(e.size.ratio)} of fp32 (${bytes(e.size.baseline_bytes)})` : "no fp32 file to compare with"),
  ];
  for (const t of mainTasks(e.tasks).filter((t) => t.artifact).slice(0, 2))
    tiles.push(tile(`${t.suite}: ${t.metric}`, score(t.artifact.mean, t.unit),
      t.difference ? `${change(t.difference.mean, t.unit)} to the original [${change(t.difference.low, t.unit)}, ${change(t.difference.high, t.unit)}]` : ""));
  tiles.push(tile("Cosine to the original", p && present(p.cosine) ? cosine(p.cosine.mean) : null,
    p ? (present(p.cosine_worst) ? `${p.output}; worst sample ${cosine(p.cosine_worst)}` : p.finite ? "" : "the output is not finite") : ""));
  if (p && present(p.top1_agreement) && tiles.length < 4)
    tiles.push(tile("Same top answer", percent(p.top1_agreement.mean), `${p.positions ?? p.top1_agreement.n} comparisons`));
  const l = e.latency;
  tiles.push(tile("Latency, p50", l ? ms(l.p50_ms) : null,
    l ? [l.ratio ? `${times(l.ratio.mean)} of fp32` : `p90 ${ms(l.p90_ms)}`, l.valid ? "" : "not valid as a claim"].filter(Boolean).join("; ") : ""));
  const m = e.memory;
  tiles.push(tile("Peak memory", m ? `${m.peak_rss_mb.toFixed(0)} MB` : null,
    m && present(m.baseline_peak_rss_mb) ? `fp32: ${m.baseline_peak_rss_mb.toFixed(0)} MB` : ""));
  if (e.weights && tiles.length < 4)
    tiles.push(tile("Weights in the file", `${e.weights.equal} of ${e.weights.checked}`, "equal, bit for bit"));
  place("tiles").append(...tiles);
}

/* Checks */
function title(metric) {
  const known = {
    cosine_min: "Cosine similarity, mean", relative_l2_max: "Relative L2 distance",
    top1_agreement_min: "Same top answer", kl_max: "KL divergence", size_ratio_max: "Size against fp32",
    latency_ratio_max: "Latency against fp32", latency_p90_max: "Latency, p90", cpu_ratio_max: "Processor time against fp32",
    size_max: "Size", cold_load_max: "Cold load", first_run_max: "First inference", peak_memory_max: "Peak memory",
    accuracy_drop_max: "Worse than the original by", accuracy_score_min: "Score of the suite",
    delegated: "The delegate runs what it is there for", peak_memory_ratio_max: "Peak memory against fp32",
    weights_equal: "Weights in the file are the logical ones", finite: "Every value is finite", varies: "Outputs follow the inputs",
    tokenizer: "The device's tokenizer splits texts as the original's", long_cache: "A long text in the cache gives the same scores",
    free_text: "What it writes by itself stays near the original's",
  };
  const [older, name] = metric.startsWith("regression.") ? ["Against the older bundle: ", metric.slice(11)] : ["", metric];
  return older + (known[name] || known[name + "_max"] || known[name + "_min"] || name.replace(/_(min|max)$/, "").replaceAll("_", " "));
}
function amount(c, value) {
  const metric = c.metric;
  if (!present(value)) return "not measured";
  if (metric.includes("ratio")) return times(value);
  if (metric.startsWith("top1")) return percent(value);
  if (c.unit === "share") return metric.includes("drop") ? minus((100 * value).toFixed(1)) + " pt" : percent(value);
  if (c.unit === "relative") return minus(percent(value));
  if (c.unit === "bytes" || c.unit === "B") return bytes(value);
  return metric.startsWith("cosine") || Number.isInteger(value) ? String(value) : small(value);
}
/* Yes-or-no checks that passed for several outputs share one line. */
function grouped(checks) {
  const lines = [];
  for (const c of checks) {
    const same = c.passed && isFlag(c) && lines.find((line) => line.metric === c.metric && line.passed);
    if (same) same.output = [same.output, c.output].filter(present).join(", ");
    else lines.push({ ...c });
  }
  return lines.sort((a, b) => Number(a.passed) - Number(b.passed));
}
const isFlag = (c) => !/_(min|max)$/.test(c.metric) && c.allowed === 1;
function measureOf(c) {
  if (isFlag(c)) return c.passed ? "yes" : present(c.measured) ? "no" : "not measured";
  const sign = c.metric.endsWith("_min") ? "≥" : "≤";
  const measured = c.metric.startsWith("cosine") && present(c.measured) ? cosine(c.measured) : amount(c, c.measured);
  const unit = ["ms", "MB", "nats"].includes(c.unit) ? " " + c.unit : "";
  const interval = present(c.low) && present(c.high) && c.n > 1 ? ` [${amount(c, c.low)}, ${amount(c, c.high)}]` : "";
  const allowed = `${c.passed ? "" : ", allowed"} ${sign} ${amount(c, c.allowed)}${unit}`;
  return measured + (present(c.measured) ? unit : "") + (c.metric.startsWith("accuracy") ? interval : "") + allowed;
}
function drawChecks(verdict) {
  for (const c of grouped(verdict.checks)) {
    const more = !c.passed || c.metric === "weights_equal" ? c.message : "";
    const word = c.passed ? "passed" : c.undecided ? "undecided" : present(c.measured) ? "failed" : "not measured";
    place("checks").append(
      el("li", { class: c.passed ? "pass" : "fail" },
        el("span", { class: "mark", role: "img", "aria-label": word }, c.passed ? "✓" : c.undecided ? "?" : "✗"),
        el("span", {}, title(c.metric), c.output ? el("span", { class: "muted" }, " · " + c.output) : null),
        el("span", { class: "measure" }, measureOf(c)),
        more ? el("span", { class: "more" }, more) : null,
        c.passed || !c.advice ? null : el("span", { class: "more advice" }, "Try first: " + c.advice)));
  }
  if ((verdict.notes || []).length) place("checks").after(caption("Not compared: " + verdict.notes.join("; ") + "."));
}

/* Suites */
function drawSuites(e) {
  const target = place("suites");
  const tasks = e.tasks || [];
  if (tasks.length === 0) {
    target.append(notice("No suite was asked of this file. What is known is how close its outputs are to the original's, on the inputs below, not how well it does what it is for. `edgeport suites` lists what can be asked.", "plain"));
    return;
  }
  for (const unit of new Set(tasks.map((t) => t.unit))) target.append(...suiteCharts(tasks.filter((t) => t.unit === unit), unit, e.verdict.checks));
  target.append(table("Suites: the file and the original on the same samples", [
    { name: "Suite", show: (t) => t.suite },
    { name: "Metric", show: (t) => t.metric },
    { name: "n", number: true, show: (t) => count(t.n), value: (t) => t.n },
    { name: "Original", number: true, show: (t) => maybe(t.original, (i) => two(score(i.mean, t.unit), interval(i, (x) => score(x, t.unit)))), value: (t) => t.original && t.original.mean },
    { name: "This file", number: true, show: (t) => maybe(t.artifact, (i) => two(score(i.mean, t.unit), interval(i, (x) => score(x, t.unit)))), value: (t) => t.artifact && t.artifact.mean },
    { name: "Difference", number: true, show: (t) => maybe(t.difference, (i) => two(change(i.mean, t.unit), interval(i, (x) => change(x, t.unit)))), value: (t) => t.difference && t.difference.mean },
    { name: "Worse", number: true, show: (t) => count(t.worse), value: (t) => t.worse },
    { name: "Better", number: true, show: (t) => count(t.better), value: (t) => t.better },
    { name: "McNemar p", number: true, optional: true, show: (t) => maybe(t.mcnemar_p, (p) => (p < 0.001 ? "< 0.001" : p.toFixed(3))), value: (t) => t.mcnemar_p },
    { name: "Chance", number: true, optional: true, show: (t) => maybe(t.chance, (x) => score(x, t.unit)), value: (t) => t.chance },
    { name: "Note", wide: true, optional: true, show: (t) => t.baseline_problem },
  ], tasks));
  for (const t of tasks.filter((t) => t.baseline_problem)) target.append(notice(`${t.suite} says nothing of this file: ${t.baseline_problem}.`));
  target.append(caption("Intervals hold at 95 %. The difference is paired: both models answered the same samples. " +
    mainTasks(tasks).map((t) => `${t.suite}: ${t.data.slice}; licence ${t.data.licence || "not stated"}`).join(". ") + "."));
}
function suiteCharts(tasks, unit, checks) {
  const shares = unit === "share";
  const levels = tasks.flatMap((t) => [t.original, t.artifact]).filter(present);
  const differences = tasks.filter((t) => t.difference);
  const nodes = [];
  if (levels.length) {
    const [low, high] = shares ? [0, 1] : around(levels.flatMap((i) => [i.low, i.high]));
    const ticks = ticksOf(low, high, (x) => (shares ? short(100 * x) + " %" : short(x)));
    const scale = (x) => (x - low) / (high - low);
    nodes.push(figure(null,
      tasks.filter((t) => t.artifact).map((t) => row(`${t.suite}: ${t.metric}`, dotDrawing(scale, ticks, t.artifact, null, null, t.original), score(t.artifact.mean, unit), t.original ? "original " + score(t.original.mean, unit) : "")),
      axisRow(ticks),
      keys(meanKey("this file"), worstKey("the original"), rangeKey())));
  }
  if (differences.length) {
    /* Margins are told as how much worse is allowed: on the side of the worse. */
    const margin = (t) => {
      const c = checks.find((check) => check.metric === "accuracy_drop_max" && check.output === t.suite);
      return c && t === tasks.find((other) => other.suite === t.suite) ? (t.higher_is_better ? -1 : 1) * c.allowed : null;
    };
    const [low, high] = around([0, ...differences.flatMap((t) => [t.difference.low, t.difference.high, margin(t) ?? 0])]);
    const scale = (x) => (x - low) / (high - low);
    const ticks = ticksOf(low, high, changeTick(unit));
    const zero = (drawing) => (drawing.prepend(el("line", { class: "zero", x1: at(scale(0)), x2: at(scale(0)), y1: 0, y2: 26 })), drawing);
    const words = (t) => {
      const [better, worse] = t.higher_is_better ? [t.difference.low > 0, t.difference.high < 0] : [t.difference.high < 0, t.difference.low > 0];
      return better ? "better" : worse ? "worse" : "no difference shown";
    };
    nodes.push(figure("Difference from the original, paired",
      differences.map((t) => row(`${t.suite}: ${t.metric}`, zero(dotDrawing(scale, ticks, t.difference, null, margin(t))), change(t.difference.mean, unit), words(t))),
      axisRow(ticks),
      keys(meanKey("difference"), rangeKey(), differences.some((t) => present(margin(t))) ? budgetKey("the gate's margin") : null, lineKey("zero", "no difference"))));
  }
  return nodes;
}

/* Parity */
function limits(checks, metric) {
  const found = new Map();
  for (const c of checks) if (c.metric === metric) found.set(c.output, c.allowed);
  return (output) => found.get(output) ?? found.get(null) ?? found.get(undefined);
}
function drawParity(e) {
  const target = place("parity");
  const d = e.data;
  if (e.parity.length === 0) {
    target.append(notice("Not compared."));
    return;
  }
  if (!d.real) target.append(notice("Synthetic inputs: the numbers show that the file computes what the model computes, not how it does on real data."));
  const shown = e.parity.filter((p) => present(p.cosine));
  if (shown.length) target.append(cosineChart(shown, limits(e.verdict.checks, "cosine_min")));
  const answers = e.parity.filter((p) => present(p.top1_agreement));
  if (answers.length) target.append(el("h3", {}, "Same top answer"), top1Chart(answers, limits(e.verdict.checks, "top1_agreement_min")));
  target.append(parityTable(e.parity));
  target.append(caption(`${d.samples} samples of ${d.name}${d.real ? "" : " (synthetic)"}: ${d.slice}. Licence: ${d.licence || "not stated"}.`));
}
function cosineChart(rows, limit) {
  const nines = (c) => Math.min(8, Math.max(0, c >= 1 ? 8 : -Math.log10(1 - c)));
  const values = rows.flatMap((p) => [p.cosine.mean, p.cosine.low, p.cosine.high, p.cosine_worst, limit(p.output)]).filter(present).map(nines);
  const low = Math.floor(Math.min(...values));
  const high = Math.max(low + 1, Math.ceil(Math.max(...values)));
  const scale = (c) => (nines(c) - low) / (high - low);
  const ticks = [];
  for (let n = low; n <= high; n += Math.ceil((high - low) / 4)) ticks.push([(n - low) / (high - low), n === 0 ? "0" : n === 8 ? "1" : "0." + "9".repeat(n)]);
  return figure(null,
    rows.map((p) => row(p.output, dotDrawing(scale, ticks, p.cosine, p.cosine_worst, limit(p.output)), cosine(p.cosine.mean), interval(p.cosine, cosine))),
    axisRow(ticks),
    keys(meanKey(), rangeKey(), worstKey(), budgetKey(), el("span", { class: "key" }, "cosine similarity, further right is closer")));
}
function top1Chart(rows, limit) {
  const values = rows.flatMap((p) => [p.top1_agreement.low, limit(p.output)]).filter(present);
  const low = Math.min(0.9, Math.floor(10 * Math.min(...values)) / 10);
  const scale = (x) => (x - low) / (1 - low);
  const ticks = [0, 0.5, 1].map((share) => [share, percent(low + share * (1 - low))]);
  return figure(null,
    rows.map((p) => row(p.output, dotDrawing(scale, ticks, p.top1_agreement, null, limit(p.output)), percent(p.top1_agreement.mean), interval(p.top1_agreement, percent))),
    axisRow(ticks));
}
function parityTable(rows) {
  const has = (name) => rows.some((p) => present(p[name]));
  return table("Outputs of the file against the original's", [
    { name: "Output", name_: true, show: (p) => p.output },
    { name: "Largest difference", number: true, show: (p) => maybe(p.max_abs, small), value: (p) => p.max_abs },
    { name: "Relative L2", number: true, show: (p) => maybe(p.relative_l2, small), value: (p) => p.relative_l2 },
    { name: "Cosine", number: true, show: (p) => maybe(p.cosine, (i) => cosine(i.mean)), value: (p) => p.cosine && p.cosine.mean },
    { name: "Worst", number: true, show: (p) => maybe(p.cosine_worst, (x) => cosine(x)), value: (p) => p.cosine_worst },
    ...(has("top1_agreement") ? [{ name: "Same top answer", number: true, show: (p) => maybe(p.top1_agreement, (i) => percent(i.mean)), value: (p) => p.top1_agreement && p.top1_agreement.mean }] : []),
    ...(has("kl") ? [{ name: "KL, nats", number: true, show: (p) => maybe(p.kl, (i) => `${small(i.mean)} (${small(i.low)} – ${small(i.high)})`), value: (p) => p.kl && p.kl.mean }] : []),
    { name: "Finite", show: (p) => (p.finite ? "yes" : "no") },
  ], rows);
}

/* Memory */
function drawMemory(e) {
  const target = place("memory");
  const m = e.memory;
  if (!m) {
    target.append(notice("Memory was not measured. " + (e.memory_absent || ""), "plain"));
    drawMemoryPlan(target, e);
    return;
  }
  const most = Math.max(m.peak_rss_mb, m.baseline_peak_rss_mb || 0);
  const mb = (x) => x.toFixed(0) + " MB";
  target.append(figure("Peak memory of a fresh process",
    row("This file", bar(m.peak_rss_mb / most, "bar-this"), mb(m.peak_rss_mb)),
    present(m.baseline_peak_rss_mb) ? row("fp32, same runtime", bar(m.baseline_peak_rss_mb / most, "bar-base"), mb(m.baseline_peak_rss_mb)) : null),
  facts([
    ["The runtime alone", mb(m.runtime_rss_mb)],
    ["Loading", ms(m.load_ms) + (present(m.cold_load_ms) ? `; ${ms(m.cold_load_ms)} when the file was not in memory` : "")],
    ["First inference", ms(m.first_run_ms)],
    ...(m.tokens ? [["It read", `${m.tokens} tokens, as many as the cache holds`]] : []),
  ]));
  drawMemoryPlan(target, e);
}
function drawMemoryPlan(target, e) {
  const p = e.memory_plan;
  if (!p) return;
  const m = e.memory;
  const rows = [["Weights", bytes(p.weights_bytes)]];
  if (p.context) rows.push([`Keys and values of ${p.context} tokens`, bytes(p.cache_bytes)]);
  rows.push(["Activations", present(p.activations_bytes) ? `${bytes(p.activations_bytes)} (${p.activations_from})` : "unknown"],
    ["While loading", `${bytes(p.loading_bytes)} (estimate)`],
    ["Planned together", bytes(p.total_bytes) + (p.ram_bytes ? ` of the device's ${bytes(p.ram_bytes)}` : "")]);
  if (m) rows.push(["Measured beside the runtime", bytes((m.peak_rss_mb - m.runtime_rss_mb) * 1e6)]);
  target.append(el("h3", {}, "Memory on the device, as planned"), facts(rows));
}

/* Where and how */
function drawMachine(e) {
  const m = e.machine;
  const rows = [
    ["Measured", e.measured_at],
    ["Machine", `${m.cpu}, ${m.cores} cores, ${digits(m.memory_gb)} GB, ${m.platform}`],
    ["Software", [`Python ${m.python}`, ...Object.entries(m.versions).map(([k, v]) => `${k} ${v}`)].join(", ")],
  ];
  if (e.weights)
    rows.push(["Weights", `${e.weights.equal} of ${e.weights.checked} compressed tensors in the file equal the logical ones, bit for bit` +
      (e.weights.different.length ? ": " + e.weights.different.join("; ") : "")]);
  for (const t of e.tokenizers || [])
    rows.push(["Tokenizer", `${t.implementation} ${t.version || ""}: ` + (t.absent || t.failed || (t.different ? `${t.different} of ${t.texts} texts come out otherwise: ${t.examples[0]}` : `all ${t.texts} texts come out as the original's`))]);
  if (e.delegation)
    rows.push(["Delegated", `${plural(e.delegation.delegates, "part")} of the file to ${e.delegation.delegate}; ${plural(e.delegation.kernels.length, "kind")} of kernels run outside: ${e.delegation.kernels.join(", ") || "none"}`]);
  const c = e.compression;
  if (c)
    rows.push(["Compression", [`${c.cpu_seconds.toFixed(1)} s of processor time`,
      present(c.peak_rss_mb) ? `peak ${c.peak_rss_mb.toFixed(0)} MB` : null,
      `${c.weights} weights` + (c.weights_before ? `, ${c.weights_before} of them by a run before` : ""),
      c.samples ? `${c.samples} inputs` + (present(c.tokens) ? ` of ${c.tokens} tokens` : "") : null,
    ].filter(Boolean).join("; ")]);
  if (e.manifest_sha256) rows.push(["Manifest", `sha256 ${e.manifest_sha256}`]);
  place("machine").append(facts(rows));
}
/* One word for a shell, as Python's shlex.quote writes it: a name is copied from here into a terminal. */
const word = (text) => (/^[\w@%+=:,./-]+$/.test(text) ? text : "'" + text.replaceAll("'", `'"'"'`) + "'");
/* The commands of the shell, with what this run measured. */
function drawCommands(e) {
  const node = place("validate-command");
  const known = node.dataset.suites.split(" ");
  const suites = mainTasks(e.tasks).map((t) => " --suite " + word(known.includes(t.suite) ? t.suite : `PATH/${t.suite}.toml`)).join("");
  const original = suites && node.dataset.original ? ` --original ${word(node.dataset.original)}` : "";
  node.textContent += suites + original + (e.latency && e.latency.min_queries_met && e.latency.min_duration_met ? " --full" : "");
  place("export-command").textContent += suites;
}
