/* What both pages share: elements, numbers, tables that sort and filter. Text goes in as text nodes only, never as markup. */
const place = (id) => document.getElementById(id);
const svgNames = new Set(["svg", "rect", "line", "circle", "path", "polyline", "text", "g"]);

function el(tag, attributes = {}, ...children) {
  const node = svgNames.has(tag)
    ? document.createElementNS("http://www.w3.org/2000/svg", tag)
    : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes))
    if (value !== null && value !== undefined && value !== false) node.setAttribute(name, String(value));
  for (const child of children.flat(3)) if (child !== null && child !== undefined) node.append(child);
  return node;
}
/* The JSON of a block of the page; null where it is empty. */
function read(id) {
  const text = place(id).textContent.trim();
  return text === "" ? null : JSON.parse(text);
}

/* Numbers */
const ABSENT = "–";
const present = (value) => value !== null && value !== undefined;
const maybe = (value, form) => (present(value) ? form(value) : ABSENT);
const minus = (text) => text.replace(/-/g, "−");
function bytes(count) {
  for (const [unit, factor] of [["GB", 1e9], ["MB", 1e6], ["kB", 1e3]])
    if (Math.abs(count) >= factor * 0.9995) return minus(digits(count / factor)) + " " + unit;
  return minus(String(count)) + " B";
}
const shortBytes = (x) => bytes(x).replace(/\.0+ /, " ");
function digits(x) {
  const size = Math.abs(x);
  return x.toFixed(size >= 99.95 ? 0 : size >= 9.995 ? 1 : 2);
}
const ms = (x) => (x >= 1000 ? digits(x / 1000) + " s" : x < 0.1 ? digits(x * 1000) + " µs" : digits(x) + " ms");
const times = (x) => x.toFixed(2) + "×";
const percent = (x) => (100 * x).toFixed(1) + " %";
const small = (x) => (x === 0 ? "0" : minus(Math.abs(x) < 0.001 ? x.toExponential(1) : x.toPrecision(3)));
/* A round number of an axis, without zeros at its end. */
const short = (x) => minus(String(Number(x.toPrecision(3))));
const count = (x) => x.toLocaleString("en");
/* As many nines as the cosine has, and two digits more; `like` gives neighbours the same length. */
function cosine(x, like = x) {
  const nines = like >= 1 ? 6 : Math.max(0, Math.floor(-Math.log10(1 - like)));
  return x.toFixed(Math.min(8, Math.max(4, nines + 2)));
}
const interval = (i, format) => (i.n > 1 ? `${format(i.low, i.mean)} – ${format(i.high, i.mean)}` : "one sample");
/* A suite's score, and a difference of two, in the metric's unit. */
const score = (x, unit) => (unit === "share" ? percent(x) : unit === "correlation" ? x.toFixed(4) : small(x) + (unit === "nats" ? " nats" : ""));
function change(x, unit) {
  if (x === 0) return unit === "share" ? "0 pt" : "0";
  const sign = x < 0 ? "−" : "+";
  const size = Math.abs(x);
  return sign + (unit === "share" ? (100 * size).toFixed(size < 0.0995 ? 1 : 0) + " pt" : small(size) + (unit === "nats" ? " nats" : ""));
}
const changeTick = (unit) => (x) => (x > 0 ? "+" : "") + (unit === "share" ? short(100 * x) + " pt" : short(x));
const plural = (n, word) => `${count(n)} ${word}${n === 1 ? "" : "s"}`;

/* Text with a second line below it. */
const two = (first, second) => [first, el("small", {}, second)];
const notice = (text, style = "") => el("p", { class: "notice " + style }, text);
const caption = (text) => el("p", { class: "caption" }, text);
const facts = (rows) => el("dl", { class: "facts" }, rows.flatMap(([k, v]) => [el("dt", {}, k), el("dd", {}, v)]));
function reveal(id, ...children) {
  const section = place(id);
  section.hidden = false;
  section.append(...children.flat(3).filter(present));
}

/* Tables. A column: {name, show(row) -> text or nodes, value(row) -> what it sorts by, number, choose, wide}.
   `choose` offers a list of the column's texts to filter by. */
function table(title, columns, rows, { tall = rows.length > 14, cards = false, filter = rows.length > 7, label = null } = {}) {
  const shown = columns.filter((c) => !c.optional || rows.some((row) => present(c.show(row)) && c.show(row) !== ABSENT));
  const body = el("tbody", {}, rows.map((row) =>
    el("tr", { class: label ? label(row) : null }, shown.map((c) => {
      const cell = el("td", { class: [c.number ? "number" : "", c.wide ? "wide" : "", c.name_ ? "name" : ""].join(" ").trim() || null, "data-label": c.name }, cards ? el("div", {}, c.show(row) ?? ABSENT) : c.show(row) ?? ABSENT);
      if (c.value) {
        const value = c.value(row);
        cell.dataset.value = present(value) ? value : "";
      }
      return cell;
    }))));
  const node = el("table", { class: "sortable" + (cards ? " cards" : "") },
    el("caption", {}, title),
    el("thead", {}, el("tr", {}, shown.map((c) =>
      el("th", { scope: "col", "aria-sort": "none", class: c.number ? "number" : null }, el("button", { type: "button" }, c.name))))),
    body);
  const box = el("div", { class: "scroll" + (tall ? " tall" : ""), tabindex: "0", role: "region", "aria-label": title }, node);
  sortable(node);
  const tools = filter ? filters(node, shown.map((c, i) => (c.choose ? i : -1)).filter((i) => i >= 0)) : null;
  return el("div", { class: "table" }, tools, box);
}

function sortable(node) {
  const headings = [...node.querySelectorAll("thead th")];
  headings.forEach((heading, column) => heading.addEventListener("click", () => {
    const up = heading.getAttribute("aria-sort") !== "ascending";
    headings.forEach((h) => h.setAttribute("aria-sort", "none"));
    heading.setAttribute("aria-sort", up ? "ascending" : "descending");
    const value = (tr) => {
      const cell = tr.children[column];
      if (cell.dataset.value === undefined) return cell.textContent;
      const number = Number(cell.dataset.value);
      return cell.dataset.value === "" ? -Infinity : Number.isNaN(number) ? cell.dataset.value : number;
    };
    const order = (a, b) => (typeof a === "number" && typeof b === "number" ? a - b || 0 : String(a).localeCompare(String(b), "en", { numeric: true }));
    const body = node.tBodies[0];
    body.append(...[...body.rows].sort((a, b) => (up ? 1 : -1) * order(value(a), value(b))));
  }));
}

/* A search field, and a list for each of `columns`; rows that don't fit are hidden. */
function filters(node, columns = []) {
  const rows = () => [...node.tBodies[0].rows];
  const told = el("output", { class: "told" });
  const field = el("input", { type: "search", placeholder: "Filter rows", "aria-label": `Filter: ${node.caption ? node.caption.textContent : "table"}` });
  const lists = columns.map((column) => {
    const texts = [...new Set(rows().map((tr) => tr.children[column].textContent))].sort((a, b) => a.localeCompare(b, "en", { numeric: true }));
    const name = node.tHead.rows[0].children[column].textContent;
    return [column, texts.length > 1 ? el("select", { "aria-label": name }, el("option", { value: "" }, `${name}: all`), texts.map((text) => el("option", { value: "=" + text }, text || ABSENT))) : null];
  }).filter(([, list]) => list);
  function apply() {
    const words = field.value.toLowerCase().split(/\s+/).filter(Boolean);
    let fit = 0;
    for (const tr of rows()) {
      const text = tr.textContent.toLowerCase();
      const ok = words.every((word) => text.includes(word)) && lists.every(([column, list]) => list.value === "" || list.value === "=" + tr.children[column].textContent);
      tr.hidden = !ok;
      fit += ok ? 1 : 0;
    }
    told.textContent = fit === rows().length ? plural(fit, "row") : `${count(fit)} of ${plural(rows().length, "row")}`;
  }
  for (const control of [field, ...lists.map(([, list]) => list)]) control.addEventListener("input", apply);
  apply();
  return el("div", { class: "filters" }, field, lists.map(([, list]) => list), told);
}

/* Contents, from the headings that are there. */
function contents(nav) {
  const list = el("ul");
  document.querySelectorAll("main section:not([hidden]) > h2").forEach((heading, i) => {
    heading.id = heading.id || "part-" + i;
    list.append(el("li", {}, el("a", { href: "#" + heading.id }, heading.dataset.short || heading.textContent)));
  });
  nav.append(list);
}
/* Everything is open on paper. */
function openForPrint() {
  window.addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((d) => (d.open = true)));
}
