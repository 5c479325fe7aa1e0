"use strict";
// A click on a heading sorts its table: ascending, descending, original order. Without this script tables keep their order.

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
  const rows = [...table.originalRows];
  if (next) {
    rows.sort((left, right) => {
      const a = key(left, column);
      const b = key(right, column);
      const missingLast = missing(a, numeric) - missing(b, numeric);
      return missingLast || (missing(a, numeric) ? 0 : sign * compare(a, b, numeric));
    });
  }
  body.append(...rows);
}

for (const table of document.querySelectorAll("table[data-sortable]")) {
  table.originalRows = [...table.tBodies[0].rows];
  for (const heading of table.tHead.rows[0].cells) {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...heading.childNodes);
    heading.append(button);
    button.addEventListener("click", () => sort(table, heading));
  }
}

// Only regions that scroll are stops of the Tab key.
const watch = new ResizeObserver((entries) => {
  for (const { target } of entries) {
    if (target.scrollWidth > target.clientWidth) target.tabIndex = 0;
    else target.removeAttribute("tabindex");
  }
});
for (const region of document.querySelectorAll(".scroll")) watch.observe(region);

// Folded details are opened for printing.
let closed = [];
addEventListener("beforeprint", () => {
  closed = [...document.querySelectorAll("details:not([open])")];
  for (const details of closed) details.open = true;
});
addEventListener("afterprint", () => {
  for (const details of closed) details.open = false;
});
