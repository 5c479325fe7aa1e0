"use strict";
// Tables are sorted by their headings: up, down, and back to how they came. Without this script they stand as they came.

function key(row, column) {
  const cell = row.cells[column];
  return "value" in cell.dataset ? cell.dataset.value : cell.textContent.trim();
}

function compare(a, b, numeric) {
  if (!numeric) return a.localeCompare(b, undefined, { numeric: true, sensitivity: "base" });
  return parseFloat(a) - parseFloat(b);
}

function missing(value, numeric) {
  return numeric ? Number.isNaN(parseFloat(value)) : value === "" || value === "–";
}

function sort(table, heading) {
  const before = heading.getAttribute("aria-sort");
  for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
  const order = { ascending: "descending", descending: null }[before];
  const next = order === undefined ? "ascending" : order;
  if (next) heading.setAttribute("aria-sort", next);
  const numeric = "numeric" in heading.dataset;
  const column = heading.cellIndex;
  const sign = next === "descending" ? -1 : 1;
  const body = table.tBodies[0];
  const rows = [...table.came];
  if (next) {
    rows.sort((left, right) => {
      const a = key(left, column);
      const b = key(right, column);
      const lacks = missing(a, numeric) - missing(b, numeric);
      return lacks || (missing(a, numeric) ? 0 : sign * compare(a, b, numeric));
    });
  }
  body.append(...rows);
}

for (const table of document.querySelectorAll("table[data-sortable]")) {
  table.came = [...table.tBodies[0].rows];
  for (const heading of table.tHead.rows[0].cells) {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...heading.childNodes);
    heading.append(button);
    button.addEventListener("click", () => sort(table, heading));
  }
}

// What fits needs no stop on the way of the Tab key.
const watch = new ResizeObserver((entries) => {
  for (const { target } of entries) {
    if (target.scrollWidth > target.clientWidth) target.tabIndex = 0;
    else target.removeAttribute("tabindex");
  }
});
for (const region of document.querySelectorAll(".scroll")) watch.observe(region);

// Paper cannot be opened.
let closed = [];
addEventListener("beforeprint", () => {
  closed = [...document.querySelectorAll("details:not([open])")];
  for (const details of closed) details.open = true;
});
addEventListener("afterprint", () => {
  for (const details of closed) details.open = false;
});
