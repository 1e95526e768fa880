"use strict";
/* Draws the measurements of evidence.json. Text goes in as text nodes only, never as markup. */
(() => {
  const block = document.getElementById("evidence").textContent.trim();
  const place = (id) => document.getElementById(id);
  const svgNames = new Set(["svg", "rect", "line", "circle", "path", "text", "g"]);

  function el(tag, attributes = {}, ...children) {
    const node = svgNames.has(tag)
      ? document.createElementNS("http://www.w3.org/2000/svg", tag)
      : document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, String(value));
    for (const child of children.flat()) if (child !== null && child !== undefined) node.append(child);
    return node;
  }

  /* Numbers */
  const present = (value) => value !== null && value !== undefined;
  function bytes(count) {
    for (const [unit, factor] of [["GB", 1e9], ["MB", 1e6], ["kB", 1e3]])
      if (Math.abs(count) >= factor * 0.9995) return digits(count / factor) + " " + unit;
    return count + " B";
  }
  function digits(x) {
    const size = Math.abs(x);
    return x.toFixed(size >= 99.95 ? 0 : size >= 9.995 ? 1 : 2);
  }
  const ms = (x) => (x >= 1000 ? digits(x / 1000) + " s" : digits(x) + " ms");
  const times = (x) => x.toFixed(2) + "×";
  const percent = (x) => (100 * x).toFixed(1) + " %";
  const small = (x) => (x === 0 ? "0" : Math.abs(x) < 0.001 ? x.toExponential(1) : x.toPrecision(3));
  /* As many nines as the cosine has, and two digits more; `like` gives neighbours the same length. */
  function cosine(x, like = x) {
    const nines = like >= 1 ? 6 : Math.max(0, Math.floor(-Math.log10(1 - like)));
    return x.toFixed(Math.min(8, Math.max(4, nines + 2)));
  }
  const interval = (i, format) => (i.n > 1 ? `${format(i.low, i.mean)} – ${format(i.high, i.mean)}` : "one sample");

  function draw(e) {
    drawVerdict(e.verdict, e.states.executed_here);
    drawStates(e.states);
    drawTiles(e);
    drawChecks(e.verdict.checks);
    drawParity(e);
    drawLatency(e);
    drawMemory(e);
    drawMachine(e);
  }

  /* Verdict, states, tiles */
  function drawVerdict(verdict, executed) {
    const failed = verdict.checks.filter((c) => !c.passed);
    const total = verdict.checks.length;
    const banner = place("verdict");
    const how = { reference: ", run by a reference evaluator: not yet on the target's own kernels", none: ", which was not run here" }[executed] || "";
    banner.classList.add(verdict.passed ? "pass" : "fail");
    banner.append(
      el("div", { class: "mark", "aria-hidden": "true" }, verdict.passed ? "✓" : "✗"),
      el("div", {},
        el("strong", {}, verdict.passed ? "All checks passed" : "Not ready to ship"),
        el("span", {}, verdict.passed
          ? `${total} of ${total} checks of the recipe's gate, on the file in this bundle${how}.`
          : `${failed.length} of ${total} checks failed (exit code ${verdict.exit_code}): ` +
            [...new Set(failed.map((c) => title(c.metric)))].join(", ") + "."))
    );
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
      el("li", { class: "statement" }, s.statement)
    );
  }

  function mainParity(e) {
    const rows = e.parity.filter((p) => p.main !== false);
    const measured = rows.filter((p) => present(p.cosine));
    return measured.sort((a, b) => a.cosine.mean - b.cosine.mean)[0] || rows[0];
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
      tile("Cosine to the original", p && present(p.cosine) ? cosine(p.cosine.mean) : null,
        p ? (present(p.cosine_worst) ? `${p.output}; worst sample ${cosine(p.cosine_worst)}` : p.finite ? "" : "the output is not finite") : ""),
    ];
    if (p && present(p.top1_agreement))
      tiles.push(tile("Same top answer", percent(p.top1_agreement.mean), `${p.positions ?? p.top1_agreement.n} comparisons`));
    const l = e.latency;
    tiles.push(tile("Latency, p50", l ? ms(l.p50_ms) : null,
      l ? `${times(l.ratio.mean)} of fp32${l.valid ? "" : "; not valid as a claim"}` : ""));
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
    };
    return known[metric] || metric.replace(/_(min|max)$/, "").replaceAll("_", " ");
  }
  function amount(metric, value) {
    if (!present(value)) return "not measured";
    if (metric.includes("ratio")) return times(value);
    if (metric.startsWith("top1")) return percent(value);
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
    const measured = c.metric.startsWith("cosine") && present(c.measured) ? cosine(c.measured) : amount(c.metric, c.measured);
    const unit = ["ms", "MB", "nats"].includes(c.unit) ? " " + c.unit : "";
    const interval = present(c.low) && present(c.high) && c.n > 1 ? ` [${small(c.low)}, ${small(c.high)}]` : "";
    const allowed = `${c.passed ? "" : ", allowed"} ${sign} ${amount(c.metric, c.allowed)}${unit}`;
    return measured + (present(c.measured) ? unit : "") + (c.metric.startsWith("accuracy") ? interval : "") + allowed;
  }
  function drawChecks(checks) {
    for (const c of grouped(checks)) {
      const more = !c.passed || c.metric === "weights_equal" ? c.message : "";
      place("checks").append(
        el("li", { class: c.passed ? "pass" : "fail" },
          el("span", { class: "mark", "aria-label": c.passed ? "passed" : "failed" }, c.passed ? "✓" : "✗"),
          el("span", {}, title(c.metric), c.output ? el("span", { class: "muted" }, " · " + c.output) : null),
          el("span", { class: "measure" }, measureOf(c)),
          more ? el("span", { class: "more" }, more) : null,
          c.passed || !c.advice ? null : el("span", { class: "more advice" }, "Try first: " + c.advice)));
    }
  }

  /* Charts: rows of label, drawing, value. Positions are shares of the width, so they fit any screen. */
  const at = (share) => (100 * Math.min(1, Math.max(0, share))).toFixed(2) + "%";
  function row(label, drawing, value, note) {
    return el("div", { class: "row" },
      el("span", { class: "label" }, label), drawing,
      el("span", { class: "value" }, value, note ? el("small", {}, note) : null));
  }
  function axisRow(ticks) {
    const marks = ticks.map(([share, label], i) =>
      el("text", { x: at(share), y: 12, "text-anchor": i === 0 ? "start" : i === ticks.length - 1 ? "end" : "middle" }, label));
    return el("div", { class: "row" }, el("span", { class: "label" }),
      el("svg", { class: "axis-row", width: "100%", height: 16, "aria-hidden": "true" }, marks), el("span", { class: "value" }));
  }
  function dotDrawing(scale, ticks, i, worst, budget) {
    const y = 13;
    const drawing = el("svg", { width: "100%", height: 26, "aria-hidden": "true" });
    for (const [share] of ticks) drawing.append(el("line", { class: "axis", x1: at(share), x2: at(share), y1: 0, y2: 26 }));
    if (present(budget)) drawing.append(el("line", { class: "budget", x1: at(scale(budget)), x2: at(scale(budget)), y1: 0, y2: 26 }));
    if (i.n > 1) drawing.append(el("line", { class: "range", x1: at(scale(i.low)), x2: at(scale(i.high)), y1: y, y2: y }));
    if (present(worst)) drawing.append(el("circle", { class: "worst", cx: at(scale(worst)), cy: y, r: 4 }));
    drawing.append(el("circle", { class: "mean", cx: at(scale(i.mean)), cy: y, r: 5 }));
    return drawing;
  }
  function key(shape, text) {
    return el("span", { class: "key" }, el("svg", { width: 18, height: 12, "aria-hidden": "true" }, shape), text);
  }
  const meanKey = () => key(el("circle", { class: "mean", cx: 9, cy: 6, r: 5 }), "mean");
  const rangeKey = () => key(el("line", { class: "range", x1: 2, x2: 16, y1: 6, y2: 6 }), "95 % interval");
  const worstKey = () => key(el("circle", { class: "worst", cx: 9, cy: 6, r: 4 }), "worst sample");
  const budgetKey = () => key(el("line", { class: "budget", x1: 9, x2: 9, y1: 0, y2: 12 }), "the gate's limit");

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
      target.append(el("p", { class: "notice" }, "Not compared."));
      return;
    }
    if (!d.real) target.append(el("p", { class: "notice" }, "Synthetic inputs: the numbers show that the file computes what the model computes, not how it does on real data."));
    const shown = e.parity.filter((p) => present(p.cosine));
    if (shown.length) target.append(cosineChart(shown, limits(e.verdict.checks, "cosine_min")));
    const answers = e.parity.filter((p) => present(p.top1_agreement));
    if (answers.length) target.append(el("h3", {}, "Same top answer"), top1Chart(answers, limits(e.verdict.checks, "top1_agreement_min")));
    target.append(parityTable(e.parity));
    target.append(el("p", { class: "caption" },
      `${d.samples} samples of ${d.name}${d.real ? "" : " (synthetic)"}: ${d.slice}. Licence: ${d.licence || "not stated"}.`));
  }
  function cosineChart(rows, limit) {
    const nines = (c) => Math.min(8, Math.max(0, c >= 1 ? 8 : -Math.log10(1 - c)));
    const values = rows.flatMap((p) => [p.cosine.mean, p.cosine.low, p.cosine.high, p.cosine_worst, limit(p.output)]).filter(present).map(nines);
    const low = Math.floor(Math.min(...values));
    const high = Math.max(low + 1, Math.ceil(Math.max(...values)));
    const scale = (c) => (nines(c) - low) / (high - low);
    const ticks = [];
    for (let n = low; n <= high; n += Math.ceil((high - low) / 4)) ticks.push([(n - low) / (high - low), n === 0 ? "0" : n === 8 ? "1" : "0." + "9".repeat(n)]);
    return el("figure", { class: "chart" },
      rows.map((p) => row(p.output, dotDrawing(scale, ticks, p.cosine, p.cosine_worst, limit(p.output)), cosine(p.cosine.mean), interval(p.cosine, cosine))),
      axisRow(ticks),
      el("figcaption", {}, meanKey(), rangeKey(), worstKey(), budgetKey(),
        el("span", { class: "key" }, "cosine similarity, further right is closer")));
  }
  function top1Chart(rows, limit) {
    const values = rows.flatMap((p) => [p.top1_agreement.low, limit(p.output)]).filter(present);
    const low = Math.min(0.9, Math.floor(10 * Math.min(...values)) / 10);
    const scale = (x) => (x - low) / (1 - low);
    const ticks = [0, 0.5, 1].map((share) => [share, percent(low + share * (1 - low))]);
    return el("figure", { class: "chart" },
      rows.map((p) => row(p.output, dotDrawing(scale, ticks, p.top1_agreement, null, limit(p.output)), percent(p.top1_agreement.mean), interval(p.top1_agreement, percent))),
      axisRow(ticks));
  }
  function parityTable(rows) {
    const columns = [
      ["Output", (p) => p.output],
      ["Largest difference", (p) => (present(p.max_abs) ? small(p.max_abs) : "–")],
      ["Relative L2", (p) => (present(p.relative_l2) ? small(p.relative_l2) : "–")],
      ["Cosine", (p) => (present(p.cosine) ? cosine(p.cosine.mean) : "–")],
      ["Worst", (p) => (present(p.cosine_worst) ? cosine(p.cosine_worst) : "–")],
      ["Same top answer", (p) => (present(p.top1_agreement) ? percent(p.top1_agreement.mean) : null)],
      ["KL, nats", (p) => (present(p.kl) ? `${small(p.kl.mean)} (${small(p.kl.low)} – ${small(p.kl.high)})` : null)],
      ["Finite", (p) => (p.finite ? "yes" : "no")],
    ].filter(([, read]) => rows.some((p) => read(p) !== null));
    return el("div", { class: "scroll" }, el("table", { class: "numbers" },
      el("thead", {}, el("tr", {}, columns.map(([name]) => el("th", {}, name)))),
      el("tbody", {}, rows.map((p) => el("tr", {}, columns.map(([, read]) => el("td", {}, read(p) ?? "–")))))));
  }

  /* Speed and memory */
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
  function drawLatency(e) {
    const target = place("latency");
    const l = e.latency;
    if (!l) {
      target.append(el("p", { class: "notice plain" }, "Latency was not measured. " + (e.latency_absent || "")));
      return;
    }
    const most = 1.02 * Math.max(l.p90_ms, l.baseline_p90_ms);
    target.append(el("figure", { class: "chart" },
      row("This file", bar(l.p50_ms / most, "bar-this", l.p90_ms / most), ms(l.p50_ms), "p90 " + ms(l.p90_ms)),
      row("fp32, same runtime", bar(l.baseline_p50_ms / most, "bar-base", l.baseline_p90_ms / most), ms(l.baseline_p50_ms), "p90 " + ms(l.baseline_p90_ms))));
    const high = Math.max(1.1, 1.05 * l.ratio.high);
    const step = high > 4 ? Math.ceil(high / 4) : high > 2 ? 1 : 0.5;
    const ticks = [];
    for (let x = 0; x <= high; x += step) ticks.push([x / high, x.toFixed(1) + "×"]);
    const limit = limits(e.verdict.checks, "latency_ratio_max")(null);
    target.append(el("figure", { class: "chart" },
      row("Ratio to fp32", dotDrawing((x) => x / high, ticks, l.ratio, null, limit), times(l.ratio.mean), interval(l.ratio, (x) => x.toFixed(3) + "×")),
      axisRow(ticks),
      el("figcaption", {},
        `Bars: median of a call, whisker: p90. ${l.queries} calls of each, interleaved, after ${l.warmup} to warm up; ` +
        `${l.threads} thread${l.threads === 1 ? "" : "s"}; ` +
        Object.entries(l.input_shapes).map(([name, shape]) => `${name} ${shape.join("×")}`).join(", ") + ".")));
    if (!l.valid) target.append(el("p", { class: "notice" }, "Not valid as a claim: " + l.note));
    else if (l.note) target.append(el("p", { class: "caption" }, l.note));
  }
  function drawMemory(e) {
    const target = place("memory");
    const m = e.memory;
    if (!m) {
      target.append(el("p", { class: "notice plain" }, "Memory was not measured. " + (e.memory_absent || "")));
      drawMemoryPlan(target, e);
      return;
    }
    const most = Math.max(m.peak_rss_mb, m.baseline_peak_rss_mb || 0);
    const mb = (x) => x.toFixed(0) + " MB";
    target.append(el("h3", {}, "Peak memory of a fresh process"),
      el("figure", { class: "chart" },
        row("This file", bar(m.peak_rss_mb / most, "bar-this"), mb(m.peak_rss_mb)),
        present(m.baseline_peak_rss_mb) ? row("fp32, same runtime", bar(m.baseline_peak_rss_mb / most, "bar-base"), mb(m.baseline_peak_rss_mb)) : null,
        el("figcaption", {}, `Of which the runtime alone: ${mb(m.runtime_rss_mb)}. Loading took ${ms(m.load_ms)}, the first call ${ms(m.first_run_ms)}.` +
          (m.tokens ? ` It read ${m.tokens} tokens, as many as the cache holds.` : ""))));
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
    target.append(el("h3", {}, "Memory on the device, as planned"),
      el("dl", { class: "facts" }, rows.flatMap(([k, v]) => [el("dt", {}, k), el("dd", {}, v)])));
  }

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
    const c = e.compression;
    if (c)
      rows.push(["Compression", [`${c.cpu_seconds.toFixed(1)} s of processor time`,
        present(c.peak_rss_mb) ? `peak ${c.peak_rss_mb.toFixed(0)} MB` : null,
        `${c.weights} weights` + (c.weights_before ? `, ${c.weights_before} of them by a run before` : ""),
        c.samples ? `${c.samples} inputs` + (present(c.tokens) ? ` of ${c.tokens} tokens` : "") : null,
      ].filter(Boolean).join("; ")]);
    if (e.manifest_sha256) rows.push(["Manifest", `sha256 ${e.manifest_sha256}`]);
    place("machine").append(el("dl", { class: "facts" }, rows.flatMap(([k, v]) => [el("dt", {}, k), el("dd", {}, v)])));
  }

  /* Sorting */
  function sortTables() {
    for (const table of document.querySelectorAll("table.sortable")) {
      const headings = [...table.querySelectorAll("thead th")];
      headings.forEach((heading, column) => heading.addEventListener("click", () => {
        const up = heading.getAttribute("aria-sort") !== "ascending";
        headings.forEach((h) => h.setAttribute("aria-sort", "none"));
        heading.setAttribute("aria-sort", up ? "ascending" : "descending");
        const value = (tr) => {
          const cell = tr.children[column];
          return cell.dataset.value === undefined ? cell.textContent : Number(cell.dataset.value);
        };
        const body = table.tBodies[0];
        const order = (a, b) => (typeof a === "number" ? a - b : a.localeCompare(b, "en", { numeric: true }));
        body.append(...[...body.rows].sort((a, b) => (up ? 1 : -1) * order(value(a), value(b))));
      }));
    }
  }

  if (block === "") {
    place("verdict").className = "verdict";
    place("verdict").append(el("span", {}, "This page holds no measurements."));
  } else {
    draw(JSON.parse(block));
  }
  sortTables();
})();
