/* Draws how fast the file is: all timed calls, the roofline, and how it generates text. */
function drawLatency(e) {
  const target = place("latency");
  const l = e.latency;
  if (!l) {
    target.append(notice("Latency was not measured. " + (e.latency_absent || ""), "plain"));
    return;
  }
  target.append(l.valid
    ? notice(`A valid run as MLPerf's single stream defines it: ${plural(l.queries, "call")}${l.seconds ? ` that took ${digits(l.seconds)} s` : ""}, on a quiet machine.`, "good")
    : notice("Not valid as a claim: " + l.note));
  const most = 1.02 * Math.max(l.p90_ms, l.baseline_p90_ms || 0);
  const two = present(l.baseline_p50_ms);
  target.append(figure(null,
    row("This file", bar(l.p50_ms / most, "bar-this", l.p90_ms / most), ms(l.p50_ms), "p90 " + ms(l.p90_ms)),
    two ? row("fp32, same runtime", bar(l.baseline_p50_ms / most, "bar-base", l.baseline_p90_ms / most), ms(l.baseline_p50_ms), "p90 " + ms(l.baseline_p90_ms)) : null));
  if (l.ratio) {
    const high = Math.max(1.1, 1.05 * l.ratio.high);
    const ticks = stepsOf(0, high, 4).map((x) => [x / high, x.toFixed(x % 1 && high < 1 ? 2 : 1) + "×"]);
    const limit = limits(e.verdict.checks, "latency_ratio_max")(null);
    target.append(figure(null,
      row("Ratio to fp32", dotDrawing((x) => x / high, ticks, l.ratio, null, limit), times(l.ratio.mean), interval(l.ratio, (x) => x.toFixed(3) + "×")),
      axisRow(ticks)));
  }
  target.append(caption(
    `Bars: median of a call, whisker: p90. ${plural(l.queries, "call")}${two ? " of each, interleaved," : ""} after ${l.warmup} to warm up; ` +
    `${plural(l.threads, "thread")}; ` + Object.entries(l.input_shapes).map(([name, shape]) => `${name} ${shape.join("×")}`).join(", ") + "."));
  if (l.calls) target.append(distribution(l), course(l));
  const rows = [];
  if (l.p90) rows.push(["p90", `${ms(l.p90.mean)} [${ms(l.p90.low)}, ${ms(l.p90.high)}] at 95 %`]);
  if (l.calls) rows.push(["p99", ms(l.calls.percentiles_ms[99])], ["Slowest call", ms(l.calls.percentiles_ms[100])]);
  rows.push(["Processor time", `${ms(l.cpu_ms)} a call` + (l.cpu_ratio ? `, ${times(l.cpu_ratio.mean)} of fp32 [${times(l.cpu_ratio.low)}, ${times(l.cpu_ratio.high)}]` : "")]);
  if (l.outliers) rows.push(["Outliers", `${percent(l.outliers)} of the calls took more than twice the median`]);
  if (l.noise) rows.push(["The machine alone", `a fixed piece of arithmetic took ${digits(l.noise.median_us)} µs, its p90 ${percent(l.noise.spread)} more, ${minus(percent(l.noise.drift))} drift over the run`]);
  if ((l.cores || []).length) rows.push(["Held to processors", l.cores.join(", ")]);
  target.append(facts(rows));
  if (l.valid && l.note) target.append(caption(l.note));
}
/* The share of calls done within a time: every timed call is in it. */
function distribution(l) {
  const lines = [["this", "this file", l.calls], ["base", "fp32", l.baseline_calls]].filter(([, , calls]) => calls);
  const ends = lines.flatMap(([, , calls]) => [calls.percentiles_ms[0], calls.percentiles_ms[99]]);
  const [low, high] = around(ends, 0.04);
  const x = { low: Math.max(0, low), high, label: "milliseconds of a call, up to the p99", form: short };
  const y = { low: 0, high: 1, label: "share of calls done", form: (v) => (100 * v).toFixed(0) + " %", ticks: [0, 0.25, 0.5, 0.75, 0.9, 1] };
  return figure(`All ${count(l.queries)} timed calls`,
    plot("Share of calls done within a time", x, y, (px, py) => lines.map(([style, name, calls]) => [
      line("line-" + style, calls.percentiles_ms.slice(0, 100).map((v, i) => [px(v), py(i / 100)])),
      [50, 90, 99].map((p) => el("circle", tip(`${name}: p${p} is ${ms(calls.percentiles_ms[p])}`, { class: "dot-" + style, cx: px(calls.percentiles_ms[p]), cy: py(p / 100), r: 5 }))),
    ])),
    keys(lineKey("line-this", "this file"), l.baseline_calls ? lineKey("line-base", "fp32, same runtime") : null, el("span", { class: "key" }, "points: p50, p90, p99")));
}
function course(l) {
  const lines = [["this", "this file", l.calls], ["base", "fp32", l.baseline_calls]].filter(([, , calls]) => calls && calls.course_ms.length > 2);
  if (!lines.length) return [];
  const [, high] = around([0, ...lines.flatMap(([, , calls]) => calls.course_ms)]);
  return figure("Over the run",
    plot("Median of a call over the run", { low: 0, high: 1, label: "from the first call to the last", form: (v) => (100 * v).toFixed(0) + " %" },
      { low: 0, high, label: "ms, median of a stretch", form: short },
      (px, py) => lines.map(([style, , calls]) => line("line-" + style, calls.course_ms.map((v, i) => [px((i + 0.5) / calls.course_ms.length), py(v)]))), { height: 190 }));
}

/* The roofline of edgeport.validate.work: no file runs faster than the slower of arithmetic and memory. */
function drawRoofline(e) {
  const w = e.work;
  if (!w) return;
  const l = e.latency;
  const moved = w.weight_bytes + w.activation_bytes + (w.cache_bytes || 0);
  const intensity = w.flops / moved;
  const rows = [
    ["Operations", `${digits(w.flops / 1e9)} Gflop (2 a multiply-add)`],
    ["Bytes moved, at least", `${bytes(moved)}: weights ${bytes(w.weight_bytes)}, activations ${bytes(w.activation_bytes)}` + (w.cache_bytes ? `, cache ${bytes(w.cache_bytes)}` : "")],
    ["Intensity", `${digits(intensity)} operations a byte`],
  ];
  const target = place("roofline");
  target.append(el("h3", {}, "What one inference has to do"));
  const same = l && JSON.stringify(sorted(w.input_shapes)) === JSON.stringify(sorted(l.input_shapes));
  if (!same || !present(w.peak_gflops) || !present(w.bandwidth_gb_s)) {
    target.append(facts(rows));
    return;
  }
  const achieved = w.flops / l.p50_ms / 1e6;
  const base = present(l.baseline_p50_ms) ? w.flops / l.baseline_p50_ms / 1e6 : null;
  const memory = intensity * w.bandwidth_gb_s;
  const roof = Math.min(memory, w.peak_gflops);
  const ridge = w.peak_gflops / w.bandwidth_gb_s;
  rows.push(["Achieved", `${digits(achieved)} Gflop/s, ${percent(achieved / w.peak_gflops)} of this machine's float32 peak (MFU)` + (achieved > w.peak_gflops ? ", as integer kernels can" : "")],
    ["The roof here", `${digits(roof)} Gflop/s, by ${memory < w.peak_gflops ? "memory" : "arithmetic"}`]);
  const xs = [intensity, ridge], ys = [achieved, roof, base ?? achieved, w.peak_gflops];
  const x = { low: 10 ** Math.floor(Math.log10(Math.min(...xs) / 1.5)), high: 10 ** Math.ceil(Math.log10(Math.max(...xs) * 1.5)), log: true, label: "operations a byte", form: short };
  const y = { low: 10 ** Math.floor(Math.log10(Math.min(...ys) / 1.2)), high: 10 ** Math.ceil(Math.log10(Math.max(...ys) * 1.2)), log: true, label: "Gflop/s", form: short };
  const lowX = Math.max(x.low, y.low / w.bandwidth_gb_s);
  target.append(figure(null,
    plot("Roofline", x, y, (px, py, area) => [
      line("roof", [[px(lowX), py(lowX * w.bandwidth_gb_s)], [px(ridge), py(w.peak_gflops)], [area.right, py(w.peak_gflops)]]),
      el("line", { class: "drop", x1: px(intensity), x2: px(intensity), y1: py(roof), y2: area.bottom }),
      base === null ? null : el("circle", tip(`fp32, same runtime: ${digits(base)} Gflop/s (drawn at this file's intensity)`, { class: "dot-base", cx: px(intensity), cy: py(base), r: 6 })),
      el("circle", tip(`this file: ${digits(achieved)} Gflop/s of the ${digits(roof)} that the roof allows at ${digits(intensity)} operations a byte`, { class: "dot-this", cx: px(intensity), cy: py(achieved), r: 6 })),
    ]),
    keys(lineKey("roof", `the roof: ${digits(w.bandwidth_gb_s)} GB/s, then ${digits(w.peak_gflops)} Gflop/s`), key(el("circle", { class: "dot-this", cx: 9, cy: 6, r: 5 }), "this file"), base === null ? null : key(el("circle", { class: "dot-base", cx: 9, cy: 6, r: 5 }), "fp32"))),
    facts(rows));
}
const sorted = (shapes) => Object.entries(shapes).sort(([a], [b]) => (a < b ? -1 : 1));

function drawGeneration(g) {
  if (!g) return;
  const target = place("generation");
  target.append(el("h3", {}, "Generating text"));
  if (g.rates.length)
    target.append(table("Speed with a text of some length in the cache", [
      { name: "Tokens before", number: true, show: (r) => count(r.length), value: (r) => r.length },
      { name: "First token after", number: true, show: (r) => ms(r.first_token_ms), value: (r) => r.first_token_ms },
      { name: "Reading, tokens/s", number: true, show: (r) => digits(r.prefill_tokens_per_s), value: (r) => r.prefill_tokens_per_s },
      { name: "Writing, tokens/s", number: true, show: (r) => digits(r.decode_tokens_per_s), value: (r) => r.decode_tokens_per_s },
      { name: "Processor time a token", number: true, show: (r) => ms(r.decode_cpu_ms), value: (r) => r.decode_cpu_ms },
    ], g.rates));
  const rows = [
    ["Cache", `${count(g.context)} tokens, ${bytes(g.cache_bytes)}${g.cache === "float" ? "" : " in " + g.cache}`],
    ["Token by token", `${g.long_tokens} tokens one by one against all at once: cosine ${cosine(Math.min(1, g.long_cosine))}, KL ${small(g.long_kl)} nats`],
  ];
  if (present(g.encoder_ms)) rows.push(["Encoder", `${ms(g.encoder_ms)}, before the first token and part of its time`]);
  if (g.free_text) rows.push(["Writing by itself", `${g.free_text.equal} of ${g.free_text.texts} texts are the original's; ${g.free_text.edits} of ${g.free_text.tokens} tokens to change; ${g.free_text.unended} never end`]);
  target.append(facts(rows));
}
