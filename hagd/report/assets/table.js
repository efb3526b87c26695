// Sorts the table by the column whose heading is pressed: ascending, then descending. Cells without a value come last.
"use strict";

for (const table of document.querySelectorAll("table.sortable")) {
  const headings = Array.from(table.tHead.rows[0].cells), body = table.tBodies[0];
  const key = (row, column) => {
    const { dataset, textContent } = row.cells[column];
    return dataset.value === undefined || Number.isNaN(+dataset.value) ? textContent : +dataset.value;
  };
  const compare = (a, b) => {
    if (typeof a !== typeof b) return 0;
    return typeof a === "number" ? a - b : a.localeCompare(b, "en", { numeric: true });
  };
  headings.forEach((heading, column) => heading.firstChild.addEventListener("click", () => {
    const sign = heading.ariaSort === "ascending" ? -1 : 1;
    for (const other of headings) other.ariaSort = null;
    heading.ariaSort = sign > 0 ? "ascending" : "descending";
    const keyed = Array.from(body.rows, (row) => ({ row, key: key(row, column) }));
    const last = (each) => typeof each.key !== "number" && keyed.some((other) => typeof other.key === "number");
    keyed.sort((a, b) => last(a) - last(b) || sign * compare(a.key, b.key));
    body.append(...keyed.map((each) => each.row));
  }));
}
