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
