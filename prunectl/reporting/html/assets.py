"""What the page does: sort a table by a column, and show the rows that hold a word."""

from __future__ import annotations

SCRIPT = """
"use strict";
const order = (one, other) => {
  const [a, b] = [one, other].map(cell => cell.dataset.v ?? cell.textContent);
  if (a === "" || b === "") return (a === "") - (b === "");
  return one.dataset.v !== undefined ? a - b : a.localeCompare(b, "en", { numeric: true });
};
const isEmpty = cell => (cell.dataset.v ?? cell.textContent) === "";
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0], heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, at) => head.querySelector("button")?.addEventListener("click", () => {
    const isUp = head.getAttribute("aria-sort") !== "ascending";
    for (const other of heads) if (other.ariaSort) other.setAttribute("aria-sort", "none");
    head.setAttribute("aria-sort", isUp ? "ascending" : "descending");
    const rows = [...body.rows].sort((one, other) => {
      const [a, b] = [one.cells[at], other.cells[at]];
      return isEmpty(a) || isEmpty(b) || isUp ? order(a, b) : order(b, a);
    });
    body.append(...rows);
  }));
}
for (const field of document.querySelectorAll("input[type=search]")) {
  const body = document.getElementById(field.dataset.table).tBodies[0];
  const told = field.parentElement.querySelector("output");
  field.addEventListener("input", () => {
    const word = field.value.toLowerCase();
    let shown = 0;
    for (const row of body.rows) {
      row.hidden = !row.textContent.toLowerCase().includes(word);
      shown += !row.hidden;
    }
    told.textContent = word ? shown + " of " + body.rows.length + " rows" : "";
  });
}
"""


STYLE = """
:root { color-scheme: light dark; --back: #fff; --ink: #1b1f24; --dim: #59636e; --line: #d1d9e0; --mark: #0b6bcb;
  --bar: #0b6bcb; --rest: #e4e9ee; --warn: #9a6700; --bad: #c4232b; --good: #1a7f37; --low: #b8c2cc }
@media (prefers-color-scheme: dark) { :root { --back: #12161b; --ink: #e6edf3; --dim: #9aa6b2; --line: #343c46;
  --mark: #6cb6ff; --bar: #6cb6ff; --rest: #2a313a; --warn: #d8a32c; --bad: #ff7b72; --good: #56d364; --low: #39424d } }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 75rem; padding: 1.5rem; background: var(--back); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif }
h1 { font-size: 1.4rem; overflow-wrap: anywhere } h2 { font-size: 1.15rem; margin-top: 2.2rem; overflow-wrap: anywhere }
h3 { font-size: 1rem; margin-bottom: .4rem }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem } dt { color: var(--dim) }
dd { margin: 0; overflow-wrap: anywhere }
.scroll { overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .2rem .7rem; text-align: left; border-bottom: 1px solid var(--line); overflow-wrap: break-word }
td.n, th.n { text-align: right; white-space: nowrap }
thead th { padding: 0; position: sticky; top: 0; background: var(--back) }
th button { font: inherit; font-weight: 600; color: var(--dim); background: none; border: 0; padding: .3rem .7rem;
  width: 100%; text-align: inherit; white-space: nowrap; cursor: pointer }
th[aria-sort=ascending] button::after { content: " \\2191" }
th[aria-sort=descending] button::after { content: " \\2193" }
tfoot td { font-weight: 600 }
:focus-visible { outline: 2px solid var(--mark); outline-offset: 1px }
input { font: inherit; padding: .25rem .5rem; border: 1px solid var(--line); border-radius: 4px;
  background: var(--back); color: inherit; margin-bottom: .5rem }
output { color: var(--dim); margin-left: .6rem }
pre { line-height: 1.15; overflow-x: auto }
.remarks { color: var(--warn) } .bad { color: var(--bad) }
.good { color: var(--good) }
svg { max-width: 100%; height: auto } svg text { fill: var(--ink); font: 11px system-ui, sans-serif }
svg .dim { fill: var(--dim) } svg .grid { stroke: var(--line) } svg .bar { fill: var(--bar) }
svg .rest { fill: var(--rest) }
svg .step { fill: none; stroke: var(--mark); stroke-width: 2 } svg .dot { fill: var(--low); stroke: var(--ink) }
svg .best { fill: var(--mark); stroke: var(--ink) }
svg .curve { fill: none; stroke-width: 2 }
svg .c0 { stroke: #0072b2 } svg .c1 { stroke: #d55e00 } svg .c2 { stroke: #009e73 } svg .c3 { stroke: #cc79a7 }
svg .c4 { stroke: #56b4e9 } svg .c5 { stroke: #e69f00 }
svg .cell { fill: var(--bar); stroke: var(--back) }
.masks { display: flex; flex-wrap: wrap; gap: 1rem; align-items: flex-end }
figure { margin: 0; max-width: 18rem } figcaption { font-size: .8rem; color: var(--dim); overflow-wrap: anywhere }
img { image-rendering: pixelated; border: 1px solid var(--line); max-width: 100% }
.tall { max-height: 32rem; overflow-y: auto }
footer { margin-top: 3rem; color: var(--dim) }
@media print { input, output { display: none } thead th { position: static } }
"""
